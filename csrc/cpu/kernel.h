// The kernel, written once over a small SIMD wrapper S and compiled by each isa_*.cpp for its own
// target. S::Single and S::Double give: Real, Vec, kWidth, kRows (of a tile), kVectors (of its
// columns), kPairs, zero, set1, load, store, fma; dot where kPairs; and update(E* w, Vec, Vec) for
// each dtype E of weights. Where it can, also record and restore, which do with vectors what
// record_one and restore_one do.
//
// A step of k is one k, or two where a term's factors go in as pairs (see Term). Scratch holds A of
// a panel as [term][column tile][step][kCols] and B of a tile of rows as
// [term][step / kChunk][kRows][kChunk], zeros where the matrices end. One column tile of A is read
// in order; the rows of B are a constant distance apart, which spares their pointers.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/half.h"
#include "cpu/lowrank_add.h"
#include "cpu/requantise_kernel.h"
#include "cpu/rounding.h"
#include "cpu/skinny_kernel.h"
#include "cpu/undo.h"

namespace portllm {
namespace {

constexpr int kChunk = 16;
// How many column tiles ahead of the arithmetic W is fetched.
constexpr int kAhead = 4;

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// Calls f with a value of the C++ type that a dtype stands for.
template <class F>
void with_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::bf16: return f(bf16{});
    case DType::fp16: return f(fp16{});
    case DType::fp32: return f(float{});
    case DType::fp64: return f(double{});
  }
}

template <class E>
E* at(const Matrix& x, int64_t row, int64_t col) {
  return static_cast<E*>(x.data) + row * x.row_stride + col * x.col_stride;
}

template <class S>
constexpr int kCols = S::kVectors * S::kWidth;

// bf16 pairs are widened in place: one vector takes the even columns, the next one the odd ones.
template <class S>
int position(int col, bool even_odd) {
  if (!even_odd) return col;
  const int in_pair = col % (2 * S::kWidth);
  return col - in_pair + in_pair % 2 * S::kWidth + in_pair / 2;
}

inline int64_t steps(const Term& term) { return term.pairs ? (term.rank + 1) / 2 : term.rank; }

template <class S>
int64_t a_size(const Term& term, int64_t cols) {
  return steps(term) * round_up(cols, kCols<S>);
}

template <class S>
int64_t b_size(const Term& term) {
  return round_up(steps(term), kChunk) * S::kRows;
}

template <class S>
int64_t scratch_size(const Weight& weight, int64_t cols) {
  int64_t size = 0;
  for (const Term& term : weight.terms) size += a_size<S>(term, cols) + b_size<S>(term);
  return size;
}

// Of the chunks of a tile of so many rows, the old ones and the new ones.
template <class E>
Log<Bits<E>>* logs_in(void* scratch, int64_t bytes) {
  const auto end = reinterpret_cast<uintptr_t>(scratch) + bytes;
  return reinterpret_cast<Log<Bits<E>>*>((end + 63) & ~uintptr_t{63});
}

inline int64_t log_bytes(const Weight& weight, int rows) {
  if (!weight.undoes()) return 0;
  int64_t size = 0;
  with_type(weight.w.dtype, [&](auto e) { size = 2 * rows * sizeof(Log<Bits<decltype(e)>>); });
  return size + 64;
}

inline uint32_t as_bf16(bf16 x) { return x.bits; }
inline uint32_t as_bf16(float x) { return std::bit_cast<uint32_t>(x) >> 16; }

template <class S, class E>
constexpr bool kCanPair = S::kPairs && (std::is_same_v<E, bf16> || std::is_same_v<E, float>);

// Reads one column of A, or one row of B, a step at a time. Of a pair, `dot` takes the upper half
// first; where an odd rank leaves a pair incomplete, -0 * 0 changes no sum, not even the sign of 0.
template <class Real, class E, bool kPairs, uint16_t kPad>
struct Steps {
  const E* data;
  int64_t stride;
  int64_t rank;

