// SPDX-License-Identifier: Apache-2.0
// From a sum, int32 or float (FP4), to an output: operations in the reference's order, each rounded once.
#pragma once
#include "decode_weights.cuh"
#include "exact_math.cuh"

namespace dtq {

// The arguments of the GEMM kernels.
struct GemmArgs {
  Gemm g;
  Groups groups;
  int splits;           // of K
  int steps_per_split;  // of 64 columns
  bool partial;         // int32 sums are written to the workspace, (splits, M, N), for sum_splits
};

DTQ_DEV float scaled(float sum, float row_scale, float weight_scale, bool has_bias, float bias) {
  const float v = fmul(fmul(sum, row_scale), weight_scale);
  return has_bias ? fadd(v, bias) : v;
}
DTQ_DEV float scaled(int32_t sum, float row_scale, float weight_scale, bool has_bias, float bias) {
  return scaled(int_to_float(sum), row_scale, weight_scale, has_bias, bias);
}

// Of a row of the weight: per-channel for int32 sums, one for all rows for float sums (FP4).
template <class Sum>
DTQ_DEV float weight_scale(const Gemm& g, int64_t n);
template <>
DTQ_DEV float weight_scale<int32_t>(const Gemm& g, int64_t n) {
  return ldg(g.weight_scale + n);
}
template <>
DTQ_DEV float weight_scale<float>(const Gemm& g, int64_t) {
  return g.weight_scale ? ldg(g.weight_scale) : 1;
}

// GELU in its tanh form, x / (1 + e^-2u), in seven instructions. Its error is far below half a step of
// bfloat16 (docs/kernels.md); the GELU of exact_math.cuh, with the bits of the reference, takes 47.
DTQ_DEV float gelu_approximate(float x) {
  const float exponent = fmul(x, ffma(fmul(x, x), kGeluCubic, kGeluLinear));  // -2u / ln 2
  return fmul(x, reciprocal_approximate(fadd(1.0f, exp2_approximate(exponent))));
}

// GELU, then gate * v + residual, if requested.
DTQ_DEV float apply_epilogue(const Gemm& g, int64_t m, int64_t n, float v) {
  if (g.gelu) v = gelu_approximate(v);
  if (!g.gate) return v;
  const float gate = load_float(g.gate, m / g.gate_tokens * g.rows + n, g.out_type);
  return fadd(fmul(gate, v), load_float(g.residual, m * g.rows + n, g.out_type));
}

// Two neighbouring columns, the first of them even.
DTQ_DEV void store_halves(const Gemm& g, int64_t m, int64_t n, uint16_t h0, uint16_t h1) {
  uint16_t* to = static_cast<uint16_t*>(g.out) + m * g.rows + n;
  if (g.rows % 2 == 0) {
    stg(reinterpret_cast<uint32_t*>(to), uint32_t(h0) | uint32_t(h1) << 16);
  } else {
    stg(to, h0);
    if (n + 1 < g.rows) stg(to + 1, h1);
  }
}

DTQ_DEV void store_pair(const Gemm& g, int64_t m, int64_t n, float v0, float v1) {
  if (g.out_type != kFloat32)
    return store_halves(g, m, n, uint16_t(round_float(v0, g.out_type)),
                        uint16_t(round_float(v1, g.out_type)));
  float* to = static_cast<float*>(g.out) + m * g.rows + n;
  if (g.rows % 2 == 0) {
    stg(reinterpret_cast<U2*>(to), U2{float_bits(v0), float_bits(v1)});
  } else {
    stg(to, v0);
    if (n + 1 < g.rows) stg(to + 1, v1);
  }
}

// The tile of a thread block. Tiles are processed in bands of kBand x tiles_n, column by column, so that
// the operands of concurrent blocks stay in the L2 cache.
struct TileCoord {
  int m, n;  // in tiles
};

constexpr int kBand = 8;

// Tile `rest` of the band that begins with `first`.
DTQ_DEV TileCoord coord_in_band(int first, int rest, int tiles_m) {
  const int height = tiles_m - first < kBand ? tiles_m - first : kBand;
  return {first + rest % height, rest / height};
}

DTQ_DEV TileCoord tile_coord(int id, int tiles_m, int tiles_n) {
  const int in_band = kBand * tiles_n;
  return coord_in_band(id / in_band * kBand, id % in_band, tiles_m);
}

// Two neighbouring columns of a row of `down` or `up`, packed for mma; zero past the last row.
DTQ_DEV uint32_t lowrank_pair(const void* p, int64_t row, int64_t rows, int64_t rank, int64_t r) {
  if (row >= rows) return 0;
  return ldg(reinterpret_cast<const uint32_t*>(static_cast<const uint16_t*>(p) + row * rank + r));
}

DTQ_DEV void lowrank_mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                         Float type) {
  if (type == kBFloat16) mma_bf16(c, a, b0, b1);
  else mma_f16(c, a, b0, b1);
}

// Sums the splits of K and applies the epilogue, one thread per output. Integer sums do not depend on
// their order, so the result does not depend on the number of splits.
template <int threads>
DTQ_KERNEL void sum_splits(const DTQ_CONSTANT GemmArgs p) {
  const Gemm& g = p.g;
  const int64_t size = g.tokens * g.rows, at = int64_t(block_x()) * threads + tid();
  if (at >= size) return;
  const int64_t m = at / g.rows, n = at % g.rows;
  int32_t sum = 0;
  for (int s = 0; s < p.splits; s++)
    sum += ldg(static_cast<const int32_t*>(g.workspace) + s * size + at);
  const float bias = g.bias ? load_float(g.bias, n, g.bias_type) : 0;
  float v = scaled(sum, ldg(g.row_scale + m), ldg(g.weight_scale + n), g.bias, bias);
  if (g.down)
    for (int64_t r = 0; r < g.rank; r++)
      v = ffma(load_float(g.down, m * g.rank + r, g.lowrank_type),
               load_float(g.up, n * g.rank + r, g.lowrank_type), v);
  store_float(g.out, at, apply_epilogue(g, m, n, v), g.out_type);
}

}  // namespace dtq
