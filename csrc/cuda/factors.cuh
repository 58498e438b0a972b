// The way of the factors: from global memory through registers, where they are cut into bf16 parts,
// into shared memory, and from there into the tensor cores.
#pragma once

#include <type_traits>
#include <utility>

#include "cuda/ptx.cuh"
#include "cuda/table.h"
#include "cuda/walk.cuh"

namespace portllm::cuda {

// -- from global memory to registers --------------------------------------------------------------

// What a thread loads for one step, as it lies in memory: of elements of 2 bytes, two in a word.
struct Raw {
  uint32_t b[4];  // two rows, each with two of the rank
  uint32_t a[8];  // two columns, each with four of the rank; or four of the rank, each with two
};

PORTLLM_DEVICE bool is_half(DType dtype) { return dtype == DType::bf16 || dtype == DType::fp16; }

PORTLLM_DEVICE const void* offset(const void* p, DType dtype, int64_t elements) {
  const int shift = is_half(dtype) ? 1 : dtype == DType::fp32 ? 2 : 3;
  return static_cast<const char*>(p) + (elements << shift);
}

// The bits of one element; of an fp64, those of its fp32 rounding.
PORTLLM_DEVICE uint32_t load_single(const void* p, DType dtype) {
  if (is_half(dtype)) return load_readonly<uint16_t>(p);
  if (dtype == DType::fp32) return load_readonly<uint32_t>(p);
  return as_bits(static_cast<float>(load_readonly<double>(p)));
}

// A vector of 2 or 4 elements of 2 or 4 bytes.
template <int kCount, bool kHalf>
using Vector = std::conditional_t<kCount == 4 && !kHalf, uint4,
                                  std::conditional_t<kCount == 2 && kHalf, uint32_t, uint2>>;

PORTLLM_DEVICE void unpack(uint32_t* raw, uint32_t x) { raw[0] = x; }
PORTLLM_DEVICE void unpack(uint32_t* raw, uint2 x) {
  raw[0] = x.x;
  raw[1] = x.y;
}
PORTLLM_DEVICE void unpack(uint32_t* raw, uint4 x) {
  raw[0] = x.x;
  raw[1] = x.y;
  raw[2] = x.z;
  raw[3] = x.w;
}

// Line number kLine: kCount elements, of which `left` exist: all or none, where a vector is loaded.
template <int kLine, int kCount>
PORTLLM_DEVICE void load_line(uint32_t* raw, const void* p, DType dtype, bool vector,
                              int64_t stride, int left) {
  if (vector) {
    if (left <= 0) return;
    if (is_half(dtype)) {
      unpack(raw + kLine * kCount / 2, load_readonly<Vector<kCount, true>>(p));
    } else {
      unpack(raw + kLine * kCount, load_readonly<Vector<kCount, false>>(p));
    }
    return;
  }
  uint32_t x[kCount] = {};
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (i < left) x[i] = load_single(offset(p, dtype, i * stride), dtype);
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (!is_half(dtype)) {
      raw[kLine * kCount + i] = x[i];
    } else if (i % 2 == 0) {
      raw[(kLine * kCount + i) / 2] = low_halves(x[i], x[i + 1]);
    }
  }
}

// Of each 16 rows of the tile's B a thread loads row i and row i + 8, two of the rank.
PORTLLM_DEVICE int b_block() { return thread_index() / 64; }
PORTLLM_DEVICE int b_row() { return thread_index() / 8 % 8; }
PORTLLM_DEVICE int b_pair() { return thread_index() % 8; }
// Of the tile's A two columns, four of the rank.
PORTLLM_DEVICE int a_pair() { return thread_index() % 64; }
PORTLLM_DEVICE int a_quad() { return thread_index() / 64; }

