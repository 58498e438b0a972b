#include "cpu/requantise.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <new>
#include <numeric>

#include "cpu/half.h"

namespace portllm {
namespace {

constexpr std::align_val_t kAlign{64};
// What decoding and encoding cost, in multiply-adds of a lane.
constexpr int64_t kCodeCost = 32;
// Multiply-adds, of about 0.1 ms, below which a thread costs more to start and wait for than it does.
constexpr int64_t kMinThreadCost = 1 << 22;
// Strips for each thread: enough to even out threads that are slowed down by others.
constexpr int64_t kStripsPerThread = 16;
// Elements of a tile of small blocks: sums that stay in the nearest cache.
constexpr int64_t kTileElements = 6 * 1024;
constexpr int64_t kLargeTileCols = 1024;
constexpr int64_t kPadding = 64;  // elements: a vector's load may reach past the last one

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t x, int64_t to) { return ceil_div(x, to) * to; }

double element(const Matrix& x, int64_t row, int64_t col) {
  const int64_t at = row * x.row_stride + col * x.col_stride;
  switch (x.dtype) {
    case DType::bf16: return widen(static_cast<const bf16*>(x.data)[at]);
    case DType::fp16: return widen(static_cast<const fp16*>(x.data)[at]);
    case DType::fp32: return static_cast<const float*>(x.data)[at];
    default: return static_cast<const double*>(x.data)[at];
  }
}

// The matrix from this row and column on.
Matrix from(Matrix x, int64_t row, int64_t col) {
  constexpr int64_t kBytes[] = {2, 2, 4, 8};
  const int64_t offset = (row * x.row_stride + col * x.col_stride) * kBytes[static_cast<int>(x.dtype)];
  x.data = static_cast<char*>(x.data) + offset;
  return x;
}

// The largest |x| of the bits of a float; infinite if it is no number.
double size_of(uint32_t bits) {
  return bits > 0x7f800000u ? std::numeric_limits<double>::infinity() : std::bit_cast<float>(bits);
}

}  // namespace

std::vector<RequantiseJob::Cut> RequantiseJob::cuts(int64_t size, int64_t block, int64_t tile, bool large) {
  std::vector<Cut> out;
  for (int64_t start = 0; start < size;) {
    const int64_t number = large ? start / block : 0;
    const int64_t end = std::min({size, start + tile, large ? (number + 1) * block : size});
    out.push_back({start, end, number});
    start = end;
  }
  return out;
}

RequantiseJob::RequantiseJob(const Isa& isa, const Quantised& weight, int64_t threads)
    : kernel_(*isa.requantise),
      weight_(weight),
      update_{{nullptr, DType::fp32, 0, 1}, weight.rows, weight.cols, weight.terms},
      large_(weight.block_rows * weight.block_cols > kLargestTiledBlock),
      blocks_across_(ceil_div(weight.cols, weight.block_cols)) {
  update_.kernel = choose_kernel(isa, update_, update_.terms);
  const Kernel& kernel = *update_.kernel;
  const bool runs_on = weight.flat && weight.cols % weight.block_cols != 0;
  int64_t tile_rows = kernel.tile_rows, tile_cols = weight.cols;
  if (runs_on) {
    tile_rows = weight.block_cols / std::gcd(weight.cols, weight.block_cols);
  } else if (large_) {
    tile_cols = kLargeTileCols;
  } else {
    tile_rows = weight.block_rows * std::max<int64_t>(1, tile_rows / weight.block_rows);
    tile_cols = weight.block_cols * std::max<int64_t>(1, kTileElements / (tile_rows * weight.block_cols));
  }
  rows_ = cuts(weight.rows, weight.block_rows, tile_rows, large_);
  columns_ = cuts(weight.cols, weight.block_cols, tile_cols, large_);
  const int64_t widest = std::min(tile_cols, weight.cols), highest = std::min(tile_rows, weight.rows);
  stride_ = runs_on ? weight.cols : round_up(widest, kPadding);
  elements_ = round_up(highest * stride_, kPadding) + kPadding;
  pack_bytes_ = round_up(kernel.scratch(update_, widest), 64);
  const auto fit = static_cast<size_t>(std::max<int64_t>(1, kernel.panel_bytes / pack_bytes_));
  for (size_t first = 0; first < columns_.size(); first += fit) {
    panels_.push_back({first, std::min(first + fit, columns_.size())});
  }
  int64_t steps = 0;
  for (const Term& term : weight.terms) steps += term.pairs ? (term.rank + 1) / 2 : term.rank;
  threads_ = std::clamp<int64_t>(weight.rows * weight.cols * (steps + kCodeCost) / kMinThreadCost, 1, threads);
  const auto tiles_down = static_cast<int64_t>(rows_.size()), panels = static_cast<int64_t>(panels_.size());
  strip_ = std::max<int64_t>(1, tiles_down * panels / (threads_ * kStripsPerThread));
  strips_ = ceil_div(tiles_down, strip_);
  movements_.resize(rows_.size() * columns_.size());
  if (large_) {
    blocks_ = std::vector<Large>(ceil_div(weight.rows, weight.block_rows) * blocks_across_);
    weights_in_.resize(movements_.size());
    find_norms();
  }
}

