// SPDX-License-Identifier: Apache-2.0
// Quotients that round up, and float types that are known when the kernel runs.
#pragma once
#include "arch.cuh"

namespace dtq {

DTQ_HD int64_t over(int64_t a, int64_t b) { return (a + b - 1) / b; }

DTQ_DEV float load_float(const void* p, int64_t i, Float type) {
  if (type == kFloat32) return ldg(static_cast<const float*>(p) + i);
  const uint16_t h = ldg(static_cast<const uint16_t*>(p) + i);
  return type == kBFloat16 ? bf16_to_float(h) : f16_to_float(h);
}

// As bits: 32 of a float, or the low 16.
DTQ_DEV uint32_t round_float(float v, Float type) {
  if (type == kFloat32) return float_bits(v);
  return type == kBFloat16 ? float_to_bf16(v) : float_to_f16(v);
}

DTQ_DEV float float_of(uint32_t bits, Float type) {
  if (type == kFloat32) return bits_float(bits);
  return type == kBFloat16 ? bf16_to_float(uint16_t(bits)) : f16_to_float(uint16_t(bits));
}

DTQ_DEV void store_float(void* p, int64_t i, float v, Float type) {
  const uint32_t bits = round_float(v, type);
  if (type == kFloat32) stg(static_cast<uint32_t*>(p) + i, bits);
  else stg(static_cast<uint16_t*>(p) + i, uint16_t(bits));
}

// x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), as torch has it.
DTQ_DEV float gelu_tanh(float x) {
  const float inner = fmul(0.7978845608028654f, ffma(0.044715f, fmul(fmul(x, x), x), x));
  return fmul(fmul(0.5f, x), fadd(1.0f, ftanh(inner)));
}

}  // namespace dtq