PORTLLM_DEVICE void load_factors(Raw& raw, const Table& table, const Step& step) {
  const Term& term = table.terms[step.term];
  const Weight& w = table.weights[step.weight];
#pragma unroll
  for (uint32_t& x : raw.b) x = 0;
#pragma unroll
  for (uint32_t& x : raw.a) x = 0;

  {
    const int row = step.row + 16 * b_block() + b_row(), k = step.k + 2 * b_pair();
    const void* p = offset(term.b, term.b_dtype, row * term.b_stride_m + k * term.b_stride_k);
    const void* q = offset(p, term.b_dtype, 8 * term.b_stride_m);
    const bool vector = term.b_access == Access::along_rank;
    const int left = term.rank - k;
    load_line<0, 2>(raw.b, p, term.b_dtype, vector, term.b_stride_k, row < w.m ? left : 0);
    load_line<1, 2>(raw.b, q, term.b_dtype, vector, term.b_stride_k, row + 8 < w.m ? left : 0);
  }

  const int col = step.col + 2 * a_pair(), k = step.k + 4 * a_quad();
  const int left_k = term.rank - k, left_n = w.n - col;
  const void* p = offset(term.a, term.a_dtype, k * term.a_stride_k + col * term.a_stride_n);
  if (term.a_access == Access::along_columns) {
    const int64_t bytes = term.a_stride_k * (is_half(term.a_dtype) ? 2 : 4);
    const auto load = [&]<int... kLine>(std::integer_sequence<int, kLine...>) {
      (load_line<kLine, 2>(raw.a, static_cast<const char*>(p) + kLine * bytes, term.a_dtype, true,
                           1, kLine < left_k ? left_n : 0),
       ...);
    };
    load(std::make_integer_sequence<int, 4>());
  } else {
    const void* q = offset(p, term.a_dtype, term.a_stride_n);
    const bool vector = term.a_access == Access::along_rank;
    load_line<0, 4>(raw.a, p, term.a_dtype, vector, term.a_stride_k, left_n > 0 ? left_k : 0);
    load_line<1, 4>(raw.a, q, term.a_dtype, vector, term.a_stride_k, left_n > 1 ? left_k : 0);
  }
}

// -- from registers to shared memory --------------------------------------------------------------

// In 512 bytes of a buffer lies what one mma (of A: two) takes: 16 bytes of each lane. Lanes are
// shuffled such that neither the stores nor the loads of a quarter of a warp meet in one bank.
PORTLLM_DEVICE int shuffled(int lane) { return lane ^ lane >> 3; }

constexpr int kParts = 3;
constexpr int kBlocksB = kTileRows / 16;  // of 16 rows
constexpr int kBlocksA = kTileCols / 16;  // of 16 columns
constexpr int kBufferWords = (kBlocksB + kBlocksA) * kParts * 32;  // of 16 bytes
static_assert(2 * kBufferWords * sizeof(uint4) == kFactorBytes);

PORTLLM_DEVICE uint4* block_of_b(uint4* buffer, int block) { return buffer + block * kParts * 32; }
PORTLLM_DEVICE uint4* block_of_a(uint4* buffer, int block) {
  return buffer + (kBlocksB + block) * kParts * 32;
}

// Two numbers in the halves of a word.
PORTLLM_DEVICE float low_bf16(uint32_t x) { return as_float(x << 16); }
PORTLLM_DEVICE float high_bf16(uint32_t x) { return as_float(x & 0xffff0000u); }

// Cuts two numbers into three parts each, that add up to them: 3 x 8 bits hold all 24. Returns
// whether more than the first part is needed.
PORTLLM_DEVICE bool split(float x, float y, uint32_t (&parts)[kParts]) {
#pragma unroll
  for (uint32_t& part : parts) {
    part = pack_bf16(x, y);
    x = subtract(x, low_bf16(part));
    y = subtract(y, high_bf16(part));
  }
  return ((parts[1] | parts[2]) & 0x7fff7fffu) != 0;
}

PORTLLM_DEVICE void widen(uint32_t x, DType dtype, float& low, float& high) {
  if (dtype == DType::bf16) {
    low = low_bf16(x);
    high = high_bf16(x);
  } else {
    low = widen_fp16(x);
    high = widen_fp16(x >> 16);
  }
}

