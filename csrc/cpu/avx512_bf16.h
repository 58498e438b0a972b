// The wrapper for AVX-512 with BF16 and VBMI2; see kernel.h. To be included inside of the target that it is for.
#pragma once

#include <bit>

#include "cpu/avx512.h"
#include "cpu/kernel.h"

namespace portllm {
namespace {

struct Avx512Bf16Single : Avx512Single {
  static constexpr bool kPairs = true;

  static __m512bh pairs(Vec x) { return (__m512bh)x; }

  static Vec dot(Vec a, Vec b, Vec c) { return _mm512_dpbf16_ps(c, pairs(a), pairs(b)); }

  // The same with one pair for all lanes; written so that gcc makes one instruction of it.
  static Vec dot(const float* pair, Vec b, Vec c) {
    return _mm512_dpbf16_ps(c, pairs(b), (__m512bh)_mm512_set1_epi32(std::bit_cast<int>(*pair)));
  }

  using Avx512Single::update;

  static void compress(uint16_t* out, __mmask32 mask, __m512i words) {
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi16(mask, words));
  }
  static __m512i expand(__mmask32 mask, const uint16_t* in) {
    return _mm512_maskz_expand_epi16(mask, _mm512_loadu_si512(in));
  }

  static void update(bf16* w, Vec even, Vec odd) {
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
    const __m512i both = _mm512_loadu_si512(w);
    even = _mm512_add_ps(_mm512_castsi512_ps(_mm512_slli_epi32(both, 16)), even);
    odd = _mm512_add_ps(_mm512_castsi512_ps(_mm512_and_si512(both, upper)), odd);
    const __m512i packed = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
    // The conversion makes zeros of subnormal numbers and keeps the payload of NaNs.
    const __mmask32 zero = _mm512_testn_epi16_mask(packed, _mm512_set1_epi16(0x7fff));
    const __mmask32 nan = _mm512_cmp_ps_mask(even, odd, _CMP_UNORD_Q);
    if (zero | nan) [[unlikely]] {
      return store(w, even, odd);
    }
    const __m512i order =
        _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                         21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    _mm512_storeu_si512(w, _mm512_permutexvar_epi16(order, packed));
  }
};

}  // namespace
}  // namespace portllm
