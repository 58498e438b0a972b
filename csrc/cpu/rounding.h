// How sums are stored other than to nearest: by chance, or so that zeros stay. What the random bits are,
// portllm/noise.py says; here are the same, and the same rounding to the last bit, for each element and
// for the vectors of each target.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/half.h"
#include "cpu/lowrank_add.h"
#include "cpu/noise.h"

namespace portllm {
namespace {

// How the elements of one row of W are to be stored. Where W lies turned, a row here is a column of the
// whole tensor.
class RowMode {
 public:
  RowMode() = default;
  RowMode(const Mode& mode, int64_t row)
      : mode_(&mode),
        row_(static_cast<uint32_t>(row) + (mode.turned ? mode.column : mode.row)),
        col_(mode.turned ? mode.row : mode.column),
        flip_(mode.flipped ? ~0u : 0u),
        key_(RowKey<uint32_t>::of(mode.key, row_)) {}

  bool stochastic() const { return mode_->stochastic; }
  bool keeps_zeros() const { return mode_->keep_zeros; }

  // The random bits of the elements at these columns of W.
  template <class T>
  [[gnu::always_inline]] T bits(T columns) const {
    columns += col_;
    if (mode_->turned) [[unlikely]] {
      return RowKey<T>::of(mode_->key, columns).bits(T{} + row_) ^ flip_;
    }
    return key_.bits(columns) ^ flip_;
  }

 private:
  const Mode* mode_ = nullptr;
  uint32_t row_ = 0, col_ = 0, flip_ = 0;
  RowKey<uint32_t> key_{};
};

inline bf16 narrow_by_chance(bf16, float x, uint32_t random) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t found = ((bits & 0x7fffffffu) + (random >> 16)) >> 16;
  if (found >= 0x7f80u) return narrow<bf16>(x);
  return {static_cast<uint16_t>(found | (bits >> 16 & 0x8000u))};
}

inline fp16 narrow_by_chance(fp16, float x, uint32_t random) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), size = bits & 0x7fffffffu;
  uint32_t found;
  if (size < 0x38800000u) {  // subnormal
    const float steps = std::bit_cast<float>(size) * 0x1p24f;
    found = static_cast<uint32_t>(steps);
    found += steps - static_cast<float>(found) + static_cast<float>(random >> 8) * 0x1p-24f >= 1.0f;
  } else {
    found = (size - 0x38000000u + (random >> 19)) >> 13;
    if (found >= 0x7c00u) return narrow<fp16>(x);
  }
  return {static_cast<uint16_t>(found | (bits >> 16 & 0x8000u))};
}

template <class E>
constexpr bool kIsHalf = sizeof(E) == 2;

// A SIMD wrapper S may have `update_by_chance` of its own.
template <class S, class E>
constexpr bool kVectorChance = requires(E* w, typename S::Vec x, const RowMode& mode) {
  S::update_by_chance(w, x, x, mode, 0);
};

// What was zero `before` is so again. A SIMD wrapper S may have its own.
template <class S, class E>
[[gnu::always_inline]] inline void restore_zeros(E* w, const E* before) {
  if constexpr (requires { S::restore_zeros(w, before); }) {
    S::restore_zeros(w, before);
  } else {
    for (int c = 0; c < 2 * S::kWidth; ++c) w[c] = widen(before[c]) == 0 ? before[c] : w[c];
  }
}

// What S::update does, for the elements from column `col` of W on, rounded as the mode says.
template <class S, class E>
[[gnu::always_inline]] inline void update_rounded(E* w, typename S::Vec first, typename S::Vec second,
                                                  const RowMode& mode, uint32_t col) {
  constexpr int kCount = 2 * S::kWidth;
  if (!kIsHalf<E> || !mode.stochastic()) {
    S::update(w, first, second);
  } else if constexpr (kVectorChance<S, E>) {
    S::update_by_chance(w, first, second, mode, col);
  } else if constexpr (kIsHalf<E>) {
    E before[kCount];
    std::memcpy(before, w, sizeof before);
    float sums[kCount];
    S::store(sums, first);
    S::store(sums + S::kWidth, second);
    uint32_t random[kCount];
    for (int c = 0; c < kCount; ++c) random[c] = mode.bits(col + c);
    for (int c = 0; c < kCount; ++c) {
      constexpr bool kEvenOdd = std::is_same_v<E, bf16>;  // see position() in kernel.h
      const int at = kEvenOdd ? c / 2 + c % 2 * S::kWidth : c;
      w[c] = narrow_by_chance(E{}, widen(before[c]) + sums[at], random[c]);
    }
  }
}

template <class S, class E>
[[gnu::always_inline]] inline void update_as(E* w, typename S::Vec first, typename S::Vec second,
                                             const RowMode& mode, uint32_t col) {
  if (!mode.keeps_zeros()) return update_rounded<S>(w, first, second, mode, col);
  E before[2 * S::kWidth];
  std::memcpy(before, w, sizeof before);
  update_rounded<S>(w, first, second, mode, col);
  restore_zeros<S>(w, before);
}

// The modes of the rows of a tile; with kModes false there is none, and all is rounded to nearest.
template <bool kModes, int kRows>
struct RowModes {
  RowMode of[kModes ? kRows : 1];

  void begin(const Weight& weight, int64_t row) {
    if constexpr (kModes) {
      for (int i = 0; i < kRows; ++i) of[i] = RowMode(weight.mode, row + i);
    }
  }

  // Row i takes two vectors of sums, from this column of W on.
  template <class S, class E>
  [[gnu::always_inline]] void update(int i, E* w, typename S::Vec first, typename S::Vec second,
                                     int64_t col) const {
    if constexpr (kModes) {
      update_as<S>(w, first, second, of[i], static_cast<uint32_t>(col));
    } else {
      S::update(w, first, second);
    }
  }
};

}  // namespace
}  // namespace portllm
