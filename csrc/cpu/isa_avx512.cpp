#include "cpu/isa.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/half.h"
#include "cpu/target.h"

PORTLLM_TARGET("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c")

#include "cpu/avx512.h"
#include "cpu/kernel.h"

namespace portllm {
namespace {

const Isa* table() { return isa<Avx512Single, Avx512Double>("avx512"); }

}  // namespace
}  // namespace portllm

PORTLLM_TARGET_END

const portllm::Isa* portllm::avx512() {
  const bool here = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return here ? table() : nullptr;
}

#else

const portllm::Isa* portllm::avx512() { return nullptr; }

#endif
