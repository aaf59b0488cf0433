// SPDX-License-Identifier: Apache-2.0
// What the files that implement ops share. Not for those of an instruction set: see kernels.h.
#pragma once
#include <ATen/core/Tensor.h>
#include <stdlib.h>

#include <new>
#include <optional>

#include "kernels.h"

namespace dtq::glue {

using at::Tensor;
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

inline dtq::Float float_type(at::ScalarType type) {
  return type == at::kBFloat16 ? dtq::kBFloat16
         : type == at::kHalf   ? dtq::kFloat16
                               : dtq::kFloat32;
}

inline bool written_directly(at::ScalarType type) {
  return type == at::kFloat || type == at::kBFloat16 || type == at::kHalf;
}

}  // namespace dtq::glue
