#include "cpu/isa.h"

#if defined(__x86_64__)

#include <cpuid.h>
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

PORTLLM_TARGET("avx2,fma,f16c")

#include "cpu/kernel.h"

namespace portllm {
namespace {

struct Single {
  using Real = float;
  using Vec = __m256;
  static constexpr int kWidth = 8;
  static constexpr int kRows = 6;
  static constexpr int kVectors = 2;
  static constexpr bool kPairs = false;
  static Vec zero() { return _mm256_setzero_ps(); }
  static Vec set1(float x) { return _mm256_set1_ps(x); }
  static Vec load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Vec x) { _mm256_storeu_ps(p, x); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }

  static Vec no_nan_payload(Vec x) {
    return _mm256_blendv_ps(x, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000)),
                            _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  }

  // Adds what rounds the upper half to nearest even.
  static __m256i rounded(Vec x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  }

  static void update(bf16* w, Vec even, Vec odd) {
    const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000));
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<__m256i*>(w));
    even = _mm256_add_ps(_mm256_castsi256_ps(_mm256_slli_epi32(both, 16)), even);
    odd = _mm256_add_ps(_mm256_castsi256_ps(_mm256_and_si256(both, upper)), odd);
    if (_mm256_movemask_ps(_mm256_cmp_ps(even, odd, _CMP_UNORD_Q))) [[unlikely]] {
      even = no_nan_payload(even);
      odd = no_nan_payload(odd);
    }
    const __m256i out =
        _mm256_blend_epi16(_mm256_srli_epi32(rounded(even), 16), rounded(odd), 0xaa);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(w), out);
  }

  static void update(fp16* w, Vec first, Vec second) {
    const Vec sum[] = {first, second};
    for (int i = 0; i < 2; ++i) {
      __m128i* p = reinterpret_cast<__m128i*>(w) + i;
      const Vec x = _mm256_add_ps(_mm256_cvtph_ps(_mm_loadu_si128(p)), sum[i]);
      _mm_storeu_si128(p, _mm256_cvtps_ph(no_nan_payload(x), _MM_FROUND_TO_NEAREST_INT));
    }
  }

  static void update(float* w, Vec first, Vec second) {
    store(w, no_nan_payload(_mm256_add_ps(load(w), first)));
    store(w + kWidth, no_nan_payload(_mm256_add_ps(load(w + kWidth), second)));
  }
};

struct Double {
  using Real = double;
  using Vec = __m256d;
  static constexpr int kWidth = 4;
  static constexpr int kRows = 6;
  static constexpr int kVectors = 2;
  static constexpr bool kPairs = false;
  static Vec zero() { return _mm256_setzero_pd(); }
  static Vec set1(double x) { return _mm256_set1_pd(x); }
  static Vec load(const double* p) { return _mm256_loadu_pd(p); }
  static void store(double* p, Vec x) { _mm256_storeu_pd(p, x); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_pd(a, b, c); }

  static Vec no_nan_payload(Vec x) {
    return _mm256_blendv_pd(x, _mm256_castsi256_pd(_mm256_set1_epi64x(0x7ff8000000000000)),
                            _mm256_cmp_pd(x, x, _CMP_UNORD_Q));
  }

  static void update(double* w, Vec first, Vec second) {
    store(w, no_nan_payload(_mm256_add_pd(load(w), first)));
    store(w + kWidth, no_nan_payload(_mm256_add_pd(load(w + kWidth), second)));
  }
};

const Isa* table() { return isa<Single, Double>("avx2"); }

}  // namespace
}  // namespace portllm

PORTLLM_TARGET_END

const portllm::Isa* portllm::avx2() {
  // clang has no name for F16C here.
  unsigned eax, ebx, ecx, edx;
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
  const bool here = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c;
  return here ? table() : nullptr;
}

#else

const portllm::Isa* portllm::avx2() { return nullptr; }

#endif
