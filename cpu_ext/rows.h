// SPDX-License-Identifier: Apache-2.0
// Rows of activations: scaled, permuted, rotated, quantized. After floats.h.
#pragma once
#include "floats.h"

namespace dtq {
namespace {

// One step of the transform inside a vector: (a + b, a - b) of lanes h apart.
template <int h>
inline V butterfly(V v, I lane) {
  I odd = ((lane & h) != 0) & (I)((U){} + 0x80000000);
  return swap_lanes<h>(v) + (V)((I)v ^ odd);  // b + a, and a + (-b)
}

inline V butterflies(V v, I lane, int64_t block) {
  if (block > 1) v = butterfly<1>(v, lane);
  if (block > 2) v = butterfly<2>(v, lane);
  if constexpr (kLanes > 4)
    if (block > 4) v = butterfly<4>(v, lane);
  if constexpr (kLanes > 8)
    if (block > 8) v = butterfly<8>(v, lane);
  return v;
}

// Distances of a whole vector and more, count vectors a block, kept in registers.
template <int count>
inline void transform_vectors(float* x) {
  V v[count];
  for (int i = 0; i < count; i++) v[i] = load(x + i * kLanes);
  for (int half = 1; half < count; half *= 2)
    for (int i = 0; i < count; i++)
      if (!(i & half)) {
        V a = v[i], b = v[i + half];
        v[i] = a + b;
        v[i + half] = a - b;
      }
  for (int i = 0; i < count; i++) store(x + i * kLanes, v[i]);
}

inline void transform_long(float* x, int64_t block) {
  for (int64_t half = kLanes; half < block; half *= 2)
    for (int64_t at = 0; at < block; at += 2 * half)
      for (int64_t i = at; i < at + half; i += kLanes) {
        V a = load(x + i), b = load(x + i + half);
        store(x + i, a + b);
        store(x + i + half, a - b);
      }
}

inline void long_stages(float* x, int64_t columns, int64_t block) {
  for (int64_t at = 0; at < columns; at += block) {
    if (block == 2 * kLanes) transform_vectors<2>(x + at);
    else if (block == 4 * kLanes) transform_vectors<4>(x + at);
    else if (block == 8 * kLanes) transform_vectors<8>(x + at);
    else transform_long(x + at, block);
  }
}

// Row `r` as floats, scaled; the short distances of the transform go along where no order comes first.
inline void load_row(const Rows& q, int64_t r, float* row, I lane) {
  const int size = q.type == kFloat32 ? 4 : 2;
  const int64_t block = q.perm ? 1 : q.hadamard_block;
  const char* x = (const char*)q.x + r * q.stride * size;
  for (int64_t k = 0; k < q.columns; k += kLanes) {
    const int64_t left = q.columns - k;
    V v;
    if (left >= kLanes) {
      v = load_as_float(x + k * size, q.type);
      if (q.pre_scale) v = v * load(q.pre_scale + k);
    } else {
      char end[kLanes * 4] = {};
      float scale[kLanes] = {};
      memcpy(end, x + k * size, left * size);
      v = load_as_float(end, q.type);
      if (q.pre_scale) {
        memcpy(scale, q.pre_scale + k, left * 4);
        v = v * load(scale);
      }
    }
    store(row + k, butterflies(v, lane, block));
  }
}

inline void short_stages(const Rows& q, float* row, I lane) {
  for (int64_t k = 0; k < q.columns; k += kLanes)
    store(row + k, butterflies(load(row + k), lane, q.hadamard_block));
}

// The other distances, and the length that rows had.
inline void finish_transform(const Rows& q, float* row) {
  if (q.hadamard_block > kLanes) long_stages(row, q.columns, q.hadamard_block);
  if (q.hadamard_block > 1)
    for (int64_t k = 0; k < q.columns; k += kLanes) store(row + k, load(row + k) * splat(q.hadamard_scale));
}

// Row `r` scaled, in its order and rotated, in one of the two rows of `scratch`.
inline float* transformed_row(const Rows& q, int64_t r, float* scratch, I lane) {
  const int64_t wide = (q.columns + 15) / 16 * 16, blocks = q.columns / q.hadamard_block;
  float *row = scratch, *other = scratch + wide;
  load_row(q, r, row, lane);
  if (q.perm) {
    for (int64_t k = q.columns; k < wide; k++) other[k] = 0;
    for (int64_t k = 0; k < q.columns; k++) other[k] = row[q.perm[k]];
    float* ordered = other;
    other = row, row = ordered;
    short_stages(q, row, lane);
  }
  finish_transform(q, row);
  if (q.num_rotations < 2) return row;
  for (int64_t k = q.columns; k < wide; k++) other[k] = 0;
  for (int64_t b = 0; b < blocks; b++)
    for (int64_t i = 0; i < q.hadamard_block; i++) other[i * blocks + b] = row[b * q.hadamard_block + i];
  short_stages(q, other, lane);
  finish_transform(q, other);
  return other;
}

inline float amax(const float* row, int64_t columns) {
  I peak = {};  // the bits of magnitudes order as the magnitudes do, and NaN is above all
  for (int64_t k = 0; k < columns; k += kLanes) {
    I bits = (I)load(row + k) & 0x7fffffff;
    peak = bits > peak ? bits : peak;
  }
  int32_t most = 0;
  for (int i = 0; i < kLanes; i++) most = peak[i] > most ? peak[i] : most;
  float value;
  memcpy(&value, &most, 4);
  return value;
}

inline U quantized(V x, V scale, V levels) {
  V v = x / scale;
  v = v > levels ? levels : v;
  v = v < -levels ? -levels : v;
  return (U)(v + splat(kRoundToInt));  // its low byte is the integer
}

// The number of a small float type next to x, ties to the even one: spaced `step` times the power of two
// below it, which is at least `least`.
inline V round_to_grid(V x, float least, float top, float step) {
  V size = (V)((I)x & 0x7fffffff);
  size = size > splat(top) ? splat(top) : size;
  const V whole = size < splat(least) ? splat(least) : size;
  const V below = (V)((I)whole & 0x7f800000);
  const V magic = below * splat(step * kRoundToInt);  // float32 is spaced like them there
  const V level = (size + magic) - magic;
  const I sign = (I)x & (I)((U){} + 0x80000000);
  return (V)((I)level | sign);
}

inline V round_to_e2m1(V x) { return round_to_grid(x, kE2m1MinNormal, kE2m1Max, kE2m1Step) + splat(0); }  // -0 becomes 0
inline V round_to_e4m3(V x) { return round_to_grid(x, kE4m3MinNormal, kE4m3Max, kE4m3Step); }

// Twice the E2M1 level next to x / scale in the low byte.
inline U doubled_e2m1(V x, V scale) {
  const V level = round_to_e2m1(x / scale);
  return (U)(level + level + splat(kRoundToInt));
}

// A scale as bfloat16 keeps it, at least kMinGroupScale.
inline float bfloat16_scale(float scale) {
  uint32_t bits;
  scale = scale < kMinGroupScale ? kMinGroupScale : scale;
  memcpy(&bits, &scale, 4);
  if ((bits & 0x7fffffff) <= 0x7f800000) bits += 0x7fff + (bits >> 16 & 1);
  bits &= 0xffff0000;
  memcpy(&scale, &bits, 4);
  return scale;
}

// Integers of `bits` bits with a scale, and a zero, for the group.
inline void fake_quantize_int(float* x, int64_t group, int bits, bool asymmetric) {
  const float top = (float)((1 << (asymmetric ? bits : bits - 1)) - 1);
  float range = amax(x, group), zero = 0, least = -top - 1, low = 0;
  if (asymmetric && range == range) {  // a NaN is in the range already: comparisons pass over it
    V lows = {}, highs = {};
    for (int64_t k = 0; k < group; k += kLanes) {
      const V v = load(x + k);
      lows = v < lows ? v : lows;
      highs = v > highs ? v : highs;
    }
    float high = 0;
    for (int i = 0; i < kLanes; i++) {
      low = lows[i] < low ? lows[i] : low;
      high = highs[i] > high ? highs[i] : high;
    }
    range = high - low;
  }
  const V scale = splat(bfloat16_scale(range / top));
  if (asymmetric) {
    zero = round_to_int(splat(-low) / scale)[0];
    zero = zero < 0 ? 0 : zero > top ? top : zero;
    least = 0;
  }
  for (int64_t k = 0; k < group; k += kLanes) {
    V code = round_to_int(load(x + k) / scale) + splat(zero);
    code = code < splat(least) ? splat(least) : code;
    code = code > splat(top) ? splat(top) : code;
    store(x + k, (code - splat(zero)) * scale);
  }
}

// The block of a row of NVFP4, divided by the row's peak already, or of MXFP4.
inline void fake_quantize_fp4(float* x, int64_t group, float peak) {
  const float most = amax(x, group);
  float scale;
  if (group == 16) {
    const float wanted = (most / kNvFp4TokenScale) / kE2m1Max;
    scale = round_to_e4m3(splat(wanted < kE4m3Min ? kE4m3Min : wanted))[0] * kNvFp4TokenScale;
  } else {
    uint32_t bits;
    memcpy(&bits, &most, 4);
    const uint32_t exponent = bits >> 23;
    bits = (!bits ? 124 : exponent > 3 ? exponent - 2 : 1) << 23;
    memcpy(&scale, &bits, 4);
  }
  for (int64_t k = 0; k < group; k += kLanes)
    store(x + k, round_to_e2m1(load(x + k) / splat(scale)) * splat(scale) * splat(peak));
}

inline void fake_quantize_row(const Rows& q, float* row) {
  const bool wide = q.rounding == kRoundInt8AsymG128;
  if (q.rounding == kRoundNone) return;
  if (q.rounding == kRoundFp8Row) {
    const float scale = amax(row, q.columns) / kE4m3Max;
    const V divisor = splat(scale == 0 ? __builtin_inff() : scale);
    for (int64_t k = 0; k < q.columns; k += kLanes)
      store(row + k, round_to_e4m3(load(row + k) / divisor) * splat(scale));
    return;
  }
  if (q.rounding == kRoundInt4G64 || q.rounding == kRoundInt4AsymG64 || wide) {
    const int64_t group = wide ? 128 : 64;
    for (int64_t k = 0; k < q.columns; k += group)
      fake_quantize_int(row + k, group, wide ? 8 : 4, q.rounding != kRoundInt4G64);
    return;
  }
  float peak = 1;
  if (q.rounding == kRoundNvFp4) {
    peak = amax(row, q.columns);
    peak = peak < kMinGroupScale ? kMinGroupScale : peak;
    for (int64_t k = 0; k < q.columns; k += kLanes) store(row + k, load(row + k) / splat(peak));
  }
  const int64_t group = q.rounding == kRoundNvFp4 ? 16 : 32;
  for (int64_t k = 0; k < q.columns; k += group) fake_quantize_fp4(row + k, group, peak);
}

void quantize(const Rows& q, int64_t first, int64_t last, float* scratch) {
  I lane;
  for (int i = 0; i < kLanes; i++) lane[i] = i;
  const V levels = splat((float)q.qmax);
  for (int64_t r = first; r < last; r++) {
    float* row = transformed_row(q, r, scratch, lane);
    if (q.out) {
      fake_quantize_row(q, row);
      for (int64_t k = 0; k < q.columns; k += 1024)
        store_line(q.out, r * q.columns + k, row + k,
                   (int)(q.columns - k < 1024 ? q.columns - k : 1024), q.out_type);
      continue;
    }
    float scale = 1;
    if (q.static_scale) {
      scale = *q.static_scale;
    } else {
      const float peak = amax(row, q.columns);
      if (!q.qmax) {
        scale = peak / kE2m1Max;
      } else if (peak != 0) {  // NaN too: the codes of such a row are numbers, its scale must say so
        scale = peak / (float)q.qmax;
        scale = scale < kMinInt8Scale ? kMinInt8Scale : scale;
      }
    }
    q.scale[r] = q.qmax ? scale : scale / 2;
    const V divisor = splat(scale == 0 ? __builtin_inff() : scale);  // such a row is zeros
    int8_t* codes = q.x_q + r * q.columns;
    for (int64_t k = 0; k < q.columns; k += kLanes) {
      int8_t bytes[kLanes];
      const int64_t left = q.columns - k;
      const V x = load(row + k);
      store_low_bytes(q.qmax ? quantized(x, divisor, levels) : doubled_e2m1(x, divisor),
                left < kLanes ? bytes : codes + k);
      if (left < kLanes) memcpy(codes + k, bytes, left);
    }
  }
}

}  // namespace
}  // namespace dtq
