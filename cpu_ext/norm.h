// SPDX-License-Identifier: Apache-2.0
// LayerNorm without weights, and modulation, of rows of activations; sums have the order of `sum_rows` in
// dtq/kernels/ops_quantize.py. Needs `struct Isa`, see isa.h.
#pragma once
#include "floats.h"

namespace dtq {
namespace {

// Lanes whose bit h is clear take a, the others b.
template <int h>
inline V choose(V a, V b, I lane) {
  return (lane & h) != 0 ? b : a;
}

// Lane i: the sum of 16 neighboring columns, by halves, of run i of kLanes / h runs; lanes are in the order of
// their reversed bits.
template <int h>
inline V run_sums(const float* x, I lane) {
  if constexpr (h < kLanes) {
    const V a = run_sums<2 * h>(x, lane), b = run_sums<2 * h>(x + 8 * kLanes / h, lane);
    return choose<h>(a, Isa::template swap_lanes<h>(b), lane) + choose<h>(Isa::template swap_lanes<h>(a), b, lane);
  } else if constexpr (kLanes == 16) {
    return load(x);
  } else if constexpr (kLanes == 8) {
    return load(x) + load(x + 8);
  } else {
    return (load(x) + load(x + 8)) + (load(x + 4) + load(x + 12));
  }
}

// Sum of 32 runs, by neighbors.
inline float warp_sum(const float* x, I lane) {
  float sums[32 / kLanes];
  for (int i = 0; i < 32 / kLanes; i++) {
    V v = run_sums<1>(x + i * 16 * kLanes, lane);
    if constexpr (kLanes > 8) v = v + Isa::template swap_lanes<8>(v);
    if constexpr (kLanes > 4) v = v + Isa::template swap_lanes<4>(v);
    v = v + Isa::template swap_lanes<2>(v);
    v = v + Isa::template swap_lanes<1>(v);
    sums[i] = v[0];
  }
  for (int count = 32 / kLanes; count > 1; count /= 2)
    for (int i = 0; i < count / 2; i++) sums[i] = sums[2 * i] + sums[2 * i + 1];
  return sums[0];
}

// Sum of a row in the order of `sum_rows` in dtq/kernels/ops_quantize.py; zeros follow the columns.
inline float row_sum(const float* x, int64_t columns, I lane) {
  float places[32] = {};
  const int64_t warps = (columns + kRowWarp - 1) / kRowWarp;
  for (int64_t w = 0; w < warps; w++) {
    const float sum = warp_sum(x + w * kRowWarp, lane);
    places[w % 32] = w < 32 ? sum : places[w % 32] + sum;
  }
  // the columns of zeros that fill the last 32 warps: -0 becomes 0
  for (int64_t w = warps; warps > 32 && w % 32; w++) places[w % 32] = places[w % 32] + 0.0f;
  for (int count = 32; count > 1; count /= 2)
    for (int i = 0; i < count / 2; i++) places[i] = places[2 * i] + places[2 * i + 1];
  return places[0];
}

// Row `r` of x as floats, zeros up to a multiple of kRowWarp.
inline void read_row(const Rows& q, int64_t r, float* row) {
  const int size = q.type == kFloat32 ? 4 : 2;
  const char* x = (const char*)q.x + r * q.stride * size;
  int64_t k = 0;
  for (; k + kLanes <= q.columns; k += kLanes) store(row + k, load_as_float(x + k * size, q.type));
  if (k < q.columns) {
    char end[kLanes * 4] = {};
    memcpy(end, x + k * size, (q.columns - k) * size);
    store(row + k, load_as_float(end, q.type));
    k += kLanes;
  }
  for (; k < padded_row(q.columns); k += kLanes) store(row + k, (V){});
}

// Row `r` minus its mean, divided by its standard deviation; then modulated.
inline void normalize_row(const Rows& q, int64_t r, float* row, float* squares, I lane) {
  read_row(q, r, row);
  const float count = (float)q.columns, mean = row_sum(row, q.columns, lane) / count;
  for (int64_t k = 0; k < q.columns; k += kLanes) {
    V v = load(row + k) - splat(mean);
    for (int i = 0; k + kLanes > q.columns && i < kLanes; i++) v[i] = k + i < q.columns ? v[i] : 0;
    store(row + k, v);
    store(squares + k, v * v);
  }
  for (int64_t k = (q.columns + kLanes - 1) / kLanes * kLanes; k < padded_row(q.columns); k += kLanes)
    store(squares + k, (V){});
  const float variance = row_sum(squares, q.columns, lane) / count;
  const V inverse = splat(1.0f / (float)__builtin_sqrt((double)(variance + q.eps)));
  const int64_t at = q.modulate_scale ? r / q.rows_per_modulate * q.columns : 0;
  for (int64_t k = 0; k < q.columns; k += kLanes) {
    V v = load(row + k) * inverse;
    if (q.modulate_scale) {
      const int64_t left = q.columns - k;
      v = v * (splat(1) + part_of(q.modulate_scale + at + k, left)) + part_of(q.modulate_shift + at + k, left);
    }
    store(row + k, v);
  }
}

}  // namespace
}  // namespace dtq