  Real operator[](int64_t step) const {
    if constexpr (kPairs) {
      const uint32_t first = as_bf16(data[2 * step * stride]);
      const uint32_t second = 2 * step + 1 < rank ? as_bf16(data[(2 * step + 1) * stride]) : kPad;
      return std::bit_cast<float>(first << 16 | second);
    } else {
      return static_cast<Real>(widen(data[step * stride]));
    }
  }
};

template <class S, class E, bool kPairs>
void pack_a(const Term& term, int64_t col, int64_t cols, bool even_odd,
            typename S::Real* __restrict out) {
  using Real = typename S::Real;
  using Column = Steps<Real, E, kPairs, 0x8000>;
  constexpr int kC = kCols<S>;
  const int64_t count = steps(term);
  const int64_t stride = term.a.row_stride;
  if (term.a.col_stride != 1) {
    for (int64_t j = 0; j < round_up(cols, kC); ++j) {
      Real* o = out + j / kC * count * kC + position<S>(j % kC, even_odd);
      const Column column{at<E>(term.a, 0, col + j), stride, term.rank};
      for (int64_t k = 0; k < count; ++k) o[k * kC] = j < cols ? column[k] : Real{0};
    }
    return;
  }
  for (int64_t k = 0; k < count; ++k) {
    const E* in = at<E>(term.a, 0, col);
    Real* o = out + k * kC;
    for (int64_t j = 0; j < cols; j += kC, o += count * kC) {
      Real wide[kC];
      if (cols - j >= kC) {
        for (int c = 0; c < kC; ++c) wide[c] = Column{in + j + c, stride, term.rank}[k];
      } else {
        for (int c = 0; c < kC; ++c) {
          wide[c] = j + c < cols ? Column{in + j + c, stride, term.rank}[k] : Real{0};
        }
      }
      if (even_odd) {
        for (int p = 0; p < kC; p += 2 * S::kWidth) {
          for (int c = 0; c < S::kWidth; ++c) {
            o[p + c] = wide[p + 2 * c];
            o[p + S::kWidth + c] = wide[p + 2 * c + 1];
          }
        }
      } else {
        std::memcpy(o, wide, sizeof wide);
      }
    }
  }
}

template <class S, class E, bool kPairs>
void pack_b(const Term& term, int64_t row, int64_t rows, typename S::Real* __restrict out) {
  using Real = typename S::Real;
  for (int64_t k = 0; k < steps(term); k += kChunk, out += S::kRows * kChunk) {
    const int64_t count = std::min<int64_t>(kChunk, steps(term) - k);
    for (int i = 0; i < S::kRows; ++i) {
      Real* o = out + i * kChunk;
      if (i >= rows) {
        std::memset(o, 0, kChunk * sizeof *o);
        continue;
      }
      const Steps<Real, E, kPairs, 0> in{at<E>(term.b, row + i, 0), term.b.col_stride, term.rank};
      if (in.stride == 1 && count == kChunk) {
        const Steps<Real, E, kPairs, 0> unit{in.data, 1, term.rank};
        for (int c = 0; c < kChunk; ++c) o[c] = unit[k + c];
      } else {
        for (int c = 0; c < count; ++c) o[c] = in[k + c];
      }
    }
  }
}

template <class S>
void pack_b_term(const Term& term, int64_t row, int64_t rows, typename S::Real* out) {
  with_type(term.b.dtype, [&](auto e) {
    using E = decltype(e);
    if constexpr (kCanPair<S, E>) {
      if (term.pairs) return pack_b<S, E, true>(term, row, rows, out);
    }
    pack_b<S, E, false>(term, row, rows, out);
  });
}

// The part of W that one tile updates.
template <class E>
struct Target {
  E* w;
  int64_t row_stride;
  int64_t col_stride;
  int rows;
  int cols;
  int64_t col;  // the first one's in W
};

template <class S>
using Accumulators = typename S::Vec[S::kRows][S::kVectors];

