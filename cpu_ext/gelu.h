// SPDX-License-Identifier: Apache-2.0
// GELU in its tanh form. Needs `struct Isa`, see isa.h.
#pragma once
#include "floats.h"

namespace dtq {
namespace {

// e^t, with the operations of dtq/kernels/ops_quantize.py in their order.
inline V exponential(V t) {
  t = Isa::at_most(Isa::at_least(t, splat(kExpMin)), splat(kExpMax));
  const V n = round_to_int(t * splat(kLog2E));
  const V r = (t - n * splat(kLn2High)) - n * splat(kLn2Low);
  const float taylor[] = {kExp1Over120, kExp1Over24, kExp1Over6, 0.5f, 1.0f, 1.0f};
  V p = splat(kExp1Over720);
  for (float c : taylor) p = p * r + splat(c);
  const V exponent = n == n ? n : splat(0);
  return p * (V)((U)(__builtin_convertvector(exponent, I) + 127) << 23);
}

// Of each of the vectors, with the operations of dtq/kernels/ops_quantize.py in their order. An operation is done for
// all vectors before the next: a chain of so many would leave the processor waiting.
template <int count>
inline void gelu_of(V (&x)[count]) {
  V t[count], r[count], p[count];
  U power[count];
#define DTQ_EACH _Pragma("GCC unroll 8") for (int i = 0; i < count; i++)
  DTQ_EACH x[i] = Isa::at_least(x[i], splat(kGeluLowest));
  DTQ_EACH t[i] = x[i] * x[i] * splat(kGeluCubic) + splat(kGeluLinear);
  DTQ_EACH t[i] = x[i] * t[i];
  DTQ_EACH t[i] = Isa::at_least(t[i], splat(kGeluLeastExponent));
  DTQ_EACH r[i] = t[i] + splat(kRoundToInt);  // its low bits are the rounded t
  DTQ_EACH power[i] = (U)r[i] << 23;
  DTQ_EACH r[i] = t[i] - (r[i] - splat(kRoundToInt));
  DTQ_EACH p[i] = splat(kPower5) * r[i] + splat(kPower4);
  DTQ_EACH p[i] = p[i] * r[i] + splat(kPower3);
  DTQ_EACH p[i] = p[i] * r[i] + splat(kPower2);
  DTQ_EACH p[i] = p[i] * r[i] + splat(kPower1);
  DTQ_EACH p[i] = p[i] * r[i] + splat(1);
  DTQ_EACH p[i] = splat(1) + (V)((U)p[i] + power[i]);
  DTQ_EACH x[i] = x[i] / p[i];
#undef DTQ_EACH
}

inline V gelu_of(V x) {
  V one[1] = {x};
  gelu_of(one);
  return one[0];
}

constexpr int kGeluAtOnce = 4;

inline void gelu_in_place(float* x) {
  V v[kGeluAtOnce];
  for (int i = 0; i < kGeluAtOnce; i++) v[i] = load(x + i * kLanes);
  gelu_of(v);
  for (int i = 0; i < kGeluAtOnce; i++) store(x + i * kLanes, v[i]);
}

template <Float type>
inline void gelu_of(const void* x, void* out, int64_t first, int64_t last) {
  typedef typename Storage<type == kFloat32>::T T;
  int64_t k = first;
  for (; k + kLanes <= last; k += kLanes)
    store_vector<type>((T*)out + k, gelu_of(load_as_float((const T*)x + k, type)));
  if (k == last) return;
  T end[kLanes] = {};
  memcpy(end, (const T*)x + k, (last - k) * sizeof(T));
  store_vector<type>(end, gelu_of(load_as_float(end, type)));
  memcpy((T*)out + k, end, (last - k) * sizeof(T));
}

void gelu(const void* x, void* out, Float type, int64_t first, int64_t last) {
  if (type == kFloat32) gelu_of<kFloat32>(x, out, first, last);
  else if (type == kBFloat16) gelu_of<kBFloat16>(x, out, first, last);
  else gelu_of<kFloat16>(x, out, first, last);
}

}  // namespace
}  // namespace dtq
