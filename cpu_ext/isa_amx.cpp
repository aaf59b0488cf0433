// SPDX-License-Identifier: Apache-2.0
// AMX int8: an instruction multiplies a tile of 16 output channels by a tile of 16 tokens, 64 channels deep.
//
// The weights are the left operand, plain rows of 64 bytes, so they are not transposed; the activations,
// packed once for all panels, are the right one. Loading tiles is slower than multiplying them, so two
// weight tiles are multiplied by two activation tiles; weights come from the first-level cache, activations
// bypass it.
#include "ahead.h"
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
  // GCC 12 assumes that the instruction reads 8 of these 64 bytes, and drops the other stores
  asm volatile("" : "+m"(shapes)::"memory");
  _tile_loadconfig(&shapes);
}

struct Isa : Avx512 {
  static constexpr int kMaxBlocks = 2;
  static constexpr int64_t kMaxSteps = 18;  // 36 KB of a panel

  static constexpr int64_t kLine = kGroupBlocks * kBlockTokens * 4;   // bytes of a channel's sums
  static constexpr int64_t kHalf = 16 * kGroupBlocks * kBlockTokens;  // sums of the 16 channels of a tile

  // 32 output channels x one or two token blocks; tiles 0-3 sums, 4 and 5 weights, 6 and 7 activations.
  template <int count>
  static void multiply_tiles(const Weight* weights, const Activation* x_q, int64_t steps, int64_t next,
                             bool more, int32_t* sums, Ahead& ahead) {
    if (more) {
      _tile_loadd(0, sums, kLine);
      _tile_loadd(1, sums + kHalf, kLine);
      if (count == 2) {
        _tile_loadd(2, sums + kBlockTokens, kLine);
        _tile_loadd(3, sums + kHalf + kBlockTokens, kLine);
      }
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t s = 0; s < steps; s++) {
      const Weight* w = weights + s * kPanelRows * kStep;
      const Activation* x = x_q + s * kStep * kBlockTokens;
      ahead.fetch();
      // activations come from L2 and are used once per panel: a streaming load keeps the weights in L1
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
    _tile_stored(0, sums, kLine);
    _tile_stored(1, sums + kHalf, kLine);
    if (count == 2) {
      _tile_stored(2, sums + kBlockTokens, kLine);
      _tile_stored(3, sums + kHalf + kBlockTokens, kLine);
    }
  }

  static void multiply_group(const Weight* weights, const Activation* x, int64_t steps, int64_t next,
                             int count, bool more, int32_t* sums, Ahead& ahead) {
    asm volatile("" ::: "memory");  // a tile load does not tell the compiler what it reads
    if (count == 2) multiply_tiles<2>(weights, x, steps, next, more, sums, ahead);
    else multiply_tiles<1>(weights, x, steps, next, more, sums, ahead);
    asm volatile("" ::: "memory");
  }

  static int64_t peak(int64_t rounds) {
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
};

}  // namespace
}  // namespace dtq

#include "attention.h"
#include "decode.h"
#include "decode_bf16.h"
#include "gelu.h"
#include "gemm.h"
#include "rows.h"

namespace dtq {
namespace {

// A panel that does not fit into the first-level cache: each part of kMaxSteps is multiplied by all token
// blocks before the next.
void multiply_in_parts(const Linear& g, int64_t block, int64_t block_end, int64_t p, bool last,
                       void* scratch) {
  constexpr int kMaxBlocks = Isa::kMaxBlocks;
  Weight* weights = (Weight*)scratch;
  int32_t* sums = (int32_t*)(weights + g.steps * kStep * kPanelRows);
  const int64_t n = p * kPanelRows, rows = unpack_panel(g, p, weights), next = g.steps * kBlockStep;
  const int64_t group_sums = kPanelRows * kGroupBlocks * kBlockTokens;
  Ahead ahead = ahead_of_panel(g, p, last);
  set_outputs(ahead, g, n, block, block_end - block);
  for (int64_t step = 0; step < g.steps; step += Isa::kMaxSteps) {
    const int64_t some = g.steps - step < Isa::kMaxSteps ? g.steps - step : Isa::kMaxSteps;
    for (int64_t at = block; at < block_end; at += kMaxBlocks) {
      const Activation* x = (const Activation*)g.packed + at * next;
      Isa::multiply_group(weights + step * kPanelRows * kStep, x + step * kBlockStep, some, next,
                          block_end - at < kMaxBlocks ? 1 : kMaxBlocks, step > 0,
                          sums + (at - block) / kMaxBlocks * group_sums, ahead);
    }
  }
  for (int64_t at = block; at < block_end; at += kMaxBlocks)
    store_group(g, n, rows, at, block_end - at < kMaxBlocks ? 1 : kMaxBlocks,
                sums + (at - block) / kMaxBlocks * group_sums, (const float*)sums);  // no sections: not read
}

void multiply_tiled(const Linear& g, int64_t block, int64_t block_end, int64_t panel,
                    int64_t panel_end, void* scratch) {
  configure_tiles();
  if (g.steps <= Isa::kMaxSteps || g.section_scale)
    multiply(g, block, block_end, panel, panel_end, scratch);
  else
    for (int64_t p = panel; p < panel_end; p++) multiply_in_parts(g, block, block_end, p, p + 1 == panel_end, scratch);
  _tile_release();
}

}  // namespace

const Kernels amx = {"amx", sizeof(Activation), sizeof(Weight), quantize, pack, multiply_tiled,
                     pack_small_m, multiply_small_m, decode, multiply_stored, multiply_bfloat16, gelu,
                      kQueryBlock, head_bytes, block_bytes, pack_heads, attend, Isa::peak};
}
