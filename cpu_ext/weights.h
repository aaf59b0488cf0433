// SPDX-License-Identifier: Apache-2.0
// From a row of the checkpoint's weight to weights of the multiplier, one step of 64 channels at a time.
#pragma once
#include "kernels.h"

namespace dtq {
namespace {

// The channels of step s. Sections are padded to whole steps.
inline Span span_of(const Linear& g, int64_t s) {
  int64_t at = s * kStep, end = g.columns;
  if (g.sections > 1) {
    const int64_t steps = g.steps / g.sections, section = s / steps, width = g.columns / g.sections;
    at = section * width + (s - section * steps) * kStep;
    end = (section + 1) * width;
  }
  return {at, end - at < kStep ? (int)(end - at) : kStep};
}

inline const int8_t* codebook_of_group(const Linear& g, int64_t group) {
  if (g.codebooks) return g.codebooks + group * 16;
  return g.byte_codebooks[g.group_bytes ? g.group_bytes[group] : 0];  // byte 0: the codes themselves
}

inline const int8_t* weights_at(const Linear& g, int64_t n, int64_t column) {
  return g.weight + ((n * g.columns + column) * g.bits >> 3);
}

// Code i of packed 4- or 3-bit codes.
inline int code_at(const int8_t* w, int bits, int i) {
  if (bits == 4) return (uint8_t)w[i / 2] >> (i & 1) * 4 & 15;
  const uint8_t* p = (const uint8_t*)w + i / 8 * 3;
  return (p[0] | p[1] << 8 | p[2] << 16) >> i % 8 * 3 & 7;
}

// Of columns [at, at + 64) of row n.
inline Codebooks codebooks_at(const Linear& g, int64_t n, int64_t at) {
  const int64_t row = n * g.groups_per_row;
  const int8_t* first = codebook_of_group(g, row + (at >> g.group_shift));
  if (g.group_shift >= 6) return {{first, first, first, first}, true};
  Codebooks codebooks = {{first, first, first, first}, false};
  for (int i = 1; i < 4 && at + 16 * i < g.columns; i++)
    codebooks.of[i] = codebook_of_group(g, row + ((at + 16 * i) >> g.group_shift));
  return codebooks;
}

// Adds `unpack_step` to a base that has
//
//   Weight, kWeightOffset   see isa.h
//   unpack8(w, width, out)  `width` int8 weights as kStep weights; from `width` on they may be anything,
//                           since the activations there are zero
//   unpack<bits>(w, width, codebooks, out)   the same with 4- or 3-bit codes
template <class Base>
struct StepWeights : Base {
  using typename Base::Weight;

  // Step s of output channel n.
  static void unpack_step(const Linear& g, int64_t n, int64_t s, Weight* out) {
    const Span span = span_of(g, s);
    const int8_t* w = weights_at(g, n, span.at);
    if (g.bits == 8) return Base::unpack8(w, span.width, out);
    if (g.group_shift >= 0) {
      const Codebooks codebooks = codebooks_at(g, n, span.at);
      return g.bits == 4 ? Base::template unpack<4>(w, span.width, codebooks, out)
                         : Base::template unpack<3>(w, span.width, codebooks, out);
    }
    for (int i = 0; i < kStep; i++) {  // no recipe has such groups: correct, not fast
      const int code = i < span.width ? code_at(w, g.bits, i) : 0;
      const int64_t group = i < span.width ? (span.at + i) / g.group_size : 0;
      out[i] = (Weight)(codebook_of_group(g, n * g.groups_per_row + group)[code] + Base::kWeightOffset);
    }
  }
};

}  // namespace
}  // namespace dtq
