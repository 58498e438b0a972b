// Starts the kernel; no torch, and no CUDA in the interface.
#pragma once

#include "cuda/plan.h"

namespace portllm::cuda {

// Why no GPU of this machine can run the kernel, or null.
const char* problem();

// Enqueues on a stream (a cudaStream_t) of a device; does not wait. Throws std::runtime_error.
void start(const Launch& launch, int device, void* stream);

}  // namespace portllm::cuda
