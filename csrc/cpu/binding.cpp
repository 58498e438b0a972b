// The CPU implementations of the ops whose schemas portllm/ops.py and portllm/skinny.py define.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cpu/lowrank_add.h"

namespace {

// How many weights a thread reads at least.
constexpr int64_t kGrain = 1024;

// An argument that is a list, owned. Its elements are read where they lie: std::vector<Tensor>
// would allocate for each of them, which costs as much as updating a small weight.
class List {
 public:
  explicit List(StableIValue list) : handle_(torch::stable::detail::to<StableListHandle>(list)) {
    TORCH_ERROR_CODE_CHECK(torch_list_size(handle_, &size_));
  }
  List(const List&) = delete;
  List& operator=(const List&) = delete;
  ~List() { torch_delete_list(handle_); }

  size_t size() const { return size_; }

  template <class T>
  T get(size_t index) const {
    StableIValue element{};
    TORCH_ERROR_CODE_CHECK(torch_list_get_item(handle_, index, &element));
    return torch::stable::detail::to<T>(element);
  }

 private:
  StableListHandle handle_;
  size_t size_ = 0;
};

struct Tensors : List {
  using List::List;
  ~Tensors() {
    for (size_t i = 0; i < size(); ++i) aoti_torch_delete_tensor_object(get<AtenTensorHandle>(i));
  }
};

std::optional<portllm::DType> dtype_of(AtenTensorHandle tensor) {
  using portllm::DType;
  static const std::pair<int32_t, DType> codes[] = {{aoti_torch_dtype_bfloat16(), DType::bf16},
                                                    {aoti_torch_dtype_float16(), DType::fp16},
                                                    {aoti_torch_dtype_float32(), DType::fp32},
                                                    {aoti_torch_dtype_float64(), DType::fp64}};
  int32_t wanted = -1;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor, &wanted));
  for (const auto& [code, dtype] : codes) {
    if (code == wanted) return dtype;
  }
  return std::nullopt;
}

struct Operand {
  portllm::Matrix matrix;
  int64_t rows;
  int64_t cols;
};

// The tensor as a matrix; nothing if it is none that the kernel takes.
std::optional<Operand> read(AtenTensorHandle tensor, bool written = false) {
  int64_t dim = 0;
  int32_t device = -1;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(tensor, &dim));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor, &device));
  const auto dtype = dtype_of(tensor);
  if (dim != 2 || device != aoti_torch_device_type_cpu() || !dtype) return std::nullopt;
  int64_t* sizes = nullptr;
  int64_t* strides = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tensor, &sizes));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(tensor, &strides));
  void* data = nullptr;
  if (written) {  // this pointer ends the sharing of a lazy copy
    TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(tensor, &data));
  } else {
    const void* shared = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(tensor, &shared));
    data = const_cast<void*>(shared);
  }
  return Operand{{data, *dtype, strides[0], strides[1]}, sizes[0], sizes[1]};
}

// (Tensor(a!)[] weights, Tensor[] lora_A, Tensor[] lora_B, float[] scalings, int[] n_terms) -> ()
// Refuses, before the first write, all that `_check` in portllm/ops.py does, which then says why.
void lowrank_add_cpu_(StableIValue* stack, uint64_t, uint64_t) {
  const Tensors tensors(stack[0]), lora_A(stack[1]), lora_B(stack[2]);
  const List scalings(stack[3]), n_terms(stack[4]);
  const auto count = static_cast<int64_t>(tensors.size());
  const auto total = static_cast<int64_t>(lora_A.size());

  const portllm::Isa* isa = portllm::chosen_isa();
  STD_TORCH_CHECK(isa, "lowrank_add_cpu_: PORTLLM_CPU_ISA names a variant this CPU does not have");
  STD_TORCH_CHECK(n_terms.size() == tensors.size() && lora_B.size() == lora_A.size() &&
                      scalings.size() == lora_A.size(),
                  "lowrank_add_cpu_: the lists do not have fitting lengths");
  std::vector<portllm::Weight> weights(count);
  std::vector<portllm::Term> terms(total);
  int64_t end = 0;
  for (int64_t i = 0; i < count; ++i) {
    const auto n = n_terms.get<int64_t>(i);
    const auto w = read(tensors.get<AtenTensorHandle>(i), true);
    STD_TORCH_CHECK(w && n > 0 && n <= total - end, "lowrank_add_cpu_: weights[", i,
                    "] must be a 2-D tensor of floats on the CPU, with one term or more");
    weights[i] = {w->matrix, w->rows, w->cols, {terms.data() + end, static_cast<size_t>(n)}};
    end += n;
  }
  std::atomic<bool> fit = end == total;
  // Factors lie anywhere in memory, so that their attributes come faster to several threads.
  torch::stable::parallel_for(0, count, kGrain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      for (portllm::Term& term : weights[i].terms) {
        const size_t t = &term - terms.data();
        const auto a = read(lora_A.get<AtenTensorHandle>(t));
        const auto b = read(lora_B.get<AtenTensorHandle>(t));
        if (a && b && b->rows == weights[i].rows && a->cols == weights[i].cols &&
            a->rows == b->cols && a->rows > 0) {
          term = {a->matrix, b->matrix, a->rows, scalings.get<double>(t)};
        } else {
          fit = false;
        }
      }
    }
  });
  STD_TORCH_CHECK(fit, "lowrank_add_cpu_: factors must be floats on the CPU that fit their weight");

  const auto threads = static_cast<int64_t>(torch::stable::get_num_threads());
  portllm::Job job(*isa, std::move(weights), threads);
  // Threads take blocks themselves: that also holds inside another parallel region, where torch
  // gives the whole range to one thread. What one thread can do is done here, without waking any.
  torch::stable::parallel_for(0, job.threads(), 1, [&](int64_t, int64_t) { job.work(); });
}

