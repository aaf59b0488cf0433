// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "ahead.h"
#include "kernels.h"

namespace dtq {
namespace {

// Adds `multiply_group` to a base that multiplies kBlockRows output channels by one token block at a time:
// `multiply_block`.
template <class Base>
struct ByBlocks : Base {
  using typename Base::Activation;
  using typename Base::Weight;
  static constexpr int kMaxBlocks = kGroupBlocks;
  // For this many steps the activations of a group and the weights of a panel fit into the first-level
  // cache, while the panel is multiplied kBlockRows output channels at a time.
  static constexpr int64_t kMaxSteps = 8;

  static void multiply_group(const Weight* weights, const Activation* x, int64_t steps, int64_t next,
                             int count, bool more, int32_t* sums, Ahead& ahead) {
    for (int c = 0; c < count; c++)
      for (int n = 0; n < kPanelRows; n += Base::kBlockRows)
        Base::multiply_block(weights + n * kStep, x + c * next, steps, more,
                             sums + (n * kGroupBlocks + c) * kBlockTokens, ahead);
  }

  static bool splits(const Linear&) { return false; }
};

}  // namespace
}  // namespace dtq
