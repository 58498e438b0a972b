// The AVX-512 wrapper; see kernel.h. To be included inside of the target that it is for.
#pragma once

#include <immintrin.h>

#include "cpu/half.h"
#include "cpu/rounding.h"
#include "cpu/undo.h"

namespace portllm {
namespace {

// Stores again what was zero before, two vectors of float or double, or one of 16-bit numbers.
template <class E>
[[gnu::always_inline]] inline void restore_zeros_512(E* w, const E* before) {
  if constexpr (sizeof(E) == 2) {
    const __m512i old = _mm512_loadu_si512(before);
    _mm512_mask_storeu_epi16(w, _mm512_testn_epi16_mask(old, _mm512_set1_epi16(0x7fff)), old);
  } else if constexpr (sizeof(E) == 4) {
    for (int i = 0; i < 32; i += 16) {
      const __m512i old = _mm512_loadu_si512(before + i);
      _mm512_mask_storeu_epi32(w + i, _mm512_testn_epi32_mask(old, _mm512_set1_epi32(0x7fffffff)), old);
    }
  } else {
    for (int i = 0; i < 16; i += 8) {
      const __m512i old = _mm512_loadu_si512(before + i);
      const __m512i size = _mm512_set1_epi64(0x7fffffffffffffff);
      _mm512_mask_storeu_epi64(w + i, _mm512_testn_epi64_mask(old, size), old);
    }
  }
}

struct Avx512Single {
  using Real = float;
  using Vec = __m512;
  static constexpr int kWidth = 16;
  static constexpr int kRows = 6;
  static constexpr int kVectors = 4;
  static constexpr bool kPairs = false;
  template <class E>
  static void restore_zeros(E* w, const E* before) {
    restore_zeros_512(w, before);
  }

  static Vec zero() { return _mm512_setzero_ps(); }
  static Vec set1(float x) { return _mm512_set1_ps(x); }
  static Vec load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }

  // Bytes as integers, and the low bytes of integers; I is a vector of as many.
  static __m512i load_bytes(const uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  template <class I>
  static void store_bytes(uint8_t* p, I x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8((__m512i)x));
  }

  // table[i]
  template <class I>
  static Vec lookup(const float (&table)[16], I i) {
    return _mm512_permutexvar_ps((__m512i)i, load(table));
  }
  template <class I>
  static Vec lookup(const float (&table)[32], I i) {
    return _mm512_permutex2var_ps(load(table), (__m512i)i, load(table + kWidth));
  }

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

  // 16 numbers below 2^32 that the compiler computes with; those of every other column from `col` on, or of
  // each.
  using Words = uint32_t __attribute__((vector_size(64)));
  static __m512i random(const RowMode& mode, uint32_t col, uint32_t step) {
    const Words lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return (__m512i)mode.bits(lanes * step + col);
  }

