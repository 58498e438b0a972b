// The CPU implementation of the op whose schema portllm/requantise.py defines:
//   lowrank_requantise_cpu_(
//       Tensor(a!) codes, Tensor(b!) scales, Tensor[] lora_A, Tensor[] lora_B, float[] scalings, str scheme,
//       int block_rows, int block_columns, float global_scale, int[] modes) -> Tensor
#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "cpu/arguments.h"
#include "cpu/requantise.h"

namespace {

using namespace portllm;

struct Scheme {
  const char* name;
  Code code;
  Packing packing;
  ScalarType codes;
  std::vector<ScalarType> scales;
  bool flat = false;
};

const std::vector<Scheme>& schemes() {
  static const std::vector<Scheme> all{
      {"fp8_e4m3", Code::e4m3, Packing::one, ScalarType::Float8_e4m3fn,
       {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Byte}},
      {"int8", Code::int8, Packing::one, ScalarType::Char,
       {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half}},
      {"nf4", Code::nf4, Packing::high, ScalarType::Byte, {ScalarType::Float}, true},
      {"mxfp4", Code::e2m1, Packing::low, ScalarType::Byte, {ScalarType::Byte}},
      {"nvfp4", Code::e2m1, Packing::low, ScalarType::Byte, {ScalarType::Float8_e4m3fn}},
  };
  return all;
}

ScaleType scale_type(ScalarType type) {
  switch (type) {
    case ScalarType::BFloat16: return ScaleType::bf16;
    case ScalarType::Half: return ScaleType::fp16;
    case ScalarType::Float8_e4m3fn: return ScaleType::e4m3;
    case ScalarType::Float: return ScaleType::fp32;
    default: return ScaleType::e8m0;
  }
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Refuses all that `_check` in portllm/requantise.py does, which says why.
void check(bool fits) {
  STD_TORCH_CHECK(fits, "lowrank_requantise_cpu_: codes, scales and factors must be on the CPU, contiguous but for "
                        "rows of codes, and fit each other and the scheme");
}

void lowrank_requantise_cpu_(StableIValue* stack, uint64_t, uint64_t) {
  Tensor codes = torch::stable::detail::to<Tensor>(stack[0]);
  Tensor scales = torch::stable::detail::to<Tensor>(stack[1]);
  const Tensors lora_A(stack[2]), lora_B(stack[3]);
  const List scalings(stack[4]);
  const auto name = torch::stable::detail::to<std::string>(stack[5]);
  const auto block_rows = torch::stable::detail::to<int64_t>(stack[6]);
  const auto block_cols = torch::stable::detail::to<int64_t>(stack[7]);
  const auto global_scale = torch::stable::detail::to<double>(stack[8]);
  const std::vector<int64_t> modes = integers(stack[9]);

  const Scheme* scheme = nullptr;
  for (const Scheme& each : schemes()) {
    if (name == each.name) scheme = &each;
  }
  const size_t count = lora_A.size();
  check(scheme && count > 0 && lora_B.size() == count && scalings.size() == count && block_rows > 0 &&
        block_cols > 0 && (modes.empty() || modes.size() == 4) && codes.is_cpu() && scales.is_cpu() &&
        codes.scalar_type() == scheme->codes && scales.is_contiguous());
  bool known = false;
  for (const ScalarType type : scheme->scales) known |= scales.scalar_type() == type;
  check(known);

  std::vector<Term> terms(count);
  int64_t rows = 0, cols = 0;
  for (size_t t = 0; t < count; ++t) {
    const auto a = read(lora_A.get<AtenTensorHandle>(t)), b = read(lora_B.get<AtenTensorHandle>(t));
    check(a && b && a->rows == b->cols && a->rows > 0);
    if (t == 0) {
      rows = b->rows;
      cols = a->cols;
    }
    check(b->rows == rows && a->cols == cols);
    terms[t] = {a->matrix, b->matrix, a->rows, scalings.get<double>(t)};
  }

  // Two codes in a byte: of one row, or, where blocks are flat, of all weights.
  const bool two = scheme->packing != Packing::one;
  check(!two || (block_cols % 2 == 0 && (scheme->flat || cols % 2 == 0)));
  check(!scheme->flat || (block_rows == 1 && block_cols <= kLargestTiledBlock));
  const int64_t across = two ? cols / 2 : cols;
  const int64_t bytes = scheme->flat ? ceil_div(rows * cols, 2) : rows * across;
  const bool strided = !scheme->flat && codes.dim() == 2 && codes.size(0) == rows && codes.size(1) == across &&
                       (across <= 1 || codes.stride(1) == 1);
  check(codes.numel() == bytes && (strided || codes.is_contiguous()));
  const int64_t blocks = scheme->flat ? ceil_div(rows * cols, block_cols)
                                      : ceil_div(rows, block_rows) * ceil_div(cols, block_cols);
  check(scales.numel() == blocks);

  const auto flags = modes.empty() ? 0 : modes[0];
  Quantised weight{};
  weight.code = scheme->code;
  weight.packing = scheme->packing;
  weight.scale_type = scale_type(scales.scalar_type());
  weight.codes = static_cast<uint8_t*>(codes.mutable_data_ptr());
  weight.row_bytes = strided ? codes.stride(0) : across;
  weight.scales = static_cast<uint8_t*>(scales.mutable_data_ptr());
  weight.rows = rows;
  weight.cols = cols;
  weight.block_rows = scheme->flat ? 1 : std::min(block_rows, rows);
  weight.block_cols = scheme->flat ? block_cols : std::min(block_cols, cols);
  weight.flat = scheme->flat;
  weight.global_scale = static_cast<float>(global_scale);
  weight.stochastic = flags & 1;
  weight.keep_zeros = flags & 2;
  if (!modes.empty()) {
    weight.key = static_cast<uint64_t>(modes[1]);
    weight.row = static_cast<uint32_t>(modes[2]);
    weight.column = static_cast<uint32_t>(modes[3]);
  }
  weight.terms = terms;

  Movement movement;
  if (rows > 0 && cols > 0) {
    RequantiseJob job(isa(), weight, threads());
    for (int phase = 0; phase < job.phases(); ++phase) {
      job.begin(phase);
      torch::stable::parallel_for(0, job.threads(), 1, [&](int64_t, int64_t) { job.work(); });
    }
    movement = job.movement();
  }
  Tensor sums = torch::stable::new_empty(codes, {3}, ScalarType::Double);
  auto* out = static_cast<double*>(sums.mutable_data_ptr());
  out[0] = movement.delta;
  out[1] = movement.along;
  out[2] = movement.change;
  stack[0] = torch::stable::detail::from(sums);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(portllm, CPU, m) { m.impl("lowrank_requantise_cpu_", lowrank_requantise_cpu_); }
