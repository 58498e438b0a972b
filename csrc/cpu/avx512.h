// The AVX-512 wrapper; see kernel.h. To be included inside of the target that it is for.
#pragma once

#include <immintrin.h>

#include "cpu/half.h"

namespace portllm {
namespace {

struct Avx512Single {
  using Real = float;
  using Vec = __m512;
  static constexpr int kWidth = 16;
  static constexpr int kRows = 6;
  static constexpr int kVectors = 4;
  static constexpr bool kPairs = false;
  static Vec zero() { return _mm512_setzero_ps(); }
  static Vec set1(float x) { return _mm512_set1_ps(x); }
  static Vec load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }

  static Vec no_nan_payload(Vec x) {
    return _mm512_mask_mov_ps(x, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q),
                              _mm512_castsi512_ps(_mm512_set1_epi32(0x7fc00000)));
  }

  // Adds what rounds the upper half to nearest even.
  static __m512i rounded(Vec x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
    const __m512i sum = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
    return _mm512_mask_add_epi32(sum, odd, sum, _mm512_set1_epi32(1));
  }

  static void store(bf16* w, Vec even, Vec odd) {
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
    if (_mm512_cmp_ps_mask(even, odd, _CMP_UNORD_Q)) [[unlikely]] {
      even = no_nan_payload(even);
      odd = no_nan_payload(odd);
    }
    // upper ? odd : even >> 16, bit by bit
    const __m512i out =
        _mm512_ternarylogic_epi32(upper, rounded(odd), _mm512_srli_epi32(rounded(even), 16), 0xca);
    _mm512_storeu_si512(w, out);
  }

  static void update(bf16* w, Vec even, Vec odd) {
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
    const __m512i both = _mm512_loadu_si512(w);
    even = _mm512_add_ps(_mm512_castsi512_ps(_mm512_slli_epi32(both, 16)), even);
    odd = _mm512_add_ps(_mm512_castsi512_ps(_mm512_and_si512(both, upper)), odd);
    store(w, even, odd);
  }

  static void update(fp16* w, Vec first, Vec second) {
    const Vec sum[] = {first, second};
    for (int i = 0; i < 2; ++i) {
      __m256i* p = reinterpret_cast<__m256i*>(w) + i;
      const Vec x = _mm512_add_ps(_mm512_cvtph_ps(_mm256_loadu_si256(p)), sum[i]);
      _mm256_storeu_si256(
          p, _mm512_cvtps_ph(no_nan_payload(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
  }

  static void update(float* w, Vec first, Vec second) {
    store(w, no_nan_payload(_mm512_add_ps(load(w), first)));
    store(w + kWidth, no_nan_payload(_mm512_add_ps(load(w + kWidth), second)));
  }
};

struct Avx512Double {
  using Real = double;
  using Vec = __m512d;
  static constexpr int kWidth = 8;
  static constexpr int kRows = 6;
  static constexpr int kVectors = 4;
  static constexpr bool kPairs = false;
  static Vec zero() { return _mm512_setzero_pd(); }
  static Vec set1(double x) { return _mm512_set1_pd(x); }
  static Vec load(const double* p) { return _mm512_loadu_pd(p); }
  static void store(double* p, Vec x) { _mm512_storeu_pd(p, x); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_pd(a, b, c); }

  static Vec no_nan_payload(Vec x) {
    return _mm512_mask_mov_pd(x, _mm512_cmp_pd_mask(x, x, _CMP_UNORD_Q),
                              _mm512_castsi512_pd(_mm512_set1_epi64(0x7ff8000000000000)));
  }

  static void update(double* w, Vec first, Vec second) {
    store(w, no_nan_payload(_mm512_add_pd(load(w), first)));
    store(w + kWidth, no_nan_payload(_mm512_add_pd(load(w + kWidth), second)));
  }
};

}  // namespace
}  // namespace portllm
