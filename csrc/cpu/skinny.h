// Products of a large matrix D and a few columns X: D X, or D^T X. No torch in here.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <numeric>
#include <vector>

#include "cpu/half.h"
#include "matrix.h"

namespace portllm {

struct Skinny {
  Matrix d;  // [rows, cols], fp32 or bf16; col_stride is 1
  int64_t rows;
  int64_t cols;
  bool transposed;     // D^T X
  const float* block;  // X, [cols, width] or, transposed, [rows, width]; contiguous
  int64_t width;
  float* out;  // [rows, width] or, transposed, [cols, width]; contiguous
  // Where source.data is set, and not transposed: [rows, cols] in fp32, of which D, in bf16, is made
  // first.
  Matrix source{};
  double* squares = nullptr;  // the sum of its squares in each strip; set by SkinnyJob

  int64_t depth() const { return transposed ? rows : cols; }  // products in each sum
  int64_t height() const { return transposed ? cols : rows; }
};

// X is taken kBand columns at a time (a "band"), the rows of the result a strip at a time. One thread
// sums each number of the result, in fp32 and in an order that only the shapes and the variant set,
// so the number of threads changes no bit. With D in bf16, X is rounded to bf16.
struct SkinnyKernel {
  int64_t strip;             // rows of D X
  int64_t transposed_strip;  // rows of D^T X
  // Packs one band of X into `packed`, of packed_size(product) numbers.
  void (*pack)(const Skinny&, int64_t band, float* packed);
  // Computes one strip of the result from all bands, packed one after the other.
  void (*multiply)(const Skinny&, int64_t strip, const float* packed);
};

constexpr int kBand = 16;

inline int64_t bands(const Skinny& p) { return (p.width + kBand - 1) / kBand; }

inline int64_t packed_size(const Skinny& p) { return p.depth() * kBand; }

// One product, cut into strips that any number of threads take one after the other.
class SkinnyJob {
 public:
  SkinnyJob(const SkinnyKernel& kernel, const Skinny& product, int64_t threads);

  // How many threads are worth their start, at most as many as were given.
  int64_t threads() const { return threads_; }

  // The sum of the squares of the source, when all is done; 0 without a source.
  double squares() const { return std::accumulate(squares_.begin(), squares_.end(), 0.0); }

  // Takes strips until none is left; to be called once by each thread.
  void work();

 private:
  struct Free {
    void operator()(float* p) const;
  };

  const SkinnyKernel& kernel_;
  Skinny product_;
  std::vector<double> squares_;
  std::unique_ptr<float, Free> packed_;
  int64_t strips_;
  int64_t threads_;
  std::atomic<int64_t> next_{0};
};

}  // namespace portllm
