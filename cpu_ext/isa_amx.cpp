// SPDX-License-Identifier: Apache-2.0
// AMX int8: a tile of 16 output channels by a tile of 16 tokens, 64 channels deep, an instruction.
//
// The weights are the left operand, plain rows of 64 bytes, so they need no transposing; the codes,
// packed once for all panels, are the right one.
#include "avx512.h"

namespace dtq {
namespace {

struct alignas(64) TileShapes {
  uint8_t palette, start, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

inline void configure_tiles() {
  TileShapes shapes = {};
  shapes.palette = 1;
  for (int i = 0; i < 8; i++) {
    shapes.row_bytes[i] = 64;
    shapes.rows[i] = 16;
  }
  // GCC 12 thinks that the instruction reads 8 of these 64 bytes and drops the other stores
  asm volatile("" : "+m"(shapes)::"memory");
  _tile_loadconfig(&shapes);
}

// 32 output channels by one or two token blocks; tiles 0-3 sums, 4 and 5 weights, 6 and 7 codes.
template <int count>
inline void multiply_tiles(const Weight* weights, const Code* codes, int64_t steps, int64_t next,
                           bool more, int32_t* sums) {
  constexpr int64_t line = kGroup * kTokens * 4;
  if (more) {
    _tile_loadd(0, sums, line);
    _tile_loadd(1, sums + 16 * kGroup * kTokens, line);
    if (count == 2) {
      _tile_loadd(2, sums + kTokens, line);
      _tile_loadd(3, sums + 16 * kGroup * kTokens + kTokens, line);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t s = 0; s < steps; s++) {
    const Weight* w = weights + s * kRows * kStep;
    const Code* x = codes + s * kStep * kTokens;
    // codes come from L2 and are used once a panel: a streaming load leaves the weights in L1
    _tile_stream_loadd(6, x, 64);
    _tile_loadd(4, w, kStep);
    _tile_dpbusd(0, 4, 6);
    _tile_loadd(5, w + 16 * kStep, kStep);
    _tile_dpbusd(1, 5, 6);
    if (count == 2) {
      _tile_stream_loadd(7, x + next, 64);
      _tile_dpbusd(2, 4, 7);
      _tile_dpbusd(3, 5, 7);
    }
  }
  _tile_stored(0, sums, line);
  _tile_stored(1, sums + 16 * kGroup * kTokens, line);
  if (count == 2) {
    _tile_stored(2, sums + kTokens, line);
    _tile_stored(3, sums + 16 * kGroup * kTokens + kTokens, line);
  }
}

inline void multiply_group(const Weight* weights, const Code* codes, int64_t steps, int64_t next,
                           int count, bool more, int32_t* sums) {
  asm volatile("" ::: "memory");  // a tile load does not tell the compiler what it reads
  configure_tiles();
  if (count >= 2) multiply_tiles<2>(weights, codes, steps, next, more, sums);
  if (count != 2) {
    const int done = count - 1;
    multiply_tiles<1>(weights, codes + done * next, steps, next, more, sums + done * kTokens);
  }
  _tile_release();
  asm volatile("" ::: "memory");
}

int64_t peak(int64_t rounds) {
  configure_tiles();
  _tile_zero(4);
  _tile_zero(6);
  for (int64_t r = 0; r < rounds; r++) {
    _tile_dpbusd(0, 4, 6);
    _tile_dpbusd(1, 4, 6);
    _tile_dpbusd(2, 4, 6);
    _tile_dpbusd(3, 4, 6);
  }
  _tile_release();
  return rounds * 4 * 16 * 16 * 64 * 2;
}

}  // namespace
}  // namespace dtq

#include "body.h"
#include "stored.h"

namespace dtq {
const Kernels amx = {"amx", sizeof(Code), sizeof(Weight), quantize, pack, multiply, pack_few,
                       multiply_few, decode, multiply_stored, gelu, peak};
}
