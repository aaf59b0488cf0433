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
#include "finish_wgmma.cuh"

namespace dtq {

struct WgmmaArgs {
  TensorMap x, w;
  GemmArgs p;
};

// Tiles of a cluster along each dimension.
template <class T>
DTQ_HD int tiles_m(const Gemm& g) {
  return int(ceil_div(g.tokens, T::kTokens));
}
template <class T>
DTQ_HD int tiles_n(const Gemm& g) {
  return int(ceil_div(g.rows, T::kRows * T::kCluster));
}

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
    return reinterpret_cast<uint64_t*>(shared + T::kBarriers) + stage;
  }
  DTQ_DEV uint64_t* empty(int stage) const { return full(stage) + T::kStages; }
};

// A barrier of all threads must follow, see start_ring.
template <class T>
DTQ_DEV void init_ring(const Ring<T>& ring) {
  if (tid()) return;
  for (int s = 0; s < T::kStages; s++) {
    mbarrier_init(ring.full(s), 1);  // arrival of the producer; the copies count bytes
    mbarrier_init(ring.empty(s), T::kWarps * T::kCluster);
  }
  fence_mbarrier_init();
}

DTQ_DEV float row_scale_of(const Gemm& g, int token) {
  return token < g.tokens ? ld_global(g.row_scale + token) : 0.0f;
}

template <class T>
DTQ_DEV void start_ring() {
  sync_threads();
  if (T::kCluster > 1) sync_cluster();  // copies of the other block signal these barriers, too
}

// Where a cluster's tile is: the first token, and the first row of this block.
struct TilePlace {
  int token, row;
};

template <class T>
DTQ_DEV TilePlace place_of(const TileCoord& tile, int rank) {
  return {tile.m * T::kTokens, (tile.n * T::kCluster + rank) * T::kRows};
}

// Fills the ring with a tile, from `slot` on.
template <class T, class Maps>
DTQ_DEV void produce(const Maps& a, const Ring<T>& ring, int rank, const TilePlace& place, int steps,
                     Slot& slot) {
  constexpr int kHalf = T::kTokens / T::kCluster;
  const unsigned all = T::kCluster > 1 ? (1u << T::kCluster) - 1 : 0;
  for (int s = 0; s < steps; s++) {
    if (slot.round) mbarrier_wait(ring.empty(slot.stage), (slot.round - 1) & 1);
    mbarrier_arrive_expect(ring.full(slot.stage), T::kStage);
    load_box(ring.x(slot.stage) + rank * kHalf * T::kDepth, a.x, ring.full(slot.stage),
             s * T::kDepth, place.token + rank * kHalf, all);
    load_box(ring.w(slot.stage), a.w, ring.full(slot.stage), s * T::kRowW, place.row);
    advance<T>(slot);
  }
}

// A block must not end while the other one may signal its barriers: wait for all releases.
template <class T>
DTQ_DEV void drain_ring(const Ring<T>& ring, Slot& slot) {
  for (int s = 0; s < T::kStages; s++) {
    if (slot.round) mbarrier_wait(ring.empty(slot.stage), (slot.round - 1) & 1);
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
        scale[h] = T::Source::decode(T::Source::fetch(p.groups, index[h] + group));
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
DTQ_DEV void multiply_int8(const Ring<T>& ring, int group, int steps, Slot& slot,
                           int32_t (&sums)[T::kSums]) {
  Slot last;
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
DTQ_DEV void multiply_4bit(const GemmArgs& p, const Ring<T>& ring, int row, int n, int steps, Slot& slot,
                           int32_t (&sums)[T::kSums]) {
  uint32_t a[2][4][4];  // double buffer: the tensor cores read one while the other is filled
  Slot last, next = slot;
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

// The product of a tile, by a consumer, whose first row in the tile is `in_tile`.
template <class T>
DTQ_DEV void multiply_tile(const GemmArgs& p, const Ring<T>& ring, int in_tile, const TilePlace& place,
                           int steps, Slot& slot, int32_t (&sums)[T::kSums]) {
  if constexpr (T::Source::kBits == 8) multiply_int8<T>(ring, in_tile / 64, steps, slot, sums);
  else multiply_4bit<T>(p, ring, in_tile, place.row + in_tile, steps, slot, sums);
}

template <class T, Finish finish>
DTQ_DEV void wgmma_body(const WgmmaArgs& a, unsigned char* shared) {
  const Gemm& g = a.p.g;
  const Ring<T> ring = {shared};
  const int rank = T::kCluster > 1 ? cluster_rank() : 0;
  const TilePlace place =
      place_of<T>(tile_coord(block_x() / T::kCluster, tiles_m<T>(g), tiles_n<T>(g)), rank);
  const int steps = int(ceil_div(g.columns, T::kDepth));
  init_ring<T>(ring);
  wait_for_previous_kernel();
  if (tid() < T::kTokens) sts(shared + T::kRowScales + tid() * 4, row_scale_of(g, place.token + tid()));
  start_ring<T>();
  Slot slot;
  if (warp() < 4) {
    fewer_registers<40>();
    if (tid() == 0) {
      produce<T>(a, ring, rank, place, steps, slot);
      drain_ring<T>(ring, slot);
    }
  } else {
    more_registers<232>();
    const int group = warp() / 4 - 1, in_tile = (warp() - 4) * 16 + lane() / 4;
    const Consumer consumer = {group, tid() % 128, place.token, place.row + group * 64};
    const StoredRowPair rows(g, place.row + in_tile);  // here, so that the loop hides the latency
    int32_t sums[T::kSums];
    multiply_tile<T>(a.p, ring, in_tile, place, steps, slot, sums);
    finish_tile<T, finish>(g, consumer, shared, rows.decode(g), sums);
  }
}

#endif

template <class T, Finish finish>
DTQ_KERNEL void DTQ_BOUNDS(T::kThreads, 1) gemm_wgmma(const DTQ_CONSTANT WgmmaArgs a) {
#if defined(DTQ_HAS_WGMMA)
  DTQ_SHARED(shared);
  wgmma_body<T, finish>(a, shared);
#else
  trap();  // compiled for another architecture: fail, do not leave the output unwritten
#endif
}

// The tensor maps of both operands.
template <class T, class Maps>
int encode_operands(Maps& a, const Gemm& g) {
  const int status = encode_rows(&a.x, g.x_q, g.tokens, g.columns, T::kTokens / T::kCluster, T::kDepth);
  if (status != kOk) return status;
  const int64_t bytes = g.columns * T::Source::kBits / 8;
  return encode_rows(&a.w, g.weight, g.rows, bytes, T::kRows, T::kRowW);
}

template <class T>
int run_wgmma(const GemmArgs& p, Stream stream) {
  WgmmaArgs a = {{}, {}, p};
  const Gemm& g = p.g;
  const int status = encode_operands<T>(a, g);
  if (status != kOk) return status;
  const Finish finish = finish_of(g);
  const int blocks = tiles_m<T>(g) * tiles_n<T>(g) * T::kCluster;
  const Shape shape = {{unsigned(blocks)}, T::kThreads, T::kShared, T::kCluster,
                       finish != kGeneral && starts_early(g)};
  switch (finish) {
    case kPlain: return launch(gemm_wgmma<T, kPlain>, shape, stream, a);
    case kFused: return launch(gemm_wgmma<T, kFused>, shape, stream, a);
    default: return launch(gemm_wgmma<T, kGeneral>, shape, stream, a);
  }
}

}  // namespace dtq
