// What the numbers of a factor allow, found by looking at each of them.
#pragma once

#include "cpu/lowrank_add.h"

namespace portllm {

struct Facts {
  // All are numbers of bf16, as copies of bf16 in fp32 are.
  bool bf16 = true;
  // The instruction for pairs of bf16 products takes them. It takes subnormal numbers for zeros, but a
  // factor of at least 2^-56, or 0, is a multiple of 2^-63, so that all products and their sums are
  // multiples of 2^-126: never subnormal.
  bool pairs = true;
  // All are below 2^63, so that no product overflows; no infinities, no NaNs.
  bool bounded = true;
};

// The facts of x, [rows, cols]; with only_pairs it stops as soon as `pairs` is known.
Facts inspect(const Matrix& x, int64_t rows, int64_t cols, bool only_pairs);

}  // namespace portllm
