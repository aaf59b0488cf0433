// SPDX-License-Identifier: Apache-2.0
// What every instruction set does alike. Included once per file, after the file has defined
//
//   kLanes          floats of a vector
//   swapped<h>(v)   v with lanes i and i ^ h exchanged
//   transpose16     a 16 x 16 block of 32-bit values
//   low_bytes, low_halves   of each 32-bit lane, stored one after the other
//   add_codes       the codes of a step, added to the sums of 16 tokens
//   Code            how a packed code is kept
//   kQuad           codes of one token that lie side by side: what one instruction adds up
//   what weights.h asks for, and weights.h itself
//   multiply_group  some steps of a panel by 1 to kBlocks token blocks, added to the sums if `more`
//   kBlocks, kAtOnce   token blocks multiplied together, at most kGroup; steps after which their sums
//                   go to memory
//   splits          whether dot_few wants the codes of two steps in another order
//   dot_few         some steps of one output channel by up to kFew tokens
//
// Everything is in an anonymous namespace: see kernels.h.
#pragma once
#include <stddef.h>
#include <string.h>

#include "../common_ext/constants.h"

namespace dtq {
namespace {

typedef uint16_t H __attribute__((vector_size(kLanes * 2)));

inline V splat(float x) { return x - (V){}; }

inline V load(const float* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}

inline void store(float* p, V v) { memcpy(p, &v, sizeof v); }

// Rounds to an integer, |x| < 2^22, ties to even.
inline V round_to_int(V x) { return (x + splat(kRoundToInt)) - splat(kRoundToInt); }

inline V from_half(U h) {
  // the exponent of a half sits 112 below that of a float; a product by a power of two is exact
  V small = (V)((h & 0x7fff) << 13) * splat(0x1p112f);
  U inf = (U)((h & 0x7c00) == 0x7c00) & 0x7f800000;
  return (V)((U)small | inf | ((h & 0x8000) << 16));
}

inline U to_half(V f) {
  // the sum with 2^(exponent + 13) rounds the mantissa to 10 bits, ties to even
  U w = (U)f, doubled = w + w;
  V base = (V)(w & 0x7fffffff) * splat(0x1p112f) * splat(0x1p-110f);
  U bias = doubled & 0xff000000, least = (U){} + 0x71000000;
  bias = bias < least ? least : bias;
  U bits = (U)((V)((bias >> 1) + 0x07800000) + base);
  U rest = ((bits >> 13) & 0x7c00) + (bits & 0xfff), nan = (U){} + 0x7e00;
  rest = doubled > 0xff000000 ? nan : rest;
  return ((w & 0x80000000) >> 16) | rest;
}

inline U to_bfloat(V f) {
  U w = (U)f, nan = (U){} + 0x7fc0;
  U quantized = (w + 0x7fff + ((w >> 16) & 1)) >> 16;
  return (w & 0x7fffffff) > 0x7f800000 ? nan : quantized;
}

inline V load_as_float(const void* p, Float type) {
  if (type == kFloat32) return load((const float*)p);
  H h;
  memcpy(&h, p, sizeof h);
  U u = __builtin_convertvector(h, U);
  return type == kBFloat16 ? (V)(u << 16) : from_half(u);
}

// How a float of a type is kept.
template <bool wide>
struct Storage {
  typedef uint16_t T;
};
template <>
struct Storage<true> {
  typedef float T;
};

template <Float type, typename T>
inline void store_whole(T* out, V v) {
  if constexpr (type == kFloat32) store(out, v);
  else store_low_halves(type == kBFloat16 ? to_bfloat(v) : to_half(v), out);
}

inline void store_line(void* out, int64_t at, const float* values, int count, Float type) {
  for (int i = 0; i < count; i += kLanes) {
    const int left = count - i < kLanes ? count - i : kLanes;
    const V v = load(values + i);
    if (type == kFloat32) {
      memcpy((float*)out + at + i, &v, left * 4);
    } else {
      uint16_t halves[kLanes], *to = (uint16_t*)out + at + i;
      store_low_halves(type == kBFloat16 ? to_bfloat(v) : to_half(v), left < kLanes ? halves : to);
      if (left < kLanes) memcpy(to, halves, left * 2);
    }
  }
}

}  // namespace
}  // namespace dtq
