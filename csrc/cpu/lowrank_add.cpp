#include "cpu/lowrank_add.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <utility>

#include "cpu/factors.h"
#include "cpu/isa.h"

namespace portllm {
namespace {

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

bool is_power_of_two(double x) {
  int exponent;
  return std::abs(std::frexp(x, &exponent)) == 0.5;
}

// How many numbers of bf16 each element is the sum of.
int parts(const Matrix& x, const Facts& facts) {
  if (facts.bf16) return 1;
  return x.dtype == DType::fp16 ? 2 : 3;
}

// Chooses the kernel, and sets what it needs to know of the factors.
const Kernel* choose_kernel(const Isa& isa, Weight& weight) {
  if (weight.w.dtype == DType::fp64) return &isa.fp64;
  int64_t rank = 0;
  for (const Term& term : weight.terms) rank += term.rank;
  bool matrix = isa.matrix_rank > 0 && rank >= isa.matrix_rank;
  if (!isa.pairs) return &isa.single;
  for (Term& term : weight.terms) {
    const auto can_pair = [](DType x) { return x == DType::bf16 || x == DType::fp32; };
    const bool look = can_pair(term.a.dtype) && can_pair(term.b.dtype);
    if (!look && !matrix) continue;
    const Facts a = inspect(term.a, term.rank, weight.cols, !matrix);
    if (!a.pairs && !matrix) continue;
    const Facts b = inspect(term.b, weight.rows, term.rank, !matrix);
    term.pairs = look && a.pairs && b.pairs;
    term.parts_a = parts(term.a, a);
    term.parts_b = is_power_of_two(term.scaling) ? parts(term.b, b) : 3;
    const double size = std::abs(term.scaling);
    matrix = matrix && a.bounded && b.bounded && size > 0x1p-40 && size < 0x1p40;
  }
  if (!matrix) return &isa.single;
  for (Term& term : weight.terms) term.pairs = false;
  return &isa.matrix;
}

const Isa* choose() {
  struct Variant {
    const char* name;
    const Isa* (*find)();
  };
  constexpr Variant kFastestFirst[] = {{"amx_bf16", amx_bf16},
                                       {"avx512_bf16", avx512_bf16},
                                       {"avx512", avx512},
                                       {"avx2", avx2},
                                       {"portable", portable}};
  const char* wanted = std::getenv("PORTLLM_CPU_ISA");
  for (const Variant& variant : kFastestFirst) {
    if (wanted && *wanted && std::strcmp(wanted, variant.name)) continue;
    if (const Isa* isa = variant.find()) return isa;
  }
  return nullptr;
}

}  // namespace

const Isa* chosen_isa() {
  static const Isa* const isa = choose();
  return isa;
}

Job::Job(const Isa& isa, std::vector<Weight> weights, int64_t threads)
    : weights_(std::move(weights)) {
  std::erase_if(weights_, [](const Weight& w) { return w.rows == 0 || w.cols == 0; });
  int64_t total = 0;
  for (size_t i = 0; i < weights_.size(); ++i) {
    // Factors of small weights lie anywhere in memory, and here only their first row is looked at.
    if (i + 8 < weights_.size()) __builtin_prefetch(weights_[i + 8].terms.front().a.data);
    Weight& weight = weights_[i];
    if (weight.w.col_stride != 1 && weight.w.row_stride == 1) {
      transpose(weight.w, weight.rows, weight.cols, weight.terms);
    }
    weight.kernel = choose_kernel(isa, weight);
    total += cost(weight);
  }
  threads_ = std::clamp<int64_t>(total / kMinThreadCost, 1, threads);
  const int64_t block_cost = std::max(total / (threads_ * kBlocksPerThread), kMinBlockCost);
  grids_.reserve(weights_.size());
  int64_t room = 0;  // what the last block can still take
  for (const Weight& weight : weights_) {
    const int64_t steps = total_steps(weight);
    const Kernel& kernel = *weight.kernel;
    // Columns: as many as keep the panel in L2, in panels of equal width.
    const int64_t tiles = ceil_div(weight.cols, kernel.tile_cols);
    const int64_t fit =
        std::max<int64_t>(kernel.panel_bytes / kernel.scratch(weight, kernel.tile_cols), 1);
    const int64_t panel_tiles = ceil_div(tiles, ceil_div(tiles, fit));
    Grid grid;
    grid.panel_cols = panel_tiles * kernel.tile_cols;
    const int64_t rows = block_cost / (grid.panel_cols * (steps + kPassCost));
    grid.strip_rows =
        ceil_div(std::clamp<int64_t>(rows, kernel.tile_rows, kMaxStripRows), kernel.tile_rows) *
        kernel.tile_rows;
    grid.strips = ceil_div(weight.rows, grid.strip_rows);
    const int64_t blocks = grid.strips * ceil_div(weight.cols, grid.panel_cols);
    if (blocks > 1 || cost(weight) > room) {
      blocks_ += blocks;
      room = blocks > 1 ? 0 : block_cost;
    }
    room -= cost(weight);
    grid.end_block = blocks_;
    grid.first_block = blocks_ - blocks;
    scratch_bytes_ = std::max(scratch_bytes_, kernel.scratch(weight, grid.panel_cols));
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
        weight.kernel->pack(weight, col, cols, scratch.get());
        packed = wanted;
      }
      const int64_t row = strip * grid.strip_rows;
      const int64_t row_end = std::min(row + grid.strip_rows, weight.rows);
      weight.kernel->update(weight, row, row_end, col, cols, scratch.get());
    }
  }
}

}  // namespace portllm

extern "C" __attribute__((visibility("default"))) const char* portllm_cpu_isa() {
  const portllm::Isa* isa = portllm::chosen_isa();
  return isa ? isa->name : nullptr;
}
