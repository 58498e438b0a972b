// The kernel of skinny.h, written once over the same SIMD wrapper S as kernel.h. To be included
// inside of the target that it is for.
//
// A word is a number of fp32 or, where D is bf16 and S has `dot`, a pair of bf16 that follow each
// other in the sums. D goes through a tile of words, with zeros where it ends: widening, pairing,
// edges and strides are done there, and the arithmetic is one loop,
//   sums[r][:] += tile[r, step] * X[step, :].
// Each tile is summed by itself first: rounding errors grow with the length of a sum.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/half.h"
#include "cpu/skinny.h"

namespace portllm {
namespace {

constexpr int kTileRows = 16;    // of the sums that one pass over a tile adds to; a strip of D X
constexpr int kTileWords = 128;  // in a row of a tile; a strip of D^T X
constexpr int kTileSteps = 32;   // rows of a tile of D^T X
constexpr int kBandsAtOnce = 4;  // for which D is read once

template <class S, class E>
constexpr bool kInPairs = S::kPairs && std::is_same_v<E, bf16>;

// Rows of sums that registers hold: enough to hide the latency of the multiply-add.
template <class S>
constexpr int kHeld = S::kWidth == 16 ? 16 : 4;

template <class E>
E* element(const Matrix& x, int64_t row, int64_t col) {
  return static_cast<E*>(x.data) + row * x.row_stride + col;
}

// The lines of memory that the next tile comes from, kRows of kCols elements E, to be fetched one by
// one between the steps of the arithmetic. They may lie behind the end: fetching reads nothing.
template <class E, int kRows, int kCols>
struct NextTile {
  static constexpr int kLinesInRow = kCols * sizeof(E) / 64;
  static constexpr int kLines = kRows * kLinesInRow;

  NextTile(const Matrix& x, int64_t row, int64_t col)
      : start(reinterpret_cast<uintptr_t>(x.data) + (row * x.row_stride + col) * sizeof(E)),
        row_bytes(x.row_stride * static_cast<int64_t>(sizeof(E))) {}

  void fetch(int count) {
    for (const int end = std::min(line + count, kLines); line < end; ++line) {
      const uintptr_t at = start + line / kLinesInRow * row_bytes + line % kLinesInRow * 64;
      __builtin_prefetch(reinterpret_cast<const void*>(at), 0, 2);
    }
  }

  uintptr_t start;
  int64_t row_bytes;
  int line = 0;
};

// sums[r][:] += sum over step of tile[r * kRow + step * kStep] * x[step][:], for kTileRows r.
template <class S, bool kPairs, int kRow, int kStep, int kFetches, class Next>
void add_products(const float* tile, const float* x, int64_t steps, float* sums, Next& next) {
  constexpr int kVectors = kBand / S::kWidth;
  for (int first = 0; first < kTileRows; first += kHeld<S>, sums += kHeld<S> * kBand) {
    const float* words = tile + first * kRow;
    typename S::Vec d[kHeld<S>][kVectors];
#pragma GCC unroll 16
    for (int r = 0; r < kHeld<S>; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) d[r][v] = S::zero();
    }
#pragma GCC unroll 1
    for (int64_t step = 0; step < steps; ++step) {
      next.fetch(kFetches);
      typename S::Vec b[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) b[v] = S::load(x + step * kBand + v * S::kWidth);
#pragma GCC unroll 16
      for (int r = 0; r < kHeld<S>; ++r) {
        const float* a = words + r * kRow + step * kStep;
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          if constexpr (kPairs) {
            d[r][v] = S::dot(a, b[v], d[r][v]);
          } else {
            d[r][v] = S::fma(S::set1(*a), b[v], d[r][v]);
          }
        }
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kHeld<S>; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        float* sum = sums + r * kBand + v * S::kWidth;
        S::store(sum, S::fma(S::set1(1), d[r][v], S::load(sum)));
      }
    }
  }
}

inline float pair(bf16 first, bf16 second) {
  return std::bit_cast<float>(uint32_t{first.bits} | uint32_t{second.bits} << 16);
}

