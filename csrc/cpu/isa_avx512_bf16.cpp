#include "cpu/isa.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/half.h"
#include "cpu/target.h"

PORTLLM_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vbmi2,fma,f16c")

#include "cpu/avx512_bf16.h"

namespace portllm {
namespace {

using Single = Avx512Bf16Single;

// Whether the instruction rounds after each of its two products, upper half first, as Intel and AMD
// document it: then it does what two fused multiply-adds do.
bool dot_is_sequential() {
  uint32_t state = 1;
  const auto random = [&](int exponents) {  // sign and mantissa random, exponent near that of 1
    state = state * 1664525u + 1013904223u;
    const uint32_t exponent = 127 - exponents / 2 + state % 4096 * exponents / 4096;
    return std::bit_cast<float>((state & 0x807fffffu) | exponent << 23);
  };
  const auto upper = [](float x) { return std::bit_cast<uint32_t>(x) & 0xffff0000u; };
  for (int trial = 0; trial < 256; ++trial) {
    const uint32_t a0 = upper(random(8)), a1 = upper(random(8));
    const uint32_t b0 = upper(random(8)), b1 = upper(random(8));
    const float c = random(16);
    const auto f = [](uint32_t bits) { return std::bit_cast<float>(bits); };
    const float expected = std::fma(f(a1), f(b1), std::fma(f(a0), f(b0), c));
    const Single::Vec got = Single::dot(Single::set1(f(a0 | a1 >> 16)),
                                        Single::set1(f(b0 | b1 >> 16)), Single::set1(c));
    if (_mm512_cvtss_f32(got) != expected) return false;
  }
  return true;
}

const Isa* table() { return isa<Single, Avx512Double>("avx512_bf16"); }

}  // namespace
}  // namespace portllm

PORTLLM_TARGET_END

const portllm::Isa* portllm::avx512_bf16() {
  return avx512() && __builtin_cpu_supports("avx512bf16") &&
                 __builtin_cpu_supports("avx512vbmi2") && dot_is_sequential() ? table()
                                                                                 : nullptr;
}

#else

const portllm::Isa* portllm::avx512_bf16() { return nullptr; }

#endif
