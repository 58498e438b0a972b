// W <- round(W + sum_t s_t * (B_t A_t)), in place, for a list of weights. No torch in here.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
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

// Bytes that grow, and are not zeroed first.
class Bytes {
 public:
  // Where the next ones go, of which there may be so many; add() then says how many there are.
  uint8_t* room(size_t most) {
    if (size_ + most > capacity_) grow(size_ + most);
    return data_.get() + size_;
  }
  void add(size_t count) { size_ += count; }
  void clear() { size_ = 0; }
  const uint8_t* data() const { return data_.get(); }
  size_t size() const { return size_; }

 private:
  void grow(size_t least);

  std::unique_ptr<uint8_t[]> data_;
  size_t size_ = 0, capacity_ = 0;
};

// The chunks that one thread has recorded.
struct Recorded {
  Bytes bytes;
  std::vector<Bytes> rows;  // of the tile of rows that is being updated
};

// What takes an update of a weight off again; the bytes of a chunk are described in undo.h.
struct Record {
  const uint16_t* lengths;           // in bytes, of each chunk, [rows][ceil(cols / kSpan)]
  const uint8_t* data;               // of all weights, one after the other
  std::vector<int64_t> starts = {};  // where in data each row begins; set by Job
};

// How the sums of a weight are stored; see portllm/noise.py.
struct Mode {
  bool stochastic = false;  // by chance; else to nearest. Weights of more than 16 bits always to nearest
  bool keep_zeros = false;
  bool flipped = false;  // each random bit is its opposite
  bool turned = false;   // rows and columns have changed places; set by Job
  uint64_t key = 0;
  uint32_t row = 0, column = 0;  // of the weight's first element in the whole tensor

  bool any() const { return stochastic || keep_zeros; }
};

struct Weight {
  Matrix w;  // [rows, cols]
  int64_t rows;
  int64_t cols;
  std::span<Term> terms;  // of the caller, who keeps those of all weights in one vector
  // The first of the terms are taken off with the help of their record; what the others do can be
  // recorded: the lengths of the chunks go here.
  size_t old_terms = 0;
  Record record = {};
  uint16_t* lengths = nullptr;
  const Kernel* kernel = nullptr;  // set by Job
  Mode mode = {};

  bool undoes() const { return old_terms > 0 || lengths; }

  // Whether a row of the weight in memory is a column here, and the other way round; Job turns it.
  bool lies_turned() const { return w.col_stride != 1 && w.row_stride == 1; }
  // How many chunks a record has.
  int64_t chunks() const;
};

// What is done to each element, whatever the tiling and the number of threads, in every variant but
// that with a matrix unit, so that all of them give one result to the last bit (c is float, or double
// where W is double):
//   sum = 0; for t: { d = 0; for k: d = fma(B[i,k], A[k,j], d); sum = fma(s, d, sum); }
//   w = round_to_nearest_even(c(w) + sum), with every NaN written as the positive quiet one; or as the
//   weight's mode says.
// Where the first terms are taken off, W becomes what it was before they were added, to the bit, before
// the others are added.
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
  // Updates rows [row, row_end) of the columns that scratch holds. Appends the chunks of the new record,
  // row by row. False if the old record does not fit.
  bool (*update)(const Weight&, int64_t row, int64_t row_end, int64_t col, int64_t cols,
                 void* scratch, Recorded& recorded);
};

struct RequantiseKernel;

struct Isa {
  const char* name;
  Kernel single;
  Kernel fp64;  // for fp64 weights
  SkinnyKernel skinny;
  const RequantiseKernel* requantise;
  bool pairs;   // has the instruction that Term::pairs speaks of
  Kernel matrix{};      // on a matrix unit, up to fp32
  int matrix_rank = 0;  // from which it is faster than `single`; 0: there is none
};

// Chooses the kernel for some of a weight's terms, and sets what it needs to know of the factors.
const Kernel* choose_kernel(const Isa& isa, const Weight& weight, std::span<Term> terms);

// The fastest variant that the CPU has, or the one that PORTLLM_CPU_ISA names; null if that one
// is unknown or the CPU lacks it.
const Isa* chosen_isa();

// One job over all weights, cut into blocks that any number of threads take one after the other.
class Job {
 public:
  // Changes the terms (see Term), which must outlive it.
  Job(const Isa& isa, std::vector<Weight> weights, int64_t threads);

  // How long the data of the old records must be, all of which lie in one piece, in the order of the weights.
  int64_t old_bytes() const { return old_bytes_; }

  // How many threads are worth their start, at most as many as were given.
  int64_t threads() const { return threads_; }

  // Takes blocks until none is left; to be called once by each thread.
  void work();

  // What came of it: whether the old records fitted; the bytes of the new ones up to each weight, of
  // the list that was given, and all of them in order, which any number of threads can copy.
  bool fits() const { return fits_; }
  std::vector<int64_t> recorded_ends();
  void copy_recorded(uint8_t* out, int64_t part, int64_t parts) const;

 private:
  struct Grid {
    int64_t panel_cols;
    int64_t strip_rows;
    int64_t strips;
    int64_t first_block;  // blocks are numbered through all weights; small weights share one
    int64_t end_block;
    int64_t first_place;
  };
  // Where the chunks of a block of a weight are.
  struct Place {
    size_t thread;
    size_t start;
  };

  std::vector<Weight> weights_;
  std::vector<Grid> grids_;
  int64_t blocks_ = 0;
  int64_t threads_ = 1;
  int64_t old_bytes_ = 0;
  int64_t scratch_bytes_ = 0;
  std::atomic<int64_t> next_{0};
  std::atomic<bool> fits_ = true;
  std::atomic<size_t> next_thread_{0};
  std::vector<Recorded> recorded_;  // of each thread
  std::vector<Place> places_;
};

}  // namespace portllm
