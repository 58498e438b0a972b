// The CPU implementation of portllm::lowrank_add_cpu_, whose schema portllm/ops.py defines:
//   (Tensor(a!)[] weights, Tensor[] lora_A, Tensor[] lora_B, float[] scalings, int[] n_terms) -> ()
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "cpu/lowrank_add.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

portllm::DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::BFloat16: return portllm::DType::bf16;
    case ScalarType::Half: return portllm::DType::fp16;
    case ScalarType::Float: return portllm::DType::fp32;
    case ScalarType::Double: return portllm::DType::fp64;
    default: STD_TORCH_CHECK(false, "lowrank_add_cpu_: tensors must be bf16, fp16, fp32 or fp64");
  }
}

// The tensor as a matrix of the given shape; a bound of -1 takes any size.
portllm::Matrix matrix(const Tensor& tensor, const char* name, size_t index, int64_t rows,
                       int64_t cols, bool written = false) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.dim() == 2, "lowrank_add_cpu_: ", name, "[", index,
                  "] must be a 2-D tensor on the CPU");
  STD_TORCH_CHECK((rows < 0 || tensor.size(0) == rows) && (cols < 0 || tensor.size(1) == cols),
                  "lowrank_add_cpu_: ", name, "[", index, "] is [", tensor.size(0), ", ",
                  tensor.size(1), "], which does not fit its weight");
  // The mutable pointer ends the sharing of a lazy copy.
  void* data = written ? tensor.mutable_data_ptr() : const_cast<void*>(tensor.const_data_ptr());
  return {data, dtype_of(tensor), tensor.stride(0), tensor.stride(1)};
}

void lowrank_add_cpu_(const std::vector<Tensor>& tensors, const std::vector<Tensor>& lora_A,
                      const std::vector<Tensor>& lora_B, const std::vector<double>& scalings,
                      const std::vector<int64_t>& n_terms) {
  const portllm::Isa* isa = portllm::chosen_isa();
  STD_TORCH_CHECK(isa, "lowrank_add_cpu_: PORTLLM_CPU_ISA names a variant this CPU does not have");
  STD_TORCH_CHECK(n_terms.size() == tensors.size() && lora_B.size() == lora_A.size() &&
                      scalings.size() == lora_A.size(),
                  "lowrank_add_cpu_: the lists do not have fitting lengths");
  std::vector<portllm::Weight> weights(tensors.size());
  size_t t = 0;
  // All is checked before the first write.
  for (size_t i = 0; i < tensors.size(); ++i) {
    portllm::Weight& weight = weights[i];
    weight.w = matrix(tensors[i], "weights", i, -1, -1, true);
    weight.rows = tensors[i].size(0);
    weight.cols = tensors[i].size(1);
    STD_TORCH_CHECK(n_terms[i] >= 0 && static_cast<size_t>(n_terms[i]) <= lora_A.size() - t,
                    "lowrank_add_cpu_: n_terms[", i, "] does not fit the number of factors");
    for (const size_t end = t + n_terms[i]; t < end; ++t) {
      const portllm::Matrix a = matrix(lora_A[t], "lora_A", t, -1, weight.cols);
      const int64_t rank = lora_A[t].size(0);
      weight.terms.push_back(
          {a, matrix(lora_B[t], "lora_B", t, weight.rows, rank), rank, scalings[t]});
    }
  }
  STD_TORCH_CHECK(t == lora_A.size(), "lowrank_add_cpu_: there are more factors than n_terms says");

  const auto threads = static_cast<int64_t>(torch::stable::get_num_threads());
  portllm::Job job(*isa, std::move(weights), threads);
  // Threads take blocks themselves: that also holds inside another parallel region, where torch
  // gives the whole range to one thread. What one thread can do is done here, without waking any.
  torch::stable::parallel_for(0, job.threads(), 1, [&](int64_t, int64_t) { job.work(); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(portllm, CPU, m) {
  m.impl("lowrank_add_cpu_", TORCH_BOX(&lowrank_add_cpu_));
}
