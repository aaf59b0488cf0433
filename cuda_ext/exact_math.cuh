// SPDX-License-Identifier: Apache-2.0
// Conversions from and to e4m3, and GELU, bit-identical on every device.
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

// GELU in its tanh form, x (1 + tanh(u)) / 2 = x / (1 + e^-2u), u = sqrt(2 / pi) (x + 0.044715 x^3). Each product and
// each sum is rounded, as in dtq/kernels/ops_quantize.py; see kGeluLinear.
DTQ_DEV float gelu(float x) {
  const float low = x < kGeluLowest ? kGeluLowest : x;
  float t = fmul(low, fmul(fmul(low, low), kGeluCubic) + kGeluLinear);
  t = t < kGeluLeastExponent ? kGeluLeastExponent : t;
  const float shifted = t + kRoundToInt;  // its low bits are the rounded t
  const float r = t - (shifted - kRoundToInt);
  float p = kPower5;
  p = fmul(p, r) + kPower4;
  p = fmul(p, r) + kPower3;
  p = fmul(p, r) + kPower2;
  p = fmul(p, r) + kPower1;
  p = fmul(p, r) + 1.0f;
  return fdiv(low, 1.0f + bits_float(float_bits(p) + (float_bits(shifted) << 23)));
}

}  // namespace dtq
