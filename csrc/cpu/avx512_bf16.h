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

  // As in undo.h, 64 codes at a time.
  static int64_t pack_codes(const uint16_t* codes, int members, uint8_t* packed, uint8_t* follow) {
    const uint8_t* const start = follow;
    for (int i = 0; i < members; i += 64, packed += 16) {
      __m256i two[2];
      for (int half = 0; half < 2; ++half) {
        const int left = std::clamp(members - i - 32 * half, 0, 32);
        const auto valid = static_cast<__mmask32>((uint64_t{1} << left) - 1);
        const __m512i code = _mm512_maskz_loadu_epi16(valid, codes + i + 32 * half);
        const auto add = [&](short x) { return _mm512_add_epi16(code, _mm512_set1_epi16(x)); };
        const __mmask32 more = _mm512_cmpgt_epu16_mask(add(1), _mm512_set1_epi16(2));
        const __mmask32 wide = _mm512_cmpgt_epu16_mask(add(127), _mm512_set1_epi16(254));
        const __m512i low = _mm512_and_si512(code, _mm512_set1_epi16(3));
        two[half] = _mm512_cvtepi16_epi8(_mm512_mask_mov_epi16(low, more, _mm512_set1_epi16(2)));
        const __m512i byte = _mm512_mask_mov_epi16(code, wide, _mm512_set1_epi16(0x80));
        const __m256i bytes = _mm256_maskz_compress_epi8(more, _mm512_cvtepi16_epi8(byte));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(follow), bytes);
        follow += __builtin_popcount(more);
      }
      const __m512i all = _mm512_inserti64x4(_mm512_castsi256_si512(two[0]), two[1], 1);
      const __m512i pairs = _mm512_maddubs_epi16(all, _mm512_set1_epi16(0x0401));
      const __m512i fours = _mm512_madd_epi16(pairs, _mm512_set1_epi32(0x00100001));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(packed), _mm512_cvtepi32_epi8(fours));
    }
    return follow - start;
  }

  static int64_t unpack_codes(const uint8_t* packed, int members, const uint8_t* follow,
                              const uint8_t* end, uint16_t* codes) {
    const uint8_t* const start = follow;
    for (int i = 0; i < members; i += 64, packed += 16) {
      const int left = std::min(members - i, 64);
      const auto some = static_cast<__mmask16>((1u << (left + 3) / 4) - 1);
      const __m512i fours = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(some, packed));
      const __m512i halves = _mm512_or_si512(fours, _mm512_slli_epi32(fours, 12));
      const __m512i two = _mm512_and_si512(_mm512_or_si512(halves, _mm512_slli_epi32(halves, 6)),
                                           _mm512_set1_epi8(3));
      const __mmask64 valid = left == 64 ? ~__mmask64{0} : (__mmask64{1} << left) - 1;
      const __mmask64 more = _mm512_mask_cmpeq_epi8_mask(valid, two, _mm512_set1_epi8(2));
      const int64_t count = __builtin_popcountll(more);
      if (end - follow < count) return -1;
      const __mmask64 there = count == 64 ? ~__mmask64{0} : (__mmask64{1} << count) - 1;
      const __m512i bytes = _mm512_maskz_loadu_epi8(there, follow);
      follow += count;
      const __m512i low = _mm512_sub_epi8(_mm512_xor_si512(two, _mm512_set1_epi8(2)),
                                          _mm512_set1_epi8(2));
      const __m512i code = _mm512_mask_expand_epi8(low, more, bytes);
      _mm512_storeu_si512(codes + i, _mm512_cvtepi8_epi16(_mm512_castsi512_si256(code)));
      _mm512_storeu_si512(codes + i + 32, _mm512_cvtepi8_epi16(_mm512_extracti64x4_epi64(code, 1)));
    }
    return follow - start;
  }

  using Avx512Single::narrow;
  static void narrow(bf16* w, Vec first, Vec second) {
    const __m512i packed = (__m512i)_mm512_cvtne2ps_pbh(second, first);
    // As in update().
    const __mmask32 zero = _mm512_testn_epi16_mask(packed, _mm512_set1_epi16(0x7fff));
    if (zero | _mm512_cmp_ps_mask(first, second, _CMP_UNORD_Q)) [[unlikely]] {
      return Avx512Single::narrow(w, first, second);
    }
    _mm512_storeu_si512(w, packed);
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
