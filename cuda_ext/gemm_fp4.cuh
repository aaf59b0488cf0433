// SPDX-License-Identifier: Apache-2.0
// FP4 GEMM with the block-scaled mma.sync of sm_120: both operands E2M1 with a scale for every 16
// columns (NVFP4) or 32 (MXFP4), in the layouts of the checkpoint and of fp4_quantize_rows.
//
// A stage is 128 columns: 64 bytes of a row, swizzled for ldmatrix, and the row's 8 or 4 scales. The
// instruction takes 64 columns; its scales are in one register for each 16 rows and each 8 columns.
#pragma once
#include "gemm_mma.cuh"

namespace dtq {

template <Weights kind, int tile_m, int tile_n, int warp_m, int warp_n, int stages>
struct Fp4Tile {
  static constexpr bool kMx = kind == kMxFp4, kAligned = true;
  static constexpr int kTileM = tile_m, kTileN = tile_n, kWarpM = warp_m, kWarpN = warp_n;
  static constexpr int kStages = stages;
  static constexpr int kWarpsM = tile_m / warp_m, kThreads = 32 * kWarpsM * (tile_n / warp_n);
  static constexpr int kBlocksM = warp_m / 16, kBlocksN = warp_n / 8;  // mma of a warp
  static constexpr int kDepth = 128, kRow = kDepth / 2;                // columns, bytes of a stage
  static constexpr int kScales = kDepth / (kMx ? 32 : 16);             // of a row
  static constexpr int kBytesX = tile_m * kRow, kBytesW = tile_n * kRow;
  static constexpr int kStage = kBytesX + kBytesW + (tile_m + tile_n) * kScales;
  static constexpr int kShared = stages * kStage;
  static_assert(kShared <= 99 * 1024, "the limit of a block on sm_120");
  static_assert(kBlocksN % 2 == 0, "ldmatrix loads 16 columns");
};

struct Fp4Args {
  Gemm g;
  int scales;  // of a row
};

#if defined(DTQ_HAS_FP4)

// The scales of rows [first, first + rows), four at a time; zeros outside the matrix.
template <class T, int rows>
DTQ_DEV void load_block_scales(unsigned char* to, const uint8_t* scales, int first, int64_t all,
                               int count, int step) {
  constexpr int kWords = T::kScales / 4;
  DTQ_UNROLL for (int i = 0; i < (rows * kWords + T::kThreads - 1) / T::kThreads; i++) {
    const int word = tid() + i * T::kThreads, row = first + word / kWords;
    const int at = step * T::kScales + word % kWords * 4;
    if (word < rows * kWords)
      cp_async4(to + word * 4, scales + int64_t(row) * count + at, row < all && at < count);
  }
}

template <class T>
struct Fp4Loader {
  Loader<T, T::kTileM, T::kRow> x;
  Loader<T, T::kTileN, T::kRow> w;
  int m, n;  // first token and row of the tile

  DTQ_DEV Fp4Loader(const Gemm& g, TileCoord tile)
      : x(g.x_q, tile.m * T::kTileM, g.tokens, g.columns / 2),
        w(g.weight, tile.n * T::kTileN, g.rows, g.columns / 2),
        m(tile.m * T::kTileM),
        n(tile.n * T::kTileN) {}

