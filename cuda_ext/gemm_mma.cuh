// SPDX-License-Identifier: Apache-2.0
// int8 GEMM with mma.sync, sm_80 and later, for every kind of weight.
//
// Both operands have the same layout in shared memory as in global memory, 64 contiguous columns of a
// row. A thread (g, t) = (lane / 4, lane % 4) loads columns 16 t .. 16 t + 15 of a row at once, as
// int8 or as 4-bit codes, and passes them to two mma in the order
//
//   register      a[0], b0            a[2], b1            a[0], b0 of the 2nd   a[2], b1
//   columns       16t .. 16t + 3      16t + 4 .. + 7      16t + 8 .. + 11       16t + 12 .. + 15
//
// The instruction expects columns 4 t .. and 16 + 4 t .. in these registers, but it sums over all
// columns, and both operands have the same permutation. So weights need no fragment order, and neither
// swizzle (eight lanes of a 16-byte load read 128 contiguous bytes) nor ldmatrix is needed. The columns
// of a thread are in one group, as groups have 16 columns or more.
#pragma once
#include "epilogue.cuh"
#include "gemm_plan.h"

namespace dtq {

constexpr int kStep = 64;  // columns of a stage: with more, two blocks do not fit on an sm_89

template <class Source_, int tile_m, int tile_n, int warp_m, int warp_n, int stages, bool aligned>
struct MmaTile {
  using Source = Source_;
  static constexpr int kTileM = tile_m, kTileN = tile_n, kWarpM = warp_m, kWarpN = warp_n;
  static constexpr int kStages = stages;
  static constexpr bool kAligned = aligned;   // rows start at multiples of 16 bytes
  static constexpr bool kSwizzled = false;    // see Loader
  static constexpr int kWarpsM = tile_m / warp_m, kThreads = 32 * kWarpsM * (tile_n / warp_n);
  static constexpr int kBlocksM = warp_m / 16, kBlocksN = warp_n / 8;  // mma of a warp
  static constexpr int kRowW = kStep * Source::kBits / 8;              // bytes
  static constexpr int kBytesX = tile_m * kStep, kBytesW = tile_n * kRowW;
  static constexpr int kStage = kBytesX + kBytesW, kShared = stages * kStage;
  static_assert(kShared <= 48 * 1024, "the default limit; two blocks fit on a multiprocessor");
};

// This thread's 16-byte chunks of a tile of `rows` rows x `width` bytes: the same bytes of every kPitch-th
// row. Elements outside the matrix become zeros. If swizzled, the four chunks of 64 bytes are permuted by
// row / 2, so that a chunk of eight rows is in different banks.
template <class T, int rows, int width>
struct Loader {
  static constexpr int kAcross = width / 16, kPitch = T::kThreads / kAcross;
  static constexpr int kChunks = (rows + kPitch - 1) / kPitch;
  static_assert(T::kThreads % kAcross == 0 && (rows % kPitch == 0 || kChunks == 1));
  const uint8_t* from;
  int64_t row_bytes;
  int byte;             // of the row, in step 0
  int offset;           // of the first chunk in the tile
  uint32_t valid_mask;  // which of the chunks are in rows of the matrix

  DTQ_DEV Loader(const void* matrix, int first, int64_t all, int64_t bytes) {
    const int row = first + tid() / kAcross;
    row_bytes = bytes;
    byte = tid() % kAcross * 16;
    offset = tid() * 16;
    if constexpr (T::kSwizzled) {
      static_assert(width == 64 && kPitch % 8 == 0);
      offset ^= tid() / kAcross / 2 % 4 * 16;
    }
    from = static_cast<const uint8_t*>(matrix) + row * bytes + byte;
    valid_mask = 0;
    DTQ_UNROLL for (int c = 0; c < kChunks; c++)
      valid_mask |= uint32_t(row + c * kPitch < all && tid() / kAcross + c * kPitch < rows) << c;
  }

  DTQ_DEV void load(unsigned char* to, int step) const {
    const int left = int(row_bytes) - byte - step * width, valid = left > 16 ? 16 : left;
    DTQ_UNROLL for (int c = 0; c < kChunks; c++) {
      if (rows < kPitch && tid() / kAcross >= rows) break;
      const uint8_t* p = from + c * kPitch * row_bytes + step * width;
      const int bytes = valid_mask >> c & 1 && valid > 0 ? valid : 0;
      unsigned char* chunk = to + offset + c * T::kThreads * 16;
      if constexpr (T::kAligned) cp_async16(chunk, p, bytes);
      else copy_bytes(chunk, p, bytes);
    }
  }

  // For row widths that are not a multiple of 16, which are rare in models.
  DTQ_DEV static void copy_bytes(unsigned char* to, const uint8_t* p, int bytes) {
    uint32_t word[4] = {};
    DTQ_UNROLL for (int b = 0; b < 16; b++)
      if (b < bytes) word[b / 4] |= uint32_t(ldg(p + b)) << (b % 4 * 8);
    sts(to, U4{word[0], word[1], word[2], word[3]});
  }
};

template <class T>
struct StageLoader {
  Loader<T, T::kTileM, kStep> x;
  Loader<T, T::kTileN, T::kRowW> w;

