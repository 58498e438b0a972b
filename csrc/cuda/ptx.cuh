// Every instruction and built-in that the kernel takes from the GPU, and nothing else: the tests
// put another file of this name in its place to run the same kernel on a CPU (tests/cuda_emulator).
#pragma once

#include <cstdint>

#define PORTLLM_DEVICE __device__ __forceinline__
// A constant argument in place: indexing it makes no copy of the table in local memory.
#define PORTLLM_ARGUMENT(type) const __grid_constant__ type
#define PORTLLM_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)

namespace portllm::cuda {

PORTLLM_DEVICE int thread_index() { return threadIdx.x; }
PORTLLM_DEVICE int block_index() { return blockIdx.x; }
PORTLLM_DEVICE int block_count() { return gridDim.x; }

PORTLLM_DEVICE uint4* shared_memory() {
  extern __shared__ uint4 shared[];
  return shared;
}

// A barrier of the block; whether the predicate holds in any of its threads.
PORTLLM_DEVICE bool barrier_any(bool predicate) { return __syncthreads_or(predicate); }

// For comparing: "evict_normal", "evict_unchanged".
#ifndef PORTLLM_L2_POLICY
#define PORTLLM_L2_POLICY "evict_first"
#endif

// How L2 should treat what is used once. Made where it is used: it costs two registers.
PORTLLM_DEVICE uint64_t streaming_policy() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::" PORTLLM_L2_POLICY ".b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// From global to shared memory, past the registers and L1; 16-byte aligned.
PORTLLM_DEVICE void cp_async16(uint4* shared, const void* global, uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;"
               :
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))), "l"(global),
                 "l"(policy)
               : "memory");
}

PORTLLM_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of the groups that this thread committed are under way.
template <int kPending>
PORTLLM_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Past L1, and out of L2 first.
PORTLLM_DEVICE void store_streaming(void* global, uint4 x, uint64_t policy) {
  asm volatile("st.global.L1::no_allocate.L2::cache_hint.v4.b32 [%0], {%1, %2, %3, %4}, %5;"
               :
               : "l"(global), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w), "l"(policy)
               : "memory");
}

// Through the read-only path: T is a type of 2, 4, 8 or 16 bytes.
template <class T>
PORTLLM_DEVICE T load_readonly(const void* global) {
  return __ldg(static_cast<const T*>(global));
}

template <class T>
PORTLLM_DEVICE T load(const T* global) {
  return *global;
}

template <class T>
PORTLLM_DEVICE void store(T* global, T x) {
  *global = x;
}

// d += a b for a 16x16 and a 16x8 matrix that a warp holds together.
PORTLLM_DEVICE void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

PORTLLM_DEVICE void mma_fp16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Two numbers rounded to nearest even, the first in the low half.
PORTLLM_DEVICE uint32_t pack_bf16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

PORTLLM_DEVICE uint32_t pack_fp16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// The number whose bits are the low half of x.
PORTLLM_DEVICE float widen_fp16(uint32_t x) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(static_cast<uint16_t>(x)));
  return wide;
}

PORTLLM_DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }
PORTLLM_DEVICE uint32_t as_bits(float x) { return __float_as_uint(x); }

// Never fused by the compiler, and fused where it says so: which it is, is part of the result.
PORTLLM_DEVICE float add(float x, float y) { return __fadd_rn(x, y); }
PORTLLM_DEVICE float subtract(float x, float y) { return __fsub_rn(x, y); }
PORTLLM_DEVICE float multiply_add(float x, float y, float z) { return __fmaf_rn(x, y, z); }

// The high word of a product.
PORTLLM_DEVICE uint32_t multiply_high(uint32_t x, uint32_t y) { return __umulhi(x, y); }

// The low halves of x and y in one word, and the high halves.
PORTLLM_DEVICE uint32_t low_halves(uint32_t x, uint32_t y) { return __byte_perm(x, y, 0x5410); }
PORTLLM_DEVICE uint32_t high_halves(uint32_t x, uint32_t y) { return __byte_perm(x, y, 0x7632); }

}  // namespace portllm::cuda
