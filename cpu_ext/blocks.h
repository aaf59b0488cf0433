// SPDX-License-Identifier: Apache-2.0
// For an instruction set that multiplies kBlock output channels by one token block at a time, and has
// defined both: `multiply_block`.
#pragma once

namespace dtq {
namespace {

constexpr int kMaxBlocks = kGroupBlocks;
// Codes of a group and weights of a panel stay in the first-level cache for so many steps while each
// kBlock rows of the panel pass by.
constexpr int64_t kMaxSteps = 8;

inline void multiply_group(const Weight* weights, const Activation* codes, int64_t steps, int64_t next,
                           int count, bool more, int32_t* sums) {
  for (int c = 0; c < count; c++)
    for (int n = 0; n < kPanelRows; n += kBlock)
      multiply_block(weights + n * kStep, codes + c * next, steps, more,
                     sums + (n * kGroupBlocks + c) * kBlockTokens);
}

inline bool splits(const Linear&) { return false; }

}  // namespace
}  // namespace dtq
