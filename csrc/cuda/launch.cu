#include "cuda/launch.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>

#include "cuda/lowrank_add.cuh"

namespace portllm::cuda {
namespace {

using Kernel = void (*)(Table);

template <DType kDType>
Kernel kernel_of(bool aligned) {
  return aligned ? &lowrank_add<kDType, true> : &lowrank_add<kDType, false>;
}

Kernel kernel_of(DType dtype, bool aligned) {
  return dtype == DType::bf16   ? kernel_of<DType::bf16>(aligned)
         : dtype == DType::fp16 ? kernel_of<DType::fp16>(aligned)
                                : kernel_of<DType::fp32>(aligned);
}

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // it is reported here, and must not be taken for another's
  throw std::runtime_error(std::string("portllm: CUDA: ") + cudaGetErrorString(error));
}

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, device));
  return value;
}

// How a kernel is started on a device.
struct Setup {
  int stages = 0;
  int bytes = 0;
  int most_blocks = 0;
};

// The environment's choice of stages, for tuning; 0: none.
int wanted_stages() {
  const char* text = std::getenv("PORTLLM_CUDA_STAGES");
  const int stages = text ? std::atoi(text) : 0;
  return stages >= kMinStages && stages <= kMaxStages ? stages : 0;
}

Setup set_up(const Launch& launch, Kernel kernel, int device) {
  const int per_sm = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  const int per_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  const int reserved = attribute(cudaDevAttrReservedSharedMemoryPerBlock, device);
  const int element = launch.dtype == DType::fp32 ? 4 : 2;
  const auto bytes = [&](int stages) {
    return shared_bytes(element, stages, launch.several_terms);
  };
  Setup setup;
  if (launch.aligned) {
    // As many stages as leave room for all blocks, else as many as one block can have.
    const auto fits = [&](int stages, int blocks) {
      return bytes(stages) <= per_block && blocks * (bytes(stages) + reserved) <= per_sm;
    };
    for (int blocks = kBlocksPerSm; blocks > 0 && setup.stages == 0; --blocks) {
      for (int stages = kMaxStages; stages >= kMinStages && setup.stages == 0; --stages) {
        if (fits(stages, blocks)) setup.stages = stages;
      }
    }
    if (setup.stages == 0) throw std::runtime_error("portllm: too little shared memory");
    if (const int stages = wanted_stages(); stages && fits(stages, 1)) setup.stages = stages;
  }
  setup.bytes = bytes(setup.stages);
  const auto* function = reinterpret_cast<const void*>(kernel);
  // What is allowed, not what is needed: that differs from launch to launch.
  check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, per_block));
  check(cudaFuncSetAttribute(function, cudaFuncAttributePreferredSharedMemoryCarveout,
                             cudaSharedmemCarveoutMaxShared));
  int blocks = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, function, kThreads, setup.bytes));
  setup.most_blocks = std::max(blocks, 1) * attribute(cudaDevAttrMultiProcessorCount, device);
  return setup;
}

// Found once for each device and kernel.
Setup setup_of(const Launch& launch, Kernel kernel, int device) {
  static std::mutex mutex;
  static std::map<std::tuple<int, Kernel, bool>, Setup> known;
  const std::lock_guard lock(mutex);
  const auto key = std::tuple(device, kernel, launch.several_terms);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  return known[key] = set_up(launch, kernel, device);
}

}  // namespace

void start(const Launch& launch, int device, void* stream) {
  check(cudaSetDevice(device));  // for the CUDA runtime in this library; the caller has a guard
  const Kernel kernel = kernel_of(launch.dtype, launch.aligned);
  const Setup setup = setup_of(launch, kernel, device);
  Table table = launch.table;
  table.stages = setup.stages;
  void* arguments[] = {&table};
  check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel),
                         std::min(table.n_tiles, setup.most_blocks), kThreads, arguments,
                         setup.bytes, static_cast<cudaStream_t>(stream)));
}

const char* problem() {
  static const std::string text = [] {
    int count = 0;
    cudaError_t error = cudaGetDeviceCount(&count);
    // Other devices are not looked into for the kernel: that would take memory there.
    for (int device = 0; device < count && error == cudaSuccess; ++device) {
      int major = 0;
      error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
      if (error == cudaSuccess && major < 8) {
        return "device " + std::to_string(device) + " is older than sm_80";
      }
    }
    cudaFuncAttributes attributes;
    const auto* function = reinterpret_cast<const void*>(kernel_of(DType::bf16, true));
    if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, function);
    cudaGetLastError();
    if (error != cudaSuccess) return std::string("CUDA says: ") + cudaGetErrorString(error);
    return std::string();
  }();
  return text.empty() ? nullptr : text.c_str();
}

}  // namespace portllm::cuda
