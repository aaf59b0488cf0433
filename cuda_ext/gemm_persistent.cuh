// SPDX-License-Identifier: Apache-2.0
// The int8 GEMM on Hopper with persistent blocks: a cluster computes one tile after the other.
//
// The ring of gemm_wgmma.cuh goes on from tile to tile. While the consumers finish a tile, the producer fills it
// with the next one, so that only the first tile of a cluster waits for its operands. Outputs do not go through
// the ring but through two buffers of a warpgroup, `chunk` tokens each: it writes one while a bulk store reads
// the other, and does not wait until outputs are in global memory.
#pragma once
#include "gemm_wgmma.cuh"

namespace dtq {

template <class Source_, int tokens, int stages, int chunk>
struct PersistentTile : WgmmaTile<Source_, tokens, stages, 2> {
  using Base = WgmmaTile<Source_, tokens, stages, 2>;
  static constexpr int kChunk = chunk, kBuffer = chunk * 128;  // tokens, bytes
  static constexpr int kBuffers = stages * Base::kStage;       // two of each warpgroup
  static constexpr int kBarriers = kBuffers + 4 * kBuffer;
  static constexpr int kRowScales = kBarriers + 2 * stages * 8;  // of each warpgroup
  static constexpr int kShared = kRowScales + 2 * tokens * 4;
  static_assert(kShared <= 227 * 1024, "the limit of a block on sm_90");
  static_assert(tokens % (2 * chunk) == 0, "every tile begins with the first buffer");
  static_assert(tokens == 256, "TokenScales");
};

struct PersistentArgs {
  TensorMap x, w, out;
  GemmArgs p;
};

#if defined(DTQ_HAS_WGMMA)

// The tiles of a cluster, in the order of tile_coord: one of every `clusters`.
template <class T>
struct TileWalk {
  int height, tiles, clusters;
  unsigned in_band;
  int id, first = 0;  // the tile; where its band begins
  unsigned rest;      // of the tile in the band
  DTQ_DEV explicit TileWalk(const Gemm& g)
      : height(tiles_m<T>(g)), tiles(height * tiles_n<T>(g)), clusters(grid_x() / T::kCluster),
        in_band(kBand * unsigned(tiles_n<T>(g))), id(block_x() / T::kCluster), rest(unsigned(id)) {
    settle();
  }
  DTQ_DEV void settle() {  // a loop of few steps, faster than a division
    while (rest >= in_band) rest -= in_band, first += kBand;
  }
  DTQ_DEV bool has_tile() const { return id < tiles; }
  DTQ_DEV TilePlace place(int rank) const {
    if (height - first < kBand) return place_of<T>(coord_in_band(first, int(rest), height), rank);
    return place_of<T>({first + int(rest % kBand), int(rest / kBand)}, rank);  // no division
  }
  DTQ_DEV void advance() {
    id += clusters, rest += unsigned(clusters);
    settle();
  }
};

// The scales of two tokens of the tile, which the thread loads before the products and puts into shared memory
// after them.
struct TokenScales {
  float scale[2];
  DTQ_DEV TokenScales(const Gemm& g, const Consumer& c) {
    DTQ_UNROLL for (int i = 0; i < 2; i++) scale[i] = row_scale_of(g, c.m + c.thread + i * 128);
  }
  DTQ_DEV void store(const Consumer& c, unsigned char* row_scales) const {
    DTQ_UNROLL for (int i = 0; i < 2; i++) sts(row_scales + (c.thread + i * 128) * 4, scale[i]);
    sync_named(2 + c.group, 128);
  }
};

// Outputs in the layout of store_plain, which is the 128-byte swizzle, chunk by chunk. The barrier of a chunk
// does two things: all of it has been written, and the store of the chunk before, which the first thread has
// waited for, leaves the other buffer free.
template <class T, Float type, bool has_gelu>
DTQ_DEV void store_chunks(const PersistentArgs& a, const Consumer& c, unsigned char* buffers,
                          const unsigned char* row_scales, const RowPair& rows,
                          const int32_t (&sums)[T::kSums]) {
  const int q = lane() / 8, r = lane() % 8, piece = c.thread / 32 * 2 + q % 2;
  unsigned char* const to = buffers + (q / 2 * 8 + r) * 128 + (piece ^ r) * 16;
  U2 scales[2];
  load_token_scales<T>(row_scales, 0, scales);
  DTQ_UNROLL for (int first = 0; first < T::kTokens; first += T::kChunk) {
    const int buffer = first / T::kChunk % 2 * T::kBuffer;
    DTQ_UNROLL for (int j = first / 8; j < (first + T::kChunk) / 8; j += 2)
      store_16_tokens<T, type, has_gelu>(to + buffer + (j - first / 8) * 1024, row_scales, rows, sums, j,
                                         scales);
    fence_proxy_async();
    if (c.thread == 0) bulk_wait_read<0>();
    sync_named(2 + c.group, 128);
    if (c.thread == 0) {
      store_box(a.out, buffers + buffer, c.n * 2, c.m + first);
      bulk_commit();
    }
  }
}

template <class T, bool has_gelu>
DTQ_DEV void consume(const PersistentArgs& a, const Ring<T>& ring, int rank, int steps) {
  const Gemm& g = a.p.g;
  const int group = warp() / 4 - 1, in_tile = (warp() - 4) * 16 + lane() / 4;
  unsigned char* const buffers = ring.shared + T::kBuffers + group * 2 * T::kBuffer;
  unsigned char* const row_scales = ring.shared + T::kRowScales + group * T::kTokens * 4;
  Slot slot;
  for (TileWalk<T> walk(g); walk.has_tile(); walk.advance()) {
    const TilePlace place = walk.place(rank);
    const Consumer c = {group, tid() % 128, place.token, place.row + group * 64};
    const StoredRowPair stored(g, place.row + in_tile);  // the products hide the latency of both
    const TokenScales scales(g, c);
    int32_t sums[T::kSums];
    multiply_tile<T>(a.p, ring, in_tile, place, steps, slot, sums);
    scales.store(c, row_scales);
    const RowPair rows = stored.decode(g);
    if (g.out_type == kBFloat16)
      store_chunks<T, kBFloat16, has_gelu>(a, c, buffers, row_scales, rows, sums);
    else store_chunks<T, kFloat16, has_gelu>(a, c, buffers, row_scales, rows, sums);
  }
  if (tid() % 128 == 0) bulk_wait_read<0>();  // the block's shared memory exists until then
}

template <class T, bool has_gelu>
DTQ_DEV void persistent_body(const PersistentArgs& a, unsigned char* shared) {
  const Gemm& g = a.p.g;
  const Ring<T> ring = {shared};
  const int rank = cluster_rank(), steps = int(ceil_div(g.columns, T::kDepth));
  init_ring<T>(ring);
  wait_for_previous_kernel();
  start_ring<T>();
  if (warp() < 4) {
    fewer_registers<40>();
    if (tid()) return;
    Slot slot;
    for (TileWalk<T> walk(g); walk.has_tile(); walk.advance())
      produce<T>(a, ring, rank, walk.place(rank), steps, slot);
    drain_ring<T>(ring, slot);
  } else {
    more_registers<232>();
    consume<T, has_gelu>(a, ring, rank, steps);
  }
}

#endif

template <class T, bool has_gelu>
DTQ_KERNEL void DTQ_BOUNDS(T::kThreads, 1) gemm_persistent(const DTQ_CONSTANT PersistentArgs a) {
#if defined(DTQ_HAS_WGMMA)
  DTQ_SHARED(shared);
  persistent_body<T, has_gelu>(a, shared);
#else
  trap();  // compiled for another architecture: fail, do not leave the output unwritten
#endif
}

template <class T>
int run_persistent(const GemmArgs& p, Stream stream) {
  PersistentArgs a = {{}, {}, {}, p};
  const Gemm& g = p.g;
  int status = encode_operands<T>(a, g);
  if (status != kOk) return status;
  status = encode_rows(&a.out, g.out, g.tokens, g.rows * 2, T::kChunk, 128);
  if (status != kOk) return status;
  const int tiles = tiles_m<T>(g) * tiles_n<T>(g), most = g.sms < 2 ? 1 : g.sms / T::kCluster;
  const int blocks = (tiles < most ? tiles : most) * T::kCluster;
  const Shape shape = {{unsigned(blocks)}, T::kThreads, T::kShared, T::kCluster, starts_early(g)};
  return launch(g.gelu ? gemm_persistent<T, true> : gemm_persistent<T, false>, shape, stream, a);
}

}  // namespace dtq
