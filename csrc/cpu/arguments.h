// What the bindings share: arguments of ops as LibTorch's stable ABI passes them.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "cpu/lowrank_add.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

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

inline std::optional<portllm::DType> dtype_of(AtenTensorHandle tensor) {
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
inline std::optional<Operand> read(AtenTensorHandle tensor, bool written = false) {
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

inline std::vector<int64_t> integers(StableIValue argument) {
  const List list(argument);
  std::vector<int64_t> out(list.size());
  for (size_t i = 0; i < out.size(); ++i) out[i] = list.get<int64_t>(i);
  return out;
}

inline const portllm::Isa& isa() {
  const portllm::Isa* isa = portllm::chosen_isa();
  STD_TORCH_CHECK(isa, "PORTLLM_CPU_ISA names a variant this CPU does not have");
  return *isa;
}

inline int64_t threads() { return static_cast<int64_t>(torch::stable::get_num_threads()); }

}  // namespace
