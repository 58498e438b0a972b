#include "cpu/lowrank_add.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <numeric>
#include <utility>

#include "cpu/factors.h"
#include "cpu/isa.h"
#include "cpu/undo.h"

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

// Sets where in the record's data each row begins, the first one at `start`; returns where the last ends.
int64_t find_rows(Weight& weight, int64_t start) {
  const int64_t chunks = ceil_div(weight.cols, kSpan);
  weight.record.starts.resize(weight.rows);
  const uint16_t* lengths = weight.record.lengths;
  for (int64_t& row : weight.record.starts) {
    row = start;
    start = std::accumulate(lengths, lengths + chunks, start);
    lengths += chunks;
  }
  return start;
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

const Kernel* choose_kernel(const Isa& isa, const Weight& weight, std::span<Term> terms) {
  if (weight.w.dtype == DType::fp64) return &isa.fp64;
  int64_t rank = 0;
  for (const Term& term : terms) rank += term.rank;
  bool matrix = isa.matrix_rank > 0 && rank >= isa.matrix_rank;
  if (!isa.pairs) return &isa.single;
  for (Term& term : terms) {
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
  for (Term& term : terms) term.pairs = false;
  return &isa.matrix;
}

const Isa* chosen_isa() {
  static const Isa* const isa = choose();
  return isa;
}

void Bytes::grow(size_t least) {
  capacity_ = std::max(least, 2 * capacity_);
  auto larger = std::make_unique_for_overwrite<uint8_t[]>(capacity_);
  if (size_ > 0) std::memcpy(larger.get(), data_.get(), size_);
  data_ = std::move(larger);
}

int64_t Weight::chunks() const {
  return lies_turned() ? cols * ceil_div(rows, kSpan) : rows * ceil_div(cols, kSpan);
}

Job::Job(const Isa& isa, std::vector<Weight> weights, int64_t threads)
    : weights_(std::move(weights)) {
  int64_t total = 0, places = 0;
  for (size_t i = 0; i < weights_.size(); ++i) {
    // Factors of small weights lie anywhere in memory, and here only their first row is looked at.
    if (i + 8 < weights_.size()) __builtin_prefetch(weights_[i + 8].terms.front().a.data);
    Weight& weight = weights_[i];
    if (weight.lies_turned()) {
      transpose(weight.w, weight.rows, weight.cols, weight.terms);
      weight.mode.turned = true;
    }
    const auto old = weight.terms.first(weight.old_terms);
    const auto now = weight.terms.subspan(weight.old_terms);
    if (!old.empty()) weight.kernel = choose_kernel(isa, weight, old);
    if (!now.empty()) weight.kernel = choose_kernel(isa, weight, now);
    if (!old.empty()) old_bytes_ = find_rows(weight, old_bytes_);
    total += cost(weight);
  }
  threads_ = std::clamp<int64_t>(total / kMinThreadCost, 1, threads);
  const int64_t block_cost = std::max(total / (threads_ * kBlocksPerThread), kMinBlockCost);
  grids_.reserve(weights_.size());
  int64_t room = 0;  // what the last block can still take
  for (const Weight& weight : weights_) {
    if (weight.rows == 0 || weight.cols == 0) {
      // Of no strip; in the last block, as those behind it may be.
      grids_.push_back({0, 0, 0, std::max<int64_t>(blocks_ - 1, 0), blocks_, places});
      continue;
    }
    const int64_t steps = total_steps(weight);
    const Kernel& kernel = *weight.kernel;
    // Columns: as many as keep the panel in L2, in panels of equal width.
    const int64_t tiles = ceil_div(weight.cols, kernel.tile_cols);
    Weight bare = weight;  // without the logs of chunks, which do not grow with the columns
    bare.old_terms = 0;
    bare.lengths = nullptr;
    const int64_t fit =
        std::max<int64_t>(kernel.panel_bytes / kernel.scratch(bare, kernel.tile_cols), 1);
    const int64_t panel_tiles = ceil_div(tiles, ceil_div(tiles, fit));
    Grid grid;
    grid.panel_cols = panel_tiles * kernel.tile_cols;
    if (weight.undoes() && panel_tiles < tiles) {  // a chunk lies in one panel
      grid.panel_cols = ceil_div(grid.panel_cols, kSpan) * kSpan;
    }
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
    grid.first_place = places;
    if (weight.lengths) places += blocks;
    scratch_bytes_ = std::max(scratch_bytes_, kernel.scratch(weight, grid.panel_cols));
    grids_.push_back(grid);
  }
  recorded_.resize(threads_);
  places_.resize(places);
}

void Job::work() {
  const auto free = [](void* p) { ::operator delete(p, kAlign); };
  std::unique_ptr<void, decltype(free)> scratch(nullptr, free);
  std::pair<size_t, int64_t> packed{weights_.size(), 0};  // the weight and panel in scratch
  const size_t thread = next_thread_.fetch_add(1, std::memory_order_relaxed);
  Recorded& recorded = recorded_[thread];
  size_t first = 0;
  for (int64_t block; (block = next_.fetch_add(1, std::memory_order_relaxed)) < blocks_;) {
    if (!scratch) scratch.reset(::operator new(scratch_bytes_, kAlign));
    while (grids_[first].end_block <= block) ++first;
    for (size_t i = first; i < grids_.size() && grids_[i].first_block <= block; ++i) {
      const Weight& weight = weights_[i];
      const Grid& grid = grids_[i];
      if (grid.strips == 0) continue;
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
      if (weight.lengths) {
        places_[grid.first_place + (block - grid.first_block)] = {thread, recorded.bytes.size()};
      }
      if (!weight.kernel->update(weight, row, row_end, col, cols, scratch.get(), recorded)) {
        fits_ = false;
      }
    }
  }
}

std::vector<int64_t> Job::recorded_ends() {
  std::vector<int64_t> ends;
  int64_t end = 0;
  for (Weight& weight : weights_) {
    if (weight.lengths) {
      weight.record = {weight.lengths, nullptr};
      end = find_rows(weight, end);
    }
    ends.push_back(end);
  }
  return ends;
}

void Job::copy_recorded(uint8_t* out, int64_t part, int64_t parts) const {
  for (size_t i = 0; i < weights_.size(); ++i) {
    const Weight& weight = weights_[i];
    const Grid& grid = grids_[i];
    if (!weight.lengths) continue;
    if (grid.strips == 0) continue;
    const int64_t chunks = ceil_div(weight.cols, kSpan);
    const int64_t panels = ceil_div(weight.cols, grid.panel_cols);
    for (int64_t b = part; b < grid.strips * panels; b += parts) {
      const Place& place = places_[grid.first_place + b];
      const uint8_t* from = recorded_[place.thread].bytes.data() + place.start;
      const int64_t first = b / grid.strips * grid.panel_cols / kSpan;
      const int64_t last = std::min(first + ceil_div(grid.panel_cols, kSpan), chunks);
      const int64_t row = b % grid.strips * grid.strip_rows;
      for (int64_t r = row; r < std::min(row + grid.strip_rows, weight.rows); ++r) {
        const uint16_t* lengths = weight.lengths + r * chunks;
        const int64_t start = std::accumulate(lengths, lengths + first, weight.record.starts[r]);
        const int64_t bytes = std::accumulate(lengths + first, lengths + last, int64_t{0});
        if (bytes == 0) continue;
        std::memcpy(out + start, from, bytes);
        from += bytes;
      }
    }
  }
}

}  // namespace portllm

extern "C" __attribute__((visibility("default"))) const char* portllm_cpu_isa() {
  const portllm::Isa* isa = portllm::chosen_isa();
  return isa ? isa->name : nullptr;
}
