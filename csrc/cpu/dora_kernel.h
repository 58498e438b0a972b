// The kernel of dora.h, written once over the same SIMD wrapper S as kernel.h, whose multiplication it takes. To be
// included inside of the target that it is for.
//
// Columns keep their natural order here, and S can have vectors for what is done to them: widen(const E*), of kWidth
// elements; narrow(E*, Vec, Vec), which rounds 2 * kWidth; squares(double*, const Vec (&)[kVectors]), which adds those of
// kCols<S> columns to kLanes sums. Where it has none, loops that the compiler turns into vectors do the same.
//
// A tile's sums go to scratch, one plane for each term that has a norm and one for the plain terms together. In one pass
// other planes hold whole rows, W + D, until the rows' norms are known: they stay in L2, and W is read and written once.
// What is written fills the gaps of a later multiplication: that of the next tile, or, in one pass, that of the next rows,
// so that there are two halves of what it is made of.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/dora.h"
#include "cpu/half.h"

namespace portllm {
namespace {

using Pass = DoraWeight::Pass;

// Where what is in scratch.
template <class S>
struct DoraScratch {
  using Real = typename S::Real;

  DoraScratch(const DoraWeight& dora, void* scratch) : a(static_cast<Real*>(scratch)) {
    const Weight& weight = dora.weight;
    const auto norms = static_cast<int64_t>(dora.norms.size());
    const int64_t planes = norms + dora.has_plain();
    const bool whole_rows = dora.pass == Pass::both;
    padded = round_up(weight.cols, kCols<S>);
    row = whole_rows ? padded : kCols<S>;
    plane = S::kRows * row;
    b = a;
    for (const Term& term : weight.terms) b += a_size<S>(term, weight.cols);
    sums = b;
    for (const Term& term : weight.terms) sums += b_size<S>(term);
    tuned = sums + 2 * planes * S::kRows * kCols<S>;
    of_rows = tuned + (whole_rows ? 2 * planes * plane : planes * plane);
    of_columns = of_rows + round_up(2 * norms * S::kRows, 64 / sizeof(Real));
    lanes = reinterpret_cast<double*>(of_columns + norms * padded);
    end = lanes + norms * S::kRows * kLanes;
  }

  int64_t padded, row, plane;  // numbers in a row of W, in a row of `tuned`, and in one of its planes
  Real* a;           // packed factors
  Real* b;
  Real* sums;        // of a tile, [2][planes][kRows][kCols]
  Real* tuned;       // W + D, and the sum of the plain terms: [2][planes][kRows][row] in one pass, else [planes]...
  Real* of_rows;     // strength * magnitude / norm: [2][norms][kRows]
  Real* of_columns;  // the same, [norms][padded]
  double* lanes;     // sums of squares, [norms][kRows][kLanes]
  double* end;
};

template <class S, class E>
[[gnu::always_inline]] inline typename S::Vec widen_vector(const E* w) {
  if constexpr (requires { S::widen(w); }) {
    return S::widen(w);
  } else {
    typename S::Real wide[S::kWidth];
    for (int c = 0; c < S::kWidth; ++c) wide[c] = widen(w[c]);
    return S::load(wide);
  }
}

template <class S, class E>
[[gnu::always_inline]] inline void narrow_vectors(E* w, typename S::Vec first, typename S::Vec second) {
  if constexpr (requires { S::narrow(w, first, second); }) {
    S::narrow(w, first, second);
  } else {
    typename S::Real wide[2 * S::kWidth];
    S::store(wide, first);
    S::store(wide + S::kWidth, second);
    for (int c = 0; c < 2 * S::kWidth; ++c) w[c] = narrow<E>(wide[c]);
  }
}

// Adds the squares of a tile's row, which begins at this column, to the kLanes sums of the row.
template <class S>
[[gnu::always_inline]] inline void add_to_lanes(double* lanes, const typename S::Real* tuned, int64_t col) {
  constexpr int kGroup = std::min(kCols<S>, kLanes);
  static_assert(kLanes % kGroup == 0 && kCols<S> % kGroup == 0);
  for (int first = 0; first < kCols<S>; first += kGroup) {
    double* out = lanes + (col + first) % kLanes;
    for (int c = 0; c < kGroup; ++c) out[c] += static_cast<double>(tuned[first + c]) * tuned[first + c];
  }
}

// strength * magnitude / norm
template <class Real>
Real coefficient(const Norm& norm, int64_t index, double squares) {
  const Real length = static_cast<Real>(std::sqrt(squares));
  if (!(length > 0)) return 0 * static_cast<Real>(norm.strength);
  Real magnitude = 0;
  with_type(norm.magnitude.dtype, [&](auto e) {
    magnitude = static_cast<Real>(widen(*at<decltype(e)>(norm.magnitude, 0, index)));
  });
  return static_cast<Real>(norm.strength) * (magnitude / length);
}

// One pass over a strip of rows; kAlone: of one term, that has a norm and takes the whole of the way, so that nothing of W
// is kept.
template <class S, class E, Pass kPass, bool kAlone>
class DoraStrip {
 public:
  using Real = typename S::Real;
  using Vec = typename S::Vec;
  static constexpr int kR = S::kRows, kC = kCols<S>;

