// SPDX-License-Identifier: Apache-2.0
// LayerNorm without weights, and modulation, of rows of activations; sums have the order of `sum_rows` in
// dtq/kernels/ops_quantize.py. Needs `struct Isa`, see isa.h.
#pragma once
#include "floats.h"

namespace dtq {
namespace {

// Lanes from `count` on become zero.
inline V first_lanes(V v, int64_t count, I lane) { return (V)((I)v & (lane < (int)count)); }

struct Yes {
  constexpr operator bool() const { return true; }
};
struct No {
  constexpr operator bool() const { return false; }
};

// Lanes whose bit h is clear take a, the others b.
template <int h>
DTQ_INLINE V choose(V a, V b, I lane) {
  return (lane & h) != 0 ? b : a;
}

// `value(k, whole)` has the columns from k on. Lane i: the sum of 16 neighboring columns, by halves, of run i of
// kLanes / h runs; lanes are in the order of their reversed bits.
template <int h, class Whole, class Value>
DTQ_INLINE V run_sums(const Value& value, int64_t k, I lane) {
  if constexpr (h < kLanes) {
    const V a = run_sums<2 * h, Whole>(value, k, lane), b = run_sums<2 * h, Whole>(value, k + 8 * kLanes / h, lane);
    return choose<h>(a, Isa::template swap_lanes<h>(b), lane) + choose<h>(Isa::template swap_lanes<h>(a), b, lane);
  } else {
    V part[16 / kLanes];
    for (int i = 0; i < 16 / kLanes; i++) part[i] = value(k + i * kLanes, Whole());
    for (int half = 8 / kLanes; half; half /= 2)
      for (int i = 0; i < half; i++) part[i] = part[i] + part[i + half];
    return part[0];
  }
}

// Sum of 32 runs, by neighbors.
template <class Value>
inline float warp_sum(const Value& value, int64_t k, int64_t columns, I lane) {
  float sums[32 / kLanes] = {};
  for (int i = 0; i < 32 / kLanes && k < columns; i++, k += 16 * kLanes) {
    V v = k + 16 * kLanes <= columns ? run_sums<1, Yes>(value, k, lane) : run_sums<1, No>(value, k, lane);
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

// Sum of a row in the order of `sum_rows` in dtq/kernels/ops_quantize.py. `value(k, whole)` is called once for each
// vector, and has zeros after the columns.
template <class Value>
inline float row_sum(const Value& value, int64_t columns, I lane) {
  float places[32] = {};
  const int64_t warps = (columns + kRowWarp - 1) / kRowWarp;
  for (int64_t w = 0; w < warps; w++) {
    const float sum = warp_sum(value, w * kRowWarp, columns, lane);
    places[w % 32] = w < 32 ? sum : places[w % 32] + sum;
  }
  // the columns of zeros that fill the last 32 warps: -0 becomes 0
  for (int64_t w = warps; warps > 32 && w % 32; w++) places[w % 32] = places[w % 32] + 0.0f;
  for (int count = 32; count > 1; count /= 2)
    for (int i = 0; i < count / 2; i++) places[i] = places[2 * i] + places[2 * i + 1];
  return places[0];
}

// A row of the input.
template <Float type>
struct InputRow {
  const char* x;
  int64_t columns;

  InputRow(const Rows& q, int64_t r) : x((const char*)q.x + r * q.stride * size), columns(q.columns) {}

  template <class Whole>
  DTQ_INLINE V operator()(int64_t k, Whole whole) const {
    const int64_t left = whole ? kLanes : columns - k;
    return left > 0 ? part_as_float(x, k, left, type) : (V){};
  }

  static constexpr int size = type == kFloat32 ? 4 : 2;
};

// A row of the input, normalized and modulated.
struct NormalizedRow {
  const float *row, *scale, *shift;  // without its mean; null: no modulation
  int64_t columns;
  V inverse;  // of the standard deviation

  // `row` is memory for it.
  template <class Input>
  NormalizedRow(const Rows& q, int64_t r, const Input& input, float* memory, I lane) : row(memory), columns(q.columns) {
    const auto read = [&](int64_t k, auto whole) __attribute__((always_inline)) {
      const V v = input(k, whole);
      store(memory + k, v);
      return v;
    };
    const float count = (float)q.columns, mean = row_sum(read, q.columns, lane) / count;
    const auto squared = [&](int64_t k, auto whole) __attribute__((always_inline)) {
      V v = load(memory + k) - splat(mean);
      if (!whole && k + kLanes > columns) v = k < columns ? first_lanes(v, columns - k, lane) : (V){};
      store(memory + k, v);
      return v * v;
    };
    const float variance = row_sum(squared, q.columns, lane) / count;
    inverse = splat(1.0f / (float)__builtin_sqrt((double)(variance + q.eps)));
    const int64_t at = q.modulate_scale ? r / q.rows_per_modulate * columns : 0;
    scale = q.modulate_scale ? q.modulate_scale + at : nullptr;
    shift = q.modulate_shift + at;
  }

  template <class Whole>
  DTQ_INLINE V operator()(int64_t k, Whole whole) const {
    const V v = load(row + k) * inverse;
    const int64_t left = whole ? kLanes : columns - k;
    return scale ? v * (splat(1) + part_of(scale + k, left)) + part_of(shift + k, left) : v;
  }
};

}  // namespace
}  // namespace dtq
