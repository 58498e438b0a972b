// A matrix in memory, and the problem that every kernel solves. No torch in here.
#pragma once

#include <cstdint>
#include <utility>

namespace portllm {

enum class DType : uint8_t { bf16, fp16, fp32, fp64 };

struct Matrix {
  void* data;
  DType dtype;
  int64_t row_stride;  // in elements
  int64_t col_stride;
};

// The same problem for the transposed weight: W^T += sum s A^T B^T.
template <class Terms>
void transpose(Matrix& w, int64_t& rows, int64_t& cols, Terms& terms) {
  const auto flip = [](Matrix& x) { std::swap(x.row_stride, x.col_stride); };
  std::swap(rows, cols);
  flip(w);
  for (auto& term : terms) {
    std::swap(term.a, term.b);
    flip(term.a);
    flip(term.b);
  }
}

}  // namespace portllm
