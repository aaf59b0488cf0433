// SPDX-License-Identifier: Apache-2.0
// From the bytes of a checkpoint to int8 registers. Weights are read as the file has them: nothing
// is packed for a kernel, so there is one copy, and sharding and offloading need not know.
//
//   word     eight codes of 4 bits, code 0 in the lowest nibble
//   expand   a word to two registers: int8 of codes 0..3, and of codes 4..7
#pragma once
#include "launch.h"
#include "floats.cuh"

namespace dtq {

// Where the group bytes or tables of a weight lie.
struct Groups {
  const uint8_t* bytes;  // (N, count) bytes or tables of 16
  int count;             // groups of a row
  int shift;             // group == 1 << shift, or larger where a row has one
};

// Each of the three has
//   kBits     of a stored weight
//   Scale     what a thread keeps per row and group
//   scale     reads that of group `index`, counted over all rows
//   expand    see above
struct Int8 {
  static constexpr int kBits = 8;
  struct Scale {};
  DTQ_DEV static Scale scale(const Groups&, int) { return {}; }
};

// (code - zero) * scale2 in four bytes at once. With b = 128 - scale2 * zero no byte of
// code * scale2 + b leaves 0..255, so none carries into the next; flipping the top bit takes the
// 128 away again. That needs scale2 * zero <= 128 and scale2 * (15 - zero) <= 127, which is what
// makes the weight an int8 at all.
struct TwoLevel {
  static constexpr int kBits = 4;
  struct Scale {
    uint32_t scale2, b;  // b in all four bytes
  };

  DTQ_HD static Scale scale_of(uint32_t byte) {
    const uint32_t scale2 = (byte >> 4) + 1;
    return {scale2, (128 - scale2 * (byte & 15)) * 0x01010101u};
  }

  DTQ_DEV static Scale scale(const Groups& g, int index) { return scale_of(ldg(g.bytes + index)); }

  DTQ_DEV static void expand(uint32_t word, const Scale& s, uint32_t& first, uint32_t& second) {
    const uint32_t even = ((word & 0x0F0F0F0Fu) * s.scale2 + s.b) ^ 0x80808080u;
    const uint32_t odd = ((word >> 4 & 0x0F0F0F0Fu) * s.scale2 + s.b) ^ 0x80808080u;
    first = byte_perm(even, odd, 0x5140);
    second = byte_perm(even, odd, 0x7362);
  }
};

// A table of 16 int8 in four registers. prmt looks four codes up in half of it; a third prmt takes
// each byte from the half that bit 3 of its code names.
struct Table {
  static constexpr int kBits = 4;
  using Scale = U4;

  DTQ_DEV static Scale scale(const Groups& g, int index) {
    return ldg(reinterpret_cast<const U4*>(g.bytes) + index);
  }

  DTQ_DEV static uint32_t look_up(uint32_t codes, const Scale& t) {  // the low 16 bits
    const uint32_t low = byte_perm(t.x, t.y, codes & 0x7777);
    const uint32_t high = byte_perm(t.z, t.w, codes & 0x7777);
    return byte_perm(low, high, 0x3210 | (codes >> 1 & 0x4444));
  }

  DTQ_DEV static void expand(uint32_t word, const Scale& t, uint32_t& first, uint32_t& second) {
    first = look_up(word, t);
    second = look_up(word >> 16, t);
  }
};

}  // namespace dtq
