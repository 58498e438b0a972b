// What one launch is told: a table of weights and terms, small enough to be a kernel's argument.
//
// As an argument the table needs no memory on the device, no copy and no event: it is in the launch
// itself, valid whatever the host does next, and a CUDA graph that captures the launch captures the
// table.
#pragma once

#include <cstdint>

#include "matrix.h"

namespace portllm::cuda {

using portllm::DType;

// Which elements of a factor one load takes.
enum class Access : uint8_t {
  single,         // one: whatever the strides
  along_rank,     // two neighbours along the rank; of A four
  along_columns,  // two neighbouring columns; of A only
};

enum class Products : uint8_t {
  bf16,   // both factors are bf16
  fp16,   // both are fp16
  split,  // any other pair: each is cut into three bf16 parts that add up to it
};

struct Term {
  const void* a;  // [rank, n]
  const void* b;  // [m, rank]
  int64_t a_stride_k;
  int64_t a_stride_n;
  int64_t b_stride_m;
  int64_t b_stride_k;
  int32_t rank;
  float scaling;
  DType a_dtype;
  DType b_dtype;
  Access a_access;
  Access b_access;
  Products products;
};
static_assert(sizeof(Term) == 64);

struct Weight {
  void* data;
  int64_t row_stride;
  int64_t col_stride;
  int32_t m;
  int32_t n;
  int32_t first_tile;  // among those of all weights
  int32_t end_tile;
  uint32_t reciprocal;  // of its tiles in a row, times 2^32, to divide by them
  uint16_t first_term;  // its slot in the table
  uint16_t n_terms;
};
static_assert(sizeof(Weight) == 48);

// A launch takes 32764 bytes of arguments since CUDA 12.1, from the first Volta on.
constexpr int kSlots = 511;
constexpr int kTableBytes = kSlots * sizeof(Term);

struct Table {
  int32_t n_weights;
  int32_t n_tiles;
  int32_t stages;  // of the ring: tiles of W that are under way or in use; 0 if there is none
  int32_t unused;
  union {
    Weight weights[kTableBytes / sizeof(Weight)];  // from the first byte on
    Term terms[kSlots];                            // in the slots behind the last weight
  };
};
static_assert(sizeof(Table) <= 32764);

// A tile of W, which a block updates at a time, and how much of the rank it multiplies at a time.
constexpr int kTileRows = 64;
constexpr int kTileCols = 128;
constexpr int kTileRank = 16;
constexpr int kThreads = 256;
constexpr int kBlocksPerSm = 2;
constexpr int kMinStages = 2;
constexpr int kMaxStages = 4;

// Bytes of shared memory for the parts of both factors, twice: to read one and write the other.
constexpr int kFactorBytes = 2 * 3 * (kTileRows + kTileCols) * kTileRank * 2;

// Bytes of shared memory of a block: the factors, the ring (if W is aligned), and for weights with
// several terms the sum of those that are complete.
constexpr int shared_bytes(int element_bytes, int stages, bool several_terms) {
  return kFactorBytes + kTileRows * kTileCols * (stages * element_bytes + (several_terms ? 4 : 0));
}

}  // namespace portllm::cuda