// One step: d += b[:, k] * a[k, :].
template <class S, bool kPairs>
[[gnu::always_inline]] inline void multiply(const typename S::Real* a, const typename S::Real* b,
                                            Accumulators<S>& d) {
  typename S::Vec x[S::kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < S::kVectors; ++v) x[v] = S::load(a + v * S::kWidth);
#pragma GCC unroll 16
  for (int i = 0; i < S::kRows; ++i) {
    const typename S::Vec y = S::set1(b[i * kChunk]);
#pragma GCC unroll 4
    for (int v = 0; v < S::kVectors; ++v) {
      if constexpr (kPairs) {
        d[i][v] = S::dot(y, x[v], d[i][v]);
      } else {
        d[i][v] = S::fma(y, x[v], d[i][v]);
      }
    }
  }
}

// Row i of a tile, whose first element is in column `col` of W.
template <class S, class E, class Modes>
[[gnu::always_inline]] inline void update_row(E* w, const typename S::Real* sums, const Modes& modes,
                                              int i, int64_t col) {
#pragma GCC unroll 4
  for (int v = 0; v < S::kVectors; v += 2) {
    const int at = v * S::kWidth;
    modes.template update<S>(i, w + at, S::load(sums + at), S::load(sums + at + S::kWidth), col + at);
  }
}

// d = b * a for one tile. Meanwhile, piece by piece between the steps of k, W takes the finished sums of
// another tile, which is what done(i) does for i < pieces: so its update fills the gaps of the
// multiplication.
template <class S, bool kPairs, class Done>
[[gnu::always_inline]] inline void multiply_tile(const typename S::Real* a,
                                                 const typename S::Real* b, int64_t count,
                                                 int pieces, const Done& done, Accumulators<S>& d) {
#pragma GCC unroll 16
  for (int i = 0; i < S::kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < S::kVectors; ++v) d[i][v] = S::zero();
  }
  const int both = static_cast<int>(std::min<int64_t>(pieces, std::min<int64_t>(count, kChunk)));
#pragma GCC unroll 1
  for (int i = 0; i < both; ++i, a += kCols<S>) {
    multiply<S, kPairs>(a, b + i, d);
    done(i);
  }
  for (int64_t k = both; k < count;) {
    const typename S::Real* chunk = b + k / kChunk * kChunk * S::kRows;
    const int64_t end = std::min<int64_t>(count, k / kChunk * kChunk + kChunk);
#pragma GCC unroll 1
    for (; k < end; ++k, a += kCols<S>) multiply<S, kPairs>(a, chunk + k % kChunk, d);
  }
#pragma GCC unroll 1
  for (int i = both; i < pieces; ++i) done(i);
}

// sums = s * (b * a) + sums for one tile and term.
template <class S, bool kPairs, class Done>
void add_term(const typename S::Real* a, const typename S::Real* b, int64_t count,
              typename S::Real scaling, bool first, typename S::Real* sums, int pieces,
              const Done& done) {
  Accumulators<S> d;
  multiply_tile<S, kPairs>(a, b, count, pieces, done, d);
  const typename S::Vec s = S::set1(scaling);
#pragma GCC unroll 16
  for (int i = 0; i < S::kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < S::kVectors; ++v) {
      typename S::Real* sum = sums + i * kCols<S> + v * S::kWidth;
      S::store(sum, S::fma(s, d[i][v], first ? S::zero() : S::load(sum)));
    }
  }
}

// A tile that W does not fill, or whose columns lie apart: through a buffer.
template <class S, class E, class Modes>
[[gnu::noinline]] void update_edge(const Target<E>& target, const typename S::Real* sums,
                                   const Modes& modes) {
  constexpr int kPair = 2 * S::kWidth;
  for (int i = 0; i < target.rows; ++i) {
    for (int j = 0; j < target.cols; j += kPair) {
      const int count = std::min(kPair, target.cols - j);
      E* w = target.w + i * target.row_stride + j * target.col_stride;
      E buffer[kPair] = {};
      for (int c = 0; c < count; ++c) buffer[c] = w[c * target.col_stride];
      const typename S::Real* sum = sums + i * kCols<S> + j;
      modes.template update<S>(i, buffer, S::load(sum), S::load(sum + S::kWidth), target.col + j);
      for (int c = 0; c < count; ++c) w[c * target.col_stride] = buffer[c];
    }
  }
}

