#include <cmath>

#include "cpu/half.h"
#include "cpu/isa.h"
#include "cpu/kernel.h"

namespace portllm {
namespace {

// Vectors of the size that most CPUs have. Where the compiler's target has no fused multiply-add
// each one is a call into libm, tens of times slower: right bits come first.
template <class R>
struct Plain {
  using Real = R;
  static constexpr int kWidth = 16 / sizeof(R);
  static constexpr int kRows = 6;
  static constexpr int kVectors = 4;
  static constexpr bool kPairs = false;
  struct Vec {
    R lane[kWidth];
  };
  static Vec zero() { return {}; }
  static Vec set1(R x) {
    Vec out;
    for (R& lane : out.lane) lane = x;
    return out;
  }
  static Vec load(const R* p) {
    Vec out;
    std::memcpy(&out, p, sizeof out);
    return out;
  }
  static void store(R* p, Vec x) { std::memcpy(p, &x, sizeof x); }
  static Vec fma(Vec a, Vec b, Vec c) {
    for (int i = 0; i < kWidth; ++i) c.lane[i] = std::fma(a.lane[i], b.lane[i], c.lane[i]);
    return c;
  }

  template <class E>
  static void update(E* w, Vec first, Vec second) {
    for (int i = 0; i < kWidth; ++i) {
      // See position().
      constexpr bool kEvenOdd = std::is_same_v<E, bf16>;
      E& x = w[kEvenOdd ? 2 * i : i];
      E& y = w[kEvenOdd ? 2 * i + 1 : kWidth + i];
      x = narrow<E>(widen(x) + first.lane[i]);
      y = narrow<E>(widen(y) + second.lane[i]);
    }
  }
};

}  // namespace
}  // namespace portllm

const portllm::Isa* portllm::portable() {
  return portllm::isa<portllm::Plain<float>, portllm::Plain<double>>("portable");
}
