// From the arguments of the op to tables for the kernel; runs on the host and knows neither torch
// nor CUDA.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda/table.h"

namespace portllm::cuda {

using portllm::Matrix;

struct Product {
  Matrix a;  // [rank, n]
  Matrix b;  // [m, rank]
  int64_t rank;
  double scaling;
};

struct Update {
  Matrix w;  // [m, n]
  int64_t m;
  int64_t n;
  std::vector<Product> terms;
};

struct Launch {
  DType dtype;
  bool aligned;  // rows of every W are covered exactly by 16-byte vectors
  bool several_terms = false;
  Table table{};
};

// As few launches as the size of a table allows, for updates on one device. What has nothing to add
// is left out. Throws std::invalid_argument, naming the weight by its place, if one cannot be
// updated.
std::vector<Launch> plan(std::vector<Update> updates);

}  // namespace portllm::cuda
