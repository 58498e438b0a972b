// W <- round(W + sum_t s_t * (B_t A_t)), in place, for a list of weights. No torch in here.
#pragma once

#include <atomic>
#include <cstdint>
#include <span>
#include <vector>

#include "cpu/skinny.h"
#include "matrix.h"

namespace portllm {

struct Term {
  Matrix a;  // [rank, cols]
  Matrix b;  // [rows, rank]
  int64_t rank;
  double scaling;
  // Set by Job. Whether the instruction that adds two bf16 products at a time gives the same bits:
  bool pairs = false;
  // How many numbers of bf16 each element of A, and of B times the scaling, is the sum of:
  int parts_a = 3;
  int parts_b = 3;
};

struct Kernel;

struct Weight {
  Matrix w;  // [rows, cols]
  int64_t rows;
  int64_t cols;
  std::span<Term> terms;  // of the caller, who keeps those of all weights in one vector
  const Kernel* kernel = nullptr;  // set by Job
};

// What is done to each element, whatever the tiling and the number of threads, in every variant but
// that with a matrix unit, so that all of them give one result to the last bit (c is float, or double
// where W is double):
//   sum = 0; for t: { d = 0; for k: d = fma(B[i,k], A[k,j], d); sum = fma(s, d, sum); }
//   w = round_to_nearest_even(c(w) + sum), with every NaN written as the positive quiet one.
// Only fp64 factors of narrower weights are rounded, to float, before. On the matrix unit the sum is
// as good as one in fp32, in an order that the ranks and the factors' formats set (isa_amx.cpp).
//
// A kernel is one way to do it.
struct Kernel {
  int tile_rows;
  int tile_cols;
  // Packed A of one panel is read again for every tile of rows: bytes that stay in L2.
  int64_t panel_bytes;
  // Bytes of scratch that a block of so many columns needs.
  int64_t (*scratch)(const Weight&, int64_t cols);
  // Packs the columns [col, col + cols) of every A into scratch.
  void (*pack)(const Weight&, int64_t col, int64_t cols, void* scratch);
  // Updates rows [row, row_end) of the columns that scratch holds.
  void (*update)(const Weight&, int64_t row, int64_t row_end, int64_t col, int64_t cols,
                 void* scratch);
};

struct Isa {
  const char* name;
  Kernel single;
  Kernel fp64;  // for fp64 weights
  SkinnyKernel skinny;
  bool pairs;   // has the instruction that Term::pairs speaks of
  Kernel matrix{};      // on a matrix unit, up to fp32
  int matrix_rank = 0;  // from which it is faster than `single`; 0: there is none
};

// The fastest variant that the CPU has, or the one that PORTLLM_CPU_ISA names; null if that one
// is unknown or the CPU lacks it.
const Isa* chosen_isa();

// One job over all weights, cut into blocks that any number of threads take one after the other.
class Job {
 public:
  // Changes the terms (see Term), which must outlive it.
  Job(const Isa& isa, std::vector<Weight> weights, int64_t threads);

  // How many threads are worth their start, at most as many as were given.
  int64_t threads() const { return threads_; }

  // Takes blocks until none is left; to be called once by each thread.
  void work();

 private:
  struct Grid {
    int64_t panel_cols;
    int64_t strip_rows;
    int64_t strips;
    int64_t first_block;  // blocks are numbered through all weights; small weights share one
    int64_t end_block;
  };

  std::vector<Weight> weights_;
  std::vector<Grid> grids_;
  int64_t blocks_ = 0;
  int64_t threads_ = 1;
  int64_t scratch_bytes_ = 0;
  std::atomic<int64_t> next_{0};
};

}  // namespace portllm