  DoraStrip(DoraWeight& dora, int64_t strip, int64_t strips, void* scratch)
      : dora_(dora),
        weight_(dora.weight),
        place_(dora, scratch),
        many_(static_cast<int>(dora.norms.size())),
        plain_(dora.has_plain()),
        planes_(many_ + plain_),
        keep_(static_cast<Real>(dora.keep)) {
    double* of_strips = dora.strip_squares.data();
    for (const Norm& norm : dora.norms) {
      const bool by_column = kPass == Pass::squares && norm.axis == 1;
      by_column_.push_back(norm.axis == 1);
      columns_.push_back(by_column ? of_strips + strip * weight_.cols : nullptr);
      if (by_column) of_strips += strips * weight_.cols;
    }
  }

  void run(int64_t row, int64_t row_end) {
    const int64_t tiles = place_.padded / kC, stride = weight_.w.row_stride;
    const bool unit = weight_.w.col_stride == 1;
    const auto width_of = [&](int64_t tile) { return static_cast<int>(std::min<int64_t>(kC, weight_.cols - tile * kC)); };
    int late = 0;  // rows that are still to be written: in one pass those before, else those of the tile before
    int half = 0;
    for (; row < row_end; row += kR) {
      const int rows = static_cast<int>(std::min<int64_t>(kR, row_end - row));
      pack_b_terms<S>(weight_, row, rows, place_.b);
      begin(row, rows);
      for (int64_t tile = 0; tile < tiles; ++tile) {
        if constexpr (kPass == Pass::write) half = tile % 2;
        E* const w = at<E>(weight_.w, row, tile * kC);
        const int width = width_of(tile);
        const bool straight = unit && width == kC;
        const int64_t late_col = kPass == Pass::both ? tile * kC : (tile - 1) * kC;
        E* const late_w = at<E>(weight_.w, kPass == Pass::both ? row - kR : row, late_col);
        const auto write = [&](int i) __attribute__((always_inline)) {
          if constexpr (kPass != Pass::squares) combine(late_w + i * stride, i, late_col, 1 - half);
        };
        const auto sums_of = [&](size_t t) { return sums(std::min(static_cast<int>(t), norms()), 0, half); };
        fetch_ahead<kR, kC>(at<E>(weight_.w, row, 0), stride, tile, tiles);
        const int pieces = kPass != Pass::both || straight ? late : 0;
        add_terms<S>(weight_, weight_.cols, tile, place_.a, place_.b, sums_of, pieces, write);
        if (pieces < late) write_tile(row - kR, late, tile, width, 1 - half);
        if constexpr (kPass == Pass::write) {
          late = straight ? rows : 0;
          if (!straight) write_tile(row, rows, tile, width, half);
        } else {
          for (int i = 0; i < rows; ++i) {
            if (straight) {
              tune(w + i * stride, i, tile * kC, kC, half);
            } else {
              through_buffer(w + i * stride, width, [&](E* x) { tune(x, i, tile * kC, width, half); });
            }
          }
        }
      }
      if constexpr (kPass == Pass::write) {
        if (late) write_tile(row, late, tiles - 1, kC, half);
        late = 0;
      } else {
        finish_rows(row, rows, half);
      }
      if constexpr (kPass == Pass::both) {
        late = rows;
        half = 1 - half;
      }
    }
    for (int64_t tile = 0; late && tile < tiles; ++tile) write_tile(row - kR, late, tile, width_of(tile), 1 - half);
  }

