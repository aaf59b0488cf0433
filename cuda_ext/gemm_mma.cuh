// SPDX-License-Identifier: Apache-2.0
// int8 GEMM with mma.sync, sm_80 and later, for every kind of weight.
//
// Both operands have the same layout in shared memory as in global memory, 64 contiguous columns of a row, in
// 16-byte chunks that are permuted so that eight rows are in different banks. ldmatrix delivers int8 in the
// order of the instruction: thread (g, t) = (lane / 4, lane % 4) gets columns 4 t .. 4 t + 3 and
// 16 + 4 t .. of 32. In 4-bit codes these are twice two bytes, 8 bytes apart; two 4-byte loads and a prmt
// combine them to the word that is expanded.
#pragma once
#include <type_traits>

#include "epilogue.cuh"
#include "gemm_plan.h"

namespace dtq {

// Blocks of large tiles that fit on a multiprocessor. With tables ptxas spills 12 bytes for sm_120 when it is held
// to the 128 registers of two; there the tensor cores need twice the cycles, so one is enough.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr int kTableBlocks = 1;
#else
constexpr int kTableBlocks = 2;
#endif

constexpr int kStep = 64;  // columns of a stage: with more, two blocks do not fit on an sm_89

template <class Source_, int tile_m, int tile_n, int warp_m, int warp_n, int stages, bool aligned>
struct MmaTile {
  using Source = Source_;
  static constexpr int kTileM = tile_m, kTileN = tile_n, kWarpM = warp_m, kWarpN = warp_n;
  static constexpr int kStages = stages;
  static constexpr bool kAligned = aligned;   // rows start at multiples of 16 bytes
  static constexpr bool kIsTable = std::is_same_v<Source, Table>;
  static constexpr int kBlocks = warp_m * warp_n < 2048 ? 1 : kIsTable ? kTableBlocks : 2;
  static constexpr int kWarpsM = tile_m / warp_m, kThreads = 32 * kWarpsM * (tile_n / warp_n);
  static constexpr int kBlocksM = warp_m / 16, kBlocksN = warp_n / 8;  // mma of a warp
  static constexpr int kRowW = kStep * Source::kBits / 8;              // bytes
  static constexpr int kBytesX = tile_m * kStep, kBytesW = tile_n * kRowW;
  static constexpr int kStage = kBytesX + kBytesW, kShared = stages * kStage;
  static_assert(kShared <= 48 * 1024, "the default limit; two blocks fit on a multiprocessor");
  static_assert(kBlocksN % 2 == 0, "ldmatrix loads 16 rows");
};

// This thread's 16-byte chunks of a tile of `rows` rows x `width` bytes: the same bytes of every kPitch-th
// row. Elements outside the matrix become zeros. The four chunks of 64 bytes are permuted by row / 2, the two of
// 32 bytes by row / 4, so that a chunk of eight rows is in different banks.
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
    static_assert((width == 64 || width == 32) && kPitch % 8 == 0);
    offset = tid() * 16 ^ (tid() / kAcross / (8 / kAcross) % kAcross) * 16;
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

// Rows of 64 bytes: the address of a 16-byte chunk, as permuted by the loader.
DTQ_DEV const unsigned char* chunk_of(const unsigned char* tile, int row, int chunk) {
  return tile + row * 64 + (chunk ^ row / 2 % 4) * 16;
}

// Operand B of rows n + 8 j .. of the tile and 32 columns, the first or the second half of the stage.
template <class T>
DTQ_DEV void load_weights(const unsigned char* weights, int n, int half,
                          const typename T::Source::Scale (&scale)[T::kBlocksN],
                          uint32_t (&b)[T::kBlocksN][2]) {
  if constexpr (T::Source::kBits == 8) {
    DTQ_UNROLL for (int j = 0; j < T::kBlocksN; j += 2) {
      // matrices: rows 0..7 of the first and the second 16 columns, then rows 8..15
      const int row = n + j * 8 + lane() / 16 * 8 + lane() % 8;
      uint32_t r[4];
      ldmatrix_x4(r, chunk_of(weights, row, half * 2 + lane() / 8 % 2));
      b[j][0] = r[0], b[j][1] = r[1], b[j + 1][0] = r[2], b[j + 1][1] = r[3];
    }
  } else {
    const int t = lane() % 4, row = n + lane() / 4;
    const unsigned char* p = weights + row * T::kRowW + (half ^ row / 4 % 2) * 16 + t / 2 * 4;
    DTQ_UNROLL for (int j = 0; j < T::kBlocksN; j++) {
      const unsigned char* codes = p + j * 8 * T::kRowW;
      const uint32_t word = byte_perm(lds<uint32_t>(codes), lds<uint32_t>(codes + 8),
                                      t % 2 ? 0x7632 : 0x5410);
      T::Source::expand(word, scale[j], b[j][0], b[j][1]);
    }
  }
}

// The scales of a thread's rows, fetched for the next 32 columns before these are multiplied. Past the end of a
// row or of the matrix any scale will do: x_q is zero there, or the sum is not stored.
template <class T>
struct ScaleReader {
  const Groups& groups;
  int first[T::kBlocksN];  // group of each row
  typename T::Source::Stored stored[T::kBlocksN];

