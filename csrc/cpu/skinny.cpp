#include "cpu/skinny.h"

#include <algorithm>
#include <new>

namespace portllm {
namespace {

constexpr std::align_val_t kAlign{64};
// Multiply-adds, of about 0.1 ms, below which a thread costs more to start and wait for than it does.
constexpr int64_t kMinThreadCost = 1 << 22;

}  // namespace

void SkinnyJob::Free::operator()(float* p) const { ::operator delete(p, kAlign); }

SkinnyJob::SkinnyJob(const SkinnyKernel& kernel, const Skinny& product, int64_t threads)
    : kernel_(kernel), product_(product) {
  const int64_t strip = product.transposed ? kernel.transposed_strip : kernel.strip;
  strips_ = (product.height() + strip - 1) / strip;
  if (product.source.data) {
    squares_.resize(strips_);
    product_.squares = squares_.data();
  }
  const int64_t cost = product.rows * product.cols * bands(product) * kBand;
  threads_ = std::clamp<int64_t>(std::min(cost / kMinThreadCost, strips_), 1, threads);
  const int64_t size = packed_size(product);
  packed_.reset(static_cast<float*>(::operator new(bands(product) * size * sizeof(float), kAlign)));
  for (int64_t band = 0; band < bands(product); ++band) {
    kernel.pack(product, band, packed_.get() + band * size);
  }
}

void SkinnyJob::work() {
  for (int64_t strip; (strip = next_.fetch_add(1, std::memory_order_relaxed)) < strips_;) {
    kernel_.multiply(product_, strip, packed_.get());
  }
}

}  // namespace portllm
