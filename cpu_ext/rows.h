// SPDX-License-Identifier: Apache-2.0
// Rows of activations: normalized, scaled, permuted, rotated by a block Hadamard transform, then quantized, or
// fake quantized to floats. Needs `struct Isa`, see isa.h.
#pragma once
#include "floats.h"
#include "norm.h"

namespace dtq {
namespace {

// ---------------------------------------------------------------------------- Hadamard transform

// One stage inside a vector: (a + b, a - b) of lanes h apart. The products are exact.
template <int h>
DTQ_INLINE V butterfly(V v, I lane) {
  const V sign = (lane & h) != 0 ? splat(-1) : splat(1);
  return Isa::fma(v, sign, Isa::template swap_lanes<h>(v));  // b + a, and a + (-b)
}

// All stages inside a vector.
DTQ_INLINE V short_stages(V v, I lane, int64_t block) {
  if (block > 1) v = butterfly<1>(v, lane);
  if (block > 2) v = butterfly<2>(v, lane);
  if constexpr (kLanes > 4)
    if (block > 4) v = butterfly<4>(v, lane);
  if constexpr (kLanes > 8)
    if (block > 8) v = butterfly<8>(v, lane);
  return v;
}

// The largest magnitude, as bits: they are ordered as the magnitudes are, with NaN above all.
DTQ_INLINE I larger(I largest, V v) {
  const I bits = (I)v & 0x7fffffff;
  return bits > largest ? bits : largest;
}

// Some of the stages between the vectors of a block, for `count` vectors. The `last` stages come with the scale.
template <int count>
DTQ_INLINE void long_stages(V (&v)[count], bool last, V scale, I& largest) {
#pragma GCC unroll 3
  for (int half = 1; half < count; half *= 2)
#pragma GCC unroll 8
    for (int i = 0; i < count; i++)
      if (!(i & half)) {
        const V a = v[i], b = v[i + half];
        v[i] = a + b;
        v[i + half] = a - b;
      }
  if (!last) return;
#pragma GCC unroll 8
  for (int i = 0; i < count; i++) v[i] = v[i] * scale, largest = larger(largest, v[i]);
}

// The stages inside vectors, and the first ones between `count` of them, of vectors that come from `source`.
template <int count, class Source>
inline void first_stages(const Rows& q, const Source& source, float* row, I lane, bool last, V scale, I& largest) {
  const int64_t block = count > 1 ? kLanes : q.hadamard_block;  // a constant, so that no stage has a branch
  const auto some = [&](int64_t k, auto whole) __attribute__((always_inline)) {
    V v[count];
#pragma GCC unroll 8
    for (int i = 0; i < count; i++) v[i] = short_stages(source(k + i * kLanes, whole), lane, block);
    long_stages<count>(v, last, scale, largest);
#pragma GCC unroll 8
    for (int i = 0; i < count; i++) store(row + k + i * kLanes, v[i]);
  };
  int64_t k = 0;
  for (; k + count * kLanes <= q.columns; k += count * kLanes) some(k, Yes());
  if (count == 1 && k < q.columns) some(k, No());
}

// The stages after them, of blocks that consist of parts of `stride` floats.
template <int count>
inline void next_stages(float* row, int64_t columns, int64_t stride, bool last, V scale, I& largest) {
  for (int64_t at = 0; at < columns; at += count * stride)
    for (int64_t k = at; k < at + stride; k += kLanes) {
      V v[count];
#pragma GCC unroll 8
      for (int i = 0; i < count; i++) v[i] = load(row + k + i * stride);
      long_stages<count>(v, last, scale, largest);
#pragma GCC unroll 8
      for (int i = 0; i < count; i++) store(row + k + i * stride, v[i]);
    }
}

// A row that comes from `source`, transformed in blocks; returns its largest magnitudes.
template <class Source>
inline I hadamard_row(const Rows& q, const Source& source, float* row, I lane) {
  I largest = {};
  const V scale = splat(q.hadamard_scale);  // 1 for blocks of 1
  int64_t stride = kLanes;
  const auto parts = [&] { return q.hadamard_block / stride; };
  const auto each = [&](auto stages) {
    const bool last = parts() <= 8;
    parts() >= 8 ? stages.template operator()<8>(last) : parts() == 4 ? stages.template operator()<4>(last)
                 : parts() == 2 ? stages.template operator()<2>(last) : stages.template operator()<1>(last);
    stride *= 8;
  };
  each([&]<int count>(bool last) { first_stages<count>(q, source, row, lane, last, scale, largest); });
  while (parts() > 1)
    each([&]<int count>(bool last) { next_stages<count>(row, q.columns, stride, last, scale, largest); });
  return largest;
}

// A row in memory.
struct FloatRow {
  const float* row;
  template <class Whole>
  DTQ_INLINE V operator()(int64_t k, Whole) const {
    return load(row + k);
  }
};

// A row times pre_scale, if there is one.
template <class Source>
struct ScaledRow {
  const Source& source;
  const float* scale;
  int64_t columns;
  template <class Whole>
  DTQ_INLINE V operator()(int64_t k, Whole whole) const {
    const V v = source(k, whole);
    return scale ? v * part_of(scale + k, whole ? kLanes : columns - k) : v;
  }
};

inline void exchange(float*& a, float*& b) {
  float* c = a;
  a = b, b = c;
}

// A row that comes from `source`, permuted and rotated to one of two rows; returns its largest magnitudes.
template <class Source>
inline I rotate_row(const Rows& q, const Source& source, float*& row, float*& other, I lane) {
  const int64_t padded = padded_row(q.columns), blocks = q.columns / q.hadamard_block;
  I largest;
  if (!q.perm) {
    largest = hadamard_row(q, source, row, lane);
  } else {
    for (int64_t k = 0; k < q.columns; k += kLanes)
      store(row + k, k + kLanes <= q.columns ? source(k, Yes()) : source(k, No()));
    for (int64_t k = 0; k < q.columns; k++) other[k] = row[q.perm[k]];
    for (int64_t k = q.columns; k < padded; k++) other[k] = 0;
    exchange(row, other);
    largest = hadamard_row(q, FloatRow{row}, row, lane);
  }
  if (q.num_rotations < 2) return largest;
  for (int64_t b = 0; b < blocks; b++)
    for (int64_t i = 0; i < q.hadamard_block; i++) other[i * blocks + b] = row[b * q.hadamard_block + i];
  for (int64_t k = q.columns; k < padded; k++) other[k] = 0;
  exchange(row, other);
  return hadamard_row(q, FloatRow{row}, row, lane);
}

// Row `r` normalized if wanted, scaled, permuted and rotated, in `row`, which may be exchanged with `other`; returns
// its largest magnitudes.
template <Float type>
inline I transform_row(const Rows& q, int64_t r, float*& row, float*& other, I lane) {
  const InputRow<type> input(q, r);
  if (!q.norm) return rotate_row(q, ScaledRow<InputRow<type>>{input, q.pre_scale, q.columns}, row, other, lane);
  const NormalizedRow normalized(q, r, input, row, lane);
  return rotate_row(q, ScaledRow<NormalizedRow>{normalized, q.pre_scale, q.columns}, row, other, lane);
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
  const auto transform = q.type == kFloat32    ? transform_row<kFloat32>
                         : q.type == kBFloat16 ? transform_row<kBFloat16>
                                               : transform_row<kFloat16>;
  for (int64_t r = first; r < last; r++) {
    float *row = scratch, *other = scratch + padded_row(q.columns);
    const I largest = transform(q, r, row, other, lane);
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