void RequantiseJob::find_norms() {
  for (const Term& term : weight_.terms) {
    const auto norms = [&](const Matrix& x, const std::vector<Cut>& cuts, bool of_rows, std::vector<double>& out) {
      for (const Cut& cut : cuts) {
        double largest = 0;
        for (int64_t i = cut.start; i < cut.end; ++i) {
          double sum = 0;
          for (int64_t k = 0; k < term.rank; ++k) {
            const double x_ik = of_rows ? element(x, i, k) : element(x, k, i);
            sum += x_ik * x_ik;
          }
          largest = sum <= largest ? largest : sum;  // what is no number stays
        }
        out.push_back(std::sqrt(largest));
      }
    };
    norms(term.b, rows_, true, norms_b_);
    norms(term.a, columns_, false, norms_a_);
  }
}

double RequantiseJob::bound(size_t row, size_t column) const {
  double sum = 0;
  for (size_t t = 0; t < weight_.terms.size(); ++t) {
    const Term& term = weight_.terms[t];
    const double rounding = 1 + static_cast<double>(term.rank + 8) * 0x1p-22;
    sum += rounding * std::abs(term.scaling) * norms_b_[t * rows_.size() + row] *
           norms_a_[t * columns_.size() + column];
  }
  return sum + std::numeric_limits<float>::min();
}

// What the largest |W| of the tiles say of the largest |S| of the blocks.
void RequantiseJob::look_ahead() {
  for (size_t i = 0; i < rows_.size(); ++i) {
    for (size_t j = 0; j < columns_.size(); ++j) {
      Large& block = block_of(i, j);
      const double size = weight_in(i, j), reach = bound(i, j) + 0x1p-22 * size;
      if (size - reach > block.least) block.least = size - reach;
      if (!(size + reach <= block.most)) block.most = size + reach;
    }
  }
  for (size_t i = 0; i < blocks_.size(); ++i) {
    const float range = kernel_.range(weight_, static_cast<int64_t>(i));
    blocks_[i].kept = blocks_[i].most <= range;
  }
}

void RequantiseJob::begin(int phase) {
  phase_ = phase;
  next_ = 0;
  if (!large_) return;
  if (phase == 1) look_ahead();
  if (phase == 2) {
    for (size_t i = 0; i < blocks_.size(); ++i) {
      Large& block = blocks_[i];
      const uint32_t largest =
          block.kept ? std::bit_cast<uint32_t>(static_cast<float>(block.most)) : block.largest.load();
      block.choice = kernel_.choose(weight_, static_cast<int64_t>(i), largest, block.kept);
    }
  }
}

// One thread's scratch, and the tile that is in it.
class RequantiseJob::Worker {
 public:
  explicit Worker(RequantiseJob& job)
      : job_(job),
        packs_(allocate(job.phase_ == 0 && job.large_ ? 0 : most_cuts() * job.pack_bytes_)),
        delta_(allocate(job.elements_ * sizeof(float))),
        scratch_(allocate(job.kernel_.scratch_bytes(job.elements_))) {
    std::fill_n(delta(), job.elements_, 0.0f);
  }

  void strip(size_t panel, int64_t strip) {
    const auto [first, end] = job_.panels_[panel];
    const auto row = static_cast<size_t>(strip * job_.strip_);
    const size_t row_end = std::min(row + static_cast<size_t>(job_.strip_), job_.rows_.size());
    for (size_t i = row; i < row_end; ++i) {
      for (size_t j = first; j < end; ++j) tile(panel, i, j);
    }
  }

