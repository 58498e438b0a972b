// The kernel of requantise.h, written once over vectors that gcc and clang know, of the width of the SIMD wrapper S
// of kernel.h. To be included inside of the target that it is for. Nothing depends on the width: what is summed over
// a row is summed in kLanes lanes everywhere.
//
// A block goes through three loops: S = W + D and its largest element, which sets the fresh scale; the squared errors
// that the old and the fresh scale leave; codes. Blocks whose numbers are out of the ordinary go through careful
// ones, which do what the reference does step by step.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "cpu/half.h"
#include "cpu/noise.h"
#include "cpu/requantise.h"

namespace portllm {
namespace {

constexpr int kLanes = 16;
constexpr int kPiece = 128;  // columns that are summed in fp32, before the sums go on in fp64

inline int64_t to_lanes(int64_t x) { return (x + kLanes - 1) / kLanes * kLanes; }

// Spelt out, since gcc loses attributes that depend on a template's argument.
template <int kWidth>
struct Vectors;
#define PORTLLM_VECTORS(width)                                    \
  template <>                                                     \
  struct Vectors<width> {                                         \
    typedef float F __attribute__((vector_size(4 * (width))));    \
    typedef int32_t I __attribute__((vector_size(4 * (width))));  \
    typedef uint32_t U __attribute__((vector_size(4 * (width)))); \
    typedef uint8_t B __attribute__((vector_size(width)));        \
  }
PORTLLM_VECTORS(4);
PORTLLM_VECTORS(8);
PORTLLM_VECTORS(16);
#undef PORTLLM_VECTORS

template <int kWidth>
struct Lanes : Vectors<kWidth> {
  static constexpr int N = kWidth;
  using typename Vectors<kWidth>::F;
  using typename Vectors<kWidth>::I;
  using typename Vectors<kWidth>::U;
  using typename Vectors<kWidth>::B;

  template <class V, class T>
  [[gnu::always_inline]] static inline V load(const T* p) {
    V x;
    std::memcpy(&x, p, sizeof x);
    return x;
  }
  template <class V, class T>
  [[gnu::always_inline]] static inline void store(T* p, V x) {
    std::memcpy(p, &x, sizeof x);
  }
  [[gnu::always_inline]] static inline F size(F x) { return (F)((I)x & 0x7fffffff); }
  [[gnu::always_inline]] static inline I sign(F x) { return (I)x & static_cast<int32_t>(0x80000000); }
};

template <class S>
using LanesOf = Lanes<S::kWidth>;

// Codes, one in a byte. Where gcc makes poor work of the conversion, S has its own.
template <class S>
[[gnu::always_inline]] inline typename LanesOf<S>::I load_codes(const uint8_t* p) {
  using L = LanesOf<S>;
  if constexpr (requires { S::load_bytes(p); }) {
    return (typename L::I)S::load_bytes(p);
  } else {
    return __builtin_convertvector(L::template load<typename L::B>(p), typename L::I);
  }
}

template <class S>
[[gnu::always_inline]] inline void store_codes(uint8_t* p, typename LanesOf<S>::I codes) {
  using L = LanesOf<S>;
  if constexpr (requires { S::store_bytes(p, codes); }) {
    S::store_bytes(p, codes);
  } else {
    L::store(p, __builtin_convertvector(codes, typename L::B));
  }
}

// table[i] of a table of 16 or 32 entries.
template <class S, int kSize>
[[gnu::always_inline]] inline typename LanesOf<S>::F lookup(const float (&table)[kSize],
                                                            typename LanesOf<S>::I i) {
  using L = LanesOf<S>;
  if constexpr (requires { S::lookup(table, i); }) {
    return (typename L::F)S::lookup(table, i);
  } else {
    typename L::F out;
    for (int lane = 0; lane < L::N; ++lane) out[lane] = table[i[lane]];
    return out;
  }
}

// -- grids of codes -----------------------------------------------------------------------------------------------
//
// A grid gives: kLargest, kZero (the code of 0), kNone (that of what is no number); decode; is_special, for codes that
// the ordinary loops do not take; snap, to the nearest value; nearest and random, which give the code as well.
// Values are in units of the scale; what is not finite is up to the careful loops.

// Floating point of few bits, without infinities: kDrop of fp32's 23 bits of mantissa are missing, and the least
// normal number is 2^kLeast.
template <int kDrop, int kLeast, int kSignBit, int kLargestCode, int kNoneCode>
struct Mini {
  static constexpr int32_t kLeastBits = (127 + kLeast) << 23;
  static constexpr float kLeastNormal = std::bit_cast<float>(kLeastBits);
  static constexpr int kMagnitudes = (1 << kSignBit) - 1;
  static constexpr int kSteps = 1 << (23 - kDrop);  // in each binade
  static constexpr float kLargest =
      std::bit_cast<float>((kLargestCode << kDrop) + kLeastBits - (1 << 23));
  static constexpr int kZero = 0;
  static constexpr int kNone = kNoneCode;