  DTQ_DEV void load(const Fp4Args& p, unsigned char* stage, int step) const {
    unsigned char* scales = stage + T::kBytesX + T::kBytesW;
    x.load(stage, step);
    w.load(stage + T::kBytesX, step);
    load_block_scales<T, T::kTileM>(scales, p.g.x_block_scale, m, p.g.tokens, p.scales, step);
    load_block_scales<T, T::kTileN>(scales + T::kTileM * T::kScales, p.g.groups, n, p.g.rows,
                                    p.scales, step);
    cp_async_commit();
  }
};

// The scales of a row for the first or second 64 columns of the stage.
template <class T>
DTQ_DEV uint32_t block_scales(const unsigned char* scales, int row, int half) {
  if constexpr (T::kMx) return lds<uint16_t>(scales + row * T::kScales + half * 2);
  else return lds<uint32_t>(scales + row * T::kScales + half * 4);
}

template <class T>
DTQ_DEV void multiply_fp4(const unsigned char* stage, int warp_m, int warp_n,
                          float (&sums)[T::kBlocksM][T::kBlocksN][4]) {
  const unsigned char *x = stage, *w = stage + T::kBytesX;
  const unsigned char *scales_x = w + T::kBytesW, *scales_w = scales_x + T::kTileM * T::kScales;
  const int m = warp_m * T::kWarpM, n = warp_n * T::kWarpN, g = lane() / 4, t = lane() % 4;
  DTQ_UNROLL for (int half = 0; half < 2; half++) {
    uint32_t b[T::kBlocksN][2], scale_w[T::kBlocksN];
    DTQ_UNROLL for (int j = 0; j < T::kBlocksN; j += 2) {
      // matrices: rows 0..7 of the first and the second 32 columns, then rows 8..15
      const int row = n + j * 8 + lane() / 16 * 8 + lane() % 8;
      uint32_t r[4];
      ldmatrix_x4(r, chunk_of(w, row, half * 2 + lane() / 8 % 2));
      b[j][0] = r[0], b[j][1] = r[1], b[j + 1][0] = r[2], b[j + 1][1] = r[3];
    }
    DTQ_UNROLL for (int j = 0; j < T::kBlocksN; j++)
      scale_w[j] = block_scales<T>(scales_w, n + j * 8 + g, half);
    DTQ_UNROLL for (int i = 0; i < T::kBlocksM; i++) {
      uint32_t a[4];  // matrices: rows 0..7, 8..15 of the first 32 columns, then of the second
      ldmatrix_x4(a, chunk_of(x, m + i * 16 + lane() % 16, half * 2 + lane() / 16));
      const uint32_t scale_x = block_scales<T>(scales_x, m + i * 16 + g + t % 2 * 8, half);
      DTQ_UNROLL for (int j = 0; j < T::kBlocksN; j++)
        mma_fp4<T::kMx>(sums[i][j], a, b[j][0], b[j][1], scale_x, scale_w[j]);
    }
  }
}

template <class T, bool has_epilogue>
DTQ_DEV void fp4_body(const Fp4Args& p, unsigned char* shared) {
  const Gemm& g = p.g;
  const TileCoord tile =
      tile_coord(block_x(), int(ceil_div(g.tokens, T::kTileM)), int(ceil_div(g.rows, T::kTileN)));
  const int warp_m = warp() % T::kWarpsM, warp_n = warp() / T::kWarpsM;
  const int steps = int(ceil_div(g.columns, T::kDepth));
  float sums[T::kBlocksM][T::kBlocksN][4] = {};
  const Fp4Loader<T> loader(g, tile);
  DTQ_UNROLL for (int s = 0; s < T::kStages - 1; s++) {
    if (s < steps) loader.load(p, shared + s * T::kStage, s);
    else cp_async_commit();  // the wait below counts groups
  }
  for (int s = 0; s < steps; s++) {
    cp_async_wait<T::kStages - 2>();
    sync_threads();  // the stage is complete for all threads, and none reads the one filled next
    const int ahead = s + T::kStages - 1;
    if (ahead < steps) loader.load(p, shared + ahead % T::kStages * T::kStage, ahead);
    else cp_async_commit();
    multiply_fp4<T>(shared + s % T::kStages * T::kStage, warp_m, warp_n, sums);
  }
  finish<T, has_epilogue>(g, tile.m * T::kTileM + warp_m * T::kWarpM,
                    tile.n * T::kTileN + warp_n * T::kWarpN, sums);
}

#endif

template <class T, bool has_epilogue>
DTQ_KERNEL void DTQ_BOUNDS(T::kThreads, 1) fp4_mma(const DTQ_CONSTANT Fp4Args p) {
#if defined(DTQ_HAS_FP4)
  DTQ_SHARED(shared);
  fp4_body<T, has_epilogue>(p, shared);
#else
  trap();  // compiled for another architecture: fail, do not leave the output unwritten
#endif
}

template <class T>
int run_fp4(const Gemm& g, int64_t tiles, Stream stream) {
  const Fp4Args p = {g, int(g.columns / g.group)};
  const Shape shape = {{unsigned(tiles)}, unsigned(T::kThreads), size_t(T::kShared)};
  return launch(has_epilogue(g) ? fp4_mma<T, true> : fp4_mma<T, false>, shape, stream, p);
}

}  // namespace dtq
