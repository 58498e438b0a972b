// W <- round(W + sum_t strength_t * (m_t * (W + D_t) / ||W + D_t|| - W)), in place, for a list of weights: DoRA. No torch
// in here. The arithmetic is that of lowrank_dora_ in portllm/reference.py, with D_t summed as in lowrank_add.h, products
// fused with the sums that take them, and squares added up in an order that the shape alone sets:
//   axis 0: columns j with the same j % kLanes are summed in order, then the kLanes sums are;
//   axis 1: rows are summed in order within a strip of square_strip(rows), then the strips are.
// So one pass and two give the same bits, in every variant and with any number of threads.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "cpu/lowrank_add.h"

namespace portllm {

constexpr int kLanes = 16;

// What a term of DoRA has beside its factors.
struct Norm {
  Matrix magnitude;  // of one row
  double strength;
  int axis;         // 0: of each row; 1: of each column
  double* squares;  // [rows] or [cols]; null: they are summed and used in one pass
};

struct DoraWeight {
  enum class Pass {
    squares,  // sums them, and writes nothing else
    write,    // takes them as they are
    both,     // of rows only: one read of W, one write
  };

  Weight weight;  // the terms that have a norm come first
  std::vector<Norm> norms;
  double keep = 1;  // 1 - the sum of the norms' strengths
  Pass pass = Pass::both;
  // Of the squares of columns, for each strip: [norms of axis 1][strips][cols]; set by DoraJob.
  std::vector<double> strip_squares = {};

  bool has_plain() const { return weight.terms.size() > norms.size(); }
  bool has(int axis) const;

  // Turns a weight that lies transposed, and sets what the kernel needs to know of the factors; once, before any job.
  void prepare(const Isa& isa);
};

inline int64_t square_strip(int64_t rows) {
  constexpr int64_t kLeast = 96, kMost = 64, kTileRows = 6;  // rows; strips; those of every exact kernel
  const int64_t strip = rows > kLeast * kMost ? (rows + kMost - 1) / kMost : kLeast;
  return (strip + kTileRows - 1) / kTileRows * kTileRows;
}

// One pass over all weights, cut into strips of rows that any number of threads take one after the other.
class DoraJob {
 public:
  // The weights, which are prepared, must outlive it; those without a row or a column are left out.
  DoraJob(std::vector<DoraWeight*> weights, int64_t threads);

  // How many threads are worth their start, at most as many as were given.
  int64_t threads() const { return threads_; }

  // Takes strips until none is left; to be called once by each thread.
  void work();

  // To be called when all is done.
  void finish();

 private:
  struct Grid {
    int64_t strip_rows;
    int64_t end_block;
  };

  std::vector<DoraWeight*> weights_;
  std::vector<Grid> grids_;
  int64_t blocks_ = 0;
  int64_t threads_ = 1;
  int64_t scratch_bytes_ = 0;
  std::atomic<int64_t> next_{0};
};

}  // namespace portllm