  template <class S>
  [[gnu::always_inline]] static inline typename LanesOf<S>::F decode(typename LanesOf<S>::I code) {
    using L = LanesOf<S>;
    using F = typename L::F;
    using I = typename L::I;
    const I magnitude = code & kMagnitudes;
    const I bits = (magnitude << kDrop) + (kLeastBits - (1 << 23));
    // Subnormal: the implicit one is added, and subtracted as a number.
    const I subnormal = magnitude < kSteps;
    const F value = (F)(bits + (subnormal & (1 << 23))) - (F)(subnormal & kLeastBits);
    return (F)((I)value | (code >> kSignBit) << 31);
  }

  template <class S>
  [[gnu::always_inline]] static inline typename LanesOf<S>::I is_special(typename LanesOf<S>::I code) {
    if constexpr (kNoneCode == kMagnitudes) {
      return (code & kMagnitudes) == kMagnitudes;
    } else {
      return code ^ code;
    }
  }

  // The steps in its binade, or of the subnormal numbers, to which a size is rounded, come out in the last bits of
  // its sum with a power of two that leaves no others.
  template <class S>
  struct Rounded {
    using L = LanesOf<S>;
    typename L::I exponent;
    typename L::F magic, sum;

    [[gnu::always_inline]] inline explicit Rounded(typename L::F y) {
      using F = typename L::F;
      using I = typename L::I;
      F size = L::size(y);
      size = size < kLargest ? size : F{} + kLargest;
      const I bits = (I)size & 0x7f800000;
      exponent = bits > kLeastBits ? bits : I{} + kLeastBits;
      magic = (F)(exponent + (kDrop << 23));
      sum = size + magic;
    }
  };

  template <class S>
  [[gnu::always_inline]] static inline typename LanesOf<S>::F snap(typename LanesOf<S>::F y) {
    using L = LanesOf<S>;
    const Rounded<S> x(y);
    return (typename L::F)((typename L::I)(x.sum - x.magic) | L::sign(y));
  }

  template <class S>
  [[gnu::always_inline]] static inline void nearest(typename LanesOf<S>::F y, typename LanesOf<S>::I& code,
                                                    typename LanesOf<S>::F& value) {
    using L = LanesOf<S>;
    using F = typename L::F;
    using I = typename L::I;
    using U = typename L::U;
    const Rounded<S> x(y);
    const I sign = L::sign(y);
    value = (F)((I)(x.sum - x.magic) | sign);
    code = (I)x.sum - x.exponent + (x.exponent >> kDrop) - ((kDrop << 23) + (kLeastBits >> kDrop));
    code |= (I)((U)sign >> (31 - kSignBit));
  }

  template <class S>
  [[gnu::always_inline]] static inline void random(typename LanesOf<S>::F y, typename LanesOf<S>::U bits,
                                                   typename LanesOf<S>::I& code,
                                                   typename LanesOf<S>::F& value) {
    using L = LanesOf<S>;
    using F = typename L::F;
    using I = typename L::I;
    using U = typename L::U;
    F size = L::size(y);
    size = size < kLargest ? size : F{} + kLargest;
    const I binade = (I)size & 0x7f800000;
    const I exponent = binade > kLeastBits ? binade : I{} + kLeastBits;
    // A step is 2^(exponent - steps' bits).
    const F steps = size * (F)(((254u + 23 - kDrop) << 23) - (U)exponent);
    const I whole = __builtin_convertvector(steps, I);
    const F fraction = steps - __builtin_convertvector(whole, F);
    I up = fraction + __builtin_convertvector((I)(bits >> 8), F) * 0x1p-24f >= 1.0f;
    if constexpr (kDrop == 20) {  // of e4m3's normal numbers the dropped bits themselves carry
      const I carry = ((I)size & 0xfffff) + (I)(bits >> 12) > 0xfffff;
      up = size < kLeastNormal ? up : carry;
    }
    const I sum = whole - up;
    const I sign = L::sign(y);
    value = (F)((I)(__builtin_convertvector(sum, F) * (F)(exponent - ((23 - kDrop) << 23))) | sign);
    code = (sum + ((exponent - kLeastBits) >> kDrop)) | (I)((U)sign >> (31 - kSignBit));
  }
};

using E4m3 = Mini<20, -6, 7, 0x7e, 0x7f>;
using E2m1 = Mini<22, 0, 3, 7, 0>;
static_assert(E4m3::kLargest == 448 && E2m1::kLargest == 6);

// -127 to 127; what is stored as -128 stays where nothing is added to it.
struct Int8 {
  static constexpr float kLargest = 127;
  static constexpr int kZero = 0;
  static constexpr int kNone = 0;
  static constexpr float kMagic = 0x1p23f;

  template <class S>
  [[gnu::always_inline]] static inline typename LanesOf<S>::F decode(typename LanesOf<S>::I code) {
    return __builtin_convertvector((code << 24) >> 24, typename LanesOf<S>::F);
  }

  template <class S>
  [[gnu::always_inline]] static inline typename LanesOf<S>::I is_special(typename LanesOf<S>::I code) {
    return code == 0x80;
  }

  template <class S>
  [[gnu::always_inline]] static inline typename LanesOf<S>::F clamped(typename LanesOf<S>::F y) {
    using L = LanesOf<S>;
    const auto size = L::size(y);
    return size < kLargest ? size : typename L::F{} + kLargest;
  }