  // Magnitudes above this one may need care.
  static bool any_above(Vec a, Vec b, int most) {
    const auto above = [&](Vec x) {
      const __m512i size = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff));
      return _mm512_cmpgt_epi32_mask(size, _mm512_set1_epi32(most));
    };
    return above(a) | above(b);
  }

  // Element by element.
  template <class E, int kStep>
  [[gnu::noinline]] static void narrow_each(E* w, const Vec (&sums)[2], const __m512i (&random)[2]) {
    for (int half = 0; half < 2; ++half) {
      float x[kWidth];
      uint32_t r[kWidth];
      store(x, sums[half]);
      _mm512_storeu_si512(r, random[half]);
      E* out = w + half * (kStep == 2 ? 1 : kWidth);
      for (int i = 0; i < kWidth; ++i) out[i * kStep] = narrow_by_chance(E{}, x[i], r[i]);
    }
  }

  static void update_by_chance(bf16* w, Vec even, Vec odd, const RowMode& mode, uint32_t col) {
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
    const __m512i both = _mm512_loadu_si512(w);
    even = _mm512_add_ps(_mm512_castsi512_ps(_mm512_slli_epi32(both, 16)), even);
    odd = _mm512_add_ps(_mm512_castsi512_ps(_mm512_and_si512(both, upper)), odd);
    const __m512i r[] = {random(mode, col, 2), random(mode, col + 1, 2)};
    if (any_above(even, odd, 0x7f7f0000)) [[unlikely]] {  // the largest number, which none carries past
      return narrow_each<bf16, 2>(w, {even, odd}, r);
    }
    const __m512i low = _mm512_add_epi32(_mm512_castps_si512(even), _mm512_srli_epi32(r[0], 16));
    const __m512i high = _mm512_add_epi32(_mm512_castps_si512(odd), _mm512_srli_epi32(r[1], 16));
    _mm512_storeu_si512(w, _mm512_ternarylogic_epi32(upper, high, _mm512_srli_epi32(low, 16), 0xca));
  }

  // Numbers of fp32 up to the largest of fp16.
  static __m256i narrowed(Vec x, __m512i bits) {
    const __m512i pattern = _mm512_castps_si512(x);
    const __m512i size = _mm512_and_si512(pattern, _mm512_set1_epi32(0x7fffffff));
    __m512i found = _mm512_sub_epi32(size, _mm512_set1_epi32(0x38000000));
    found = _mm512_srli_epi32(_mm512_add_epi32(found, _mm512_srli_epi32(bits, 19)), 13);
    const __mmask16 subnormal = _mm512_cmplt_epi32_mask(size, _mm512_set1_epi32(0x38800000));
    if (subnormal) {
      const Vec steps = _mm512_mul_ps(_mm512_castsi512_ps(size), _mm512_set1_ps(0x1p24f));
      const __m512i whole = _mm512_cvttps_epi32(steps);
      const Vec rest = _mm512_sub_ps(steps, _mm512_cvtepi32_ps(whole));
      const Vec chance = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_srli_epi32(bits, 8)),
                                       _mm512_set1_ps(0x1p-24f));
      const __mmask16 up = _mm512_cmp_ps_mask(_mm512_add_ps(rest, chance), _mm512_set1_ps(1.0f),
                                              _CMP_GE_OQ);
      const __m512i small = _mm512_mask_add_epi32(whole, up, whole, _mm512_set1_epi32(1));
      found = _mm512_mask_mov_epi32(found, subnormal, small);
    }
    const __m512i sign = _mm512_and_si512(_mm512_srli_epi32(pattern, 16), _mm512_set1_epi32(0x8000));
    return _mm512_cvtepi32_epi16(_mm512_or_si512(found, sign));
  }

  static void update_by_chance(fp16* w, Vec first, Vec second, const RowMode& mode, uint32_t col) {
    auto* p = reinterpret_cast<__m256i*>(w);
    first = _mm512_add_ps(_mm512_cvtph_ps(_mm256_loadu_si256(p)), first);
    second = _mm512_add_ps(_mm512_cvtph_ps(_mm256_loadu_si256(p + 1)), second);
    const __m512i r[] = {random(mode, col, 1), random(mode, col + kWidth, 1)};
    if (any_above(first, second, 0x477fe000)) [[unlikely]] {
      return narrow_each<fp16, 1>(w, {first, second}, r);
    }
    _mm256_storeu_si256(p, narrowed(first, r[0]));
    _mm256_storeu_si256(p + 1, narrowed(second, r[1]));
  }

  // What guess() in undo.h gives, for 32 words.
  static __m512i guess(const bf16*, __m512i after, Vec even, Vec odd) {
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
    const __m512i half = _mm512_set1_epi32(0x8000);
    even = _mm512_sub_ps(_mm512_castsi512_ps(_mm512_slli_epi32(after, 16)), even);
    odd = _mm512_sub_ps(_mm512_castsi512_ps(_mm512_and_si512(after, upper)), odd);
    const __m512i low = _mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(even), half), 16);
    const __m512i high = _mm512_add_epi32(_mm512_castps_si512(odd), half);
    return _mm512_ternarylogic_epi32(upper, high, low, 0xca);  // upper ? high : low, bit by bit
  }
  static __m512i guess(const fp16*, __m512i after, Vec first, Vec second) {
    const Vec low = _mm512_sub_ps(_mm512_cvtph_ps(_mm512_castsi512_si256(after)), first);
    const Vec high = _mm512_sub_ps(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(after, 1)), second);
    constexpr int kRound = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return _mm512_inserti64x4(
        _mm512_castsi256_si512(_mm512_cvtps_ph(no_nan_payload(low), kRound)),
        _mm512_cvtps_ph(no_nan_payload(high), kRound), 1);
  }

  // Stores the words that the mask names, one after the other, and what comes behind them.
  static void compress(uint16_t* out, __mmask32 mask, __m512i words) {
    const auto half = [&](__mmask16 bits, __m256i x, uint16_t* to) {
      const __m512i wide = _mm512_maskz_compress_epi32(bits, _mm512_cvtepu16_epi32(x));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(wide));
    };
    const auto low = static_cast<__mmask16>(mask);
    half(low, _mm512_castsi512_si256(words), out);
    half(mask >> 16, _mm512_extracti64x4_epi64(words, 1), out + __builtin_popcount(low));
  }
  // The other way round: the words that follow in memory, at the places that the mask names.
  static __m512i expand(__mmask32 mask, const uint16_t* in) {
    const auto half = [&](__mmask16 bits, const uint16_t* from) {
      const auto* p = reinterpret_cast<const __m256i*>(from);
      const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p));
      return _mm512_cvtepi32_epi16(_mm512_maskz_expand_epi32(bits, wide));
    };
    const auto low = static_cast<__mmask16>(mask);
    return _mm512_inserti64x4(_mm512_castsi256_si512(half(low, in)),
                              half(mask >> 16, in + __builtin_popcount(low)), 1);
  }

  template <class U>
  [[gnu::always_inline]] static void note_strays(uint32_t mask, __m512i before, int column, Log<U>& log) {
    U bits[64 / sizeof(U)];
    _mm512_storeu_si512(bits, before);
    for (; mask; mask &= mask - 1) {
      const int i = __builtin_ctz(mask);
      log.stray[log.strays++] = {static_cast<uint16_t>(column + i), bits[i]};
    }
  }

  // The lanes where the updated weight has the larger exponent.
  template <class E>
  static auto members(__m512i after, __m512i guessed) {
    if constexpr (sizeof(E) == 2) {
      const __m512i exponent = _mm512_set1_epi16(kExponent<E>);
      return _mm512_cmpgt_epu16_mask(_mm512_and_si512(after, exponent),
                                     _mm512_and_si512(guessed, exponent));
    } else {
      const __m512i exponent = _mm512_set1_epi32(kExponent<E>);
      return _mm512_cmpgt_epu32_mask(_mm512_and_si512(after, exponent),
                                     _mm512_and_si512(guessed, exponent));
    }
  }

  template <class S, class E>
  static void record(E* w, Vec first, Vec second, int column, Log<Bits<E>>& log) {
    if constexpr (sizeof(E) == 2) {
      const __m512i before = _mm512_loadu_si512(w);
      S::update(w, first, second);
      const __m512i after = _mm512_loadu_si512(w);
      const __m512i guessed = guess(w, after, first, second);
      const __mmask32 member = members<E>(after, guessed);
      const __m512i code = _mm512_sub_epi16(before, guessed);
      const __mmask32 stray = _mm512_test_epi16_mask(code, code) & ~member;
      S::compress(log.codes + log.members, member, code);
      log.members += __builtin_popcount(member);
      if (stray) [[unlikely]] note_strays(stray, before, column, log);
    } else {
      const __m512i before[] = {_mm512_loadu_si512(w), _mm512_loadu_si512(w + kWidth)};
      S::update(w, first, second);
      const Vec sums[] = {first, second};
      for (int i = 0; i < 2; ++i) {
        const Vec after = load(w + i * kWidth);
        const __m512i guessed = _mm512_castps_si512(_mm512_sub_ps(after, sums[i]));
        const __mmask16 member = members<E>(_mm512_castps_si512(after), guessed);
        const __m512i code = _mm512_sub_epi32(before[i], guessed);
        const __mmask16 stray = _mm512_test_epi32_mask(code, code) & ~member;
        const __m512i codes = _mm512_maskz_compress_epi32(member, code);
        _mm512_storeu_si512(log.codes + log.members, codes);
        log.members += __builtin_popcount(member);
        if (stray) [[unlikely]] note_strays(stray, before[i], column + i * kWidth, log);
      }
    }
  }

  // All but the strays.
  template <class S, class E>
  static void restore(E* w, Vec first, Vec second, Log<Bits<E>>& log) {
    if constexpr (sizeof(E) == 2) {
      const __m512i after = _mm512_loadu_si512(w);
      const __m512i guessed = guess(w, after, first, second);
      const __mmask32 member = members<E>(after, guessed);
      const __m512i code = S::expand(member, log.codes + log.next);
      log.next += __builtin_popcount(member);
      _mm512_storeu_si512(w, _mm512_add_epi16(guessed, code));
    } else {
      const Vec sums[] = {first, second};
      for (int i = 0; i < 2; ++i) {
        const Vec after = load(w + i * kWidth);
        const __m512i guessed = _mm512_castps_si512(_mm512_sub_ps(after, sums[i]));
        const __mmask16 member = members<E>(_mm512_castps_si512(after), guessed);
        const __m512i codes = _mm512_loadu_si512(log.codes + log.next);
        log.next += __builtin_popcount(member);
        const __m512i code = _mm512_maskz_expand_epi32(member, codes);
        _mm512_storeu_si512(w + i * kWidth, _mm512_add_epi32(guessed, code));
      }
    }
  }
};

struct Avx512Double {
  using Real = double;
  using Vec = __m512d;
  static constexpr int kWidth = 8;
  static constexpr int kRows = 6;
  static constexpr int kVectors = 4;
  static constexpr bool kPairs = false;
  template <class E>
  static void restore_zeros(E* w, const E* before) {
    restore_zeros_512(w, before);
  }

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
