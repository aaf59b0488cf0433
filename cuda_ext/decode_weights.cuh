// SPDX-License-Identifier: Apache-2.0
// From the bytes of a checkpoint to int8 registers. Weights are read in the layout of the checkpoint:
// they are not repacked for a kernel, so there is one copy, and sharding and offloading are not affected.
//
//   word     eight codes of 4 bits, code 0 in the lowest nibble
//   expand   a word to two registers: the int8 values of codes 0..3, and of codes 4..7
#pragma once
#include "launch.h"
#include "floats.cuh"

namespace dtq {

// The group bytes or codebooks of a weight.
struct Groups {
  const uint8_t* bytes;  // (N, count) bytes, or codebooks of 16 bytes
  int count;             // groups of a row
  int shift;             // log2 of the group size; at least log2(K) if a row is one group
};

// The `Source` of a GEMM kernel is one of the following three:
//   kBits     of a stored weight
//   Stored    the scales of a group as they are in memory
//   fetch     loads those of group `index`, counted over all rows. What is done to them waits for the load, so
//             a loop keeps them as stored until it needs them
//   Scale     what `expand` needs of a group, in registers
//   decode    Stored to Scale
//   expand    see above
struct Int8 {
  static constexpr int kBits = 8;
  struct Stored {};
  struct Scale {};
  DTQ_DEV static Stored fetch(const Groups&, int) { return {}; }
  DTQ_DEV static Scale decode(const Stored&) { return {}; }
};

// (code - zero) * scale2 in four bytes at once. With b = 128 - scale2 * zero each byte of
// code * scale2 + b is in 0..255, so none carries into the next; flipping the top bit subtracts the
// 128 again. This requires scale2 * zero <= 128 and scale2 * (15 - zero) <= 127, which is also the
// condition for the weight to be an int8.
struct TwoLevel {
  static constexpr int kBits = 4;
  struct Scale {
    uint32_t scale2, b;  // b in all four bytes
  };

  using Stored = uint8_t;
  DTQ_DEV static Stored fetch(const Groups& g, int index) { return ldg(g.bytes + index); }

  DTQ_HD static Scale decode(uint32_t byte) {
    const uint32_t scale2 = (byte >> 4) + 1;
    return {scale2, (128 - scale2 * (byte & 15)) * 0x01010101u};
  }

  DTQ_DEV static void expand(uint32_t word, const Scale& s, uint32_t& first, uint32_t& second) {
    const uint32_t even = ((word & 0x0F0F0F0Fu) * s.scale2 + s.b) ^ 0x80808080u;
    const uint32_t odd = ((word >> 4 & 0x0F0F0F0Fu) * s.scale2 + s.b) ^ 0x80808080u;
    first = byte_perm(even, odd, 0x5140);
    second = byte_perm(even, odd, 0x7362);
  }
};

// A codebook of 16 int8 in four registers. A prmt looks four codes up in one half of it; a third prmt
// selects each byte from one of the halves by bit 3 of its code.
struct Table {
  static constexpr int kBits = 4;
  using Stored = U4;
  using Scale = U4;

  DTQ_DEV static Stored fetch(const Groups& g, int index) {
    return ldg(reinterpret_cast<const U4*>(g.bytes) + index);
  }
  DTQ_DEV static Scale decode(const Stored& s) { return s; }

  DTQ_DEV static uint32_t lookup(uint32_t codes, const Scale& t) {  // of the low 16 bits
    const uint32_t low = byte_perm(t.x, t.y, codes & 0x7777);
    const uint32_t high = byte_perm(t.z, t.w, codes & 0x7777);
    return byte_perm(low, high, 0x3210 | (codes >> 1 & 0x4444));
  }

  DTQ_DEV static void expand(uint32_t word, const Scale& t, uint32_t& first, uint32_t& second) {
    first = lookup(word, t);
    second = lookup(word >> 16, t);
  }
};

}  // namespace dtq