// A row of a tile: `count` elements of D, then zeros; bf16 in pairs as they lie there, or widened.
template <bool kPairs, class E>
void copy_row(const E* in, int64_t count, float* __restrict out) {
  constexpr size_t kBytes = kTileWords * sizeof *out;
  if constexpr (kPairs || std::is_same_v<E, float>) {
    if (count * sizeof *in >= kBytes) {
      std::memcpy(out, in, kBytes);
    } else {
      std::memset(out, 0, kBytes);
      std::memcpy(out, in, count * sizeof *in);
    }
  } else if (count >= kTileWords) {
    for (int j = 0; j < kTileWords; ++j) out[j] = widen(in[j]);
  } else {
    for (int j = 0; j < kTileWords; ++j) out[j] = j < count ? widen(in[j]) : 0;
  }
}

// The pairs that `count` elements of two rows of D make, then zeros.
inline void pair_rows(const bf16* in, const bf16* below, int64_t count, float* __restrict out) {
  if (count >= kTileWords) {
    for (int j = 0; j < kTileWords; ++j) out[j] = pair(in[j], below[j]);
  } else {
    for (int j = 0; j < kTileWords; ++j) out[j] = j < count ? pair(in[j], below[j]) : 0;
  }
}

template <class S, class E>
void pack_band(const Skinny& p, int64_t band, float* packed) {
  const int64_t width = std::min<int64_t>(p.width - band * kBand, kBand);
  float edge[2][kBand] = {};
  const auto row = [&](int64_t k, float* edge) -> const float* {
    const float* x = p.block + k * p.width + band * kBand;
    if (width == kBand && k < p.depth()) return x;
    for (int j = 0; j < kBand; ++j) edge[j] = j < width && k < p.depth() ? x[j] : 0;
    return edge;
  };
  for (int64_t k = 0; k < p.depth(); k += kInPairs<S, E> ? 2 : 1, packed += kBand) {
    const float* x = row(k, edge[0]);
    if constexpr (kInPairs<S, E>) {
      const float* y = row(k + 1, edge[1]);
      for (int j = 0; j < kBand; ++j) packed[j] = pair(narrow<bf16>(x[j]), narrow<bf16>(y[j]));
    } else if constexpr (std::is_same_v<E, bf16>) {
      for (int j = 0; j < kBand; ++j) packed[j] = widen(narrow<bf16>(x[j]));
    } else {
      std::memcpy(packed, x, kBand * sizeof *x);
    }
  }
}

template <class S>
double sum(typename S::Vec x) {
  float lanes[S::kWidth];
  S::store(lanes, x);
  double total = 0;
  for (const float lane : lanes) total += lane;
  return total;
}

// Makes `cols` elements of D, kCols at most, from their source, in bf16; adds the squares.
template <class S, int kCols>
void round_row(const Skinny& p, int64_t row, int64_t col, int64_t cols, typename S::Vec* squares) {
  const float* x = element<const float>(p.source, row, col);
  bf16* out = element<bf16>(p.d, row, col);
  alignas(64) float edge[kCols];
  if (cols < kCols) {
    std::memset(edge, 0, sizeof edge);
    x = static_cast<float*>(std::memcpy(edge, x, cols * sizeof *x));
  }
  alignas(64) bf16 rounded[kCols];
  for (int j = 0; j < kCols; j += 2 * S::kWidth) {
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const auto v = S::load(x + j + i * S::kWidth);
      squares[i] = S::fma(v, v, squares[i]);
    }
  }
  for (int j = 0; j < kCols; ++j) rounded[j] = narrow<bf16>(x[j]);
  std::memcpy(out, rounded, std::min<int64_t>(cols, kCols) * sizeof *out);
}

inline void write_rows(const Skinny& p, int64_t row, int64_t rows, int64_t band,
                       const float* sums) {
  const int64_t width = std::min<int64_t>(p.width - band * kBand, kBand);
  float* out = p.out + row * p.width + band * kBand;
  for (int64_t r = 0; r < rows; ++r) {
    std::memcpy(out + r * p.width, sums + r * kBand, width * sizeof *sums);
  }
}

