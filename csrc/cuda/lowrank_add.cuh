// W <- round(W + sum_t s_t * B_t A_t) in place, for all weights of a table, in one pass over them.
//
// A block takes tile after tile of 64 x 128 elements. W streams: each thread copies those elements
// that it will update into a ring in shared memory (cp.async), a few tiles ahead, so that memory is
// always busy; it waits for its own copies only. The factors stay in L2: of each, 16 of the rank at
// a time pass through registers, where they are cut into bf16 parts, into shared memory, in the
// order in which the tensor cores want them. Sums stay in registers, and so does W from the ring to
// its way back.
//
// Which column or place in the rank an mma calls which is up to us, as long as both factors agree.
// So of 32 columns each thread has 8 that lie side by side: 16 bytes of a half type.
#pragma once

#include <type_traits>

#include "cuda/factors.cuh"
#include "cuda/ptx.cuh"
#include "cuda/table.h"
#include "cuda/walk.cuh"

namespace portllm::cuda {

// -- W --------------------------------------------------------------------------------------------

template <DType kDType>
PORTLLM_DEVICE uint32_t pack(float low, float high) {
  return kDType == DType::bf16 ? pack_bf16(low, high) : pack_fp16(low, high);
}

// The first column, and the rows 0..3, that a thread updates.
PORTLLM_DEVICE int thread_col(const Tile& tile) {
  return tile.col + 32 * warp_col() + 8 * (lane() % 4);
}
PORTLLM_DEVICE int thread_row(const Tile& tile, int i) {
  return tile.row + 32 * warp_row() + 8 * i + lane() / 4;
}

// Rows that 16-byte vectors cover exactly.
template <DType kDType>
struct AlignedWeight {
  static constexpr int kBytes = kDType == DType::fp32 ? 4 : 2;
  static constexpr int kVector = 16 / kBytes;
  static constexpr int kVectors = 8 / kVector;  // in a thread's part of a row
  static constexpr int kStageWords = 4 * kVectors * kThreads;

  uint4* ring;
  int slot = 0;

  PORTLLM_DEVICE uint4* place(int stage, int i, int v) const {
    return ring + ((stage * 4 + i) * kVectors + v) * kThreads + thread_index();
  }

  template <class F>
  PORTLLM_DEVICE static void for_each(const Table& table, const Tile& tile, F&& f) {
    const Weight& w = table.weights[tile.weight];
    const int col = thread_col(tile), m = w.m, n = w.n;
    const int64_t stride = w.row_stride * kBytes;
    char* p = static_cast<char*>(w.data) + thread_row(tile, 0) * stride + col * kBytes;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const bool inside = thread_row(tile, i) < m && col + v * kVector < n;
        if (inside) f(p + v * 16, i, v);
      }
      p += 8 * stride;
    }
  }

  // Begins to copy a tile that is `ahead` tiles away; to be called for every tile, there or not.
  PORTLLM_DEVICE void copy(const Table& table, const Tile& tile, int ahead) {
    if (tile.valid(table)) {
      const uint64_t policy = streaming_policy();
      const int stage = slot + ahead < table.stages ? slot + ahead : slot + ahead - table.stages;
      for_each(table, tile, [&](char* p, int i, int v) {
        cp_async16(place(stage, i, v), p, policy);
      });
    }
    cp_async_commit();
  }

  PORTLLM_DEVICE void wait(int stages) {
    static_assert(kMinStages == 2 && kMaxStages == 4);
    if (stages == 2) {
      cp_async_wait<1>();
    } else if (stages == 3) {
      cp_async_wait<2>();
    } else {
      cp_async_wait<3>();
    }
  }

  PORTLLM_DEVICE void update(const Table& table, const Tile& tile, const Sums& sums) {
    wait(table.stages);
    const uint64_t policy = streaming_policy();
    for_each(table, tile, [&](char* p, int i, int v) {
      const uint4 x = *place(slot, i, v);
      uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        if constexpr (kDType == DType::fp32) {
          const int e = v * 4 + c;
          words[c] = as_bits(add(as_float(words[c]), sums[i / 2][e / 2][i % 2 * 2 + e % 2]));
        } else {
          float low, high;
          widen(words[c], kDType, low, high);
          words[c] = pack<kDType>(add(low, sums[i / 2][c][i % 2 * 2]),
                                  add(high, sums[i / 2][c][i % 2 * 2 + 1]));
        }
      }
      store_streaming(p, {words[0], words[1], words[2], words[3]}, policy);
    });
    slot = slot + 1 < table.stages ? slot + 1 : 0;
  }
};

