// The kernel of dora.h, written once over the same SIMD wrapper S as kernel.h, whose multiplication it takes. To be
// included inside of the target that it is for.
//
// Columns keep their natural order here, and S can have vectors for what is done to them: widen(const E*), of kWidth
// elements; narrow(E*, Vec, Vec), which rounds 2 * kWidth; squares(double*, const Real*), which adds those of kCols<S>
// columns to kLanes sums. Where it has none, loops that the compiler turns into vectors do the same.
//
// A tile's sums go to scratch, one plane for each term that has a norm and one for the plain terms together. In one pass
// the planes hold whole rows, W + D, until the rows' norms are known: they stay in L2, and W is read and written once.
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
    tuned = sums + planes * S::kRows * kCols<S>;
    of_rows = tuned + planes * plane;
    of_columns = of_rows + round_up(norms * S::kRows, 64 / sizeof(Real));
    lanes = reinterpret_cast<double*>(of_columns + norms * padded);
    end = lanes + norms * S::kRows * kLanes;
  }

  int64_t padded, row, plane;  // numbers in a row of W, in a row of `tuned`, and in one of its planes
  Real* a;           // packed factors
  Real* b;
  Real* sums;        // of one tile, [planes][kRows][kCols]
  Real* tuned;       // W + D, and the sum of the plain terms: [planes][kRows][row]
  Real* of_rows;     // strength * magnitude / norm: [norms][kRows]
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
  if constexpr (requires { S::squares(lanes, tuned); }) {
    S::squares(lanes, tuned);
  } else {
    constexpr int kGroup = std::min(kCols<S>, kLanes);
    static_assert(kLanes % kGroup == 0 && kCols<S> % kGroup == 0);
    for (int first = 0; first < kCols<S>; first += kGroup) {
      double* out = lanes + (col + first) % kLanes;
      for (int c = 0; c < kGroup; ++c) out[c] += static_cast<double>(tuned[first + c]) * tuned[first + c];
    }
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

// One pass over a strip of rows.
template <class S, class E, Pass kPass>
class DoraStrip {
 public:
  using Real = typename S::Real;
  using Vec = typename S::Vec;
  static constexpr int kR = S::kRows, kC = kCols<S>;

  DoraStrip(DoraWeight& dora, int64_t strip, int64_t strips, void* scratch)
      : dora_(dora), weight_(dora.weight), place_(dora, scratch), norms_(static_cast<int>(dora.norms.size())) {
    double* of_strips = dora.strip_squares.data();
    for (const Norm& norm : dora.norms) {
      const bool by_column = kPass == Pass::squares && norm.axis == 1;
      columns_.push_back(by_column ? of_strips + strip * weight_.cols : nullptr);
      if (by_column) of_strips += strips * weight_.cols;
    }
  }

  void run(int64_t row, int64_t row_end) {
    const int64_t tiles = place_.padded / kC, stride = weight_.w.row_stride;
    const bool unit = weight_.w.col_stride == 1;
    const auto sums_of = [&](size_t t) { return place_.sums + std::min<int64_t>(t, norms_) * kR * kC; };
    for (; row < row_end; row += kR) {
      const int rows = static_cast<int>(std::min<int64_t>(kR, row_end - row));
      pack_b_terms<S>(weight_, row, rows, place_.b);
      begin(row, rows);
      for (int64_t tile = 0; tile < tiles; ++tile) {
        E* const w = at<E>(weight_.w, row, tile * kC);
        fetch_ahead<kR, kC>(at<E>(weight_.w, row, 0), stride, tile, tiles);
        add_terms<S>(weight_, weight_.cols, tile, place_.a, place_.b, sums_of, 0, [](int) {});
        const int width = static_cast<int>(std::min<int64_t>(kC, weight_.cols - tile * kC));
        for (int i = 0; i < rows; ++i) {
          if (unit && width == kC) {
            finish_tile(w + i * stride, i, tile * kC, kC);
          } else {
            through_buffer(w + i * stride, width, [&](E* x) { finish_tile(x, i, tile * kC, width); });
          }
        }
      }
      finish_rows(row, rows);
      if constexpr (kPass != Pass::both) continue;
      for (int i = 0; i < rows; ++i) {
        for (int64_t tile = 0; tile < tiles; ++tile) {
          E* const w = at<E>(weight_.w, row + i, tile * kC);
          const int width = static_cast<int>(std::min<int64_t>(kC, weight_.cols - tile * kC));
          if (unit && width == kC) {
            combine(w, i, tile * kC);
          } else {
            through_buffer(w, width, [&](E* x) { combine(x, i, tile * kC); });
          }
        }
      }
    }
  }

 private:
  void begin(int64_t row, int rows) {
    if constexpr (kPass == Pass::write) {
      each_row_norm(rows, [&](const Norm& norm, Real& coefficient_of, double*, int i) {
        coefficient_of = coefficient<Real>(norm, row + i, norm.squares[row + i]);
      });
    } else {
      std::fill(place_.lanes, place_.end, 0.0);
    }
  }

  void finish_rows(int64_t row, int rows) {
    if constexpr (kPass == Pass::write) return;
    each_row_norm(rows, [&](const Norm& norm, Real& coefficient_of, double* lanes, int i) {
      double total = 0;
      for (int lane = 0; lane < kLanes; ++lane) total += lanes[lane];
      if constexpr (kPass == Pass::squares) {
        norm.squares[row + i] = total;
      } else {
        coefficient_of = coefficient<Real>(norm, row + i, total);
      }
    });
  }

  template <class F>
  void each_row_norm(int rows, const F& f) {
    for (int p = 0; p < norms_; ++p) {
      if (dora_.norms[p].axis != 0) continue;
      for (int i = 0; i < rows; ++i) {
        f(dora_.norms[p], place_.of_rows[p * kR + i], place_.lanes + (p * kR + i) * kLanes, i);
      }
    }
  }

  Real* tuned(int plane, int i, int64_t col) const {
    return place_.tuned + plane * place_.plane + i * place_.row + (kPass == Pass::both ? col : 0);
  }

  // What is done to a tile's row as soon as its sums are there; w has kC elements, of which `width` are of W.
  [[gnu::always_inline]] void finish_tile(E* w, int i, int64_t col, int width) {
    for (int p = 0; p < norms_; ++p) {
      const Real* sums = place_.sums + (p * kR + i) * kC;
      Real* const out = tuned(p, i, col);
#pragma GCC unroll 4
      for (int v = 0; v < kC; v += S::kWidth) {
        S::store(out + v, S::fma(S::set1(1), widen_vector<S>(w + v), S::load(sums + v)));
      }
      for (int c = width; c < kC; ++c) out[c] = 0;
      if constexpr (kPass != Pass::write) {
        if (columns_[p]) {
          double* squares = columns_[p] + col;
          for (int c = 0; c < width; ++c) squares[c] += static_cast<double>(out[c]) * out[c];
        } else {
          add_to_lanes<S>(place_.lanes + (p * kR + i) * kLanes, out, col);
        }
      }
    }
    if constexpr (kPass != Pass::squares) {
      if (dora_.has_plain()) {
        std::memcpy(tuned(norms_, i, col), place_.sums + (norms_ * kR + i) * kC, kC * sizeof(Real));
      }
    }
    if constexpr (kPass == Pass::write) combine(w, i, col);
  }

  // The total of kC columns, rounded to w, which still has the old values.
  [[gnu::always_inline]] void combine(E* w, int i, int64_t col) {
    const Vec nothing = S::set1(Real{-0.0});
    const Real keep = static_cast<Real>(dora_.keep);
#pragma GCC unroll 2
    for (int v = 0; v < kC; v += 2 * S::kWidth) {
      Vec total[2] = {nothing, nothing};
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        const int c = v + h * S::kWidth;
        if (dora_.keep != 0) total[h] = S::fma(S::set1(keep), widen_vector<S>(w + c), nothing);
        for (int p = 0; p < norms_; ++p) {
          const bool by_column = kPass == Pass::write && dora_.norms[p].axis == 1;
          const Vec x = by_column ? S::load(place_.of_columns + p * place_.padded + col + c)
                                  : S::set1(place_.of_rows[p * kR + i]);
          total[h] = S::fma(x, S::load(tuned(p, i, col) + c), total[h]);
        }
        if (dora_.has_plain()) {
          total[h] = S::fma(S::set1(1), S::load(tuned(norms_, i, col) + c), total[h]);
        }
      }
      narrow_vectors<S>(w + v, total[0], total[1]);
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
  int norms_;
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
      switch (dora.pass) {
        case Pass::squares: return DoraStrip<S, E, Pass::squares>(dora, strip, strips, scratch).run(row, row_end);
        case Pass::write: return DoraStrip<S, E, Pass::write>(dora, strip, strips, scratch).run(row, row_end);
        case Pass::both: return DoraStrip<S, E, Pass::both>(dora, strip, strips, scratch).run(row, row_end);
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
