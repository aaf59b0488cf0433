// SPDX-License-Identifier: Apache-2.0
// GELU in its tanh form. Needs `struct Isa`, see isa.h.
#pragma once
#include "floats.h"

namespace dtq {
namespace {

// e^t, with the operations of dtq/kernels/ops_quantize.py in their order.
inline V exponential(V t) {
  t = t < splat(kExpMin) ? splat(kExpMin) : t;
  t = t > splat(kExpMax) ? splat(kExpMax) : t;
  const V n = round_to_int(t * splat(kLog2E));
  const V r = (t - n * splat(kLn2High)) - n * splat(kLn2Low);
  const float taylor[] = {kExp1Over120, kExp1Over24, kExp1Over6, 0.5f, 1.0f, 1.0f};
  V p = splat(kExp1Over720);
  for (float c : taylor) p = p * r + splat(c);
  const V exponent = n == n ? n : splat(0);
  return p * (V)((U)(__builtin_convertvector(exponent, I) + 127) << 23);
}

inline V gelu_of(V x) {
  const V cube = x * x * x, u2 = (x + cube * splat(kGeluCubic)) * splat(kGelu2SqrtTwoOverPi);
  return x / (splat(1) + exponential(-u2));
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
