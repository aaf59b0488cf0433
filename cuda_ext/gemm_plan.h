// SPDX-License-Identifier: Apache-2.0
// Which kernel runs: a static choice by architecture and shape, nothing is timed at run time.
#pragma once
#include <stdint.h>
#include <stdio.h>

#include "launch.h"
#include "floats.cuh"

namespace dtq {

enum Tile {
  kMma128,    // 128 tokens x 128 rows
  kMma64,     // 64 x 64: fewer idle multiprocessors if there are few tiles
  kMma16,     // 16 x 128, for few tokens: bound by reading the weight
  kMmaOdd,    // 64 x 64, rows that do not start at multiples of 16 bytes
  kWgmma256,  // sm_90: 256 tokens x 128 rows
  kWgmma128,  // 128 x 128: each expanded weight is used for half as many tokens
  kPersistent,  // sm_90: 256 x 128, each cluster computes several tiles
  kFp4Large,  // sm_120, FP4: 128 x 128
  kFp4Small,  // 64 x 64
  kTiles
};

struct TileSize {
  const char* name;
  int64_t tokens, rows;
};

constexpr TileSize kTileSizes[kTiles] = {
    {"mma 128x128", 128, 128},
    {"mma 64x64", 64, 64},
    {"mma 16x128", 16, 128},
    {"mma 64x64, any alignment", 64, 64},
    {"wgmma 256x128", 256, 128},
    {"wgmma 128x128", 128, 128},
    {"wgmma 256x128, persistent", 256, 128},
    {"fp4 128x128", 128, 128},
    {"fp4 64x64", 64, 64},
};

struct Plan {
  Tile tile;
  int splits;           // of K
  int steps_per_split;  // of 64 columns
  bool partial;         // sums go through the workspace: K is split, or a small tile has an epilogue
};

inline int64_t tiles_of(const Gemm& g, Tile tile) {
  return ceil_div(g.tokens, kTileSizes[tile].tokens) * ceil_div(g.rows, kTileSizes[tile].rows);
}

inline bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

inline bool is_fp4(const Gemm& g) { return g.weights == kNvFp4 || g.weights == kMxFp4; }

// For FP4. A step of 128 columns has four or eight bytes of scales, which are copied four at a time.
inline const char* fp4_refusal(const Gemm& g) {
  const bool mx = g.weights == kMxFp4;
  if (g.arch / 10 != 12) return "FP4 GEMM needs compute capability 12";
  if (g.group != (mx ? 32 : 16)) return "NVFP4 has groups of 16 columns, MXFP4 of 32";
  if (g.columns % (mx ? 128 : 64)) return "NVFP4 needs a multiple of 64 columns, MXFP4 of 128";
  auto aligned4 = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 4 == 0; };
  if (!aligned16(g.x_q) || !aligned16(g.weight) || !aligned4(g.x_block_scale) ||
      !aligned4(g.groups))
    return "FP4 operands must be aligned to 16 bytes, their scales to 4";
  return nullptr;
}

inline const char* refusal(const Gemm& g) {
  if (g.arch < 80) return "needs compute capability 8.0 or newer";
  if (g.tokens < 0 || g.rows < 1 || g.columns < 1) return "empty weight";
  if (g.columns > 131071) return "the int32 sum may overflow beyond 131071 columns";
  if (g.tokens >= 1 << 24 || g.rows >= 1 << 24 ||
      ceil_div(g.tokens, 16) * ceil_div(g.rows, 64) >= 1 << 26)
    return "more than 2^26 tiles, 2^24 tokens or 2^24 rows";  // the kernels count them in int
  if (g.rank % 16 || (g.down && !g.rank)) return "the rank of a low-rank branch must be a multiple of 16";
  if (g.lowrank_type == kFloat32 && g.down) return "low-rank factors are bfloat16 or float16";
  if (g.gate && (!g.residual || g.gate_tokens < 1)) return "a gate comes with a residual";
  if (g.weights == kInt8) return nullptr;
  if (is_fp4(g)) return fp4_refusal(g);
  if (g.group < 1 || g.rows * (g.columns / g.group) >= 1 << 30) return "more than 2^30 groups";
  if (g.group != 32 && g.group != 64 && g.group != 128 && g.group != g.columns)
    return "4-bit weights need groups of 32, 64 or 128 columns, or one group per row";
  if (g.columns % 32 || g.columns % g.group) return "4-bit weights need whole groups";
  if (!aligned16(g.x_q) || !aligned16(g.weight) || !aligned16(g.codebooks))
    return "4-bit weights, their codebooks and x_q must be aligned to 16 bytes";
  return nullptr;
}

