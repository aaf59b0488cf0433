// SPDX-License-Identifier: Apache-2.0
// From the sums of a wgmma tile to outputs.
//
// A warpgroup has 64 rows of the weight x all tokens of the tile; a thread has two of the rows, and of every 8
// tokens two. Outputs are stored by token, so they go through shared memory, in place of the ring:
// eight threads then write 128 contiguous bytes, 16 each. What a launch asks for is decided before the
// loops, so that they have no branches and their iterations overlap.
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
  static constexpr int kBarriers = stages * kStage, kRowScales = kBarriers + 2 * stages * 8;
  static constexpr int kShared = kRowScales + tokens * 4;
  static_assert(kShared <= 227 * 1024, "the limit of a block on sm_90");
};

#if defined(DTQ_HAS_WGMMA)

// A consumer thread in the tile.
struct Consumer {
  int group, thread;  // warpgroup 0 or 1, thread of the warpgroup
  int m, n;           // first token of the tile, first row of the warpgroup
  DTQ_DEV int row() const { return n + thread / 32 * 16 + lane() / 4; }  // of the sums, and row + 8
};

// Scale and bias of rows n and n + 8.
struct RowPair {
  float scale[2], bias[2];
};

// The same as stored: nothing waits for what the constructor loads, long before decode() uses it.
struct StoredRowPair {
  float scale[2];
  uint32_t bias[2];
  DTQ_DEV StoredRowPair(const Gemm& g, int n) {
    DTQ_UNROLL for (int h = 0; h < 2; h++) {
      const int row = n + h * 8 < g.rows ? n + h * 8 : 0;  // past the last row any values will do
      scale[h] = ldg(g.weight_scale + row);
      bias[h] = 0;
      if (!g.bias) continue;
      if (g.bias_type == kFloat32) bias[h] = ldg(static_cast<const uint32_t*>(g.bias) + row);
      else bias[h] = ldg(static_cast<const uint16_t*>(g.bias) + row);
    }
  }
  DTQ_DEV RowPair decode(const Gemm& g) const {
    RowPair r;
    DTQ_UNROLL for (int h = 0; h < 2; h++) {
      r.scale[h] = scale[h];
      const float b = g.bias_type == kFloat32 ? bits_float(bias[h]) : to_float(uint16_t(bias[h]), g.bias_type);
      r.bias[h] = g.bias ? b : -0.0f;  // x + -0 is x, so that there is always a bias
    }
    return r;
  }
};

// The scales of tokens 8 j + 2 t and + 1, for `count` values of j. They are read one round ahead: the compiler
// does not move a read across a write to shared memory.
template <class T, int count>
DTQ_DEV void load_token_scales(const unsigned char* row_scales, int j, U2 (&u)[count]) {
  DTQ_UNROLL for (int i = 0; i < count; i++)
    if (j + i < T::kTokens / 8) u[i] = lds<U2>(row_scales + (j + i) * 32 + lane() % 4 * 8);
}

// Tokens 8 j + 2 t + e of rows n + 8 h, in v[2 h + e].
template <class T>
DTQ_DEV void scaled_sums(const U2& u, const RowPair& r, const int32_t (&sums)[T::kSums], int j,
                         float (&v)[4]) {
  const float token[2] = {bits_float(u.x), bits_float(u.y)};
  DTQ_UNROLL for (int i = 0; i < 4; i++)
    v[i] = scaled(sums[j * 4 + i], token[i % 2], r.scale[i / 2], true, r.bias[i / 2]);
}

// ---------------------------------------------------------------------------- 16 bytes at a time

// The 16-byte pieces of outputs that a thread stores: eight rows of every 16th token.
struct Pieces {
  int64_t first, step;  // outputs from the start, outputs between two tokens of this thread
  int token, left;      // in the tile; tokens from there to the end of the matrix, 0 past the last row
};

template <class T>
DTQ_DEV Pieces pieces_of(const Gemm& g, const Consumer& c) {
  const int token = c.thread / 8, n = c.n + c.thread % 8 * 8;
  return {int64_t(c.m + token) * g.rows + n, g.rows * 16, token,
          n < g.rows ? int(g.tokens) - c.m - token : 0};
}