  // With the sign of y.
  template <class S>
  [[gnu::always_inline]] static inline void signed_of(typename LanesOf<S>::I size, typename LanesOf<S>::F y,
                                                      typename LanesOf<S>::I& code,
                                                      typename LanesOf<S>::F& value) {
    using L = LanesOf<S>;
    const typename L::I minus = (typename L::I)y >> 31;
    code = (size ^ minus) - minus;
    value = __builtin_convertvector(code, typename L::F);
  }

  template <class S>
  [[gnu::always_inline]] static inline typename LanesOf<S>::F snap(typename LanesOf<S>::F y) {
    using L = LanesOf<S>;
    return (typename L::F)((typename L::I)(clamped<S>(y) + kMagic - kMagic) | L::sign(y));
  }

  template <class S>
  [[gnu::always_inline]] static inline void nearest(typename LanesOf<S>::F y, typename LanesOf<S>::I& code,
                                                    typename LanesOf<S>::F& value) {
    using I = typename LanesOf<S>::I;
    signed_of<S>((I)(clamped<S>(y) + kMagic) & 0x7fffff, y, code, value);
  }

  template <class S>
  [[gnu::always_inline]] static inline void random(typename LanesOf<S>::F y, typename LanesOf<S>::U bits,
                                                   typename LanesOf<S>::I& code,
                                                   typename LanesOf<S>::F& value) {
    using L = LanesOf<S>;
    using F = typename L::F;
    using I = typename L::I;
    const F size = clamped<S>(y);
    const I whole = __builtin_convertvector(size, I);
    const F fraction = size - __builtin_convertvector(whole, F);
    const I up = fraction + __builtin_convertvector((I)(bits >> 8), F) * 0x1p-24f >= 1.0f;
    signed_of<S>(whole - up, y, code, value);
  }
};

// Sixteen numbers that lie apart: [-1, 1] is cut into 32 bins, so narrow that each holds at most one of them, and at
// most one middle between two; what lies below the bin is known.
struct Nf4Table {
  static constexpr int kBins = 32;
  alignas(64) static constexpr float kValues[16] = {
      -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
      -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
      0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f,
      0.7229568362236023f, 1.0f};

  // From the index `below` in the bin on it is one more: from `from` on (a float, for sums as exact as they come).
  struct Bins {
    float below[kBins] = {};
    float from[kBins] = {};
  };
  static constexpr float next_after(float x) {  // away from zero, or up from it
    const int32_t bits = std::bit_cast<int32_t>(x);
    return x == 0 ? std::numeric_limits<float>::denorm_min() : std::bit_cast<float>(x > 0 ? bits + 1 : bits - 1);
  }
  // The first float that belongs to kValues[i + 1], which is nearest from there on; on a tie the even one is.
  static constexpr float first_nearest(int i) {
    const double middle = (static_cast<double>(kValues[i]) + kValues[i + 1]) / 2;
    const float x = static_cast<float>(middle);
    if (x > middle || (x == middle && i % 2 == 1)) return x;
    return next_after(x);
  }
  template <class Edge>
  static constexpr Bins bins(const Edge& edge) {
    Bins out;
    for (int bin = 0; bin < kBins; ++bin) {
      const float low = -1 + bin / 16.0f, high = low + 1 / 16.0f;
      int below = 0;
      while (below < 15 && edge(below) < low) ++below;
      out.below[bin] = static_cast<float>(below);
      out.from[bin] = below < 15 && (edge(below) < high) ? edge(below) : 2.0f;
    }
    return out;
  }
};

struct Nf4 : Nf4Table {
  static constexpr float kLargest = 1;
  static constexpr int kZero = 7;
  static constexpr int kNone = 7;
  alignas(64) static constexpr Bins kNearest = bins(first_nearest);
  alignas(64) static constexpr Bins kFloor = bins([](int i) { return i < 14 ? kValues[i + 1] : 2.0f; });

  template <class S>
  [[gnu::always_inline]] static inline typename LanesOf<S>::I index(const Bins& bins,
                                                                    typename LanesOf<S>::F y) {
    using L = LanesOf<S>;
    using F = typename L::F;
    using I = typename L::I;
    y = y > -1.0f ? y : F{} - 1.0f;
    y = y < 1.0f ? y : F{} + 1.0f;
    I bin = __builtin_convertvector(y * 16.0f + 16.0f, I);
    bin = bin < kBins - 1 ? bin : I{} + (kBins - 1);
    const I below = __builtin_convertvector(lookup<S>(bins.below, bin), I);
    return below - (y >= lookup<S>(bins.from, bin));
  }

  template <class S>
  [[gnu::always_inline]] static inline typename LanesOf<S>::F decode(typename LanesOf<S>::I code) {
    return lookup<S>(kValues, code);
  }

  template <class S>
  [[gnu::always_inline]] static inline typename LanesOf<S>::I is_special(typename LanesOf<S>::I code) {
    return code ^ code;
  }

  template <class S>
  [[gnu::always_inline]] static inline typename LanesOf<S>::F snap(typename LanesOf<S>::F y) {
    return decode<S>(index<S>(kNearest, y));
  }

