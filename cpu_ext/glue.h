// SPDX-License-Identifier: Apache-2.0
// Shared by the files that implement ops. Not for the files of an instruction set: see kernels.h.
//
// Only torch's stable ABI is used, so one library serves every torch from 2.10.
#pragma once
#include <stdlib.h>
#include <string.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <new>
#include <optional>
#include <string>
#include <vector>

#include "kernels.h"

// the newer macro keeps the error message; headers of 2.10 and 2.11 lack it
#if defined(STABLE_TORCH_ERROR_CODE_CHECK)
#define DTQ_CHECKED STABLE_TORCH_ERROR_CODE_CHECK
#else
#define DTQ_CHECKED TORCH_ERROR_CODE_CHECK
#endif

namespace dtq::glue {

using torch::headeronly::ScalarType;
using torch::stable::parallel_for;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Memory that a thread reuses from call to call, aligned for vector loads.
class Scratch {
 public:
  ~Scratch() { free(memory_); }
  template <typename T = char>
  T* get(int64_t bytes) {
    if (bytes > size_) {
      free(memory_);
      size_ = (bytes + 4095) / 4096 * 4096;
      memory_ = aligned_alloc(4096, size_);
      if (!memory_) {
        size_ = 0;
        throw std::bad_alloc();
      }
    }
    return static_cast<T*>(memory_);
  }

 private:
  void* memory_ = nullptr;
  int64_t size_ = 0;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t round_up(int64_t x, int64_t multiple) { return ceil_div(x, multiple) * multiple; }

inline dtq::Float float_type(ScalarType type) {
  return type == ScalarType::BFloat16 ? dtq::kBFloat16
         : type == ScalarType::Half   ? dtq::kFloat16
                                      : dtq::kFloat32;
}

// Whether kernels read and write this type.
inline bool is_kernel_dtype(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half;
}

// These call torch only if there is something to do: a call costs a microsecond.
inline Tensor to_dtype(const Tensor& t, ScalarType type) {
  return t.scalar_type() == type ? t : torch::stable::to(t, type);
}

inline Tensor to_kernel_dtype(const Tensor& t) {
  return is_kernel_dtype(t.scalar_type()) ? t : to_dtype(t, ScalarType::Float);
}

inline Tensor to_contiguous(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

// Tensors as contiguous float32; owns the copies that this takes.
class Floats {
 public:
  const float* of(const Tensor& t) {
    if (t.scalar_type() != ScalarType::BFloat16 || !t.is_contiguous()) {
      tensors_.push_back(to_contiguous(to_dtype(t, ScalarType::Float)));
      return data<float>(tensors_.back());
    }
    // the vectors that layers have, as a bias: an op of torch takes longer than the loop
    std::vector<float>& copy = copies_.emplace_back(t.numel());
    const uint16_t* from = static_cast<const uint16_t*>(t.const_data_ptr());
    for (size_t i = 0; i < copy.size(); i++) {
      const uint32_t bits = static_cast<uint32_t>(from[i]) << 16;
      memcpy(&copy[i], &bits, sizeof bits);
    }
    return copy.data();
  }

 private:
  std::vector<Tensor> tensors_;
  std::vector<std::vector<float>> copies_;
};

inline int64_t bytes_of(const Tensor& t) {
  return t.numel() * static_cast<int64_t>(t.element_size());
}

inline std::string shape_of(const Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); i++) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + "]";
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  bool same = a.dim() == b.dim();
  for (int64_t i = 0; same && i < a.dim(); i++) same = a.size(i) == b.size(i);
  return same;
}

// Calls another op; arguments in the order of its schema.
template <class... Arguments>
Tensor call(const char* name, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(Arguments)> stack{torch::stable::detail::from(arguments)...};
  DTQ_CHECKED(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace dtq::glue
