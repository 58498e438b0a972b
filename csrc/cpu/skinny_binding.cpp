// The CPU implementations of the ops whose schemas portllm/skinny.py defines.
#include <cstdint>
#include <string>
#include <utility>

#include "cpu/arguments.h"
#include "cpu/skinny.h"

namespace {

Tensor tensor(StableIValue argument) { return torch::stable::detail::to<Tensor>(argument); }

// The data of a contiguous matrix of this size and dtype; `what` names it in the error.
void* contiguous(const Tensor& matrix, int64_t rows, int64_t cols, portllm::DType dtype,
                 const char* what, bool written = false) {
  const auto x = read(matrix.get(), written);
  STD_TORCH_CHECK(x && x->matrix.dtype == dtype && x->rows == rows && x->cols == cols &&
                      (cols <= 1 || x->matrix.col_stride == 1) &&
                      (rows <= 1 || cols == 0 || x->matrix.row_stride == cols),
                  what, " must be contiguous, on the CPU, ",
                  dtype == portllm::DType::bf16 ? "bfloat16" : "float32", " and [", rows, ", ",
                  cols, "]");
  return x->matrix.data;
}

// Takes the product with `block` into `out`, for the op of this name.
double run(portllm::Skinny product, const Tensor& block, const Tensor& out,
           const std::string& name) {
  using portllm::DType;
  product.width = block.dim() == 2 ? block.size(1) : 0;
  product.block = static_cast<const float*>(contiguous(
      block, product.depth(), product.width, DType::fp32, (name + ": block").c_str()));
  product.out = static_cast<float*>(contiguous(out, product.height(), product.width, DType::fp32,
                                               (name + ": out").c_str(), true));
  portllm::SkinnyJob job(isa().skinny, product, threads());
  torch::stable::parallel_for(0, job.threads(), 1, [&](int64_t, int64_t) { job.work(); });
  return job.squares();
}

// (Tensor(a!) out, Tensor matrix, Tensor block) -> ()
void skinny_cpu_(StableIValue* stack, uint64_t, uint64_t) {
  using portllm::DType;
  const Tensor out = tensor(stack[0]), matrix = tensor(stack[1]), block = tensor(stack[2]);
  auto d = read(matrix.get());
  const bool transposed = d && d->cols > 1 && d->matrix.col_stride != 1;
  if (transposed) {
    std::swap(d->rows, d->cols);
    std::swap(d->matrix.row_stride, d->matrix.col_stride);
  }
  STD_TORCH_CHECK(d && (d->matrix.dtype == DType::fp32 || d->matrix.dtype == DType::bf16) &&
                      (d->cols <= 1 || d->matrix.col_stride == 1),
                  "skinny_cpu_: matrix must be 2-D, on the CPU, float32 or bfloat16, and its rows "
                  "or its columns contiguous");
  run({d->matrix, d->rows, d->cols, transposed}, block, out, "skinny_cpu_");
}

// (Tensor(a!) out, Tensor(b!) coarse, Tensor matrix, Tensor block) -> float
void sketch_cpu_(StableIValue* stack, uint64_t, uint64_t) {
  using portllm::DType;
  const Tensor out = tensor(stack[0]), coarse = tensor(stack[1]);
  const Tensor matrix = tensor(stack[2]), block = tensor(stack[3]);
  const auto d = read(matrix.get());
  STD_TORCH_CHECK(
      d && d->matrix.dtype == DType::fp32 && (d->cols <= 1 || d->matrix.col_stride == 1),
      "sketch_cpu_: matrix must be 2-D, on the CPU, float32, and its rows contiguous");
  void* rounded = contiguous(coarse, d->rows, d->cols, DType::bf16, "sketch_cpu_: coarse", true);
  portllm::Skinny product{{rounded, DType::bf16, d->cols, 1}, d->rows, d->cols, false};
  product.source = d->matrix;
  stack[0] = torch::stable::detail::from(run(product, block, out, "sketch_cpu_"));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(portllm, CPU, m) {
  m.impl("skinny_cpu_", skinny_cpu_);
  m.impl("sketch_cpu_", sketch_cpu_);
}