 private:
  void begin(int64_t row, int rows) {
    if constexpr (kPass == Pass::write) {
      each_row_norm(rows, 0, [&](const Norm& norm, Real& factor, double*, int i) {
        factor = coefficient<Real>(norm, row + i, norm.squares[row + i]);
      });
    } else {
      std::fill(place_.lanes, place_.end, 0.0);
    }
  }

  void finish_rows(int64_t row, int rows, int half) {
    each_row_norm(rows, half, [&](const Norm& norm, Real& factor, double* lanes, int i) {
      double total = 0;
      for (int lane = 0; lane < kLanes; ++lane) total += lanes[lane];
      if constexpr (kPass == Pass::squares) {
        norm.squares[row + i] = total;
      } else {
        factor = coefficient<Real>(norm, row + i, total);
      }
    });
  }

  template <class F>
  void each_row_norm(int rows, int half, const F& f) {
    for (int p = 0; p < norms(); ++p) {
      if (dora_.norms[p].axis != 0) continue;
      for (int i = 0; i < rows; ++i) {
        f(dora_.norms[p], *of_rows(p, i, half), place_.lanes + (p * kR + i) * kLanes, i);
      }
    }
  }

  // The compiler cannot know otherwise that storing a vector changes none of these.
  int norms() const { return kAlone ? 1 : many_; }
  int planes() const { return kAlone ? 1 : planes_; }

  Real* sums(int plane, int i, int half) const {
    return place_.sums + ((half * planes() + plane) * kR + i) * kC;
  }
  Real* tuned(int plane, int i, int64_t col, int half) const {
    if constexpr (kPass != Pass::both) return place_.tuned + plane * place_.plane + i * place_.row;
    return place_.tuned + (half * planes() + plane) * place_.plane + i * place_.row + col;
  }
  // One pair of halves is enough for the factors of rows: two passes have them for all tiles.
  Real* of_rows(int p, int i, int half) const {
    return place_.of_rows + ((kPass == Pass::both ? half : 0) * norms() + p) * kR + i;
  }

  // W + D of a tile's row and its squares; w has kC elements, of which `width` are of W.
  [[gnu::always_inline]] void tune(E* w, int i, int64_t col, int width, int half) {
    for (int p = 0; p < norms(); ++p) {
      double* const lanes = place_.lanes + (p * kR + i) * kLanes;
      Real* const out = tuned(p, i, col, half);
      Vec x[S::kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < S::kVectors; ++v) {
        x[v] = S::fma(S::set1(1), widen_vector<S>(w + v * S::kWidth), S::load(sums(p, i, half) + v * S::kWidth));
        S::store(out + v * S::kWidth, x[v]);
      }
      if (width < kC) std::fill(out + width, out + kC, Real{0});
      if (columns_[p]) {
        double* const squares = columns_[p] + col;
        const auto add = [&](int c) { squares[c] += static_cast<double>(out[c]) * out[c]; };
        if (width == kC) {
          for (int c = 0; c < kC; ++c) add(c);
        } else {
          for (int c = 0; c < width; ++c) add(c);
        }
      } else if constexpr (requires { S::squares(lanes, x); }) {
        if (width == kC) {
          S::squares(lanes, x);
        } else {
          add_to_lanes<S>(lanes, out, col);
        }
      } else {
        add_to_lanes<S>(lanes, out, col);
      }
    }
    if (kPass == Pass::both && !kAlone && plain_) {
      std::memcpy(tuned(norms(), i, col, half), sums(norms(), i, half), kC * sizeof(Real));
    }
  }

  // The total of kC columns, rounded to w, which still has the old values.
  [[gnu::always_inline]] void combine(E* w, int i, int64_t col, int half) const {
    constexpr bool kFromSums = kPass == Pass::write;  // or from what the pass has kept
    const auto kept = [&](int p) { return kFromSums ? sums(p, i, half) : tuned(p, i, col, half); };
    const auto columns = [&](int p) -> const Real* {
      return kFromSums && by_column_[p] ? place_.of_columns + p * place_.padded + col : nullptr;
    };
    const Vec nothing = S::set1(Real{-0.0});
    const Real* const first = kept(0);
    const Real* const first_columns = kAlone ? columns(0) : nullptr;
    const Vec first_row = kAlone ? S::set1(*of_rows(0, i, half)) : nothing;
#pragma GCC unroll 2
    for (int v = 0; v < kC; v += 2 * S::kWidth) {
      Vec total[2] = {nothing, nothing};
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        const int c = v + h * S::kWidth;
        const Vec base = kFromSums || (!kAlone && keep_ != 0) ? widen_vector<S>(w + c) : nothing;
        const auto add = [&](const Real* from, const Real* of_columns, Vec of_row) __attribute__((always_inline)) {
          Vec x = S::load(from + c);
          if constexpr (kFromSums) x = S::fma(S::set1(1), base, x);
          total[h] = S::fma(kFromSums && of_columns ? S::load(of_columns + c) : of_row, x, total[h]);
        };
        if constexpr (kAlone) {
          add(first, first_columns, first_row);
        } else {
          if (keep_ != 0) total[h] = S::fma(S::set1(keep_), base, nothing);
          for (int p = 0; p < norms(); ++p) add(kept(p), columns(p), S::set1(*of_rows(p, i, half)));
          if (plain_) total[h] = S::fma(S::set1(1), S::load(kept(norms()) + c), total[h]);
        }
      }
      narrow_vectors<S>(w + v, total[0], total[1]);
    }
  }