  template <class S>
  [[gnu::always_inline]] static inline void nearest(typename LanesOf<S>::F y, typename LanesOf<S>::I& code,
                                                    typename LanesOf<S>::F& value) {
    code = index<S>(kNearest, y);
    value = decode<S>(code);
  }

  template <class S>
  [[gnu::always_inline]] static inline void random(typename LanesOf<S>::F y, typename LanesOf<S>::U bits,
                                                   typename LanesOf<S>::I& code,
                                                   typename LanesOf<S>::F& value) {
    using L = LanesOf<S>;
    using F = typename L::F;
    using I = typename L::I;
    const I lower = index<S>(kFloor, y);
    const F low = L::size(lookup<S>(kValues, lower)), high = L::size(lookup<S>(kValues, lower + 1));
    const I negative = lower < 7;
    const F near = negative ? high : low, far = negative ? low : high;
    const F fraction = (L::size(y) - near) / (far - near);
    const I away = fraction + __builtin_convertvector((I)(bits >> 8), F) * 0x1p-24f >= 1.0f;
    code = lower - (away ^ negative);
    value = decode<S>(code);
  }
};

// -- scales -------------------------------------------------------------------------------------------------------

inline float decode_e4m3(uint8_t code) {
  const int magnitude = code & 0x7f;
  if (magnitude == 0x7f) return std::numeric_limits<float>::quiet_NaN();
  const float size = magnitude < 8 ? static_cast<float>(magnitude) * 0x1p-9f
                                   : std::bit_cast<float>((magnitude << 20) + (120 << 23));
  return code & 0x80 ? -size : size;
}

inline float decode_e8m0(uint8_t code) {
  if (code == 0xff) return std::numeric_limits<float>::quiet_NaN();
  return code == 0 ? 0x1p-127f : std::bit_cast<float>(code << 23);
}

// The nearest number of a positive one.
inline uint8_t encode_e4m3(float x) {
  if (!(x < 448)) return x == x ? 0x7e : 0x7f;
  const int32_t exponent = std::max(std::bit_cast<int32_t>(x) & 0x7f800000, 121 << 23);
  const float magic = std::bit_cast<float>(exponent + (20 << 23));
  const int32_t steps = std::bit_cast<int32_t>(x + magic) - std::bit_cast<int32_t>(magic);
  return static_cast<uint8_t>(steps + ((exponent - (121 << 23)) >> 20));
}

// The smallest power of two that is no smaller.
inline uint8_t encode_e8m0(float x) {
  if (!(x > 0) || !(x < std::numeric_limits<float>::infinity())) return 0xff;
  int exponent;
  const float mantissa = std::frexp(x, &exponent);
  return static_cast<uint8_t>(std::clamp(mantissa == 0.5f ? exponent - 1 : exponent, -127, 127) + 127);
}

// The scales of a weight; one has its stored bits, its value, and the unit of the codes that it gives.
class Scales {
 public:
  explicit Scales(const Quantised& weight) : weight_(weight) {}

  struct Scale {
    uint32_t bits;
    float value;
    float unit;
    bool usable() const { return value > 0 && value < std::numeric_limits<float>::infinity(); }
  };

  Scale operator[](int64_t index) const {
    const uint8_t* at = weight_.scales + index * bytes();
    uint32_t bits = 0;
    std::memcpy(&bits, at, bytes());  // little-endian, as all CPUs that torch runs on
    return of(bits);
  }

  // The scale that brings the largest |W| of a block to the largest code.
  Scale fresh(float largest, float largest_code) const {
    const float scale = largest / largest_code;
    switch (weight_.scale_type) {
      case ScaleType::fp32: return of(std::bit_cast<uint32_t>(at_most(scale, 0x1.fffffep127f)));
      case ScaleType::bf16: return of(narrow<bf16>(at_most(scale, 0x1.fep127f)).bits);
      case ScaleType::fp16: return of(narrow<fp16>(at_most(scale, 65504)).bits);
      case ScaleType::e8m0: return of(encode_e8m0(scale));
      case ScaleType::e4m3: return of(encode_e4m3(scale / weight_.global_scale));
    }
    return {};
  }

  void write(int64_t index, const Scale& scale) const {
    std::memcpy(weight_.scales + index * bytes(), &scale.bits, bytes());
  }

 private:
  int bytes() const {
    const ScaleType type = weight_.scale_type;
    return type == ScaleType::fp32 ? 4 : type == ScaleType::bf16 || type == ScaleType::fp16 ? 2 : 1;
  }

  static float at_most(float x, float most) { return x > most ? most : x; }

  Scale of(uint32_t bits) const {
    float value = 0;
    switch (weight_.scale_type) {
      case ScaleType::fp32: value = std::bit_cast<float>(bits); break;
      case ScaleType::bf16: value = widen(bf16{static_cast<uint16_t>(bits)}); break;
      case ScaleType::fp16: value = widen(fp16{static_cast<uint16_t>(bits)}); break;
      case ScaleType::e8m0: value = decode_e8m0(static_cast<uint8_t>(bits)); break;
      case ScaleType::e4m3:
        value = decode_e4m3(static_cast<uint8_t>(bits));
        return {bits, value, value * weight_.global_scale};
    }
    return {bits, value, value};
  }

