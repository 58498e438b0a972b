// Stands in for csrc/cuda/device.h: tensors on the CPU, which is one device without streams.
#pragma once

#include <torch/csrc/stable/tensor.h>

#define PORTLLM_DISPATCH_KEY CPU

namespace portllm::cuda {

struct DeviceGuard {
  explicit DeviceGuard(int) {}
};

inline bool on_gpu(const torch::stable::Tensor& tensor) { return tensor.is_cpu(); }
inline int device_of(const torch::stable::Tensor&) { return 0; }
inline void* current_stream(int) { return nullptr; }

}  // namespace portllm::cuda
