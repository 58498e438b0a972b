// Compiles what follows for more than the baseline CPU; end with PORTLLM_TARGET_END. Standard
// headers must come before, so that their inline functions, shared with other files, stay baseline.
#pragma once

#define PORTLLM_PRAGMA(x) _Pragma(#x)
#if defined(__clang__)
#define PORTLLM_TARGET(features) \
  PORTLLM_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define PORTLLM_TARGET_END _Pragma("clang attribute pop")
#else
#define PORTLLM_TARGET(features) _Pragma("GCC push_options") PORTLLM_PRAGMA(GCC target(features))
#define PORTLLM_TARGET_END _Pragma("GCC pop_options")
#endif
