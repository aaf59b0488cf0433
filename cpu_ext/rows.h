// SPDX-License-Identifier: Apache-2.0
// Rows of activations: normalized, scaled, permuted, rotated by a block Hadamard transform, then quantized, or
// fake quantized to floats. Needs `struct Isa`, see isa.h.
#pragma once
#include "floats.h"
#include "norm.h"

namespace dtq {
namespace {

// ---------------------------------------------------------------------------- Hadamard transform

// One stage inside a vector: (a + b, a - b) of lanes h apart.
template <int h>
inline V butterfly(V v, I lane) {
  I odd = ((lane & h) != 0) & (I)((U){} + 0x80000000);
  return Isa::swap_lanes<h>(v) + (V)((I)v ^ odd);  // b + a, and a + (-b)
}

// All stages inside a vector.
inline V short_stages(V v, I lane, int64_t block) {
  if (block > 1) v = butterfly<1>(v, lane);
  if (block > 2) v = butterfly<2>(v, lane);
  if constexpr (kLanes > 4)
    if (block > 4) v = butterfly<4>(v, lane);
  if constexpr (kLanes > 8)
    if (block > 8) v = butterfly<8>(v, lane);
  return v;
}

inline void short_stages(const Rows& q, float* row, I lane) {
  for (int64_t k = 0; k < q.columns; k += kLanes)
    store(row + k, short_stages(load(row + k), lane, q.hadamard_block));
}

// The largest magnitude, as bits: they are ordered as the magnitudes are, with NaN above all.
inline I larger(I largest, V v) {
  const I bits = (I)v & 0x7fffffff;
  return bits > largest ? bits : largest;
}

// Some of the stages between the vectors of a block, for `count` vectors that lie `stride` floats apart. The last
// stages come with the scale.
template <int count, bool last>
inline void long_stages(float* x, int64_t stride, V scale, I& largest) {
  V v[count];
#pragma GCC unroll 8
  for (int i = 0; i < count; i++) v[i] = load(x + i * stride);
#pragma GCC unroll 3
  for (int half = 1; half < count; half *= 2)
#pragma GCC unroll 8
    for (int i = 0; i < count; i++)
      if (!(i & half)) {
        V a = v[i], b = v[i + half];
        v[i] = a + b;
        v[i + half] = a - b;
      }
#pragma GCC unroll 8
  for (int i = 0; i < count; i++) {
    if (last) v[i] = v[i] * scale, largest = larger(largest, v[i]);
    store(x + i * stride, v[i]);
  }
}

// The same for all vectors of a row whose blocks consist of `count` parts of `stride` floats.
template <int count>
inline void long_stages_of_row(float* row, int64_t columns, int64_t stride, bool last, V scale, I& largest) {
  for (int64_t at = 0; at < columns; at += count * stride)
    for (int64_t i = at; i < at + stride; i += kLanes)
      last ? long_stages<count, true>(row + i, stride, scale, largest)
           : long_stages<count, false>(row + i, stride, scale, largest);
}

// The stages that are left after short_stages, and the scale 1 / sqrt(hadamard_block). Returns the largest
// magnitudes.
inline I finish_transform(const Rows& q, float* row) {
  I largest = {};
  const V scale = splat(q.hadamard_scale);
  for (int64_t stride = kLanes; stride < q.hadamard_block;) {
    const int64_t parts = q.hadamard_block / stride, count = parts < 8 ? parts : 8;
    const bool last = parts == count;
    if (count == 8) long_stages_of_row<8>(row, q.columns, stride, last, scale, largest);
    else if (count == 4) long_stages_of_row<4>(row, q.columns, stride, last, scale, largest);
    else long_stages_of_row<2>(row, q.columns, stride, last, scale, largest);
    stride *= count;
  }
  if (q.hadamard_block > kLanes) return largest;
  for (int64_t k = 0; k < q.columns; k += kLanes) {
    V v = load(row + k);
    if (q.hadamard_block > 1) store(row + k, v = v * scale);
    largest = larger(largest, v);
  }
  return largest;
}

// Row `r`, or what the norm made of it, times pre_scale. Without a permutation the short stages are done in the
// same pass.
inline void load_row(const Rows& q, int64_t r, float* row, I lane) {
  const Float type = q.norm ? kFloat32 : q.type;
  const int size = type == kFloat32 ? 4 : 2;
  const int64_t block = q.perm ? 1 : q.hadamard_block;
  const char* x = q.norm ? (const char*)row : (const char*)q.x + r * q.stride * size;
  for (int64_t k = 0; k < q.columns; k += kLanes) {
    const int64_t left = q.columns - k;
    V v;
    if (left >= kLanes) {
      v = load_as_float(x + k * size, type);
      if (q.pre_scale) v = v * load(q.pre_scale + k);
    } else {
      char end[kLanes * 4] = {};
      memcpy(end, x + k * size, left * size);
      v = load_as_float(end, type);
      if (q.pre_scale) v = v * part_of(q.pre_scale + k, left);
    }
    store(row + k, short_stages(v, lane, block));
  }
}

// Row `r` normalized if wanted, scaled, permuted and rotated; returns one of the two rows of `scratch`, and its
// largest magnitudes.
inline float* transformed_row(const Rows& q, int64_t r, float* scratch, I lane, I& largest) {
  const int64_t padded = padded_row(q.columns), blocks = q.columns / q.hadamard_block;
  float *row = scratch, *other = scratch + padded;
  if (q.norm) normalize_row(q, r, row, other, lane);
  load_row(q, r, row, lane);
  if (q.perm) {
    for (int64_t k = q.columns; k < padded; k++) other[k] = 0;
    for (int64_t k = 0; k < q.columns; k++) other[k] = row[q.perm[k]];
    float* permuted = other;
    other = row, row = permuted;
    short_stages(q, row, lane);
  }
  largest = finish_transform(q, row);
  if (q.num_rotations < 2) return row;
  for (int64_t k = q.columns; k < padded; k++) other[k] = 0;
  for (int64_t b = 0; b < blocks; b++)
    for (int64_t i = 0; i < q.hadamard_block; i++) other[i * blocks + b] = row[b * q.hadamard_block + i];
  short_stages(q, other, lane);
  largest = finish_transform(q, other);
  return other;
}

// ---------------------------------------------------------------------------- quantization

// Of all lanes; NaN if there is one.
inline float amax_of_lanes(I largest) {
  int32_t result = 0;
  for (int i = 0; i < kLanes; i++) result = largest[i] > result ? largest[i] : result;
  float value;
  memcpy(&value, &result, 4);
  return value;
}

inline float amax(const float* row, int64_t columns) {
  I largest = {};
  for (int64_t k = 0; k < columns; k += kLanes) largest = larger(largest, load(row + k));
  return amax_of_lanes(largest);
}

// round(x / scale), clamped to +-qmax, as the low byte of each lane.
inline U quantized(V x, V scale, V qmax) {
  const V v = Isa::at_least(Isa::at_most(x / scale, qmax), -qmax);
  return (U)(v + splat(kRoundToInt));
}

// x rounded to a small float type, ties to even. Values are spaced by `step` times the power of two below
// them, which is at least `min_normal`.
inline V round_to_small_float(V x, float min_normal, float max, float step) {
  V size = (V)((I)x & 0x7fffffff);
  size = size > splat(max) ? splat(max) : size;
  const V normal = size < splat(min_normal) ? splat(min_normal) : size;
  const V power = (V)((I)normal & 0x7f800000);
  const V magic = power * splat(step * kRoundToInt);  // floats near it have the same spacing
  const V rounded = (size + magic) - magic;
  const I sign = (I)x & (I)((U){} + 0x80000000);
  return (V)((I)rounded | sign);
}

inline V round_to_e2m1(V x) {
  return round_to_small_float(x, kE2m1MinNormal, kE2m1Max, kE2m1Step) + splat(0);  // -0 becomes 0
}
inline V round_to_e4m3(V x) { return round_to_small_float(x, kE4m3MinNormal, kE4m3Max, kE4m3Step); }

// x / scale rounded to E2M1, times two, as the low byte of each lane.
inline U doubled_e2m1(V x, V scale) {
  const V value = round_to_e2m1(x / scale);
  return (U)(value + value + splat(kRoundToInt));
}

// ---------------------------------------------------------------------------- fake quantization

// A scale rounded to bfloat16, at least kMinGroupScale.
inline float bfloat16_scale(float scale) {
  uint32_t bits;
  scale = scale < kMinGroupScale ? kMinGroupScale : scale;
  memcpy(&bits, &scale, 4);
  if ((bits & 0x7fffffff) <= 0x7f800000) bits += 0x7fff + (bits >> 16 & 1);
  bits &= 0xffff0000;
  memcpy(&scale, &bits, 4);
  return scale;
}

// A group of integers with a scale, and a zero point if asymmetric.
inline void fake_quantize_int(float* x, int64_t group, int bits, bool asymmetric) {
  const float qmax = (float)((1 << (asymmetric ? bits : bits - 1)) - 1);
  float range = amax(x, group), zero = 0, qmin = -qmax - 1, low = 0;
  if (asymmetric && range == range) {  // if there is a NaN it is the range: comparisons would skip it
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
  const V scale = splat(bfloat16_scale(range / qmax));
  if (asymmetric) {
    zero = round_to_int(splat(-low) / scale)[0];
    zero = zero < 0 ? 0 : zero > qmax ? qmax : zero;
    qmin = 0;
  }
  for (int64_t k = 0; k < group; k += kLanes) {
    V q = round_to_int(load(x + k) / scale) + splat(zero);
    q = q < splat(qmin) ? splat(qmin) : q;
    q = q > splat(qmax) ? splat(qmax) : q;
    store(x + k, (q - splat(zero)) * scale);
  }
}

// A block of NVFP4 (group 16), of a row that was divided by its amax, or of MXFP4 (group 32). The result is
// times row_amax.
inline void fake_quantize_fp4(float* x, int64_t group, float row_amax) {
  const float block_amax = amax(x, group);
  float scale;
  if (group == 16) {
    const float wanted = (block_amax / kNvFp4TokenScale) / kE2m1Max;
    scale = round_to_e4m3(splat(wanted < kE4m3Min ? kE4m3Min : wanted))[0] * kNvFp4TokenScale;
  } else {
    uint32_t bits;
    memcpy(&bits, &block_amax, 4);
    const uint32_t exponent = bits >> 23;  // 124 for zeros, as frexp returns exponent 0 for 0
    bits = (!bits ? 124 : exponent > 3 ? exponent - 2 : 1) << 23;
    memcpy(&scale, &bits, 4);
  }
  for (int64_t k = 0; k < group; k += kLanes)
    store(x + k, round_to_e2m1(load(x + k) / splat(scale)) * splat(scale) * splat(row_amax));
}

inline void fake_quantize_row(const Rows& q, float* row) {
  const bool int8 = q.rounding == kRoundInt8AsymG128;
  if (q.rounding == kRoundNone) return;
  if (q.rounding == kRoundFp8Row) {
    const float scale = amax(row, q.columns) / kE4m3Max;
    const V divisor = splat(scale == 0 ? __builtin_inff() : scale);
    for (int64_t k = 0; k < q.columns; k += kLanes)
      store(row + k, round_to_e4m3(load(row + k) / divisor) * splat(scale));
    return;
  }
  if (q.rounding == kRoundInt4G64 || q.rounding == kRoundInt4AsymG64 || int8) {
    const int64_t group = int8 ? 128 : 64;
    for (int64_t k = 0; k < q.columns; k += group)
      fake_quantize_int(row + k, group, int8 ? 8 : 4, q.rounding != kRoundInt4G64);
    return;
  }
  float row_amax = 1;
  if (q.rounding == kRoundNvFp4) {
    row_amax = amax(row, q.columns);
    row_amax = row_amax < kMinGroupScale ? kMinGroupScale : row_amax;
    for (int64_t k = 0; k < q.columns; k += kLanes) store(row + k, load(row + k) / splat(row_amax));
  }
  const int64_t group = q.rounding == kRoundNvFp4 ? 16 : 32;
  for (int64_t k = 0; k < q.columns; k += group) fake_quantize_fp4(row + k, group, row_amax);
}

// ---------------------------------------------------------------------------- the kernel

void quantize(const Rows& q, int64_t first, int64_t last, float* scratch) {
  I lane;
  for (int i = 0; i < kLanes; i++) lane[i] = i;
  const V qmax = splat((float)q.qmax);
  for (int64_t r = first; r < last; r++) {
    I largest;
    float* row = transformed_row(q, r, scratch, lane, largest);
    if (q.out) {
      fake_quantize_row(q, row);
      for (int64_t k = 0; k < q.columns; k += 1024)
        store_floats(q.out, r * q.columns + k, row + k,
                     (int)(q.columns - k < 1024 ? q.columns - k : 1024), q.out_type);
      continue;
    }
    float scale = 1;
    if (q.static_scale) {
      scale = *q.static_scale;
    } else {
      const float row_amax = amax_of_lanes(largest);
      if (!q.qmax) {
        scale = row_amax / kE2m1Max;
      } else if (row_amax != 0) {  // true for NaN: x_q of such a row are numbers, its scale must be NaN
        scale = row_amax / (float)q.qmax;
        scale = scale < kMinInt8Scale ? kMinInt8Scale : scale;
      }
    }
    q.scale[r] = q.qmax ? scale : scale / 2;
    const V divisor = splat(scale == 0 ? __builtin_inff() : scale);  // a row with scale 0 becomes zeros
    int8_t* x_q = q.x_q + r * q.columns;
    for (int64_t k = 0; k < q.columns; k += kLanes) {
      int8_t bytes[kLanes];
      const int64_t left = q.columns - k;
      const V x = load(row + k);
      Isa::store_low_bytes(q.qmax ? quantized(x, divisor, qmax) : doubled_e2m1(x, divisor),
                           left < kLanes ? bytes : x_q + k);
      if (left < kLanes) memcpy(x_q + k, bytes, left);
    }
  }
}

}  // namespace
}  // namespace dtq