  const Quantised& weight_;
};

// -- random bits --------------------------------------------------------------------------------------------------

// Those of `count` elements in a row from (row, column) of the weight on, kPiece at most, filled up to whole lanes.
inline void random_bits(const Quantised& weight, int64_t row, int64_t column, int64_t count, uint32_t* out) {
  const auto key = RowKey<uint32_t>::of(weight.key, weight.row + static_cast<uint32_t>(row));
  const uint32_t first = weight.column + static_cast<uint32_t>(column);
  for (int j = 0; j < to_lanes(count); ++j) out[j] = key.bits(first + j);
}

// -- one block ----------------------------------------------------------------------------------------------------

// A block, or the part of one that is in a tile, with its codes one in a byte. `cols` are whole lanes; those past
// the end of the block hold zeros.
struct Block {
  uint8_t* codes;
  int64_t codes_stride;
  const float* delta;
  int64_t delta_stride;
  int64_t rows;
  int64_t cols;
  int64_t row;  // of the weight
  int64_t col;  // where blocks are flat: counted on from the start of this row
  float* sums;  // W + D, [rows, cols]
};

template <class S, class Grid, bool kCareful>
[[gnu::always_inline]] inline typename LanesOf<S>::F decode(typename LanesOf<S>::I code) {
  using L = LanesOf<S>;
  auto value = Grid::template decode<S>(code);
  if constexpr (kCareful && Grid::kNone != Grid::kZero) {
    value = Grid::template is_special<S>(code)
                ? typename L::F{} + std::numeric_limits<float>::quiet_NaN()
                : value;
  }
  return value;
}

// S from W and D.
template <class S>
[[gnu::always_inline]] inline typename LanesOf<S>::F add(typename LanesOf<S>::F weight,
                                                         typename LanesOf<S>::F delta, bool keep_zeros) {
  auto sum = weight + delta;
  if (keep_zeros) sum = weight == 0.0f ? weight : sum;
  return sum;
}

struct Range {
  uint32_t largest;  // the bits of the largest |S|; above those of infinity if one is no number
  bool special;      // there are codes that the careful loops have to take
};

// S, and what is known of it.
template <class S, class Grid, bool kCareful, bool kStore>
Range sum_up(const Block& block, float unit, bool keep_zeros) {
  using L = LanesOf<S>;
  using F = typename L::F;
  using I = typename L::I;
  I largest{}, special{};
  for (int64_t r = 0; r < block.rows; ++r) {
    const uint8_t* codes = block.codes + r * block.codes_stride;
    const float* delta = block.delta + r * block.delta_stride;
    float* sums = block.sums + r * block.cols;
    for (int64_t c = 0; c < block.cols; c += L::N) {
      const I code = load_codes<S>(codes + c);
      const F weight = decode<S, Grid, kCareful>(code) * unit;
      const F sum = add<S>(weight, L::template load<F>(delta + c), keep_zeros);
      if constexpr (kStore) L::store(sums + c, sum);
      const I size = (I)L::size(sum);
      largest = largest > size ? largest : size;
      special |= Grid::template is_special<S>(code);
    }
  }
  Range range{0, false};
  for (int lane = 0; lane < L::N; ++lane) {
    range.largest = std::max(range.largest, static_cast<uint32_t>(largest[lane]));
    range.special |= special[lane] != 0;
  }
  return range;
}

// Sums over rows, in kLanes lanes.
template <class S, int kSums>
struct Sums {
  using L = LanesOf<S>;
  static constexpr int kParts = kLanes / L::N;
  typename L::F part[kSums][kParts] = {};