  // All rows of a tile.
  [[gnu::noinline]] void write_tile(int64_t row, int rows, int64_t tile, int width, int half) {
    for (int i = 0; i < rows; ++i) {
      E* const w = at<E>(weight_.w, row + i, tile * kC);
      if (weight_.w.col_stride == 1 && width == kC) {
        combine(w, i, tile * kC, half);
      } else {
        through_buffer(w, width, [&](E* x) { combine(x, i, tile * kC, half); });
      }
    }
  }

  // A row of a tile that W does not fill, or whose columns lie apart.
  template <class F>
  [[gnu::noinline]] void through_buffer(E* w, int width, const F& f) {
    E buffer[kC] = {};
    const int64_t stride = weight_.w.col_stride;
    for (int c = 0; c < width; ++c) buffer[c] = w[c * stride];
    f(buffer);
    if constexpr (kPass == Pass::squares) return;
    for (int c = 0; c < width; ++c) w[c * stride] = buffer[c];
  }

  DoraWeight& dora_;
  const Weight& weight_;
  DoraScratch<S> place_;
  const int many_;
  const bool plain_;
  const int planes_;
  const Real keep_;
  std::vector<char> by_column_;   // of each norm
  std::vector<double*> columns_;  // of each norm: where the squares of columns go; null: they go to the lanes
};

template <class S>
int64_t dora_scratch(const DoraWeight& dora) {
  const DoraScratch<S> place(dora, nullptr);
  return reinterpret_cast<intptr_t>(place.end);
}

template <class S>
void dora_pack(const DoraWeight& dora, void* scratch) {
  using Real = typename S::Real;
  const DoraScratch<S> place(dora, scratch);
  const Weight& weight = dora.weight;
  pack_in_order<S>(weight, 0, weight.cols, false, place.a);
  if (dora.pass != Pass::write) return;
  Real* out = place.of_columns;
  for (const Norm& norm : dora.norms) {
    for (int64_t j = 0; norm.axis == 1 && j < place.padded; ++j) {
      out[j] = j < weight.cols ? coefficient<Real>(norm, j, norm.squares[j]) : 0;
    }
    out += place.padded;
  }
}

template <class S>
void dora_pass(DoraWeight& dora, int64_t strip, int64_t strip_rows, void* scratch) {
  const int64_t strips = (dora.weight.rows + strip_rows - 1) / strip_rows;
  const int64_t row = strip * strip_rows, row_end = std::min(row + strip_rows, dora.weight.rows);
  with_type(dora.weight.w.dtype, [&](auto e) {
    using E = decltype(e);
    if constexpr (std::is_same_v<E, double> == std::is_same_v<typename S::Real, double>) {
      const auto run = [&]<Pass kPass>() {
        if (dora.norms.size() == 1 && !dora.has_plain() && dora.keep == 0) {
          DoraStrip<S, E, kPass, true>(dora, strip, strips, scratch).run(row, row_end);
        } else {
          DoraStrip<S, E, kPass, false>(dora, strip, strips, scratch).run(row, row_end);
        }
      };
      switch (dora.pass) {
        case Pass::squares: return run.template operator()<Pass::squares>();
        case Pass::write: return run.template operator()<Pass::write>();
        case Pass::both: return run.template operator()<Pass::both>();
      }
    }
  });
}

template <class S>
constexpr DoraKernel dora_kernel() {
  return {dora_scratch<S>, dora_pack<S>, dora_pass<S>};
}

}  // namespace
}  // namespace portllm
