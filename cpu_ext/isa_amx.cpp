// SPDX-License-Identifier: Apache-2.0
// AMX int8: a tile of 16 output channels by a tile of 16 tokens, 64 channels deep, an instruction. Two
// tiles of weights by three of codes keep six sums going, as long as a section of channels is.
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

constexpr int64_t kLine = kGroup * kTokens * 4;  // bytes from one output channel's sums to the next
constexpr int64_t kHalf = 16 * kGroup * kTokens;  // sums of the 16 output channels of a tile
constexpr int64_t kAtOnce = INT64_MAX;            // a section's sums stay in tiles to its end

// Tile 2 * c + h holds the sums of token block c by half h of the panel's output channels.
template <int count>
inline void end_tiles(int32_t* sums) {
  _tile_stored(0, sums, kLine);
  _tile_stored(1, sums + kHalf, kLine);
  if constexpr (count > 1) {
    _tile_stored(2, sums + kTokens, kLine);
    _tile_stored(3, sums + kTokens + kHalf, kLine);
  }
  if constexpr (count > 2) {
    _tile_stored(4, sums + 2 * kTokens, kLine);
    _tile_stored(5, sums + 2 * kTokens + kHalf, kLine);
  }
}

// A step leaves two tiles for operands: weights of one half in 6, codes of one block in 7. The second
// half takes the blocks backwards, so that the last one stays where it is.
template <int count>
inline void multiply_tiles(const Weight* weights, const Code* codes, int64_t steps, int64_t next,
                           int32_t* sums) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  for (int64_t s = 0; s < steps; s++) {
    const Weight* w = weights + s * kRows * kStep;
    const Code* x = codes + s * kStep * kTokens;
    _tile_loadd(6, w, kStep);
    _tile_loadd(7, x, 64);
    _tile_dpbusd(0, 6, 7);
    if constexpr (count > 1) {
      _tile_loadd(7, x + next, 64);
      _tile_dpbusd(2, 6, 7);
    }
    if constexpr (count > 2) {
      _tile_loadd(7, x + 2 * next, 64);
      _tile_dpbusd(4, 6, 7);
    }
    _tile_loadd(6, w + 16 * kStep, kStep);
    if constexpr (count > 2) {
      _tile_dpbusd(5, 6, 7);
      _tile_loadd(7, x + next, 64);
    }
    if constexpr (count > 1) {
      _tile_dpbusd(3, 6, 7);
      _tile_loadd(7, x, 64);
    }
    _tile_dpbusd(1, 6, 7);
  }
  end_tiles<count>(sums);
}

inline void multiply_group(const Weight* weights, const Code* codes, int64_t steps, int64_t next,
                           int count, bool, int32_t* sums) {
  asm volatile("" ::: "memory");  // a tile load does not tell the compiler what it reads
  if (count == 3) multiply_tiles<3>(weights, codes, steps, next, sums);
  else if (count == 2) multiply_tiles<2>(weights, codes, steps, next, sums);
  else multiply_tiles<1>(weights, codes, steps, next, sums);
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
namespace {

// Tiles are configured once for all that a thread multiplies.
void multiply_tiled(const Linear& g, int64_t block, int64_t block_end, int64_t panel,
                    int64_t panel_end, void* scratch) {
  configure_tiles();
  multiply(g, block, block_end, panel, panel_end, scratch);
  _tile_release();
}

}  // namespace

const Kernels amx = {"amx", sizeof(Code), sizeof(Weight), quantize, pack, multiply_tiled, pack_few,
                       multiply_few, decode, multiply_stored, gelu, peak};
}