// Any strides: element by element.
template <DType kDType>
struct StridedWeight {
  static constexpr int kStageWords = 0;

  uint4* ring;

  PORTLLM_DEVICE void copy(const Table&, const Tile&, int) {}

  PORTLLM_DEVICE void update(const Table& table, const Tile& tile, const Sums& sums) {
    using Element = std::conditional_t<kDType == DType::fp32, float, uint16_t>;
    const Weight& w = table.weights[tile.weight];
    const int col = thread_col(tile);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = thread_row(tile, i);
      if (row >= w.m) continue;
      Element* p = static_cast<Element*>(w.data) + row * w.row_stride + col * w.col_stride;
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        if (col + e >= w.n) continue;
        const Element x = load(p + e * w.col_stride);
        const float sum = sums[i / 2][e / 2][i % 2 * 2 + e % 2];
        if constexpr (kDType == DType::fp32) {
          store(p + e * w.col_stride, add(x, sum));
        } else {
          float low, high;
          widen(x, kDType, low, high);
          store(p + e * w.col_stride, static_cast<uint16_t>(pack<kDType>(add(low, sum), 0.f)));
        }
      }
    }
  }
};

// -- terms ----------------------------------------------------------------------------------------

// The sum of the terms that are complete, of each thread's elements; used by weights with several
// terms only, so it costs no registers.
struct Totals {
  float4* totals;

  PORTLLM_DEVICE float4& at(int i) const { return totals[i * kThreads + thread_index()]; }

  // sums <- scaling * sums + what the earlier terms left; leaves that, if a later term follows.
  PORTLLM_DEVICE void fold(Sums& sums, float scaling, bool first, bool last) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float (&x)[4] = sums[i / 4][i % 4];
      const float4 before = first ? float4{} : at(i);
      x[0] = multiply_add(scaling, x[0], before.x);
      x[1] = multiply_add(scaling, x[1], before.y);
      x[2] = multiply_add(scaling, x[2], before.z);
      x[3] = multiply_add(scaling, x[3], before.w);
      if (!last) at(i) = {x[0], x[1], x[2], x[3]};
    }
  }
};

// -- the kernel -----------------------------------------------------------------------------------

template <DType kDType, bool kAligned>
PORTLLM_KERNEL(kThreads, kBlocksPerSm)
lowrank_add(PORTLLM_ARGUMENT(Table) table) {
  using W = std::conditional_t<kAligned, AlignedWeight<kDType>, StridedWeight<kDType>>;
  uint4* buffer = shared_memory();  // and a second one behind it
  W w{buffer + 2 * kBufferWords};
  const Totals totals{reinterpret_cast<float4*>(w.ring + table.stages * W::kStageWords)};

  Tile ahead;
  ahead.index = block_index();
  const auto copy_ahead = [&](int distance) {
    if (!kAligned) return;
    if (ahead.valid(table)) ahead.locate(table);
    w.copy(table, ahead, distance);
    ahead.index += block_count();
  };
  for (int i = 0; i < table.stages - 1; ++i) copy_ahead(i);

  Step next;
  next.start(table, block_index());
  Raw raw;
  load_factors(raw, table, next);
  Sums sums = {};
  bool second = false;
  while (next.valid(table)) {
    const Step now = next;
    const Products products = table.terms[now.term].products;
    uint4* half = buffer + (second ? kBufferWords : 0);
    second = !second;
    // The one barrier of a step: this half is complete, and no one reads the other one any more.
    const bool more = barrier_any(store_factors(half, raw, table.terms[now.term]));
    // Behind the barrier, as the slot that it takes was read before it.
    if (now.opens_tile) copy_ahead(table.stages - 1);
    next.advance(table);
    if (next.valid(table)) load_factors(raw, table, next);

    if (products == Products::fp16) {
      multiply<true, 1>(sums, half);
    } else if (more) {
      multiply<false, kParts>(sums, half);
    } else {
      multiply<false, 1>(sums, half);  // all else is zero, as in an fp32 copy of bf16
    }
    if (next.k != 0) continue;

    const bool first = now.term == table.weights[now.weight].first_term;
    const bool last = next.index != now.index;
    totals.fold(sums, table.terms[now.term].scaling, first, last);
    if (last) w.update(table, now, sums);
#pragma unroll
    for (int i = 0; i < 32; ++i) sums[i / 16][i / 4 % 4][i % 4] = 0;
  }
}

}  // namespace portllm::cuda
