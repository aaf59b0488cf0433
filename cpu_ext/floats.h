// SPDX-License-Identifier: Apache-2.0
// Vectors of floats: loads, stores, conversions from and to 16-bit types. Needs `struct Isa`, see isa.h.
#pragma once
#include "../common_ext/constants.h"
#include "isa.h"

namespace dtq {
namespace {

inline V splat(float x) { return x - (V){}; }

inline V load(const float* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}

// `count` floats at p, at most kLanes; zeros follow.
DTQ_INLINE V part_of(const float* p, int64_t count) {
  if (count >= kLanes) return load(p);
  float part[kLanes] = {};
  memcpy(part, p, count * 4);
  return load(part);
}

inline void store(float* p, V v) { memcpy(p, &v, sizeof v); }

// Rounds to an integer, |x| < 2^22, ties to even.
inline V round_to_int(V x) { return (x + splat(kRoundToInt)) - splat(kRoundToInt); }

inline V from_half(U h) {
  // the exponent bias of a half is 112 below that of a float; a product with a power of two is exact
  V small = (V)((h & 0x7fff) << 13) * splat(0x1p112f);
  U inf = (U)((h & 0x7c00) == 0x7c00) & 0x7f800000;
  return (V)((U)small | inf | ((h & 0x8000) << 16));
}

inline U to_half(V f) {
  // the sum with 2^(exponent + 13) rounds the mantissa to 10 bits, ties to even
  U w = (U)f, doubled = w + w;
  V base = (V)(w & 0x7fffffff) * splat(0x1p112f) * splat(0x1p-110f);
  U bias = doubled & 0xff000000, min_bias = (U){} + 0x71000000;
  bias = bias < min_bias ? min_bias : bias;
  U bits = (U)((V)((bias >> 1) + 0x07800000) + base);
  U magnitude = ((bits >> 13) & 0x7c00) + (bits & 0xfff), nan = (U){} + 0x7e00;
  magnitude = doubled > 0xff000000 ? nan : magnitude;
  return ((w & 0x80000000) >> 16) | magnitude;
}

inline U to_bfloat16(V f) {
  U w = (U)f, nan = (U){} + 0x7fc0;
  U rounded = (w + 0x7fff + ((w >> 16) & 1)) >> 16;
  return f == f ? rounded : nan;
}

inline V load_as_float(const void* p, Float type) {
  if (type == kFloat32) return load((const float*)p);
  const U u = Isa::load_halves(p);
  return type == kBFloat16 ? (V)(u << 16) : from_half(u);
}

// `left` elements of `from`, at most kLanes, beginning with element `at`; zeros follow.
DTQ_INLINE V part_as_float(const void* from, int64_t at, int64_t left, Float type) {
  const int bytes = type == kFloat32 ? 4 : 2;
  if (left >= kLanes) return load_as_float((const char*)from + at * bytes, type);
  float end[kLanes] = {};
  memcpy(end, (const char*)from + at * bytes, left * bytes);
  return load_as_float(end, type);
}

// The C++ type of an element in memory.
template <bool is_float32>
struct Storage {
  typedef uint16_t T;
};
template <>
struct Storage<true> {
  typedef float T;
};

template <Float type, typename T>
inline void store_vector(T* out, V v) {
  if constexpr (type == kFloat32) store(out, v);
  else Isa::store_low_halves(type == kBFloat16 ? to_bfloat16(v) : to_half(v), out);
}

// Elements [at, at + count) of `out`.
inline void store_floats(void* out, int64_t at, const float* values, int count, Float type) {
  for (int i = 0; i < count; i += kLanes) {
    const int left = count - i < kLanes ? count - i : kLanes;
    const V v = load(values + i);
    if (type == kFloat32) {
      memcpy((float*)out + at + i, &v, left * 4);
    } else {
      uint16_t halves[kLanes], *to = (uint16_t*)out + at + i;
      Isa::store_low_halves(type == kBFloat16 ? to_bfloat16(v) : to_half(v), left < kLanes ? halves : to);
      if (left < kLanes) memcpy(to, halves, left * 2);
    }
  }
}

}  // namespace
}  // namespace dtq
