// SPDX-License-Identifier: Apache-2.0
// What the files that implement ops share. Not for those of an instruction set: see kernels.h.
//
// Only torch's stable ABI: one library serves every torch from 2.10.
#pragma once
#include <stdlib.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <new>
#include <optional>
#include <string>

#include "kernels.h"

// the newer one keeps the message of the error; headers of 2.10 and 2.11 lack it
#if defined(STABLE_TORCH_ERROR_CODE_CHECK)
#define DTQ_CHECKED STABLE_TORCH_ERROR_CODE_CHECK
#else
#define DTQ_CHECKED TORCH_ERROR_CODE_CHECK
#endif

namespace dtq::glue {

using torch::headeronly::ScalarType;
using torch::stable::parallel_for;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// Memory of one thread that calls again and again, aligned for vector loads.
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

inline int64_t rounded_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

inline dtq::Float float_type(ScalarType type) {
  return type == ScalarType::BFloat16 ? dtq::kBFloat16
         : type == ScalarType::Half   ? dtq::kFloat16
                                      : dtq::kFloat32;
}

inline bool written_directly(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half;
}

// None of them asks torch where there is nothing to do: a call costs a microsecond.
inline Tensor as(const Tensor& t, ScalarType type) {
  return t.scalar_type() == type ? t : torch::stable::to(t, type);
}

inline Tensor direct(const Tensor& t) {
  return written_directly(t.scalar_type()) ? t : as(t, ScalarType::Float);
}

inline Tensor side_by_side(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

inline int64_t bytes_of(const Tensor& t) {
  return t.numel() * static_cast<int64_t>(t.element_size());
}

inline std::string shape_of(const Tensor& t) {
  std::string said = "[";
  for (int64_t i = 0; i < t.dim(); i++) said += (i ? ", " : "") + std::to_string(t.size(i));
  return said + "]";
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  bool same = a.dim() == b.dim();
  for (int64_t i = 0; same && i < a.dim(); i++) same = a.size(i) == b.size(i);
  return same;
}

// Another op: the arguments in the order of its schema.
template <class... Arguments>
Tensor call(const char* name, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(Arguments)> stack{torch::stable::detail::from(arguments)...};
  DTQ_CHECKED(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace dtq::glue
