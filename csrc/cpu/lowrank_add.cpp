#include "cpu/lowrank_add.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <utility>

#include "cpu/isa.h"

namespace portllm {
namespace {

// Packed A of one panel: it is read again for every tile of rows, so it must stay in L2.
constexpr int64_t kPanelBytes = 256 << 10;
// Blocks for each thread: enough to even out threads that are slowed down by others.
constexpr int64_t kBlocksPerThread = 16;
// A pass over an element costs about as much as this many multiply-adds of one lane.
constexpr int64_t kPassCost = 8;
// Multiply-adds below which a block is not worth taking.
constexpr int64_t kMinBlockCost = 1 << 20;
// Multiply-adds, of about 0.1 ms, below which a thread costs more to start and wait for than it does.
constexpr int64_t kMinThreadCost = 1 << 22;
constexpr int64_t kMaxStripRows = 512;
constexpr std::align_val_t kAlign{64};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Steps of the multiplication for each element.
int64_t total_steps(const Weight& weight) {
  int64_t steps = 0;
  for (const Term& term : weight.terms) steps += term.pairs ? (term.rank + 1) / 2 : term.rank;
  return steps;
}

int64_t cost(const Weight& weight) {
  return weight.rows * weight.cols * (total_steps(weight) + kPassCost);
}

// Whether the instruction for pairs of bf16 products can take this factor. It takes subnormal
// numbers for zeros, but a factor of at least 2^-56, or 0, is a multiple of 2^-63, so that all
// products and their sums are multiples of 2^-126: never subnormal. Factors in fp32 often are
// copies of bf16.
template <class Bits>
bool fits_pairs(const Matrix& x, int64_t rows, int64_t cols) {
  constexpr int kShift = 8 * sizeof(Bits) - 16;
  constexpr Bits kLeast = Bits{(127 - 56) << 7} << kShift;
  constexpr Bits kSign = Bits{0x8000} << kShift;
  constexpr Bits kBelow = (Bits{1} << kShift) - 1;
  const auto unfit = [](Bits bits) -> Bits {
    return (static_cast<Bits>((bits & ~kSign) - 1) < kLeast - 1) | (bits & kBelow);
  };
  const bool by_row = x.col_stride == 1;
  const int64_t outer_stride = by_row ? x.row_stride : x.col_stride;
  const int64_t stride = by_row ? 1 : x.row_stride;
  if (!by_row) std::swap(rows, cols);
  for (int64_t i = 0; i < rows; ++i) {
    const Bits* p = static_cast<const Bits*>(x.data) + i * outer_stride;
    Bits any = 0;
    if (stride == 1) {
      for (int64_t j = 0; j < cols; ++j) any |= unfit(p[j]);
    } else {
      for (int64_t j = 0; j < cols; ++j) any |= unfit(p[j * stride]);
    }
    if (any) return false;
  }
  return true;
}

bool pairs(const Matrix& x, int64_t rows, int64_t cols) {
  switch (x.dtype) {
    case DType::bf16: return fits_pairs<uint16_t>(x, rows, cols);
    case DType::fp32: return fits_pairs<uint32_t>(x, rows, cols);
    default: return false;
  }
}

// The same problem for the transposed weight: W^T += sum s A^T B^T.
void transpose(Weight& weight) {
  const auto flip = [](Matrix& x) { std::swap(x.row_stride, x.col_stride); };
  std::swap(weight.rows, weight.cols);
  flip(weight.w);
  for (Term& term : weight.terms) {
    std::swap(term.a, term.b);
    flip(term.a);
    flip(term.b);
  }
}

const Isa* choose() {
  const char* wanted = std::getenv("PORTLLM_CPU_ISA");
  for (const Isa* isa : {avx512_bf16(), avx512(), avx2(), portable()}) {
    if (isa && (!wanted || !*wanted || !std::strcmp(wanted, isa->name))) return isa;
  }
  return nullptr;
}

}  // namespace

const Isa* chosen_isa() {
  static const Isa* const isa = choose();
  return isa;
}

Job::Job(const Isa& isa, std::vector<Weight> weights, int64_t threads)
    : isa_(isa), weights_(std::move(weights)) {
  std::erase_if(weights_, [](const Weight& w) { return w.rows == 0 || w.cols == 0; });
  int64_t total = 0;
  for (size_t i = 0; i < weights_.size(); ++i) {
    // Factors of small weights lie anywhere in memory, and here only their first row is looked at.
    if (i + 8 < weights_.size()) __builtin_prefetch(weights_[i + 8].terms.front().a.data);
    Weight& weight = weights_[i];
    if (weight.w.col_stride != 1 && weight.w.row_stride == 1) transpose(weight);
    for (Term& term : weight.terms) {
      term.pairs = isa.pairs && weight.w.dtype != DType::fp64 &&
                   pairs(term.a, term.rank, weight.cols) && pairs(term.b, weight.rows, term.rank);
    }
    total += cost(weight);
  }
  threads_ = std::clamp<int64_t>(total / kMinThreadCost, 1, threads);
  const int64_t block_cost = std::max(total / (threads_ * kBlocksPerThread), kMinBlockCost);
  grids_.reserve(weights_.size());
  int64_t room = 0;  // what the last block can still take
  for (const Weight& weight : weights_) {
    const int64_t steps = total_steps(weight);
    const int64_t bytes = weight.w.dtype == DType::fp64 ? 8 : 4;
    // Columns: as many as keep the panel in L2, in panels of equal width.
    const int64_t tiles = ceil_div(weight.cols, isa.tile_cols);
    const int64_t fit = std::max<int64_t>(kPanelBytes / (steps * bytes * isa.tile_cols), 1);
    const int64_t panel_tiles = ceil_div(tiles, ceil_div(tiles, fit));
    Grid grid;
    grid.panel_cols = panel_tiles * isa.tile_cols;
    const int64_t rows = block_cost / (grid.panel_cols * (steps + kPassCost));
    grid.strip_rows =
        ceil_div(std::clamp<int64_t>(rows, isa.tile_rows, kMaxStripRows), isa.tile_rows) *
        isa.tile_rows;
    grid.strips = ceil_div(weight.rows, grid.strip_rows);
    const int64_t blocks = grid.strips * ceil_div(weight.cols, grid.panel_cols);
    if (blocks > 1 || cost(weight) > room) {
      blocks_ += blocks;
      room = blocks > 1 ? 0 : block_cost;
    }
    room -= cost(weight);
    grid.end_block = blocks_;
    grid.first_block = blocks_ - blocks;
    scratch_bytes_ = std::max(scratch_bytes_, isa.scratch(weight, grid.panel_cols) * bytes);
    grids_.push_back(grid);
  }
}

void Job::work() {
  const auto free = [](void* p) { ::operator delete(p, kAlign); };
  std::unique_ptr<void, decltype(free)> scratch(nullptr, free);
  std::pair<size_t, int64_t> packed{weights_.size(), 0};  // the weight and panel in scratch
  size_t first = 0;
  for (int64_t block; (block = next_.fetch_add(1, std::memory_order_relaxed)) < blocks_;) {
    if (!scratch) scratch.reset(::operator new(scratch_bytes_, kAlign));
    while (grids_[first].end_block <= block) ++first;
    for (size_t i = first; i < grids_.size() && grids_[i].first_block <= block; ++i) {
      const Weight& weight = weights_[i];
      const Grid& grid = grids_[i];
      // Strips of one panel follow each other, so that a thread packs a panel once, mostly.
      const int64_t panel = (block - grid.first_block) / grid.strips;
      const int64_t strip = (block - grid.first_block) % grid.strips;
      const int64_t col = panel * grid.panel_cols;
      const int64_t cols = std::min(grid.panel_cols, weight.cols - col);
      if (const std::pair wanted{i, panel}; packed != wanted) {
        isa_.pack(weight, col, cols, scratch.get());
        packed = wanted;
      }
      const int64_t row = strip * grid.strip_rows;
      isa_.update(weight, row, std::min(row + grid.strip_rows, weight.rows), col, cols,
                  scratch.get());
    }
  }
}

}  // namespace portllm

extern "C" __attribute__((visibility("default"))) const char* portllm_cpu_isa() {
  const portllm::Isa* isa = portllm::chosen_isa();
  return isa ? isa->name : nullptr;
}