  // All lanes in order, into `totals`.
  [[gnu::always_inline]] inline void flush(double (*totals)[kLanes]) const {
    for (int i = 0; i < kSums; ++i) {
      float lanes[kLanes];
      for (int p = 0; p < kParts; ++p) L::store(lanes + p * L::N, part[i][p]);
      for (int lane = 0; lane < kLanes; ++lane) totals[i][lane] += lanes[lane];
    }
  }
};

inline double total(const double* lanes) {
  double out = 0;
  for (int lane = 0; lane < kLanes; ++lane) out += lanes[lane];
  return out;
}

// About the squared errors that two units leave, when S is rounded to nearest, in these units.
template <class S, class Grid>
void guess_errors(const Block& block, float old, float fresh, double& error, double& fresh_error) {
  using L = LanesOf<S>;
  using F = typename L::F;
  const float inverse[] = {1 / old, 1 / fresh};
  double totals[2][kLanes] = {};
  for (int64_t r = 0; r < block.rows; ++r) {
    const float* sums = block.sums + r * block.cols;
    for (int64_t first = 0; first < block.cols; first += kPiece) {
      const int64_t end = std::min(block.cols, first + kPiece);
      Sums<S, 2> errors;
      for (int64_t c = first; c < end; c += kLanes) {
#pragma GCC unroll 4
        for (int p = 0; p < kLanes / L::N; ++p) {
          const F sum = L::template load<F>(sums + c + p * L::N);
#pragma GCC unroll 2
          for (int i = 0; i < 2; ++i) {
            const F y = sum * inverse[i];
            const F off = Grid::template snap<S>(y) - y;
            errors.part[i][p] += off * off;
          }
        }
      }
      errors.flush(totals);
    }
  }
  error = total(totals[0]) * old * old;
  fresh_error = total(totals[1]) * fresh * fresh;
}

// The squared error exactly as the reference has it, but for the order of its sum.
template <class S, class Grid>
[[gnu::noinline]] double exact_error(const Block& block, float old, float unit, bool stays, bool keep_zeros) {
  using L = LanesOf<S>;
  using F = typename L::F;
  using I = typename L::I;
  double totals[kLanes] = {};
  for (int64_t r = 0; r < block.rows; ++r) {
    for (int64_t c = 0; c < block.cols; c += L::N) {
      const I stored = load_codes<S>(block.codes + r * block.codes_stride + c);
      const F weight = decode<S, Grid, true>(stored) * old;
      const F sum = add<S>(weight, L::template load<F>(block.delta + r * block.delta_stride + c), keep_zeros);
      const F y = sum / unit;
      I code;
      F value;
      Grid::template nearest<S>(y, code, value);
      code = y == y ? code : I{} + Grid::kNone;
      if (stays) code = sum == weight ? stored : code;
      value = decode<S, Grid, true>(code) * unit;
      for (int lane = 0; lane < L::N; ++lane) {
        const double off = static_cast<double>(value[lane]) - sum[lane];
        totals[(c + lane) % kLanes] += off * off;
      }
    }
  }
  return total(totals);
}

// Writes the codes of S.
template <class S, class Grid, bool kCareful, bool kStochastic>
Movement encode(const Quantised& weight, const Block& block, float old, float unit, bool renewed) {
  using L = LanesOf<S>;
  using F = typename L::F;
  using I = typename L::I;
  using U = typename L::U;
  const I may_stay = I{} - (renewed ? 0 : 1);
  double totals[3][kLanes] = {};
  for (int64_t r = 0; r < block.rows; ++r) {
    uint8_t* codes = block.codes + r * block.codes_stride;
    const float* delta = block.delta + r * block.delta_stride;
    for (int64_t first = 0; first < block.cols; first += kPiece) {
      const int64_t end = std::min(block.cols, first + kPiece);
      uint32_t noise[kPiece];
      if constexpr (kStochastic) {
        if (weight.flat) {
          for (int64_t c = first; c < end;) {  // from row to row
            const int64_t row = block.row + (block.col + c) / weight.cols, col = (block.col + c) % weight.cols;
            const int64_t count = std::min(end - c, weight.cols - col);
            uint32_t piece[kPiece];
            random_bits(weight, row, col, count, piece);
            std::memcpy(noise + (c - first), piece, count * sizeof *noise);
            c += count;
          }
        } else {
          random_bits(weight, block.row + r, block.col + first, end - first, noise);
        }
      }
      Sums<S, 3> sums;
      for (int64_t c = first; c < end; c += kLanes) {
#pragma GCC unroll 4
        for (int p = 0; p < kLanes / L::N; ++p) {
          const int64_t at = c + p * L::N;
          const I stored = load_codes<S>(codes + at);
          const F before = decode<S, Grid, kCareful>(stored) * old;
          const F d = L::template load<F>(delta + at);
          const F sum = add<S>(before, d, weight.keep_zeros);
          const F y = sum / unit;
          I code;
          F value;
          if constexpr (kStochastic) {
            Grid::template random<S>(y, L::template load<U>(noise + (at - first)), code, value);
          } else {
            Grid::template nearest<S>(y, code, value);
          }
          if constexpr (kCareful) {
            code = y == y ? code : I{} + Grid::kNone;
            value = decode<S, Grid, true>(code);
          }
          const I stays = (sum == before) & may_stay;
          code = stays ? stored : code;
          store_codes<S>(codes + at, code);
          const F after = stays ? before : value * unit;
          if constexpr (kCareful) {
            for (int lane = 0; lane < L::N; ++lane) {
              const double change = static_cast<double>(after[lane]) - before[lane], added = d[lane];
              const int i = p * L::N + lane;
              totals[0][i] += added * added;
              totals[1][i] += change * added;
              totals[2][i] += change * change;
            }
          } else {
            const F change = after - before;
            sums.part[0][p] += d * d;
            sums.part[1][p] += change * d;
            sums.part[2][p] += change * change;
          }
        }
      }
      if constexpr (!kCareful) sums.flush(totals);
    }
  }
  return {total(totals[0]), total(totals[1]), total(totals[2])};
}

// Whether no loop meets what is not finite, nor products that leave fp32's range.
inline bool ordinary(const Range& range, float unit) {
  const float largest = std::bit_cast<float>(range.largest), size = std::abs(unit);
  return !range.special && largest < 0x1p60f && size > 0x1p-60f && size < 0x1p60f &&
         largest < size * 0x1p40f && largest > size * 0x1p-40f;
}

template <class S, class Grid, bool kCareful>
Movement encode(const Quantised& weight, const Block& block, float old, float unit, bool renewed) {
  return weight.stochastic ? encode<S, Grid, kCareful, true>(weight, block, old, unit, renewed)
                           : encode<S, Grid, kCareful, false>(weight, block, old, unit, renewed);
}

// Whether the fresh scale leaves a smaller error than the old one.
template <class S, class Grid>
bool is_better(const Block& block, const Range& range, float old, float fresh, bool keep_zeros) {
  if (ordinary(range, old) && ordinary(range, fresh) && old > 0) {
    // An error in S / unit of 2^-22 of S changes the sum by less than this, and the sum itself is off by less
    // than 2^-18.
    const double reach = 0x1p-22 * std::bit_cast<float>(range.largest) *
                         std::sqrt(static_cast<double>(block.rows * block.cols));
    const auto slack = [&](double error) {
      return 0x1p-18 * error + 2 * std::sqrt(error) * reach + reach * reach;
    };
    double error, fresh_error;
    guess_errors<S, Grid>(block, old, fresh, error, fresh_error);
    if (std::abs(error - fresh_error) > slack(error) + slack(fresh_error)) return fresh_error < error;
  }
  return !(exact_error<S, Grid>(block, old, old, true, keep_zeros) <=
           exact_error<S, Grid>(block, old, fresh, false, keep_zeros));
}

// Chooses the scale of a whole block, and writes it and the codes.
template <class S, class Grid>
Movement requantise_block(const Quantised& weight, const Block& block, int64_t index) {
  const Scales scales(weight);
  const auto old = scales[index];
  Range range = sum_up<S, Grid, false, true>(block, old.unit, weight.keep_zeros);
  if (range.special) {
    range.largest = sum_up<S, Grid, true, true>(block, old.unit, weight.keep_zeros).largest;
  }
  const auto fresh = scales.fresh(std::bit_cast<float>(range.largest), Grid::kLargest);
  const bool renewed = fresh.usable() && fresh.bits != old.bits &&
                       is_better<S, Grid>(block, range, old.unit, fresh.unit, weight.keep_zeros);
  const float unit = renewed ? fresh.unit : old.unit;
  if (renewed) scales.write(index, fresh);
  const bool plain = ordinary(range, old.unit) && ordinary(range, unit);
  return (plain ? encode<S, Grid, false> : encode<S, Grid, true>)(weight, block, old.unit, unit, renewed);
}

// -- a tile -------------------------------------------------------------------------------------------------------

inline void unpack(const uint8_t* in, int64_t count, bool high_first, uint8_t* __restrict out) {
  const int first = high_first ? 4 : 0, second = 4 - first;
  for (int64_t i = 0; i < count / 2; ++i) {
    out[2 * i] = in[i] >> first & 15;
    out[2 * i + 1] = in[i] >> second & 15;
  }
  if (count % 2) out[count - 1] = in[count / 2] >> first & 15;
}

inline void pack_codes(const uint8_t* in, int64_t count, bool high_first, int zero, uint8_t* __restrict out) {
  const int first = high_first ? 4 : 0, second = 4 - first;
  for (int64_t i = 0; i < count / 2; ++i) {
    out[i] = static_cast<uint8_t>(in[2 * i] << first | in[2 * i + 1] << second);
  }
  if (count % 2) out[count / 2] = static_cast<uint8_t>(in[count - 1] << first | zero << second);
}

// The scratch of a tile: sums, codes one in a byte, and a block of its own for what is no whole number of lanes.
struct TileScratch {
  float* sums;
  float* delta;
  uint8_t* codes;
  uint8_t* block;

