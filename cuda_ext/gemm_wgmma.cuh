// SPDX-License-Identifier: Apache-2.0
// int8 GEMM on Hopper: out^T = W x^T with wgmma, 64 output rows x 256 or 128 tokens per warpgroup.
//
//   warpgroup 0      the producer: one thread copies tiles into a ring of stages by bulk copies; the two
//                    blocks of a cluster use the same tokens, and each copies half of them to both
//   warpgroups 1, 2  the consumers: int8 weights are read from shared memory; 4-bit weights are expanded
//                    in registers while the tensor cores multiply the previous tile
//
// Weights are operand A because only A may come from registers. A stage is 128 columns: x in rows
// of 128 bytes in the 128-byte swizzle, int8 weights likewise, 4-bit weights in rows of 64 bytes in the
// 64-byte swizzle. wgmma defines which columns a register holds: thread t of a row has 4 t .. and
// 16 + 4 t .. of every 32, which in 4-bit codes are twice two bytes, 8 bytes apart.
#pragma once
#include "epilogue.cuh"
#include "gemm_plan.h"

namespace dtq {

template <class Source_, int tokens, int stages, int cluster>
struct WgmmaTile {
  using Source = Source_;
  static constexpr int kTokens = tokens, kRows = 128, kDepth = 128;
  static constexpr int kStages = stages, kCluster = cluster;
  static constexpr int kThreads = 384, kWarps = 8;  // kWarps: of the consumers
  static constexpr int kSums = tokens / 2;          // of a thread
  static constexpr int kRowW = kDepth * Source::kBits / 8;
  static constexpr int kBytesX = kTokens * kDepth, kBytesW = kRows * kRowW;
  static constexpr int kStage = kBytesX + kBytesW;
  static constexpr int kShared = stages * kStage + 2 * stages * 8;
  static_assert(kShared <= 227 * 1024, "the limit of a block on sm_90");
};

struct WgmmaArgs {
  TensorMap x, w;
  GemmArgs p;
};

#if defined(DTQ_HAS_WGMMA)

// A stage of the ring, and how often the ring was filled before.
struct Slot {
  int stage = 0, round = 0;
};

template <class T>
DTQ_DEV void advance(Slot& s) {
  if (++s.stage == T::kStages) s.stage = 0, s.round++;
}

// The layout of shared memory.
template <class T>
struct Ring {
  unsigned char* shared;
  DTQ_DEV unsigned char* x(int stage) const { return shared + stage * T::kStage; }
  DTQ_DEV unsigned char* w(int stage) const { return x(stage) + T::kBytesX; }
  DTQ_DEV uint64_t* full(int stage) const {
    return reinterpret_cast<uint64_t*>(shared + T::kStages * T::kStage) + stage;
  }
  DTQ_DEV uint64_t* empty(int stage) const { return full(stage) + T::kStages; }
};

template <class T>
DTQ_DEV void start_ring(const Ring<T>& ring) {
  if (tid() == 0) {
    for (int s = 0; s < T::kStages; s++) {
      mbarrier_init(ring.full(s), 1);  // arrival of the producer; the copies count bytes
      mbarrier_init(ring.empty(s), T::kWarps * T::kCluster);
    }
    fence_mbarrier_init();
  }
  sync_threads();
  if (T::kCluster > 1) sync_cluster();  // copies of the other block signal these barriers, too
}

template <class T>
DTQ_DEV void produce(const WgmmaArgs& a, const Ring<T>& ring, int rank, int token, int row,
                     int steps) {
  constexpr int kHalf = T::kTokens / T::kCluster;
  const unsigned all = T::kCluster > 1 ? (1u << T::kCluster) - 1 : 0;
  Slot slot;
  for (int s = 0; s < steps; s++) {
    if (slot.round) mbarrier_wait(ring.empty(slot.stage), (slot.round - 1) & 1);
    mbarrier_arrive_expect(ring.full(slot.stage), T::kStage);
    load_box(ring.x(slot.stage) + rank * kHalf * T::kDepth, a.x, ring.full(slot.stage),
             s * T::kDepth, token + rank * kHalf, all);
    load_box(ring.w(slot.stage), a.w, ring.full(slot.stage), s * T::kRowW, row);
    advance<T>(slot);
  }
}

// Signals that this warp has read the stage, to every block of the cluster.
template <class T>
DTQ_DEV void release(const Ring<T>& ring, int stage) {
  if (lane()) return;
  if (T::kCluster == 1) mbarrier_arrive(ring.empty(stage));
  else
    for (int r = 0; r < T::kCluster; r++) mbarrier_arrive_at(ring.empty(stage), r);
}

// Expands the stage's 128 columns of this thread's two rows to int8: a[i] is operand A of columns
// 32 i .. 32 i + 31. A row has `groups` groups in a stage, the first with index `index`; those after
// `left` are past the end of K.
template <class T, int groups>
DTQ_DEV void expand_groups(const GemmArgs& p, const unsigned char* w, int row,
                           const int (&index)[2], int left, uint32_t (&a)[4][4]) {
  const int t = lane() % 4, swizzle = row / 2 % 4;  // the same for row + 8
  const int offset = row * T::kRowW + swizzle * 16 + t / 2 * 4;
  typename T::Source::Scale scale[2];
  DTQ_UNROLL for (int i = 0; i < 4; i++) {
    if (i % (4 / groups) == 0) {
      const int group = i / (4 / groups) < left ? i / (4 / groups) : left;
      DTQ_UNROLL for (int h = 0; h < 2; h++)
        scale[h] = T::Source::scale(p.groups, index[h] + group);
    }
    const unsigned char* chunk = w + (offset ^ i * 16);
    DTQ_UNROLL for (int h = 0; h < 2; h++) {
      const unsigned char* codes = chunk + h * 8 * T::kRowW;
      const uint32_t word = byte_perm(lds<uint32_t>(codes), lds<uint32_t>(codes + 8),
                                      t % 2 ? 0x7632 : 0x5410);
      T::Source::expand(word, scale[h], a[i][h], a[i][2 + h]);
    }
  }
}

// Step `s`; `row` is the first of the two rows, counted in the tile, and `n` the same in the weight.
template <class T>
DTQ_DEV void expand_stage(const GemmArgs& p, const unsigned char* w, int row, int n, int s,
                          uint32_t (&a)[4][4]) {
  const int shift = p.groups.shift, count = p.groups.count, end = int(p.g.rows) - 1;
  const int first = s * T::kDepth >> shift;
  const int index[2] = {(n < end ? n : end) * count + first,
                        (n + 8 < end ? n + 8 : end) * count + first};
  const int left = count - 1 - first;
  if (shift >= 7) expand_groups<T, 1>(p, w, row, index, left, a);
  else if (shift == 6) expand_groups<T, 2>(p, w, row, index, left, a);
  else expand_groups<T, 4>(p, w, row, index, left, a);
}

template <class T>
DTQ_DEV void multiply_int8(const Ring<T>& ring, int group, int steps, int32_t (&sums)[T::kSums]) {
  Slot slot, last;
  for (int s = 0; s < steps; s++) {
    mbarrier_wait(ring.full(slot.stage), slot.round & 1);
    const uint64_t w = swizzled_rows(ring.w(slot.stage) + group * 64 * T::kRowW);
    const uint64_t x = swizzled_rows(ring.x(slot.stage));
    wgmma_fence();
    DTQ_UNROLL for (int k = 0; k < 4; k++)  // 32 bytes are 2 in the address field
      wgmma_s8<T::kTokens>(sums, w + uint64_t(2 * k), x + uint64_t(2 * k), s || k);
    wgmma_commit();
    wgmma_wait<1>();
    if (s) release<T>(ring, last.stage);
    last = slot;
    advance<T>(slot);
  }
  wgmma_wait<0>();
  release<T>(ring, last.stage);
}

template <class T>
DTQ_DEV void multiply_4bit(const GemmArgs& p, const Ring<T>& ring, int row, int n, int steps,
                           int32_t (&sums)[T::kSums]) {
  uint32_t a[2][4][4];  // double buffer: the tensor cores read one while the other is filled
  Slot slot, last, next;
  auto fill = [&](int s, uint32_t(&to)[4][4]) {
    mbarrier_wait(ring.full(next.stage), next.round & 1);
    expand_stage<T>(p, ring.w(next.stage), row, n, s, to);
    advance<T>(next);
  };
  auto step = [&](int s, uint32_t(&now)[4][4], uint32_t(&then)[4][4]) {
    const uint64_t x = swizzled_rows(ring.x(slot.stage));
    wgmma_fence();
    DTQ_UNROLL for (int k = 0; k < 4; k++)
      wgmma_s8<T::kTokens>(sums, now[k], x + uint64_t(2 * k), s || k);
    wgmma_commit();
    wgmma_wait<1>();  // the last step's, which read `then`
    if (s) release<T>(ring, last.stage);
    if (s + 1 < steps) fill(s + 1, then);
    last = slot;
    advance<T>(slot);
  };
  fill(0, a[0]);
  for (int s = 0; s < steps; s += 2) {
    step(s, a[0], a[1]);
    if (s + 1 < steps) step(s + 1, a[1], a[0]);
  }
  wgmma_wait<0>();
  release<T>(ring, last.stage);
}

// + up @ down^T of 16 rows x 8 tokens: the rows of a fragment are rows of the weight, its columns tokens.
DTQ_DEV void add_lowrank_transposed(const Gemm& g, int first_m, int n, float (&v)[4]) {
  for (int r = lane() % 4 * 2; r < g.rank; r += 16) {
    uint32_t a[4], b[2];
    DTQ_UNROLL for (int q = 0; q < 4; q++)
      a[q] = lowrank_pair(g.up, n + q % 2 * 8, g.rows, g.rank, r + q / 2 * 8);
    DTQ_UNROLL for (int q = 0; q < 2; q++)
      b[q] = lowrank_pair(g.down, first_m + lane() / 4, g.tokens, g.rank, r + q * 8);
    lowrank_mma(v, a, b[0], b[1], g.lowrank_type);
  }
}

// Rows n and n + 8 of tokens m and m + 1. 16-bit outputs are transposed in 8 x 8 blocks, so that the
// four lanes of a token write 16 contiguous bytes; with 32-bit outputs eight lanes write 32 bytes.
DTQ_DEV void store_transposed(const Gemm& g, int m, int n, const float (&v)[4]) {
  DTQ_UNROLL for (int h = 0; h < 2; h++) {
    const int row = n + h * 8;
    if (g.out_type == kFloat32) {
      DTQ_UNROLL for (int e = 0; e < 2; e++)
        if (m + e < g.tokens && row < g.rows)
          stg(static_cast<float*>(g.out) + (m + e) * g.rows + row, v[h * 2 + e]);
      continue;
    }
    const uint32_t pair = transpose_8x8(round_float(v[h * 2], g.out_type) |
                                        round_float(v[h * 2 + 1], g.out_type) << 16);
    const int token = m - lane() % 4 * 2 + lane() / 4, first = row - lane() / 4 + lane() % 4 * 2;
    if (token < g.tokens && first < g.rows)
      store_halves(g, token, first, uint16_t(pair), uint16_t(pair >> 16));
  }
}

// The epilogue is long, and unrolled like the sums it would be most of the kernel. So it is a loop over
// values in shared memory, `values`, in place of the ring.
template <class T>
DTQ_DEV void finish_in_shared(const Gemm& g, const unsigned char* values, int first_m, int n) {
  DTQ_ROLLED for (int j = 0; j < T::kTokens / 8; j++) {
    if (first_m + j * 8 >= g.tokens) break;
    const int m = first_m + j * 8 + lane() % 4 * 2;
    const U4 u = lds<U4>(values + j * T::kWarps * 32 * 16);
    float v[4] = {bits_float(u.x), bits_float(u.y), bits_float(u.z), bits_float(u.w)};
    if (g.down) add_lowrank_transposed(g, first_m + j * 8, n, v);
    DTQ_UNROLL for (int i = 0; i < 4; i++)
      if (m + i % 2 < g.tokens && n + i / 2 * 8 < g.rows)
        v[i] = apply_epilogue(g, m + i % 2, n + i / 2 * 8, v[i]);
    store_transposed(g, m, n, v);
  }
}

// Rows n and n + 8 of all tokens of the tile.
template <class T, bool has_epilogue>
DTQ_DEV void finish_transposed(const Gemm& g, unsigned char* ring, int first_m, int n,
                               const int32_t (&sums)[T::kSums]) {
  constexpr int kMultiply = T::kWarps * 32, kLoad = T::kThreads - kMultiply;
  static_assert(kMultiply * T::kSums * 4 <= T::kStages * T::kStage, "the values fit");
  float scale[2], bias[2];
  DTQ_UNROLL for (int h = 0; h < 2; h++) {
    const bool valid = n + h * 8 < g.rows;
    scale[h] = valid ? ldg(g.weight_scale + n + h * 8) : 0;
    bias[h] = valid && g.bias ? load_float(g.bias, n + h * 8, g.bias_type) : 0;
  }
  unsigned char* const values = ring + (tid() - kLoad) * 16;
  if (has_epilogue) sync_named(1, kMultiply);  // both consumers are done with the ring
  DTQ_UNROLL for (int j = 0; j < T::kTokens / 8; j++) {
    if (first_m + j * 8 >= g.tokens) break;
    const int m = first_m + j * 8 + lane() % 4 * 2;
    float v[4];
    DTQ_UNROLL for (int e = 0; e < 2; e++) {
      const float row_scale = m + e < g.tokens ? ldg(g.row_scale + m + e) : 0;
      DTQ_UNROLL for (int h = 0; h < 2; h++)
        v[h * 2 + e] = scaled(sums[j * 4 + h * 2 + e], row_scale, scale[h], g.bias, bias[h]);
    }
    if (has_epilogue)
      sts(values + j * kMultiply * 16,
          U4{float_bits(v[0]), float_bits(v[1]), float_bits(v[2]), float_bits(v[3])});
    else store_transposed(g, m, n, v);
  }
  if (has_epilogue) finish_in_shared<T>(g, values, first_m, n);
}

template <class T, bool has_epilogue>
DTQ_DEV void wgmma_body(const WgmmaArgs& a, unsigned char* shared) {
  const Gemm& g = a.p.g;
  const Ring<T> ring = {shared};
  const int rank = T::kCluster > 1 ? cluster_rank() : 0;
  const TileCoord tile = tile_coord(block_x() / T::kCluster, int(ceil_div(g.tokens, T::kTokens)),
                                    int(ceil_div(g.rows, T::kRows * T::kCluster)));
  const int token = tile.m * T::kTokens, row = (tile.n * T::kCluster + rank) * T::kRows;
  const int steps = int(ceil_div(g.columns, T::kDepth));
  start_ring<T>(ring);
  if (warp() < 4) {
    fewer_registers<40>();
    if (tid() == 0) produce<T>(a, ring, rank, token, row, steps);
  } else {
    more_registers<232>();
    const int group = warp() / 4 - 1, in_tile = (warp() - 4) * 16 + lane() / 4;
    int32_t sums[T::kSums];
    if constexpr (T::Source::kBits == 8) multiply_int8<T>(ring, group, steps, sums);
    else multiply_4bit<T>(a.p, ring, in_tile, row + in_tile, steps, sums);
    finish_transposed<T, has_epilogue>(g, shared, token, row + in_tile, sums);
  }
  if (T::kCluster > 1) {  // the other block may still signal the barriers of this one
    sync_warp();
    sync_cluster();
  }
}

#endif

template <class T, bool has_epilogue>
DTQ_KERNEL void DTQ_BOUNDS(T::kThreads, 1) gemm_wgmma(const DTQ_CONSTANT WgmmaArgs a) {
#if defined(DTQ_HAS_WGMMA)
  DTQ_SHARED(shared);
  wgmma_body<T, has_epilogue>(a, shared);
#else
  trap();  // compiled for another architecture: fail, do not leave the output unwritten
#endif
}

template <class T>
int run_wgmma(const GemmArgs& p, Stream stream) {
  WgmmaArgs a = {{}, {}, p};
  const Gemm& g = p.g;
  int status = encode_rows(&a.x, g.x_q, g.tokens, g.columns, T::kTokens / T::kCluster, T::kDepth);
  if (status != kOk) return status;
  const int64_t bytes = g.columns * T::Source::kBits / 8;
  status = encode_rows(&a.w, g.weight, g.rows, bytes, T::kRows, T::kRowW);
  if (status != kOk) return status;
  const int64_t blocks = ceil_div(g.tokens, T::kTokens) *
                         ceil_div(ceil_div(g.rows, T::kRows), T::kCluster) * T::kCluster;
  const Shape shape = {{unsigned(blocks)}, T::kThreads, T::kShared, T::kCluster};
  return launch(has_epilogue(g) ? gemm_wgmma<T, true> : gemm_wgmma<T, false>, shape, stream, a);
}

}  // namespace dtq