  DTQ_DEV StageLoader(const Gemm& g, TileCoord tile)
      : x(g.x_q, tile.m * T::kTileM, g.tokens, g.columns),
        w(g.weight, tile.n * T::kTileN, g.rows, g.columns * T::Source::kBits / 8) {}

  DTQ_DEV void load(unsigned char* stage, int step) const {
    x.load(stage, step);
    w.load(stage + T::kBytesX, step);
    cp_async_commit();
  }
};

// Columns 16 t .. 16 t + 15 of row `row` of the stage's weights.
template <class T>
DTQ_DEV void load_weights(const unsigned char* weights, int row, const typename T::Source::Scale& s,
                          uint32_t (&w)[4]) {
  const unsigned char* p = weights + row * T::kRowW + lane() % 4 * (T::kRowW / 4);
  if constexpr (T::Source::kBits == 8) {
    const U4 v = lds<U4>(p);
    w[0] = v.x, w[1] = v.y, w[2] = v.z, w[3] = v.w;
  } else {
    const U2 v = lds<U2>(p);
    T::Source::expand(v.x, s, w[0], w[1]);
    T::Source::expand(v.y, s, w[2], w[3]);
  }
}

template <class T>
DTQ_DEV void multiply(const unsigned char* stage, int warp_m, int warp_n,
                      const typename T::Source::Scale (&scale)[T::kBlocksN],
                      int32_t (&sums)[T::kBlocksM][T::kBlocksN][4]) {
  const int g = lane() / 4, t = lane() % 4;
  uint32_t x[T::kBlocksM][2][4];
  DTQ_UNROLL for (int i = 0; i < T::kBlocksM; i++) {
    const unsigned char* p = stage + (warp_m * T::kWarpM + i * 16 + g) * kStep + t * 16;
    const U4 top = lds<U4>(p), bottom = lds<U4>(p + 8 * kStep);
    x[i][0][0] = top.x, x[i][0][1] = bottom.x, x[i][0][2] = top.y, x[i][0][3] = bottom.y;
    x[i][1][0] = top.z, x[i][1][1] = bottom.z, x[i][1][2] = top.w, x[i][1][3] = bottom.w;
  }
  DTQ_UNROLL for (int j = 0; j < T::kBlocksN; j++) {
    uint32_t w[4];
    load_weights<T>(stage + T::kBytesX, warp_n * T::kWarpN + j * 8 + g, scale[j], w);
    DTQ_UNROLL for (int i = 0; i < T::kBlocksM; i++) {
      mma_s8(sums[i][j], x[i][0], w[0], w[1]);
      mma_s8(sums[i][j], x[i][1], w[2], w[3]);
    }
  }
}

// The group scales of this thread's rows, for its columns of a step.
template <class T>
DTQ_DEV void load_scales(const GemmArgs& p, int first_row, int step,
                         typename T::Source::Scale (&scale)[T::kBlocksN]) {
  const int group = (step * kStep + lane() % 4 * 16) >> p.groups.shift;
  const int last = p.groups.count - 1, end = int(p.g.rows) - 1;
  DTQ_UNROLL for (int j = 0; j < T::kBlocksN; j++) {  // past the end any scale will do: x_q is zero there
    const int n = first_row + j * 8 + lane() / 4;
    const int index = (n < end ? n : end) * p.groups.count + (group < last ? group : last);
    scale[j] = T::Source::scale(p.groups, index);
  }
}

template <class T>
DTQ_DEV void store_sums(const GemmArgs& p, int split, int64_t first_m, int64_t first_n,
                        const int32_t (&sums)[T::kBlocksM][T::kBlocksN][4]) {
  int32_t* to = static_cast<int32_t*>(p.g.workspace) + split * p.g.tokens * p.g.rows;
  DTQ_UNROLL for (int i = 0; i < T::kBlocksM; i++)
    DTQ_UNROLL for (int j = 0; j < T::kBlocksN; j++)
      DTQ_UNROLL for (int e = 0; e < 4; e++) {
        const int64_t m = first_m + i * 16 + e / 2 * 8 + lane() / 4;
        const int64_t n = first_n + j * 8 + lane() % 4 * 2 + e % 2;
        if (m < p.g.tokens && n < p.g.rows) stg(to + m * p.g.rows + n, sums[i][j][e]);
      }
}

// + down @ up^T of the warp's tile.
template <class T>
DTQ_DEV void add_lowrank(const Gemm& g, int64_t first_m, int64_t first_n,
                         float (&v)[T::kBlocksM][T::kBlocksN][4]) {
  const int row = lane() / 4, pair = lane() % 4 * 2;
  for (int64_t r = pair; r < g.rank; r += 16) {
    uint32_t a[T::kBlocksM][4];
    DTQ_UNROLL for (int i = 0; i < T::kBlocksM; i++)
      DTQ_UNROLL for (int q = 0; q < 4; q++)
        a[i][q] = lowrank_pair(g.down, first_m + i * 16 + q % 2 * 8 + row, g.tokens, g.rank,
                               r + q / 2 * 8);
    DTQ_UNROLL for (int j = 0; j < T::kBlocksN; j++) {
      const uint32_t b0 = lowrank_pair(g.up, first_n + j * 8 + row, g.rows, g.rank, r);
      const uint32_t b1 = lowrank_pair(g.up, first_n + j * 8 + row, g.rows, g.rank, r + 8);
      DTQ_UNROLL for (int i = 0; i < T::kBlocksM; i++)
        lowrank_mma(v[i][j], a[i], b0, b1, g.lowrank_type);
    }
  }
}

template <class T, bool has_epilogue, class Sum>
DTQ_DEV void finish(const Gemm& g, int64_t first_m, int64_t first_n,
                    const Sum (&sums)[T::kBlocksM][T::kBlocksN][4]) {
  const int row = lane() / 4, pair = lane() % 4 * 2;
  float v[T::kBlocksM][T::kBlocksN][4];
  DTQ_UNROLL for (int j = 0; j < T::kBlocksN; j++) {
    DTQ_UNROLL for (int e = 0; e < 2; e++) {
      const int64_t n = first_n + j * 8 + pair + e;
      const bool valid = n < g.rows;
      const float scale = valid ? weight_scale<Sum>(g, n) : 0;
      const float bias = valid && g.bias ? load_float(g.bias, n, g.bias_type) : 0;
      DTQ_UNROLL for (int i = 0; i < T::kBlocksM; i++)
        DTQ_UNROLL for (int h = 0; h < 2; h++) {
          const int64_t m = first_m + i * 16 + h * 8 + row;
          const float row_scale = m < g.tokens ? ldg(g.row_scale + m) : 0;
          v[i][j][h * 2 + e] = scaled(sums[i][j][h * 2 + e], row_scale, scale, g.bias, bias);
        }
    }
  }
  if (has_epilogue && g.down) add_lowrank<T>(g, first_m, first_n, v);
  DTQ_UNROLL for (int i = 0; i < T::kBlocksM; i++)
    DTQ_UNROLL for (int h = 0; h < 2; h++) {
      const int64_t m = first_m + i * 16 + h * 8 + row;
      if (m >= g.tokens) continue;
      DTQ_UNROLL for (int j = 0; j < T::kBlocksN; j++) {
        const int64_t n = first_n + j * 8 + pair;
        if (n >= g.rows) continue;
        float v0 = v[i][j][h * 2], v1 = v[i][j][h * 2 + 1];
        if (has_epilogue) {
          v0 = apply_epilogue(g, m, n, v0);
          if (n + 1 < g.rows) v1 = apply_epilogue(g, m, n + 1, v1);
        }
        store_pair(g, m, n, v0, v1);
      }
    }
}

template <class T, bool has_epilogue>
DTQ_KERNEL void DTQ_BOUNDS(T::kThreads, 1) gemm_mma(const DTQ_CONSTANT GemmArgs p) {
  DTQ_SHARED(shared);
  const Gemm& g = p.g;
  const int split = int(block_x() % p.splits);
  const TileCoord tile = tile_coord(block_x() / p.splits, int(ceil_div(g.tokens, T::kTileM)),
                                    int(ceil_div(g.rows, T::kTileN)));
  const int warp_m = warp() % T::kWarpsM, warp_n = warp() / T::kWarpsM;
  const int first_m = tile.m * T::kTileM + warp_m * T::kWarpM;
  const int first_n = tile.n * T::kTileN + warp_n * T::kWarpN;
  const int all_steps = int(ceil_div(g.columns, kStep)), first = split * p.steps_per_split;
  const int steps = all_steps - first < p.steps_per_split ? all_steps - first : p.steps_per_split;

  int32_t sums[T::kBlocksM][T::kBlocksN][4] = {};
  typename T::Source::Scale scale[T::kBlocksN], next[T::kBlocksN];
  const StageLoader<T> loader(g, tile);
  DTQ_UNROLL for (int s = 0; s < T::kStages - 1; s++) {
    if (s < steps) loader.load(shared + s * T::kStage, first + s);
    else cp_async_commit();  // the wait below counts groups
  }
  load_scales<T>(p, first_n, first, next);
  for (int s = 0; s < steps; s++) {
    cp_async_wait<T::kStages - 2>();
    sync_threads();  // the stage is complete for all threads, and none reads the one filled next
    const int ahead = s + T::kStages - 1;
    if (ahead < steps) loader.load(shared + ahead % T::kStages * T::kStage, first + ahead);
    else cp_async_commit();
    DTQ_UNROLL for (int j = 0; j < T::kBlocksN; j++) scale[j] = next[j];
    if (s + 1 < steps) load_scales<T>(p, first_n, first + s + 1, next);
    multiply<T>(shared + s % T::kStages * T::kStage, warp_m, warp_n, scale, sums);
  }
  if (p.partial) store_sums<T>(p, split, first_m, first_n, sums);
  else finish<T, has_epilogue>(g, first_m, first_n, sums);
}

}  // namespace dtq
