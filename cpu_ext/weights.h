// SPDX-License-Identifier: Apache-2.0
// From a row of the file to weights that can be multiplied, 64 at a time. Before it come
//
//   Weight          how a weight in a panel is kept
//   kShift          what is added to make it unsigned, 128 or 0
//   widen           `width` int8 weights to 64 of them; past the width anything will do, the codes
//                   there are zero
//   unpack<bits>    the same of 4- or 3-bit ones
#pragma once

namespace dtq {
namespace {

inline Span span_of(const Linear& g, int64_t s) {
  int64_t at = s * kStep, end = g.columns;
  if (g.sections > 1) {
    const int64_t steps = g.steps / g.sections, section = s / steps, wide = g.columns / g.sections;
    at = section * wide + (s - section * steps) * kStep;
    end = (section + 1) * wide;
  }
  return {at, end - at < kStep ? (int)(end - at) : kStep};
}

// The levels of a group.
inline const int8_t* codebook_of_group(const Linear& g, int64_t group) {
  if (g.codebooks) return g.codebooks + group * 16;
  return g.byte_codebooks[g.group_bytes ? g.group_bytes[group] : 0];  // of 0: the codes themselves
}

inline const int8_t* weights_at(const Linear& g, int64_t n, int64_t column) {
  return g.weight + ((n * g.columns + column) * g.bits >> 3);
}

inline int code_at(const int8_t* w, int bits, int i) {
  if (bits == 4) return (uint8_t)w[i / 2] >> (i & 1) * 4 & 15;
  const uint8_t* p = (const uint8_t*)w + i / 8 * 3;
  return (p[0] | p[1] << 8 | p[2] << 16) >> i % 8 * 3 & 7;
}

// Of the 64 columns from `at` on in row n.
inline Codebooks codebooks_at(const Linear& g, int64_t n, int64_t at) {
  const int64_t row = n * g.groups_per_row;
  const int8_t* first = codebook_of_group(g, row + (at >> g.group_shift));
  if (g.group_shift >= 6) return {{first, first, first, first}, true};
  Codebooks levels = {{first, first, first, first}, false};
  for (int i = 1; i < 4 && at + 16 * i < g.columns; i++)
    levels.of[i] = codebook_of_group(g, row + ((at + 16 * i) >> g.group_shift));
  return levels;
}

// Step s of row n.
inline void unpack_step(const Linear& g, int64_t n, int64_t s, Weight* out) {
  const Span span = span_of(g, s);
  const int8_t* w = weights_at(g, n, span.at);
  if (g.bits == 8) return widen(w, span.width, out);
  if (g.group_shift >= 0) {
    const Codebooks levels = codebooks_at(g, n, span.at);
    return g.bits == 4 ? unpack<4>(w, span.width, levels, out) : unpack<3>(w, span.width, levels, out);
  }
  for (int i = 0; i < kStep; i++) {  // no recipe makes such groups: right, not fast
    const int code = i < span.width ? code_at(w, g.bits, i) : 0;
    const int64_t group = i < span.width ? (span.at + i) / g.group_size : 0;
    out[i] = (Weight)(codebook_of_group(g, n * g.groups_per_row + group)[code] + kWeightOffset);
  }
}

}  // namespace
}  // namespace dtq