 private:
  struct Free {
    void operator()(void* p) const { ::operator delete(p, kAlign); }
  };
  using Memory = std::unique_ptr<void, Free>;
  static Memory allocate(int64_t bytes) { return Memory(bytes > 0 ? ::operator new(bytes, kAlign) : nullptr); }

  int64_t most_cuts() const {
    size_t most = 0;
    for (const Panel& panel : job_.panels_) most = std::max(most, panel.end - panel.first);
    return static_cast<int64_t>(most);
  }

  float* delta() { return static_cast<float*>(delta_.get()); }

  void tile(size_t panel, size_t i, size_t j) {
    const Cut &rows = job_.rows_[i], &columns = job_.columns_[j];
    Tile tile{rows.start, rows.size(), columns.start, columns.size(), delta(), job_.stride_, nullptr,
              scratch_.get(), job_.elements_};
    if (job_.large_ && job_.phase_ == 0) {
      tile.delta_stride = 0;  // of zeros
      job_.weight_in(i, j) = size_of(job_.kernel_.largest(job_.weight_, tile));
      return;
    }
    if (!job_.large_) {
      add_terms(panel, rows, j);
      job_.movements_[i * job_.columns_.size() + j] = job_.kernel_.write(job_.weight_, tile);
      return;
    }
    Large& block = job_.block_of(i, j);
    if (job_.phase_ == 2) {
      add_terms(panel, rows, j);
      tile.choice = &block.choice;
      job_.movements_[i * job_.columns_.size() + j] = job_.kernel_.write(job_.weight_, tile);
      return;
    }
    const double most = job_.weight_in(i, j) * (1 + 0x1p-22) + job_.bound(i, j);
    if (block.kept || most < block.least || most < size_of(block.largest.load(std::memory_order_relaxed))) return;
    add_terms(panel, rows, j);
    const uint32_t largest = job_.kernel_.largest(job_.weight_, tile);
    uint32_t known = block.largest.load(std::memory_order_relaxed);
    while (known < largest && !block.largest.compare_exchange_weak(known, largest, std::memory_order_relaxed)) {
    }
  }

  // The sums of the terms in a tile.
  void add_terms(size_t panel, const Cut& rows, size_t column) {
    const Cut& columns = job_.columns_[column];
    const Kernel& kernel = *job_.update_.kernel;
    if (panel != panel_) {
      packed_.assign(job_.panels_[panel].end - job_.panels_[panel].first, false);
      panel_ = panel;
    }
    const size_t place = column - job_.panels_[panel].first;
    void* pack = static_cast<char*>(packs_.get()) + static_cast<int64_t>(place) * job_.pack_bytes_;
    terms_.assign(job_.weight_.terms.begin(), job_.weight_.terms.end());
    for (Term& term : terms_) {
      term.a = from(term.a, 0, columns.start);
      term.b = from(term.b, rows.start, 0);
    }
    Weight sums = job_.update_;
    sums.w = {delta_.get(), DType::fp32, job_.stride_, 1};
    sums.rows = rows.size();
    sums.cols = columns.size();
    sums.terms = terms_;
    if (!packed_[place]) kernel.pack(sums, 0, sums.cols, pack);
    packed_[place] = true;
    std::fill_n(delta(), job_.elements_, 0.0f);
    kernel.update(sums, 0, sums.rows, 0, sums.cols, pack, unrecorded_);
  }

  RequantiseJob& job_;
  Memory packs_, delta_, scratch_;
  std::vector<Term> terms_;
  std::vector<bool> packed_;
  size_t panel_ = std::numeric_limits<size_t>::max();
  Recorded unrecorded_;
};

void RequantiseJob::work() {
  const auto panels = static_cast<int64_t>(panels_.size());
  std::unique_ptr<Worker> worker;
  // Strips of one panel follow each other, so that a thread packs a panel once, mostly.
  for (int64_t next; (next = next_.fetch_add(1, std::memory_order_relaxed)) < panels * strips_;) {
    if (!worker) worker = std::make_unique<Worker>(*this);
    worker->strip(static_cast<size_t>(next / strips_), next % strips_);
  }
}

Movement RequantiseJob::movement() const {
  Movement sum;
  for (const Movement& movement : movements_) sum += movement;
  return sum;
}

}  // namespace portllm