// One element of W at a time. Recording is adding, and noting down what takes it off again.
template <class E, class Real>
void record_one(E& w, Real sum, int column, Log<Bits<E>>& log) {
  using U = Bits<E>;
  const U before = std::bit_cast<U>(w);
  w = narrow<E>(widen(w) + sum);
  const U guessed = guess(w, sum), code = before - guessed;
  if ((std::bit_cast<U>(w) & kExponent<E>) > (guessed & kExponent<E>)) {
    log.codes[log.members++] = code;
  } else if (code != 0) {
    log.stray[log.strays++] = {static_cast<uint16_t>(column), before};
  }
}

template <class E, class Real>
void restore_one(E& w, Real sum, int column, Log<Bits<E>>& log) {
  using U = Bits<E>;
  U guessed = guess(w, sum);
  if ((std::bit_cast<U>(w) & kExponent<E>) > (guessed & kExponent<E>)) guessed += log.codes[log.next++];
  if (log.next_stray < log.strays && log.stray[log.next_stray].column == column) {
    guessed = log.stray[log.next_stray++].bits;
  }
  w = std::bit_cast<E>(guessed);
}

// Does f(element, its place among the sums, column) for the elements of one row of a tile, in order.
template <class S, class E, class F>
void each_element(E* w, int64_t col_stride, int cols, const F& f) {
  for (int c = 0; c < cols; ++c) f(w[c * col_stride], position<S>(c, std::is_same_v<E, bf16>), c);
}

template <class S, class E>
constexpr bool kVectorUndo = requires(E* w, typename S::Vec x, Log<Bits<E>>& log) {
  S::template record<S>(w, x, x, 0, log);
};

// Takes off the sums of `old` and adds the sums of `now`, where a null log means neither: for what two
// vectors hold of a row,
template <class S, class E>
[[gnu::always_inline]] inline void exchange_pair(E* w, int column, const typename S::Real* old_sums,
                                                 Log<Bits<E>>* old, const typename S::Real* sums,
                                                 Log<Bits<E>>* now) {
  if (old) {
    S::template restore<S>(w, S::load(old_sums), S::load(old_sums + S::kWidth), *old);
    const auto& stray = old->stray;
    for (int& i = old->next_stray;
         i < old->strays && stray[i].column < column + 2 * S::kWidth; ++i) {
      w[stray[i].column - column] = std::bit_cast<E>(stray[i].bits);
    }
  }
  if (now) S::template record<S>(w, S::load(sums), S::load(sums + S::kWidth), column, *now);
}

// and for a whole row of a tile, element by element.
template <class S, class E>
[[gnu::noinline]] void exchange_row(E* w, int64_t col_stride, int cols, int column,
                                    const typename S::Real* old_sums, Log<Bits<E>>* old,
                                    const typename S::Real* sums, Log<Bits<E>>* now) {
  if (old) {
    each_element<S>(w, col_stride, cols,
                    [&](E& x, int at, int c) { restore_one(x, old_sums[at], column + c, *old); });
  }
  if (now) {
    each_element<S>(w, col_stride, cols,
                    [&](E& x, int at, int c) { record_one(x, sums[at], column + c, *now); });
  }
}

// The undoing of one block: which chunks lie where, and what of them is at hand.
template <class S, class E>
class Exchange {
 public:
  using Real = typename S::Real;

  Exchange(const Weight& weight, int tile_rows, void* scratch, int64_t bytes,
           Recorded& recorded)
      : weight_(weight),
        old_(weight.old_terms ? logs_in<E>(scratch, bytes) : nullptr),
        now_(weight.lengths ? logs_in<E>(scratch, bytes) + tile_rows : nullptr),
        chunks_((weight.cols + kSpan - 1) / kSpan),
        recorded_(recorded) {
    for (int i = 0; now_ && i < tile_rows; ++i) now_[i].clear();
    recorded.rows.resize(std::max<size_t>(recorded.rows.size(), tile_rows));
  }