  TileScratch(void* scratch, int64_t elements) {
    sums = static_cast<float*>(scratch);
    delta = sums + elements;
    codes = reinterpret_cast<uint8_t*>(delta + elements);
    block = codes + elements;
  }
  static int64_t bytes(int64_t elements) { return elements * (2 * sizeof(float) + 2); }
};

// Calls f(block, index of the block's scale) for each block, or the part of one, that lies in the tile; its codes are
// read before, and written after where kWrite.
template <class Grid, bool kWrite, class F>
void each_block(const Quantised& weight, const Tile& tile, const F& f) {
  const TileScratch scratch(tile.scratch, tile.elements);
  const bool runs_on = weight.flat && weight.cols % weight.block_cols != 0;
  const bool high_first = weight.packing == Packing::high;
  const int64_t block_cols = weight.block_cols, block_rows = weight.flat ? 1 : weight.block_rows;
  // Where flat blocks run on, all rows are one.
  const int64_t rows = runs_on ? 1 : tile.rows, cols = runs_on ? tile.rows * weight.cols : tile.cols;
  const int64_t start = tile.row * weight.cols + tile.col;  // the first element, where there are no rows
  const int64_t blocks_across = (weight.cols + block_cols - 1) / block_cols;
  const bool copies = weight.packing != Packing::one || cols % kLanes != 0;
  const int64_t stride = to_lanes(cols);
  for (int64_t row = 0; row < rows;) {
    const int64_t height = std::min(rows, (tile.row + row) / block_rows * block_rows + block_rows - tile.row) - row;
    const auto stored = [&](int64_t r) {
      if (weight.packing == Packing::one) {
        return weight.codes + (tile.row + row + r) * weight.row_bytes + tile.col;
      }
      if (weight.flat) return weight.codes + (start + (row + r) * weight.cols) / 2;
      return weight.codes + (tile.row + row + r) * weight.row_bytes + tile.col / 2;
    };
    uint8_t* codes = stored(0);
    int64_t codes_stride = weight.row_bytes;
    if (copies) {
      codes = scratch.codes;
      codes_stride = stride;
      for (int64_t r = 0; r < height; ++r) {
        uint8_t* to = codes + r * stride;
        if (weight.packing == Packing::one) {
          std::memcpy(to, stored(r), cols);
        } else {
          unpack(stored(r), cols, high_first, to);
        }
        std::memset(to + cols, Grid::kZero, stride - cols);
      }
    }
    const float* delta = tile.delta + row * tile.delta_stride;
    const int64_t first = runs_on ? start / block_cols : tile.col / block_cols;
    for (int64_t col = 0, j = first; col < cols; ++j) {
      const int64_t end = std::min(cols, runs_on ? col + block_cols : (j + 1) * block_cols - tile.col);
      const int64_t width = end - col;
      const int64_t index = weight.flat ? (start + row * weight.cols + col) / block_cols
                                        : (tile.row + row) / block_rows * blocks_across + j;
      Block block{codes + col, codes_stride, delta + col, tile.delta_stride, height, to_lanes(width),
                  tile.row + row, tile.col + col, scratch.sums};
      // What is no whole number of lanes goes alone, unless nothing but the zeros of the padding follows it.
      const bool alone = width % kLanes != 0 && (end < cols || col % kLanes != 0);
      if (alone) {
        block.codes = scratch.block;
        block.delta = scratch.delta;
        block.codes_stride = block.delta_stride = block.cols;
        for (int64_t r = 0; r < height; ++r) {
          std::memset(scratch.block + r * block.cols, Grid::kZero, block.cols);
          std::memcpy(scratch.block + r * block.cols, codes + r * codes_stride + col, width);
          std::fill_n(scratch.delta + r * block.cols, block.cols, 0.0f);
          std::memcpy(scratch.delta + r * block.cols, delta + r * tile.delta_stride + col, width * sizeof(float));
        }
      }
      f(block, index);
      if (alone && kWrite) {
        for (int64_t r = 0; r < height; ++r) {
          std::memcpy(codes + r * codes_stride + col, scratch.block + r * block.cols, width);
        }
      }
      col = end;
    }
    if (copies && kWrite) {
      for (int64_t r = 0; r < height; ++r) {
        const uint8_t* from = codes + r * stride;
        if (weight.packing == Packing::one) {
          std::memcpy(stored(r), from, cols);
        } else {
          pack_codes(from, cols, high_first, Grid::kZero, stored(r));
        }
      }
    }
    row += height;
  }
}

template <class F>
auto with_grid(Code code, const F& f) {
  switch (code) {
    case Code::e4m3: return f(E4m3{});
    case Code::int8: return f(Int8{});
    case Code::e2m1: return f(E2m1{});
    default: return f(Nf4{});
  }
}

template <class S>
Movement write_tile(const Quantised& weight, const Tile& tile) {
  return with_grid(weight.code, [&](auto grid) {
    using Grid = decltype(grid);
    Movement movement;
    each_block<Grid, true>(weight, tile, [&](const Block& block, int64_t index) {
      if (const Choice* choice = tile.choice) {
        movement += (choice->plain ? encode<S, Grid, false> : encode<S, Grid, true>)(
            weight, block, choice->old, choice->now, choice->renewed);
      } else {
        movement += requantise_block<S, Grid>(weight, block, index);
      }
    });
    return movement;
  });
}

template <class S>
uint32_t largest_in_tile(const Quantised& weight, const Tile& tile) {
  return with_grid(weight.code, [&](auto grid) {
    using Grid = decltype(grid);
    uint32_t largest = 0;
    each_block<Grid, false>(weight, tile, [&](const Block& block, int64_t index) {
      const float unit = Scales(weight)[index].unit;
      largest = std::max(largest, sum_up<S, Grid, true, false>(block, unit, weight.keep_zeros).largest);
    });
    return largest;
  });
}

inline float range_of(const Quantised& weight, int64_t index) {
  const float largest = with_grid(weight.code, [](auto grid) { return decltype(grid)::kLargest; });
  return largest * Scales(weight)[index].unit;
}

inline Choice choose_scale(const Quantised& weight, int64_t index, uint32_t largest, bool kept) {
  const Scales scales(weight);
  const auto old = scales[index];
  const float size = std::bit_cast<float>(largest);
  const float largest_code = with_grid(weight.code, [](auto grid) { return decltype(grid)::kLargest; });
  const auto fresh = scales.fresh(size, largest_code);
  const bool renewed = !kept && fresh.usable() && !(size <= largest_code * old.unit);
  if (renewed) scales.write(index, fresh);
  const float now = renewed ? fresh.unit : old.unit;
  return {old.unit, now, renewed, ordinary({largest, false}, old.unit) && ordinary({largest, false}, now)};
}

template <class S>
const RequantiseKernel* requantise_kernel() {
  static constexpr RequantiseKernel kernel{TileScratch::bytes, write_tile<S>, largest_in_tile<S>, choose_scale,
                                           range_of};
  return &kernel;
}

}  // namespace
}  // namespace portllm
