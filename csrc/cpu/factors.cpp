#include "cpu/factors.h"

#include <bit>
#include <utility>

#include "cpu/half.h"

namespace portllm {
namespace {

template <class E>
Facts facts(const Matrix& x, int64_t rows, int64_t cols, bool only_pairs) {
  constexpr uint32_t kLeast = (127 - 56) << 23, kMost = (127 + 63) << 23;
  int64_t outer_stride = x.row_stride, stride = x.col_stride;
  if (stride != 1) {
    std::swap(outer_stride, stride);
    std::swap(rows, cols);
  }
  uint32_t fraction = 0, tiny = 0, large = 0;
  for (int64_t i = 0; i < rows; ++i) {
    const auto look = [&](E element) {
      const uint32_t bits = std::bit_cast<uint32_t>(static_cast<float>(widen(element)));
      const uint32_t size = bits & 0x7fffffffu;
      fraction |= bits & 0xffffu;
      tiny |= size - 1 < kLeast - 1;
      large |= size >= kMost;
    };
    const E* p = static_cast<const E*>(x.data) + i * outer_stride;
    if (stride == 1) {
      for (int64_t j = 0; j < cols; ++j) look(p[j]);
    } else {
      for (int64_t j = 0; j < cols; ++j) look(p[j * stride]);
    }
    if (only_pairs && (fraction | tiny)) break;
  }
  return {fraction == 0, (fraction | tiny) == 0, large == 0};
}

}  // namespace

Facts inspect(const Matrix& x, int64_t rows, int64_t cols, bool only_pairs) {
  switch (x.dtype) {
    case DType::bf16: return facts<bf16>(x, rows, cols, only_pairs);
    case DType::fp16: return facts<fp16>(x, rows, cols, only_pairs);
    case DType::fp32: return facts<float>(x, rows, cols, only_pairs);
    case DType::fp64: return facts<double>(x, rows, cols, only_pairs);
  }
  return {};
}

}  // namespace portllm