  // To be called before the rows of a tile, which begins at this row and column of W.
  void begin(int64_t row, int rows, int64_t col) {
    row_ = row;
    rows_ = rows;
    chunk_ = col / kSpan;
    column_ = static_cast<int>(col % kSpan);
    if (!old_ || column_ != 0) return;
    const Record& record = weight_.record;
    for (int i = 0; i < rows; ++i) {
      const uint16_t* lengths = record.lengths + (row + i) * chunks_;
      int64_t start = record.starts[row + i];
      for (int64_t c = 0; c < chunk_; ++c) start += lengths[c];
      const int64_t columns = std::min(kSpan, weight_.cols - chunk_ * kSpan);
      fits_ &= unpack_log<S>(record.data + start, lengths[chunk_], columns, old_[i]);
    }
  }

  // The tile's pairs of vectors, numbered through its rows.
  static constexpr int kPairs = S::kVectors / 2;
  [[gnu::always_inline]] void pair(int j, E* w, const Real* old_sums, const Real* sums) const {
    const int i = j / kPairs, c = j % kPairs * 2 * S::kWidth;
    const int64_t at = i * kCols<S> + c;
    exchange_pair<S, E>(w + i * weight_.w.row_stride + c, column_ + c, old_sums + at,
                        old_ ? old_ + i : nullptr, sums + at, now_ ? now_ + i : nullptr);
  }

  // Its rows, of any number of columns.
  void rows(E* w, int cols, const Real* old_sums, const Real* sums) const {
    for (int i = 0; i < rows_; ++i) {
      exchange_row<S, E>(w + i * weight_.w.row_stride, weight_.w.col_stride, cols, column_,
                         old_sums + i * kCols<S>, old_ ? old_ + i : nullptr, sums + i * kCols<S>,
                         now_ ? now_ + i : nullptr);
    }
  }

  // And after them, of so many columns.
  void end(int cols) {
    const int64_t past = chunk_ * kSpan + column_ + cols;
    if (past % kSpan != 0 && past != weight_.cols) return;
    for (int i = 0; i < rows_; ++i) {
      if (old_) fits_ &= old_[i].next == old_[i].members && old_[i].next_stray == old_[i].strays;
      if (now_) {
        weight_.lengths[(row_ + i) * chunks_ + chunk_] = pack_log<S>(now_[i], recorded_.rows[i]);
        now_[i].clear();
      }
    }
  }

  // After the last tile of these rows.
  void end_rows() {
    for (int i = 0; now_ && i < rows_; ++i) {
      Bytes& row = recorded_.rows[i];
      if (row.size() == 0) continue;
      std::memcpy(recorded_.bytes.room(row.size()), row.data(), row.size());
      recorded_.bytes.add(row.size());
      row.clear();
    }
  }

  bool fits() const { return fits_; }

 private:
  const Weight& weight_;
  Log<Bits<E>>* old_;
  Log<Bits<E>>* now_;
  int64_t chunks_;
  Recorded& recorded_;
  int64_t row_ = 0, chunk_ = 0;
  int rows_ = 0, column_ = 0;
  bool fits_ = true;
};

// Fetches the part of W that comes up kAhead tiles after this one, in this strip of rows or the next.
// Rows lie pages apart, which is more than the hardware's prefetcher follows.
template <int kRows, int kColumns, class E>
[[gnu::always_inline]] inline void fetch_ahead(const E* strip, int64_t row_stride, int64_t tile,
                                               int64_t tiles) {
  const int64_t ahead = tile + kAhead;
  const E* next = ahead < tiles ? strip + ahead * kColumns
                                : strip + kRows * row_stride + (ahead - tiles) * kColumns;
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    for (size_t line = 0; line < kColumns; line += 64 / sizeof(E)) {
      __builtin_prefetch(next + i * row_stride + line);
    }
  }
}

// B of all terms, for one tile of rows.
template <class S>
void pack_b_terms(const Weight& weight, int64_t row, int64_t rows, typename S::Real* out) {
  for (const Term& term : weight.terms) {
    pack_b_term<S>(term, row, rows, out);
    out += b_size<S>(term);
  }
}

