// The half types in plain integer arithmetic.
#pragma once

#include <bit>
#include <cstdint>

namespace portllm {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

inline float widen(bf16 x) { return std::bit_cast<float>(uint32_t{x.bits} << 16); }

inline float widen(fp16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16;
  const uint32_t rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00u) return std::bit_cast<float>(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  // Moving the bits into place leaves the exponent 112 too small; the product also makes
  // subnormals normal.
  const float magnitude = std::bit_cast<float>(rest << 13) * 0x1p112f;
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(magnitude));
}

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }

template <class E>
E narrow(float x);

template <>
inline bf16 narrow<bf16>(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (x != x) return {0x7fc0};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

template <>
inline fp16 narrow<fp16>(float x) {
  if (x != x) return {0x7e00};
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t sign = bits >> 16 & 0x8000u;
  uint32_t rest = bits & 0x7fffffffu;
  if (rest >= 0x477ff000u) {  // rounds to 65536 or more
    rest = 0x7c00u;
  } else if (rest < 0x38800000u) {  // subnormal: the addition rounds at the last place of half
    rest = std::bit_cast<uint32_t>(std::bit_cast<float>(rest) + 0.5f) - 0x3f000000u;
  } else {
    rest = (rest - 0x38000000u + 0xfffu + (rest >> 13 & 1u)) >> 13;
  }
  return {static_cast<uint16_t>(sign | rest)};
}

template <>
inline float narrow<float>(float x) {
  return x != x ? std::bit_cast<float>(0x7fc00000u) : x;
}

template <class E>
E narrow(double x);

template <>
inline double narrow<double>(double x) {
  return x != x ? std::bit_cast<double>(0x7ff8000000000000ull) : x;
}

}  // namespace portllm