// Outputs of the warp for 16 tokens, from 8 j on; `scales` are theirs, and then those of the next 16.
template <class T, Float type, bool has_gelu>
DTQ_DEV void store_16_tokens(unsigned char* to, const unsigned char* row_scales, const RowPair& rows,
                             const int32_t (&sums)[T::kSums], int j, U2 (&scales)[2]) {
  uint32_t pairs[4];
  const U2 now[2] = {scales[0], scales[1]};
  load_token_scales<T>(row_scales, j + 2, scales);
  DTQ_UNROLL for (int i = 0; i < 2; i++) {
    float v[4];
    scaled_sums<T>(now[i], rows, sums, j + i, v);
    DTQ_UNROLL for (int e = 0; e < 4; e++) v[e] = has_gelu ? gelu_approximate(v[e]) : v[e];
    DTQ_UNROLL for (int h = 0; h < 2; h++)
      pairs[i * 2 + h] = pair_of(v[h * 2], v[h * 2 + 1], type);
  }
  stmatrix_x4_trans(to, pairs);
}

// A tile of 16-bit outputs: 128 bytes a token, whose eight 16-byte chunks are permuted by the token, so that
// one chunk of eight tokens is in different banks.
template <class T, Float type>
DTQ_DEV void store_plain(const Gemm& g, const Consumer& c, unsigned char* tile,
                         const unsigned char* row_scales, const RowPair& rows,
                         const int32_t (&sums)[T::kSums]) {
  // matrix q has rows 8 (q % 2) .. of the warp and tokens 8 (q / 2) .. of 16
  const int q = lane() / 8, r = lane() % 8, chunk = c.thread / 32 * 2 + q % 2;
  unsigned char* const to = tile + (q / 2 * 8 + r) * 128 + (chunk ^ r) * 16;
  U2 scales[2];
  load_token_scales<T>(row_scales, 0, scales);
  DTQ_UNROLL for (int j = 0; j < T::kTokens / 8; j += 2) {
    store_16_tokens<T, type, false>(to + j * 1024, row_scales, rows, sums, j, scales);
  }
  sync_named(2 + c.group, 128);
  const Pieces p = pieces_of<T>(g, c);
  uint16_t* out = static_cast<uint16_t*>(g.out) + p.first;
  const unsigned char* from = tile + p.token * 128 + (c.thread % 8 ^ p.token % 8) * 16;
  DTQ_UNROLL for (int i = 0; i < T::kTokens / 16; i++) {
    const U4 piece = lds<U4>(from + i * 2048);
    stg_if(i * 16 < p.left, reinterpret_cast<U4*>(out), piece);
    out += p.step;
  }
}

// A tile of floats: 272 bytes a token, of which the first 128 have rows 0..3 of every 8 and, after 16 unused
// bytes, the next 128 rows 4..7. Neither the threads of an mma nor those of the pieces conflict.
constexpr int kFloatRow = 272, kFloatHalf = 144;

template <class T>
DTQ_DEV void stage_floats(const Consumer& c, unsigned char* tile, const unsigned char* row_scales,
                          const RowPair& rows, const int32_t (&sums)[T::kSums]) {
  static_assert(2 * T::kTokens * kFloatRow <= T::kBarriers, "both warpgroups' tiles fit into the ring");
  const int t = lane() % 4, r = lane() / 4;
  unsigned char* const to =
      tile + t * 2 * kFloatRow + c.thread / 32 * 32 + r / 4 * kFloatHalf + r % 4 * 4;
  U2 scales[2];
  load_token_scales<T>(row_scales, 0, scales);
  DTQ_UNROLL for (int j = 0; j < T::kTokens / 8; j++) {
    float v[4];
    const U2 now = scales[0];
    scales[0] = scales[1];
    if (j + 2 < T::kTokens / 8) scales[1] = lds<U2>(row_scales + (j + 2) * 32 + lane() % 4 * 8);
    scaled_sums<T>(now, rows, sums, j, v);
    DTQ_UNROLL for (int i = 0; i < 4; i++)
      sts(to + (j * 8 + i % 2) * kFloatRow + i / 2 * 16, v[i]);
  }
}

