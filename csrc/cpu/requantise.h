// W <- requantise(W + sum_t s_t * (B_t A_t)), in place, for one weight of few bits and its scales, a tile at a
// time. portllm/quant.py says what comes of it, to the bit. No torch in here.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "cpu/lowrank_add.h"

namespace portllm {

enum class Code : uint8_t { e4m3, int8, e2m1, nf4 };
enum class Packing : uint8_t { one, high, low };  // codes in a byte: two, of which the first is in that nibble
enum class ScaleType : uint8_t { fp32, bf16, fp16, e8m0, e4m3 };

struct Quantised {
  Code code;
  Packing packing;
  ScaleType scale_type;
  uint8_t* codes;
  int64_t row_bytes;  // from one row of codes to the next; where blocks are flat, codes have no rows
  uint8_t* scales;    // [ceil(rows / block_rows), ceil(cols / block_cols)], or [ceil(rows * cols / block_cols)]
  int64_t rows;
  int64_t cols;
  int64_t block_rows;
  int64_t block_cols;
  bool flat;           // blocks run on from one row into the next
  float global_scale;  // of scales in e4m3
  bool stochastic;
  bool keep_zeros;
  uint64_t key;  // of the random bits, which depend on it, and on row and column of an element, of which
  uint32_t row;  // those of the first one are here
  uint32_t column;
  std::span<Term> terms;  // of the caller
};

// ||D||^2, <W' - W, D> and ||W' - W||^2, of the sum D of the terms. Products are fp32, of which those below 2^-126
// vanish, and the sums of a few of them; the rest is fp64, in an order that only the shapes and the tiles' size set.
struct Movement {
  double delta = 0, along = 0, change = 0;

  void operator+=(const Movement& other) {
    delta += other.delta;
    along += other.along;
    change += other.change;
  }
};

// What has been chosen for a large block. `old` is what its codes are decoded with.
struct Choice {
  float old;
  float now;
  bool renewed;
  bool plain;  // nothing in it is out of the ordinary
};

// Rows and columns of the weight, with the sums of the terms, in fp32. Its blocks lie in it as a whole, or it
// lies in one of them.
struct Tile {
  int64_t row;
  int64_t rows;
  int64_t col;
  int64_t cols;
  const float* delta;  // zeros from `cols` up to the next whole number of lanes
  int64_t delta_stride;
  const Choice* choice;  // null: scales are chosen block by block, and written
  void* scratch;         // of scratch_bytes(elements)
  int64_t elements;
};

struct RequantiseKernel {
  // Scratch for tiles of so many elements, with rows that are filled up to whole lanes.
  int64_t (*scratch_bytes)(int64_t elements);
  Movement (*write)(const Quantised&, const Tile&);
  // The bits of the largest |W + D|, in a tile of a large block; above those of infinity if one is no number.
  uint32_t (*largest)(const Quantised&, const Tile&);
  // Chooses the scale of a large block from what `largest` said of its tiles, and writes it. With kept, it is known
  // that the old one stays; `largest` then may be too large.
  Choice (*choose)(const Quantised&, int64_t index, uint32_t largest, bool kept);
  // The largest |W + D| up to which a large block keeps its scale.
  float (*range)(const Quantised&, int64_t index);
};

// Blocks of more weights than this are walked through twice, and their scale is kept by range alone.
constexpr int64_t kLargestTiledBlock = 1 << 16;

class RequantiseJob {
 public:
  // Changes the terms, which must outlive it.
  RequantiseJob(const Isa& isa, const Quantised& weight, int64_t threads);

  // How many threads are worth their start, at most as many as were given.
  int64_t threads() const { return threads_; }

  // Phases follow each other: begin(), once, and work(), once by each thread, which takes strips until none is left.
  int phases() const { return large_ ? 3 : 1; }
  void begin(int phase);
  void work();

  Movement movement() const;

 private:
  // Rows or columns of tiles; of the block of this number, down or across, where blocks are large.
  struct Cut {
    int64_t start;
    int64_t end;
    int64_t block;
    int64_t size() const { return end - start; }
  };
  struct Panel {
    size_t first, end;  // cuts of columns, of which the packed factors stay in cache
  };
  struct Large {
    std::atomic<uint32_t> largest{0};
    double least = 0, most = 0;  // that the largest can be
    bool kept = false;
    Choice choice{};
  };
  class Worker;

  static std::vector<Cut> cuts(int64_t size, int64_t block, int64_t tile, bool large);
  void find_norms();
  void look_ahead();
  // No |sum of the terms| in the tile is larger.
  double bound(size_t row, size_t column) const;
  double& weight_in(size_t row, size_t column) { return weights_in_[row * columns_.size() + column]; }
  Large& block_of(size_t row, size_t column) {
    return blocks_[rows_[row].block * blocks_across_ + columns_[column].block];
  }

  const RequantiseKernel& kernel_;
  Quantised weight_;
  Weight update_;  // of the sums alone: its tiles are in fp32
  bool large_;
  int64_t blocks_across_;
  int64_t threads_ = 1;
  int phase_ = 0;
  std::vector<Cut> rows_, columns_;
  std::vector<Panel> panels_;
  int64_t strip_ = 1;  // cuts of rows that are taken at once
  int64_t strips_ = 1;
  int64_t pack_bytes_ = 0;  // factors of one cut of columns
  int64_t stride_ = 0;      // of a tile's sums
  int64_t elements_ = 0;
  std::vector<Movement> movements_;   // of each tile
  std::vector<Large> blocks_;
  std::vector<double> weights_in_;    // the largest |W| of each tile
  std::vector<double> norms_b_, norms_a_;  // of the rows, or columns, of each cut and term: the largest
  std::atomic<int64_t> next_{0};
};

}  // namespace portllm
