// SPDX-License-Identifier: Apache-2.0
// From a row of the file to weights that can be multiplied, 64 at a time. Before it come
//
//   Weight          how a weight in a panel is kept
//   kShift          what is added to make it unsigned, 128 or 0
//   widen, unpack   `width` int8 or 4-bit weights to 64 of them; past the width anything will do,
//                   the codes there are zero
#pragma once

namespace dtq {
namespace {

// Of columns [64 s, 64 s + 64) of row n.
inline Levels levels_at(const Linear& g, int64_t n, int64_t s) {
  const uint8_t* bytes = g.groups + (n * g.columns >> g.group_bits);
  const int64_t at = s * kStep;
  const int8_t* first = levels_of[bytes[at >> g.group_bits]];
  if (g.group_bits >= 6) return {{first, first, first, first}, true};
  Levels levels = {{first, first, first, first}, false};
  for (int i = 1; i < 4 && at + 16 * i < g.columns; i++)
    levels.of[i] = levels_of[bytes[(at + 16 * i) >> g.group_bits]];
  return levels;
}

// Columns [64 s, 64 s + 64) of row n.
inline void unpack_step(const Linear& g, int64_t n, int64_t s, Weight* out) {
  const int64_t at = s * kStep, left = g.columns - at;
  const int width = left < kStep ? (int)left : kStep;
  if (!g.groups) return widen(g.weight + n * g.columns + at, width, out);
  const int8_t* w = g.weight + (n * g.columns + at) / 2;
  if (g.group_bits >= 0) return unpack(w, width, levels_at(g, n, s), out);
  const uint8_t* bytes = g.groups + n * (g.columns / g.group);
  for (int i = 0; i < kStep; i++) {  // no recipe makes such groups: right, not fast
    const int code = i < width ? (uint8_t)w[i / 2] >> (i & 1) * 4 & 15 : 0;
    out[i] = (Weight)(levels_of[i < width ? bytes[(at + i) / g.group] : 0][code] + kShift);
  }
}

}  // namespace
}  // namespace dtq