// With fewer tiles, mma.sync occupies more multiprocessors.
inline bool wants_wgmma(const Gemm& g) {
  return g.arch == 90 && g.tokens > 64 && g.columns % 32 == 0 && aligned16(g.x_q) &&
         aligned16(g.weight) && tiles_of(g, kWgmma128) * 2 >= g.sms;
}

// Estimated cycles of all waves of blocks: steps of 128 columns, and per tile what is before the loop (2500, an
// assumption) and the epilogue. With 128 tokens the expansion of 4-bit weights takes longer than the products:
// 683 is an estimate, not measured.
inline int64_t wgmma_cycles(const Gemm& g, Tile tile) {
  const bool large = tile == kWgmma256;
  const int64_t step = large ? 1024 : g.weights == kInt8 ? 512 : 683;
  const int64_t once = 2500 + (large ? 1100 : 600);
  return ceil_div(tiles_of(g, tile), g.sms) * (ceil_div(g.columns, 128) * step + once);
}

inline Tile wgmma_tile(const Gemm& g) {
  return wgmma_cycles(g, kWgmma256) <= wgmma_cycles(g, kWgmma128) ? kWgmma256 : kWgmma128;
}

inline bool has_epilogue(const Gemm& g) { return g.gelu || g.gate || g.down; }

// What follows the products of a wgmma kernel.
enum Finish {
  kPlain,    // 16-bit outputs, whose rows are whole 16 bytes
  kFused,    // the same, with GELU, or gate and residual, or both
  kGeneral,  // everything else: 32-bit outputs, other rows, low-rank branches
};

inline Finish finish_of(const Gemm& g) {
  const bool whole = g.rows % 8 == 0 && aligned16(g.out) && aligned16(g.gate) && aligned16(g.residual);
  if (g.out_type == kFloat32 || !whole || g.down) return kGeneral;
  return has_epilogue(g) ? kFused : kPlain;
}

// Whether the kernel may start before the previous one on the stream has ended. One with a low-rank branch reads
// more than what is guarded by ld_global, and has kGeneral.
inline bool starts_early(const Gemm& g) { return g.options & kDependentLaunch; }

// Gates are not in the persistent kernel.
inline bool wants_persistent(const Gemm& g) {
  return g.options & kPersistentBlocks && finish_of(g) != kGeneral && !g.gate;
}

inline Plan plan_of(const Gemm& g) {
  const int steps = int(ceil_div(g.columns, 64));
  if (is_fp4(g)) return {tiles_of(g, kFp4Large) >= g.sms ? kFp4Large : kFp4Small, 1, steps, false};
  if (g.columns % 16 || !aligned16(g.x_q) || !aligned16(g.weight))
    return {kMmaOdd, 1, steps, has_epilogue(g)};
  if (wants_wgmma(g)) {
    const Tile tile = wgmma_tile(g);
    return {tile == kWgmma256 && wants_persistent(g) ? kPersistent : tile, 1, steps, false};
  }
  if (g.tokens > 64) {
    if (tiles_of(g, kMma128) >= g.sms) return {kMma128, 1, steps, false};
    return {kMma64, 1, steps, has_epilogue(g)};
  }
  const Tile tile = g.tokens <= 16 ? kMma16 : kMma64;
  // two blocks per multiprocessor, with at least four steps each
  int splits = int(2 * g.sms / tiles_of(g, tile));
  if (splits > steps / 4) splits = steps / 4;
  if (splits > 32) splits = 32;
  if (splits < 1) splits = 1;
  const int steps_per_split = int(ceil_div(steps, splits));
  splits = int(ceil_div(steps, steps_per_split));
  return {tile, splits, steps_per_split, splits > 1 || has_epilogue(g)};
}

inline int64_t workspace_of(const Gemm& g, const Plan& p) {
  return p.partial ? p.splits * g.tokens * g.rows * 4 : 0;
}

}  // namespace dtq