// The sums of one tile: those of a term go to sums_of(its index), where each of them begins anew when
// the place is another than before.
template <class S, class SumsOf, class Done>
[[gnu::always_inline]] inline void add_terms(const Weight& weight, int64_t cols, int64_t tile,
                                             const typename S::Real* a, const typename S::Real* b,
                                             const SumsOf& sums_of, int pieces,
                                             const Done& done) {
  using Real = typename S::Real;
  const Real* before = nullptr;
  for (size_t t = 0; t < weight.terms.size(); ++t) {
    const Term& term = weight.terms[t];
    const auto add = term.pairs ? add_term<S, S::kPairs, Done> : add_term<S, false, Done>;
    Real* sums = sums_of(t);
    add(a + tile * steps(term) * kCols<S>, b, steps(term), static_cast<Real>(term.scaling),
        sums != before, sums, pieces, done);
    before = sums;
    pieces = 0;
    a += a_size<S>(term, cols);
    b += b_size<S>(term);
  }
}

template <class S, class E, bool kModes>
void update_block(const Weight& weight, int64_t row, int64_t row_end, int64_t col, int64_t cols,
                  typename S::Real* a) {
  using Real = typename S::Real;
  constexpr int kR = S::kRows, kC = kCols<S>;
  const int64_t tiles = round_up(cols, kC) / kC;
  const int64_t row_stride = weight.w.row_stride, col_stride = weight.w.col_stride;
  Real* b = a;
  for (const Term& term : weight.terms) b += a_size<S>(term, cols);
  alignas(64) Real sums[2][kR * kC];
  RowModes<kModes, kR> modes;
  for (; row < row_end; row += kR) {
    const int rows = static_cast<int>(std::min<int64_t>(kR, row_end - row));
    pack_b_terms<S>(weight, row, rows, b);
    modes.begin(weight, row);
    Target<E> done{};
    for (int64_t tile = 0; tile < tiles; ++tile) {
      fetch_ahead<kR, kC>(at<E>(weight.w, row, col), row_stride, tile, tiles);
      Real* mine = sums[tile % 2];
      const Real* finished = sums[1 - tile % 2];
      const auto update = [&](int i) __attribute__((always_inline)) {
        update_row<S>(done.w + i * row_stride, finished + i * kC, modes, i, done.col);
      };
      add_terms<S>(weight, cols, tile, a, b, [&](size_t) { return mine; }, done.rows, update);
      const int width = static_cast<int>(std::min<int64_t>(kC, cols - tile * kC));
      const int64_t first = col + tile * kC;
      done = {at<E>(weight.w, row, first), row_stride, col_stride, rows, width, first};
      if (width < kC || col_stride != 1) {
        update_edge<S>(done, mine, modes);
        done.rows = 0;
      }
    }
    for (int i = 0; i < done.rows; ++i) {
      update_row<S>(done.w + i * row_stride, sums[(tiles - 1) % 2] + i * kC, modes, i, done.col);
    }
  }
}