using torch::stable::Tensor;

Tensor tensor(StableIValue argument) { return torch::stable::detail::to<Tensor>(argument); }

// The data of a contiguous matrix of this size and dtype; `what` names it in the error.
void* contiguous(const Tensor& matrix, int64_t rows, int64_t cols, portllm::DType dtype,
                 const char* what, bool written = false) {
  const auto x = read(matrix.get(), written);
  STD_TORCH_CHECK(x && x->matrix.dtype == dtype && x->rows == rows && x->cols == cols &&
                      (cols <= 1 || x->matrix.col_stride == 1) &&
                      (rows <= 1 || cols == 0 || x->matrix.row_stride == cols),
                  what, " must be contiguous, on the CPU, ",
                  dtype == portllm::DType::bf16 ? "bfloat16" : "float32", " and [", rows, ", ",
                  cols, "]");
  return x->matrix.data;
}

// Takes the product with `block` into `out`, for the op of this name.
double run(portllm::Skinny product, const Tensor& block, const Tensor& out,
           const std::string& name) {
  using portllm::DType;
  const portllm::Isa* isa = portllm::chosen_isa();
  STD_TORCH_CHECK(isa, name, ": PORTLLM_CPU_ISA names a variant this CPU does not have");
  product.width = block.dim() == 2 ? block.size(1) : 0;
  product.block = static_cast<const float*>(contiguous(
      block, product.depth(), product.width, DType::fp32, (name + ": block").c_str()));
  product.out = static_cast<float*>(contiguous(out, product.height(), product.width, DType::fp32,
                                               (name + ": out").c_str(), true));
  const auto threads = static_cast<int64_t>(torch::stable::get_num_threads());
  portllm::SkinnyJob job(isa->skinny, product, threads);
  torch::stable::parallel_for(0, job.threads(), 1, [&](int64_t, int64_t) { job.work(); });
  return job.squares();
}

// (Tensor(a!) out, Tensor matrix, Tensor block) -> ()
void skinny_cpu_(StableIValue* stack, uint64_t, uint64_t) {
  using portllm::DType;
  const Tensor out = tensor(stack[0]), matrix = tensor(stack[1]), block = tensor(stack[2]);
  auto d = read(matrix.get());
  const bool transposed = d && d->cols > 1 && d->matrix.col_stride != 1;
  if (transposed) {
    std::swap(d->rows, d->cols);
    std::swap(d->matrix.row_stride, d->matrix.col_stride);
  }
  STD_TORCH_CHECK(d && (d->matrix.dtype == DType::fp32 || d->matrix.dtype == DType::bf16) &&
                      (d->cols <= 1 || d->matrix.col_stride == 1),
                  "skinny_cpu_: matrix must be 2-D, on the CPU, float32 or bfloat16, and its rows "
                  "or its columns contiguous");
  run({d->matrix, d->rows, d->cols, transposed}, block, out, "skinny_cpu_");
}

// (Tensor(a!) out, Tensor(b!) coarse, Tensor matrix, Tensor block) -> float
void sketch_cpu_(StableIValue* stack, uint64_t, uint64_t) {
  using portllm::DType;
  const Tensor out = tensor(stack[0]), coarse = tensor(stack[1]);
  const Tensor matrix = tensor(stack[2]), block = tensor(stack[3]);
  const auto d = read(matrix.get());
  STD_TORCH_CHECK(
      d && d->matrix.dtype == DType::fp32 && (d->cols <= 1 || d->matrix.col_stride == 1),
      "sketch_cpu_: matrix must be 2-D, on the CPU, float32, and its rows contiguous");
  void* rounded = contiguous(coarse, d->rows, d->cols, DType::bf16, "sketch_cpu_: coarse", true);
  portllm::Skinny product{{rounded, DType::bf16, d->cols, 1}, d->rows, d->cols, false};
  product.source = d->matrix;
  stack[0] = torch::stable::detail::from(run(product, block, out, "sketch_cpu_"));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(portllm, CPU, m) {
  m.impl("lowrank_add_cpu_", lowrank_add_cpu_);
  m.impl("skinny_cpu_", skinny_cpu_);
  m.impl("sketch_cpu_", sketch_cpu_);
}
