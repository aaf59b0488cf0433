// SPDX-License-Identifier: Apache-2.0
// The types of a vector, in the vector extension of the compiler.
#pragma once
#include <stdint.h>

// For what is small, called for each vector, and must keep its vectors in registers.
#define DTQ_INLINE inline __attribute__((always_inline))

namespace dtq {
namespace {

template <int lanes>
struct Lanes {
  static constexpr int kLanes = lanes;
  typedef float V __attribute__((vector_size(lanes * 4)));
  typedef int32_t I __attribute__((vector_size(lanes * 4)));
  typedef uint32_t U __attribute__((vector_size(lanes * 4)));
};

}  // namespace
}  // namespace dtq