// The same with records, where the terms to be taken off have sums of their own.
template <class S, class E>
bool exchange_block(const Weight& weight, int64_t row, int64_t row_end, int64_t col, int64_t cols,
                    typename S::Real* a, Recorded& recorded) {
  using Real = typename S::Real;
  constexpr int kR = S::kRows, kC = kCols<S>;
  const int64_t tiles = round_up(cols, kC) / kC;
  const int64_t row_stride = weight.w.row_stride, col_stride = weight.w.col_stride;
  Real* b = a;
  for (const Term& term : weight.terms) b += a_size<S>(term, cols);
  Exchange<S, E> exchange(weight, kR, a, scratch_size<S>(weight, cols) * sizeof(Real), recorded);
  alignas(64) Real sums[2][2][kR * kC];
  for (; row < row_end; row += kR) {
    const int rows = static_cast<int>(std::min<int64_t>(kR, row_end - row));
    pack_b_terms<S>(weight, row, rows, b);
    int pairs = 0;  // of the tile before, which are done between the steps of the next one's sums
    for (int64_t tile = 0; tile <= tiles; ++tile) {
      E* const before = at<E>(weight.w, row, col + (tile - 1) * kC);
      const Real(*finished)[kR * kC] = sums[1 - tile % 2];
      const auto finish = [&](int j) __attribute__((always_inline)) {
        if constexpr (kVectorUndo<S, E>) exchange.pair(j, before, finished[0], finished[1]);
      };
      if (tile == tiles) {
        for (int j = 0; j < pairs; ++j) finish(j);
      } else {
        fetch_ahead<kR, kC>(at<E>(weight.w, row, col), row_stride, tile, tiles);
        const auto sums_of = [&](size_t t) { return sums[tile % 2][t >= weight.old_terms]; };
        add_terms<S>(weight, cols, tile, a, b, sums_of, pairs, finish);
      }
      if (pairs > 0) exchange.end(kC);
      pairs = 0;
      if (tile == tiles) break;
      const int width = static_cast<int>(std::min<int64_t>(kC, cols - tile * kC));
      exchange.begin(row, rows, col + tile * kC);
      if (kVectorUndo<S, E> && width == kC && col_stride == 1) {
        pairs = rows * Exchange<S, E>::kPairs;
      } else {
        exchange.rows(at<E>(weight.w, row, col + tile * kC), width, sums[tile % 2][0],
                      sums[tile % 2][1]);
        exchange.end(width);
      }
    }
    exchange.end_rows();
  }
  return exchange.fits();
}

template <class S>
void pack(const Weight& weight, int64_t col, int64_t cols, typename S::Real* out) {
  const bool even_odd = weight.w.dtype == DType::bf16;
  for (const Term& term : weight.terms) {
    with_type(term.a.dtype, [&](auto e) {
      using E = decltype(e);
      if constexpr (kCanPair<S, E>) {
        if (term.pairs) return pack_a<S, E, true>(term, col, cols, even_odd, out);
      }
      pack_a<S, E, false>(term, col, cols, even_odd, out);
    });
    out += a_size<S>(term, cols);
  }
}

template <class S>
int64_t exact_scratch(const Weight& weight, int64_t cols) {
  return scratch_size<S>(weight, cols) * static_cast<int64_t>(sizeof(typename S::Real)) +
         log_bytes(weight, S::kRows);
}

template <class S>
void exact_pack(const Weight& weight, int64_t col, int64_t cols, void* scratch) {
  pack<S>(weight, col, cols, static_cast<typename S::Real*>(scratch));
}

// Recording takes registers that sums would have.
template <class S>
struct FewRows : S {
  static constexpr int kRows = 4;
};

template <class S>
bool exact_update(const Weight& weight, int64_t row, int64_t row_end, int64_t col, int64_t cols,
                  void* scratch, Recorded& recorded) {
  bool fits = true;
  with_type(weight.w.dtype, [&](auto e) {
    using E = decltype(e);
    if constexpr (std::is_same_v<E, double> == std::is_same_v<typename S::Real, double>) {
      auto* const a = static_cast<typename S::Real*>(scratch);
      if (weight.undoes()) {
        fits = exchange_block<FewRows<S>, E>(weight, row, row_end, col, cols, a, recorded);
      } else if (weight.mode.any()) {
        update_block<S, E, true>(weight, row, row_end, col, cols, a);
      } else {
        update_block<S, E, false>(weight, row, row_end, col, cols, a);
      }
    }
  });
  return fits;
}

template <class S>
constexpr Kernel exact_kernel() {
  return {S::kRows, kCols<S>, 320 << 10, exact_scratch<S>, exact_pack<S>, exact_update<S>};
}

// S takes the weights up to fp32, D those in fp64.
template <class S, class D>
const Isa* isa(const char* name) {
  static const Isa table{name, exact_kernel<S>(), exact_kernel<D>(), skinny_kernel<S>(), requantise_kernel<S>(), S::kPairs};
  return &table;
}

}  // namespace
}  // namespace portllm
