// Stands in for csrc/cuda/ptx.cuh: the same functions, for a CPU. What they mean is taken from the
// PTX ISA's manual; how the threads of a block take turns is in emulator.cpp.
#pragma once

#include <bit>
#include <cstdint>

#include "cpu/half.h"

#define PORTLLM_DEVICE inline
#define PORTLLM_ARGUMENT(type) const type&
#define PORTLLM_KERNEL(threads, blocks) void

struct uint2 {
  uint32_t x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};
struct float4 {
  float x, y, z, w;
};

namespace emulator {

int thread_index();
int block_index();
int block_count();
uint4* shared_memory();
bool barrier_any(bool predicate);
void cp_async16(uint4* shared, const void* global);
void cp_async_commit();
void cp_async_wait(int pending);
// Throw unless all these bytes of global memory are there to be read (written, once), and so
// aligned.
void check_read(const void* global, int bytes);
void check_write(const void* global, int bytes);
enum class Mma { bf16, fp16 };
void mma(Mma kind, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

}  // namespace emulator

namespace portllm::cuda {

using emulator::barrier_any;
using emulator::block_count;
using emulator::block_index;
using emulator::cp_async_commit;
using emulator::shared_memory;
using emulator::thread_index;

inline uint64_t streaming_policy() { return 0; }

inline void cp_async16(uint4* shared, const void* global, uint64_t) {
  emulator::cp_async16(shared, global);
}

template <int kPending>
void cp_async_wait() {
  emulator::cp_async_wait(kPending);
}

inline void store_streaming(void* global, uint4 x, uint64_t) {
  emulator::check_write(global, 16);
  *static_cast<uint4*>(global) = x;
}

template <class T>
T load_readonly(const void* global) {
  emulator::check_read(global, sizeof(T));
  return *static_cast<const T*>(global);
}

template <class T>
T load(const T* global) {
  emulator::check_read(global, sizeof(T));
  return *global;
}

template <class T>
void store(T* global, T x) {
  emulator::check_write(global, sizeof(T));
  *global = x;
}

inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulator::mma(emulator::Mma::bf16, d, a, b);
}

inline void mma_fp16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulator::mma(emulator::Mma::fp16, d, a, b);
}

// The one NaN that an instruction gives, whatever those are that it takes.
inline uint32_t canonical(float x, uint32_t bits) { return x != x ? 0x7fff : bits; }

inline uint32_t pack_bf16(float low, float high) {
  return canonical(low, narrow<bf16>(low).bits) | canonical(high, narrow<bf16>(high).bits) << 16;
}

inline uint32_t pack_fp16(float low, float high) {
  return canonical(low, narrow<fp16>(low).bits) | canonical(high, narrow<fp16>(high).bits) << 16;
}

inline float widen_fp16(uint32_t x) { return widen(fp16{static_cast<uint16_t>(x)}); }

inline float as_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t as_bits(float x) { return std::bit_cast<uint32_t>(x); }

inline float canonical(float x) { return x != x ? as_float(0x7fffffffu) : x; }
inline float add(float x, float y) { return canonical(x + y); }
inline float subtract(float x, float y) { return canonical(x - y); }
inline float multiply_add(float x, float y, float z) {
  return canonical(__builtin_fmaf(x, y, z));
}

inline uint32_t multiply_high(uint32_t x, uint32_t y) {
  return static_cast<uint32_t>(uint64_t{x} * y >> 32);
}

inline uint32_t low_halves(uint32_t x, uint32_t y) { return (x & 0xffff) | y << 16; }
inline uint32_t high_halves(uint32_t x, uint32_t y) { return x >> 16 | (y & 0xffff0000u); }

}  // namespace portllm::cuda
