// What the binding takes from a torch with CUDA, and nothing else: the tests put another file of
// this name in its place to run it on a CPU (tests/cuda_emulator).
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#define PORTLLM_DISPATCH_KEY CUDA

namespace portllm::cuda {

using torch::stable::accelerator::DeviceGuard;

inline bool on_gpu(const torch::stable::Tensor& tensor) { return tensor.is_cuda(); }

inline int device_of(const torch::stable::Tensor& tensor) {
  return static_cast<int>(tensor.get_device_index());
}

// Looked up while running: so the library can be built where torch has no CUDA.
inline void* current_stream(int device) {
  using Function = AOTITorchError (*)(int32_t, void**);
  static const auto function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<Function>(
        dlsym(library ? library : RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream"));
  }();
  STD_TORCH_CHECK(function, "lowrank_add_cuda_: this torch has no CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(function(device, &stream));
  return stream;
}

}  // namespace portllm::cuda