constexpr int kAhead = 8;  // pieces of the residual that are loaded ahead

DTQ_DEV void floats_of_piece(const U4& u, Float type, float (&v)[8]) {
  floats_of(u.x, type, v[0], v[1]);
  floats_of(u.y, type, v[2], v[3]);
  floats_of(u.z, type, v[4], v[5]);
  floats_of(u.w, type, v[6], v[7]);
}

// The pieces of the residual, kAhead of them from piece `i` on.
DTQ_DEV void load_residual(const Gemm& g, const Pieces& p, int i, U4 (&residual)[kAhead]) {
  const uint16_t* from = static_cast<const uint16_t*>(g.residual) + p.first + i * p.step;
  DTQ_UNROLL for (int k = 0; k < kAhead; k++) {
    residual[k] = ld_global_if((i + k) * 16 < p.left, reinterpret_cast<const U4*>(from));
    from += p.step;
  }
}

enum Gates { kNoGate, kOneGate, kManyGates };  // images whose tokens are in the tile

DTQ_DEV U4 load_gate(const Gemm& g, int image, int n) {
  const uint16_t* from = static_cast<const uint16_t*>(g.gate) + image * g.rows + n;
  return ld_global_if(n < g.rows, reinterpret_cast<const U4*>(from));
}

// From the tile of floats to outputs. `residual` has the first pieces.
template <class T, Float type, bool has_gelu, Gates gates>
DTQ_DEV void store_fused(const Gemm& g, const Consumer& c, const unsigned char* tile, const Pieces& p,
                         int gate_tokens, U4 (&residual)[kAhead]) {
  const int n = c.n + c.thread % 8 * 8;
  const unsigned char* from = tile + p.token * kFloatRow + c.thread % 8 * 16;
  uint16_t* out = static_cast<uint16_t*>(g.out) + p.first;
  float gate[8];
  if (gates == kOneGate) floats_of_piece(load_gate(g, c.m / gate_tokens, n), type, gate);
  DTQ_ROLLED for (int first = 0; first < T::kTokens / 16; first += kAhead) {
    U4 now[kAhead], of_token[kAhead];
    DTQ_UNROLL for (int k = 0; k < kAhead; k++) now[k] = residual[k];
    if (gates == kManyGates)  // all before the first store, which no later load may pass
      DTQ_UNROLL for (int k = 0; k < kAhead; k++) {
        const int m = c.m + p.token + (first + k) * 16;
        of_token[k] = load_gate(g, (m < g.tokens ? m : c.m) / gate_tokens, n);
      }
    if (gates != kNoGate) load_residual(g, p, first + kAhead, residual);
    DTQ_UNROLL for (int k = 0; k < kAhead; k++) {
      const int i = first + k;
      const U4 low = lds<U4>(from), high = lds<U4>(from + kFloatHalf);
      const uint32_t bits[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
      float v[8], add[8];
      if (gates == kManyGates) floats_of_piece(of_token[k], type, gate);
      floats_of_piece(now[k], type, add);
      DTQ_UNROLL for (int e = 0; e < 8; e++) {
        v[e] = has_gelu ? gelu_approximate(bits_float(bits[e])) : bits_float(bits[e]);
        if (gates != kNoGate) v[e] = fadd(fmul(gate[e], v[e]), add[e]);
      }
      stg_if(i * 16 < p.left, reinterpret_cast<U4*>(out),
             U4{pair_of(v[0], v[1], type), pair_of(v[2], v[3], type),
                pair_of(v[4], v[5], type), pair_of(v[6], v[7], type)});
      out += p.step;
      from += 16 * kFloatRow;
    }
  }
}

template <class T, Float type>
DTQ_DEV void finish_fused(const Gemm& g, const Consumer& c, unsigned char* tile,
                          const unsigned char* row_scales, const RowPair& rows,
                          const int32_t (&sums)[T::kSums]) {
  const Pieces p = pieces_of<T>(g, c);
  U4 residual[kAhead] = {};
  if (g.gate) load_residual(g, p, 0, residual);
  stage_floats<T>(c, tile, row_scales, rows, sums);
  sync_named(2 + c.group, 128);
  const int tokens = int(g.tokens), each = g.gate_tokens < tokens ? int(g.gate_tokens) : tokens;
  const int end = c.m + T::kTokens < tokens ? c.m + T::kTokens : tokens;
  if (!g.gate) return store_fused<T, type, true, kNoGate>(g, c, tile, p, 1, residual);
  if (c.m / each == (end - 1) / each) {
    if (g.gelu) store_fused<T, type, true, kOneGate>(g, c, tile, p, each, residual);
    else store_fused<T, type, false, kOneGate>(g, c, tile, p, each, residual);
  } else {
    if (g.gelu) store_fused<T, type, true, kManyGates>(g, c, tile, p, each, residual);
    else store_fused<T, type, false, kManyGates>(g, c, tile, p, each, residual);
  }
}

// ---------------------------------------------------------------------------- any output

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

// Unrolled like the sums, this would be most of the kernel. So it is a loop over values in shared memory, a
// thread's own.
template <class T>
DTQ_DEV void finish_general(const Gemm& g, const Consumer& c, unsigned char* ring,
                            const unsigned char* row_scales, const RowPair& rows,
                            const int32_t (&sums)[T::kSums]) {
  constexpr int kThreads = T::kWarps * 32;
  static_assert(kThreads * T::kSums * 4 <= T::kBarriers, "the values fit");
  unsigned char* const values = ring + (c.group * 128 + c.thread) * 16;
  DTQ_UNROLL for (int j = 0; j < T::kTokens / 8; j++) {
    float v[4];
    U2 scales[1];
    load_token_scales<T>(row_scales, j, scales);
    scaled_sums<T>(scales[0], rows, sums, j, v);
    sts(values + j * kThreads * 16,
        U4{float_bits(v[0]), float_bits(v[1]), float_bits(v[2]), float_bits(v[3])});
  }
  DTQ_ROLLED for (int j = 0; j < T::kTokens / 8; j++) {
    if (c.m + j * 8 >= g.tokens) break;
    const int m = c.m + j * 8 + lane() % 4 * 2, n = c.row();
    const U4 u = lds<U4>(values + j * kThreads * 16);
    float v[4] = {bits_float(u.x), bits_float(u.y), bits_float(u.z), bits_float(u.w)};
    if (g.down) add_lowrank_transposed(g, c.m + j * 8, n, v);
    DTQ_UNROLL for (int i = 0; i < 4; i++)
      if (m + i % 2 < g.tokens && n + i / 2 * 8 < g.rows)
        v[i] = apply_epilogue(g, m + i % 2, n + i / 2 * 8, v[i]);
    store_transposed(g, m, n, v);
  }
}

// ---------------------------------------------------------------------------- all

template <class T, Finish finish>
DTQ_DEV void finish_tile(const Gemm& g, const Consumer& c, unsigned char* shared, const RowPair& rows,
                         const int32_t (&sums)[T::kSums]) {
  const unsigned char* row_scales = shared + T::kRowScales;
  sync_named(1, T::kWarps * 32);  // both consumers are done with the ring
  if constexpr (finish == kGeneral) return finish_general<T>(g, c, shared, row_scales, rows, sums);
  unsigned char* const tile =
      shared + c.group * T::kTokens * (finish == kPlain ? 128 : kFloatRow);
  const bool is_bfloat16 = g.out_type == kBFloat16;
  if constexpr (finish == kPlain) {
    if (is_bfloat16) store_plain<T, kBFloat16>(g, c, tile, row_scales, rows, sums);
    else store_plain<T, kFloat16>(g, c, tile, row_scales, rows, sums);
  } else {
    if (is_bfloat16) finish_fused<T, kBFloat16>(g, c, tile, row_scales, rows, sums);
    else finish_fused<T, kFloat16>(g, c, tile, row_scales, rows, sums);
  }
}

#endif

}  // namespace dtq