  DTQ_DEV ScaleReader(const GemmArgs& p, int first_row) : groups(p.groups) {
    const int end = int(p.g.rows) - 1;
    DTQ_UNROLL for (int j = 0; j < T::kBlocksN; j++) {
      const int n = first_row + j * 8 + lane() / 4;
      first[j] = (n < end ? n : end) * groups.count;
    }
  }

  DTQ_DEV void fetch(int half) {  // counted from the start of a row
    const int group = half * 32 >> groups.shift, last = groups.count - 1;
    DTQ_UNROLL for (int j = 0; j < T::kBlocksN; j++)
      stored[j] = T::Source::fetch(groups, first[j] + (group < last ? group : last));
  }

  // The scales that were fetched last.
  DTQ_DEV void decode(typename T::Source::Scale (&scale)[T::kBlocksN]) const {
    DTQ_UNROLL for (int j = 0; j < T::kBlocksN; j++) scale[j] = T::Source::decode(stored[j]);
  }
};

// One half of a stage, 32 columns; `count` is that of the halves before.
template <class T>
DTQ_DEV void multiply(const unsigned char* stage, int warp_m, int warp_n, int half, int count,
                      ScaleReader<T>& scales, int32_t (&sums)[T::kBlocksM][T::kBlocksN][4]) {
  uint32_t b[T::kBlocksN][2];
  typename T::Source::Scale scale[T::kBlocksN];
  scales.decode(scale);
  load_weights<T>(stage + T::kBytesX, warp_n * T::kWarpN, half, scale, b);
  scales.fetch(count + 1);  // these are no longer needed: so one set of registers is enough
  DTQ_UNROLL for (int i = 0; i < T::kBlocksM; i++) {
    uint32_t a[4];  // matrices: rows 0..7, 8..15 of the first 16 columns, then of the second
    ldmatrix_x4(a, chunk_of(stage, warp_m * T::kWarpM + i * 16 + lane() % 16, half * 2 + lane() / 16));
    DTQ_UNROLL for (int j = 0; j < T::kBlocksN; j++) mma_s8(sums[i][j], a, b[j][0], b[j][1]);
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

// Scale and bias of this thread's columns.
template <class T, class Sum>
DTQ_DEV void load_columns(const Gemm& g, int64_t first_n, float (&scale)[T::kBlocksN][2],
                          float (&bias)[T::kBlocksN][2]) {
  const int64_t first = first_n + lane() % 4 * 2;
  DTQ_UNROLL for (int j = 0; j < T::kBlocksN; j++)
    DTQ_UNROLL for (int e = 0; e < 2; e++) {
      const int64_t n = first + j * 8 + e;
      scale[j][e] = n < g.rows ? weight_scale<Sum>(g, n) : 0;
      bias[j][e] = -0.0f;  // x + -0 is x, so that there is always a bias
    }
  if (!g.bias) return;
  auto load = [&](auto kind) {
    DTQ_UNROLL for (int j = 0; j < T::kBlocksN; j++)
      DTQ_UNROLL for (int e = 0; e < 2; e++) {
        const int64_t n = first + j * 8 + e;
        if (n < g.rows) bias[j][e] = load_float(g.bias, n, decltype(kind)::value);
      }
  };
  if (g.bias_type == kFloat32) load(std::integral_constant<Float, kFloat32>());
  else if (g.bias_type == kBFloat16) load(std::integral_constant<Float, kBFloat16>());
  else load(std::integral_constant<Float, kFloat16>());
}

// Gate and residual of a token for this thread's columns, two 16-bit values each. What is past the end is not
// stored, so its address only has to be valid.
template <class T>
struct GatedRow {
  uint32_t gate[T::kBlocksN], residual[T::kBlocksN];

  DTQ_DEV void load(const Gemm& g, int m, int first_n, int gate_tokens) {
    const int token = m < g.tokens ? m : int(g.tokens) - 1;
    const uint16_t* gates = static_cast<const uint16_t*>(g.gate) + token / gate_tokens * g.rows;
    const uint16_t* residuals = static_cast<const uint16_t*>(g.residual) + token * g.rows;
    DTQ_UNROLL for (int j = 0; j < T::kBlocksN; j++) {
      const int n = first_n + j * 8 < g.rows ? first_n + j * 8 : 0;
      gate[j] = ldg(reinterpret_cast<const uint32_t*>(gates + n));
      residual[j] = ldg(reinterpret_cast<const uint32_t*>(residuals + n));
    }
  }

  template <Float type>
  DTQ_DEV void apply(int j, float (&v)[2]) const {
    float by[2], add[2];
    floats_of(gate[j], type, by[0], by[1]);
    floats_of(residual[j], type, add[0], add[1]);
    DTQ_UNROLL for (int e = 0; e < 2; e++) v[e] = fadd(fmul(by[e], v[e]), add[e]);
  }
};

// 16-bit outputs, an even number of them in a row, no low-rank branch: without branches.
template <class T, Float type, bool has_gelu, bool gated, class Sum>
DTQ_DEV void store_pairs(const Gemm& g, int64_t first_m, int64_t first_n,
                         const Sum (&sums)[T::kBlocksM][T::kBlocksN][4]) {
  const int row = lane() / 4, pair = lane() % 4 * 2;
  float scale[T::kBlocksN][2], bias[T::kBlocksN][2], token[T::kBlocksM][2];
  DTQ_UNROLL for (int i = 0; i < T::kBlocksM; i++)
    DTQ_UNROLL for (int h = 0; h < 2; h++) {
      const int64_t m = first_m + i * 16 + h * 8 + row;
      token[i][h] = m < g.tokens ? ldg(g.row_scale + m) : 0;
    }
  load_columns<T, Sum>(g, first_n, scale, bias);
  uint16_t* out = static_cast<uint16_t*>(g.out) + (first_m + row) * g.rows + first_n + pair;
  const int each = g.gate_tokens < g.tokens ? int(g.gate_tokens) : int(g.tokens);
  GatedRow<T> next;  // loaded one token ahead
  if (gated) next.load(g, int(first_m) + row, int(first_n) + pair, each);
  DTQ_UNROLL for (int i = 0; i < T::kBlocksM; i++)
    DTQ_UNROLL for (int h = 0; h < 2; h++) {
      const int m = int(first_m) + i * 16 + h * 8 + row;
      const bool valid = m < g.tokens;
      const GatedRow<T> now = next;
      if (gated && i * 2 + h + 1 < T::kBlocksM * 2)
        next.load(g, m + 8, int(first_n) + pair, each);
      DTQ_UNROLL for (int j = 0; j < T::kBlocksN; j++) {
        float v[2];
        DTQ_UNROLL for (int e = 0; e < 2; e++)
          v[e] = scaled(sums[i][j][h * 2 + e], token[i][h], scale[j][e], true, bias[j][e]);
        if (has_gelu) v[0] = gelu_approximate(v[0]), v[1] = gelu_approximate(v[1]);
        if (gated) now.template apply<type>(j, v);
        stg_if(valid && first_n + pair + j * 8 < g.rows, reinterpret_cast<uint32_t*>(out + j * 8),
               pair_of(v[0], v[1], type));
      }
      out += g.rows * 8;
    }
}

template <class T, Float type, bool has_epilogue, class Sum>
DTQ_DEV void store_half_outputs(const Gemm& g, int64_t first_m, int64_t first_n,
                                const Sum (&sums)[T::kBlocksM][T::kBlocksN][4]) {
  if constexpr (!has_epilogue) store_pairs<T, type, false, false>(g, first_m, first_n, sums);
  else if (!g.gate) store_pairs<T, type, true, false>(g, first_m, first_n, sums);
  else if (!g.gelu) store_pairs<T, type, false, true>(g, first_m, first_n, sums);
  else store_pairs<T, type, true, true>(g, first_m, first_n, sums);
}

// Whether outputs, gate and residual can be read and written two at a time.
DTQ_DEV bool in_pairs(const Gemm& g) {
  const uintptr_t all = reinterpret_cast<uintptr_t>(g.out) | reinterpret_cast<uintptr_t>(g.gate) |
                        reinterpret_cast<uintptr_t>(g.residual);
  return g.out_type != kFloat32 && g.rows % 2 == 0 && all % 4 == 0;
}

template <class T, bool has_epilogue, class Sum>
DTQ_DEV void finish(const Gemm& g, int64_t first_m, int64_t first_n,
                    const Sum (&sums)[T::kBlocksM][T::kBlocksN][4]) {
  if (in_pairs(g) && !g.down) {
    if (g.out_type == kBFloat16)
      return store_half_outputs<T, kBFloat16, has_epilogue>(g, first_m, first_n, sums);
    return store_half_outputs<T, kFloat16, has_epilogue>(g, first_m, first_n, sums);
  }
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
DTQ_KERNEL void DTQ_BOUNDS(T::kThreads, has_epilogue ? 1 : T::kBlocks) gemm_mma(const DTQ_CONSTANT GemmArgs p) {
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
  ScaleReader<T> scales(p, first_n);
  scales.fetch(first * 2);
  const StageLoader<T> loader(g, tile);
  DTQ_UNROLL for (int s = 0; s < T::kStages - 1; s++) {
    if (s < steps) loader.load(shared + s * T::kStage, first + s);
    else cp_async_commit();  // the wait below counts groups
  }
  for (int s = 0; s < steps; s++) {
    cp_async_wait<T::kStages - 2>();
    sync_threads();  // the stage is complete for all threads, and none reads the one filled next
    const int ahead = s + T::kStages - 1;
    if (ahead < steps) loader.load(shared + ahead % T::kStages * T::kStage, first + ahead);
    else cp_async_commit();
    DTQ_UNROLL for (int half = 0; half < 2; half++)
      multiply<T>(shared + s % T::kStages * T::kStage, warp_m, warp_n, half,
                  (first + s) * 2 + half, scales, sums);
  }
  if (p.partial) store_sums<T>(p, split, first_m, first_n, sums);
  else finish<T, has_epilogue>(g, first_m, first_n, sums);
}

}  // namespace dtq
