// SPDX-License-Identifier: Apache-2.0
// Conversions from and to e4m3, the exponential and GELU, bit-identical on every device.
//
// Products use fmul: the compiler may contract a plain product with the sum that follows, which rounds
// once where the reference rounds twice.
#pragma once
#include "../common_ext/constants.h"
#include "arch.cuh"

namespace dtq {

// ---------------------------------------------------------------------------- e4m3

// Four exponent bits biased by 7, three of mantissa, no infinity; 0x7f and 0xff are NaN.
DTQ_DEV float from_e4m3(uint32_t c) {
  const uint32_t nan = (c & 0x7f) == 0x7f ? 0x7fc00000 : 0;
  // the exponent bias is 120 below that of a float; a product with a power of two is exact
  return bits_float(float_bits(fmul(bits_float((c & 0x7f) << 20), 0x1p120f)) | nan | (c & 0x80) << 24);
}

// Ties to even; magnitudes above 448 become 448.
DTQ_DEV uint32_t to_e4m3(float x) {
  const uint32_t sign = float_bits(x) >> 24 & 0x80, u = float_bits(x) & 0x7fffffff;
  if (u > 0x7f800000) return sign | 0x7f;
  if (u >= 0x43e00000) return sign | 0x7e;
  if (u < 0x3c800000)  // a multiple of 2^-9: the sum with 2^14 rounds there
    return sign | (float_bits(bits_float(u) + 0x1p14f) - 0x46800000);
  return sign | (u - 0x3c000000 + 0x7ffff + (u >> 20 & 1)) >> 20;
}

// ---------------------------------------------------------------------------- GELU

// 2^n, n in [-126, 128]; 128 is infinity.
DTQ_DEV float power_of_two(int n) { return bits_float((uint32_t)(n + 127) << 23); }

// e^t with a relative error below 3e-7 for t in [-87, 88.7]; smaller t are taken as -87, larger ones give
// infinity. Each product and each sum is rounded, as in dtq/kernels/ops_quantize.py.
DTQ_DEV float exponential(float t) {
  t = t > kExpMax ? kExpMax : t;
  t = t < kExpMin ? kExpMin : t;
  const int n = round_to_int(fmul(t, kLog2E));  // 0 for NaN
  const float exponent = int_to_float(n);
  const float r = (t - fmul(exponent, kLn2High)) - fmul(exponent, kLn2Low);
  float p = kExp1Over720;
  p = fmul(p, r) + kExp1Over120;
  p = fmul(p, r) + kExp1Over24;
  p = fmul(p, r) + kExp1Over6;
  p = fmul(p, r) + 0.5f;
  p = fmul(p, r) + 1.0f;
  p = fmul(p, r) + 1.0f;
  return fmul(p, power_of_two(n));
}

// GELU in its tanh form, x (1 + tanh(u)) / 2 = x / (1 + e^-2u), u = sqrt(2 / pi) (x + 0.044715 x^3).
DTQ_DEV float gelu(float x) {
  const float cube = fmul(fmul(x, x), x);
  const float u = fmul(x + fmul(cube, kGeluCubic), kGelu2SqrtTwoOverPi);
  return fdiv(x, 1.0f + exponential(-u));
}

}  // namespace dtq
