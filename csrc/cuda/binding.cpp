// The CUDA implementation of portllm::lowrank_add_cuda_, whose schema portllm/ops.py defines:
//   (Tensor(a!)[] weights, Tensor[] lora_A, Tensor[] lora_B, float[] scalings, int[] n_terms) -> ()
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <map>
#include <utility>
#include <vector>

#include "cuda/device.h"
#include "cuda/launch.h"

namespace {

namespace cuda = portllm::cuda;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

cuda::DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::BFloat16: return cuda::DType::bf16;
    case ScalarType::Half: return cuda::DType::fp16;
    case ScalarType::Float: return cuda::DType::fp32;
    case ScalarType::Double: return cuda::DType::fp64;
    default: STD_TORCH_CHECK(false, "lowrank_add_cuda_: tensors must be bf16, fp16, fp32 or fp64");
  }
}

// The tensor as a matrix of the given shape; a bound of -1 takes any size.
cuda::Matrix matrix(const Tensor& tensor, const char* name, size_t index, int device, int64_t rows,
                    int64_t cols, bool written = false) {
  STD_TORCH_CHECK(cuda::on_gpu(tensor) && cuda::device_of(tensor) == device && tensor.dim() == 2,
                  "lowrank_add_cuda_: ", name, "[", index,
                  "] must be a 2-D tensor on the CUDA device of its weight");
  STD_TORCH_CHECK((rows < 0 || tensor.size(0) == rows) && (cols < 0 || tensor.size(1) == cols),
                  "lowrank_add_cuda_: ", name, "[", index, "] is [", tensor.size(0), ", ",
                  tensor.size(1), "], which does not fit its weight");
  // The mutable pointer ends the sharing of a lazy copy.
  void* data = written ? tensor.mutable_data_ptr() : const_cast<void*>(tensor.const_data_ptr());
  return {data, dtype_of(tensor), tensor.stride(0), tensor.stride(1)};
}

void lowrank_add_cuda_(const std::vector<Tensor>& tensors, const std::vector<Tensor>& lora_A,
                       const std::vector<Tensor>& lora_B, const std::vector<double>& scalings,
                       const std::vector<int64_t>& n_terms) {
  STD_TORCH_CHECK(n_terms.size() == tensors.size() && lora_B.size() == lora_A.size() &&
                      scalings.size() == lora_A.size(),
                  "lowrank_add_cuda_: the lists do not have fitting lengths");
  std::map<int, std::vector<cuda::Update>> updates;  // by device
  size_t t = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& weight = tensors[i];
    const int device = cuda::device_of(weight);
    cuda::Update update{matrix(weight, "weights", i, device, -1, -1, true), weight.size(0),
                        weight.size(1), {}};
    STD_TORCH_CHECK(n_terms[i] >= 0 && static_cast<size_t>(n_terms[i]) <= lora_A.size() - t,
                    "lowrank_add_cuda_: n_terms[", i, "] does not fit the number of factors");
    for (const size_t end = t + n_terms[i]; t < end; ++t) {
      const cuda::Matrix a = matrix(lora_A[t], "lora_A", t, device, -1, update.n);
      const int64_t rank = lora_A[t].size(0);
      const cuda::Matrix b = matrix(lora_B[t], "lora_B", t, device, update.m, rank);
      update.terms.push_back({a, b, rank, scalings[t]});
    }
    updates[device].push_back(std::move(update));
  }
  STD_TORCH_CHECK(t == lora_A.size(), "lowrank_add_cuda_: more factors than n_terms says");

  // All is checked before the first write.
  std::map<int, std::vector<cuda::Launch>> launches;
  for (auto& [device, list] : updates) launches[device] = cuda::plan(std::move(list));
  for (const auto& [device, list] : launches) {
    [[maybe_unused]] const cuda::DeviceGuard guard(device);
    for (const cuda::Launch& launch : list) {
      cuda::start(launch, device, cuda::current_stream(device));
    }
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(portllm, PORTLLM_DISPATCH_KEY, m) {
  m.impl("lowrank_add_cuda_", TORCH_BOX(&lowrank_add_cuda_));
}

extern "C" __attribute__((visibility("default"))) const char* portllm_cuda_problem() {
  return cuda::problem();
}