// Rows of D X; with kRound, of D made from its source, whose squares are summed.
template <class S, class E, bool kRound>
void multiply_rows(const Skinny& p, int64_t strip, const float* packed) {
  constexpr bool kPairs = kInPairs<S, E>;
  constexpr int kCols = kPairs ? 2 * kTileWords : kTileWords;
  using Next = NextTile<std::conditional_t<kRound, float, E>, kTileRows, kCols>;
  alignas(64) float tile[kTileRows][kTileWords] = {};
  alignas(64) float sums[kBandsAtOnce][kTileRows * kBand];
  const int64_t row = strip * kTileRows, rows = std::min<int64_t>(p.rows - row, kTileRows);
  double total = 0;
  for (int64_t band = 0; band < bands(p); band += kBandsAtOnce) {
    const int64_t count = std::min<int64_t>(bands(p) - band, kBandsAtOnce);
    std::memset(sums, 0, sizeof sums);
    for (int64_t col = 0; col < p.cols; col += kCols) {
      const int64_t cols = std::min<int64_t>(p.cols - col, kCols);
      if constexpr (kRound) {
        if (band == 0) {
          typename S::Vec squares[] = {S::zero(), S::zero()};
          for (int64_t r = 0; r < rows; ++r) round_row<S, kCols>(p, row + r, col, cols, squares);
          total += sum<S>(squares[0]) + sum<S>(squares[1]);
        }
      }
      for (int64_t r = 0; r < rows; ++r) {
        copy_row<kPairs>(element<const E>(p.d, row + r, col), cols, tile[r]);
      }
      const int64_t first = kPairs ? col / 2 : col, steps = kPairs ? (cols + 1) / 2 : cols;
      Next next(kRound ? p.source : p.d, row, col + kCols);
      for (int64_t i = 0; i < count; ++i) {
        const float* x = packed + (band + i) * packed_size(p) + first * kBand;
        add_products<S, kPairs, kTileWords, 1, Next::kLines / kTileWords>(
            tile[0], x, steps, sums[i], next);
      }
    }
    for (int64_t i = 0; i < count; ++i) write_rows(p, row, rows, band + i, sums[i]);
  }
  if (kRound) p.squares[strip] = total;
}

// Rows of D^T X.
template <class S, class E>
void multiply_cols(const Skinny& p, int64_t strip, const float* packed) {
  constexpr bool kPairs = kInPairs<S, E>;
  constexpr int kRows = kPairs ? 2 * kTileSteps : kTileSteps;
  alignas(64) float tile[kTileSteps][kTileWords];
  alignas(64) float sums[kBandsAtOnce][kTileWords * kBand];
  const int64_t col = strip * kTileWords, cols = std::min<int64_t>(p.cols - col, kTileWords);
  for (int64_t band = 0; band < bands(p); band += kBandsAtOnce) {
    const int64_t count = std::min<int64_t>(bands(p) - band, kBandsAtOnce);
    std::memset(sums, 0, sizeof sums);
    for (int64_t row = 0; row < p.rows; row += kRows) {
      const int64_t rows = std::min<int64_t>(p.rows - row, kRows);
      int64_t steps = 0;
      for (int64_t r = 0; r < rows; r += kPairs ? 2 : 1, ++steps) {
        const E* in = element<const E>(p.d, row + r, col);
        if constexpr (kPairs) {
          static constexpr bf16 kZeros[kTileWords] = {};
          pair_rows(in, r + 1 < rows ? in + p.d.row_stride : kZeros, cols, tile[steps]);
        } else {
          copy_row<false>(in, cols, tile[steps]);
        }
      }
      const int64_t first = kPairs ? row / 2 : row;
      NextTile<E, kRows, kTileWords> next(p.d, row + kRows, col);
      for (int64_t i = 0; i < count; ++i) {
        const float* x = packed + (band + i) * packed_size(p) + first * kBand;
        for (int c = 0; c < cols; c += kTileRows) {
          add_products<S, kPairs, 1, kTileWords, 1>(tile[0] + c, x, steps, sums[i] + c * kBand, next);
        }
      }
    }
    for (int64_t i = 0; i < count; ++i) write_rows(p, col, cols, band + i, sums[i]);
  }
}

template <class S>
void pack_block(const Skinny& p, int64_t band, float* packed) {
  const auto pack = p.d.dtype == DType::bf16 ? pack_band<S, bf16> : pack_band<S, float>;
  pack(p, band, packed);
}

template <class S>
void multiply_strip(const Skinny& p, int64_t strip, const float* packed) {
  const bool narrow = p.d.dtype == DType::bf16;
  const auto multiply = p.transposed    ? (narrow ? multiply_cols<S, bf16> : multiply_cols<S, float>)
                        : p.source.data ? multiply_rows<S, bf16, true>
                        : narrow        ? multiply_rows<S, bf16, false>
                                        : multiply_rows<S, float, false>;
  multiply(p, strip, packed);
}

template <class S>
constexpr SkinnyKernel skinny_kernel() {
  return {kTileRows, kTileWords, pack_block<S>, multiply_strip<S>};
}

}  // namespace
}  // namespace portllm
