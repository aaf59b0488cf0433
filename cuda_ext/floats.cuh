// SPDX-License-Identifier: Apache-2.0
// Float types that are known only when the kernel runs, and ceil_div.
#pragma once
#include "arch.cuh"

namespace dtq {

DTQ_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

DTQ_DEV float to_float(uint16_t h, Float type) {
  return type == kBFloat16 ? bf16_to_float(h) : f16_to_float(h);
}

DTQ_DEV uint16_t to_16(float x, Float type) {
  return type == kBFloat16 ? float_to_bf16(x) : float_to_f16(x);
}

// Two of them, the first in the low half.
DTQ_DEV uint32_t pair_of(float low, float high, Float type) {
  return type == kBFloat16 ? floats_to_bf16x2(low, high) : floats_to_f16x2(low, high);
}

// The two of a pair, the first from the low half.
DTQ_DEV void floats_of(uint32_t pair, Float type, float& low, float& high) {
  low = type == kBFloat16 ? bits_float(pair << 16) : f16_to_float(uint16_t(pair));
  high = type == kBFloat16 ? bits_float(pair & 0xFFFF0000u) : f16_to_float(uint16_t(pair >> 16));
}

DTQ_DEV float load_float(const void* p, int64_t i, Float type) {
  if (type == kFloat32) return ldg(static_cast<const float*>(p) + i);
  return to_float(ldg(static_cast<const uint16_t*>(p) + i), type);
}

// The bits of v rounded to the type: 32, or the low 16.
DTQ_DEV uint32_t round_float(float v, Float type) {
  return type == kFloat32 ? float_bits(v) : to_16(v, type);
}

DTQ_DEV void store_float(void* p, int64_t i, float v, Float type) {
  const uint32_t bits = round_float(v, type);
  if (type == kFloat32) stg(static_cast<uint32_t*>(p) + i, bits);
  else stg(static_cast<uint16_t*>(p) + i, uint16_t(bits));
}

}  // namespace dtq
