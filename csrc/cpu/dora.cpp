#include "cpu/dora.h"

#include <algorithm>
#include <memory>
#include <new>
#include <utility>

namespace portllm {
namespace {

// Strips for each thread: enough to even out threads that are slowed down by others.
constexpr int64_t kBlocksPerThread = 16;
// A pass over an element costs about as much as this many multiply-adds of one lane.
constexpr int64_t kPassCost = 16;
// Multiply-adds, of about 0.1 ms, below which a thread costs more to start and wait for than it does.
constexpr int64_t kMinThreadCost = 1 << 22;
constexpr std::align_val_t kAlign{64};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t cost(const Weight& weight) {
  int64_t steps = kPassCost;
  for (const Term& term : weight.terms) steps += term.pairs ? (term.rank + 1) / 2 : term.rank;
  return weight.rows * weight.cols * steps;
}

}  // namespace

bool DoraWeight::has(int axis) const {
  return std::any_of(norms.begin(), norms.end(), [&](const Norm& norm) { return norm.axis == axis; });
}

void DoraWeight::prepare(const Isa& isa) {
  if (weight.lies_turned()) {
    transpose(weight.w, weight.rows, weight.cols, weight.terms);
    for (Norm& norm : norms) norm.axis = 1 - norm.axis;
  }
  weight.kernel = choose_exact_kernel(isa, weight, weight.terms);
}

DoraJob::DoraJob(std::vector<DoraWeight*> weights, int64_t threads) {
  int64_t total = 0;
  for (DoraWeight* dora : weights) {
    if (dora->weight.rows == 0 || dora->weight.cols == 0) continue;
    weights_.push_back(dora);
    total += cost(dora->weight);
  }
  threads_ = std::clamp<int64_t>(total / kMinThreadCost, 1, threads);
  for (DoraWeight* dora : weights_) {
    const Weight& weight = dora->weight;
    const int64_t tile = weight.kernel->tile_rows;
    int64_t strip = square_strip(weight.rows);
    if (dora->pass == DoraWeight::Pass::squares && dora->has(1)) {
      const int64_t columns = std::count_if(dora->norms.begin(), dora->norms.end(),
                                            [](const Norm& norm) { return norm.axis == 1; });
      dora->strip_squares.assign(columns * ceil_div(weight.rows, strip) * weight.cols, 0.0);
    } else {
      strip = std::min(strip, ceil_div(ceil_div(weight.rows, threads_ * kBlocksPerThread), tile) * tile);
    }
    blocks_ += ceil_div(weight.rows, strip);
    grids_.push_back({strip, blocks_});
    scratch_bytes_ = std::max(scratch_bytes_, weight.kernel->dora.scratch(*dora));
  }
}

void DoraJob::work() {
  const auto free = [](void* p) { ::operator delete(p, kAlign); };
  std::unique_ptr<void, decltype(free)> scratch(nullptr, free);
  size_t at = 0, packed = weights_.size();  // the weights of this block, and of what is in scratch
  for (int64_t block; (block = next_.fetch_add(1, std::memory_order_relaxed)) < blocks_;) {
    if (!scratch) scratch.reset(::operator new(scratch_bytes_, kAlign));
    while (grids_[at].end_block <= block) ++at;
    DoraWeight& dora = *weights_[at];
    const DoraKernel& kernel = dora.weight.kernel->dora;
    if (packed != at) kernel.pack(dora, scratch.get());
    packed = at;
    const int64_t first = at > 0 ? grids_[at - 1].end_block : 0;
    kernel.pass(dora, block - first, grids_[at].strip_rows, scratch.get());
  }
}

void DoraJob::finish() {
  for (DoraWeight* dora : weights_) {
    if (dora->strip_squares.empty()) continue;
    const int64_t cols = dora->weight.cols;
    const int64_t strips = ceil_div(dora->weight.rows, square_strip(dora->weight.rows));
    const double* in = dora->strip_squares.data();
    for (const Norm& norm : dora->norms) {
      if (norm.axis != 1) continue;
      std::fill_n(norm.squares, cols, 0.0);
      for (int64_t strip = 0; strip < strips; ++strip, in += cols) {
        for (int64_t j = 0; j < cols; ++j) norm.squares[j] += in[j];
      }
    }
    dora->strip_squares = {};
  }
}

}  // namespace portllm