// Writes two pairs along the rank to one half of a lane's 16 bytes: of elements of 2 bytes a pair
// is a word, of others it is two.
PORTLLM_DEVICE bool store_pairs(uint4* block, int lane, int half, Products products, DType dtype,
                                const uint32_t (&words)[2], const uint32_t (&singles)[4]) {
  uint2* out = reinterpret_cast<uint2*>(block + lane) + half;
  if (products != Products::split) {
    out[0] = {words[0], words[1]};
    return false;
  }
  float x[4];
  if (is_half(dtype)) {
    widen(words[0], dtype, x[0], x[1]);
    widen(words[1], dtype, x[2], x[3]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = as_float(singles[i]);
  }
  uint32_t first[kParts], second[kParts];
  const bool more = split(x[0], x[1], first) | split(x[2], x[3], second);
#pragma unroll
  for (int part = 0; part < kParts; ++part) out[part * 64] = {first[part], second[part]};
  return more;
}

// Returns whether this thread's elements need more than their first part.
PORTLLM_DEVICE bool store_factors(uint4* buffer, const Raw& raw, const Term& term) {
  // An mma calls the four of the rank that one of its threads has 2t, 2t + 1, 2t + 8 and 2t + 9.
  const uint32_t pairs[2] = {raw.b[0], raw.b[1]};
  bool more = store_pairs(block_of_b(buffer, b_block()), shuffled(b_row() * 4 + b_pair() / 2),
                          b_pair() % 2, term.products, term.b_dtype, pairs, raw.b);
  // Of 32 columns a thread of the mma has 8, in 4 of its blocks of 8 columns two each.
  const int pair = a_pair() % 16, thread = pair / 4, n_block = pair % 4;
  uint4* block = block_of_a(buffer, a_pair() / 16 * 2 + n_block / 2);
  const bool columns = term.a_access == Access::along_columns;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    uint32_t words[2], singles[4];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const uint32_t x = raw.a[2 * k], y = raw.a[2 * k + 1];
      words[k] = !columns ? raw.a[2 * i + k] : i == 0 ? low_halves(x, y) : high_halves(x, y);
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) singles[k] = columns ? raw.a[2 * k + i] : raw.a[4 * i + k];
    const int lane = shuffled((2 * thread + i) * 4 + a_quad()) ^ n_block / 2 * 4;
    more |= store_pairs(block, lane, n_block % 2, term.products, term.a_dtype, words, singles);
  }
  return more;
}

// -- products -------------------------------------------------------------------------------------

// Of a warp: 32 x 32 elements, in 2 x 4 results of an mma.
using Sums = float[2][4][4];

PORTLLM_DEVICE int lane() { return thread_index() % 32; }
PORTLLM_DEVICE int warp_row() { return thread_index() / 128; }
PORTLLM_DEVICE int warp_col() { return thread_index() / 32 % 4; }

template <bool kFp16, int kN>
PORTLLM_DEVICE void multiply(Sums& sums, uint4* buffer) {
  const int b_lane = shuffled(lane());
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    uint32_t b[kN][4];
#pragma unroll
    for (int part = 0; part < kN; ++part) {
      const uint4 x = block_of_b(buffer, 2 * warp_row() + i)[part * 32 + b_lane];
      b[part][0] = x.x;
      b[part][1] = x.y;
      b[part][2] = x.z;
      b[part][3] = x.w;
    }
#pragma unroll
    for (int j = 0; j < 4; j += 2) {
      // The product of the first parts comes last, or the small ones would be rounded off. The
      // three that are left out are 2^-24 of the whole.
#pragma unroll
      for (int part_a = kN - 1; part_a >= 0; --part_a) {
        const uint4 x = block_of_a(buffer, 2 * warp_col() + j / 2)[part_a * 32 + (b_lane ^ 2 * j)];
        const uint32_t a[2][2] = {{x.x, x.y}, {x.z, x.w}};
#pragma unroll
        for (int part_b = kN - 1 - part_a; part_b >= 0; --part_b) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            if constexpr (kFp16) {
              mma_fp16(sums[i][j + e], b[part_b], a[e]);
            } else {
              mma_bf16(sums[i][j + e], b[part_b], a[e]);
            }
          }
        }
      }
    }
  }
}

}  // namespace portllm::cuda
