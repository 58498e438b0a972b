// The random bits of stochastic rounding, by position: as portllm/noise.py defines them.
#pragma once

#include <cstdint>

namespace portllm {
namespace {

// A permutation of 32 bits; T is uint32_t or a vector of them, here and below.
template <class T>
[[gnu::always_inline]] inline T mix(T x) {
  x ^= x >> 16;
  x *= 0x21F0AAADu;
  x ^= x >> 15;
  x *= 0xD35A2D97u;
  return x ^ x >> 15;
}

// What the bits of a row of the whole tensor are made with.
template <class T>
struct RowKey {
  T a;
  T b;

  [[gnu::always_inline]] static RowKey of(uint64_t key, T row) {
    const T a = mix(row ^ static_cast<uint32_t>(key));
    return {a, mix(a ^ static_cast<uint32_t>(key >> 32))};
  }

  // Those of the elements at these columns.
  template <class U>
  [[gnu::always_inline]] U bits(U columns) const {
    return mix((columns ^ a) * 0x9E3779B9u + b);
  }
};

}  // namespace
}  // namespace portllm
