// SPDX-License-Identifier: Apache-2.0
// GEMM for few tokens: y (M, N) = x (M, K) W^T + bias with a stored W, which is read once for 16 tokens.
//
// Such a product is bound by reading the weights, so the instructions per weight count. Weights are
// decoded directly into the registers of a tensor-core product, with output channels as its 16 rows and
// tokens as its 8 columns. The order in which a product takes the columns of K does not matter if both
// operands agree, so a lane takes a row vector of 16: lane (g, t) = (lane / 4, lane % 4) decodes columns
// 16 t .. 16 t + 15 of rows g and g + 8, and loads the same columns of token g.
//
// Order of the float32 sum: steps of 64 columns are assigned round-robin to kWarps warps, each sums its
// own, then the warps are summed in order. Within a product of 16 columns the order is that of the
// hardware. It does not depend on the other tokens.
#pragma once
#include "weights.cuh"

namespace dtq {

constexpr int kWarps = 4;      // of a block: keeps more loads in flight than one warp would
constexpr int kRowsTile = 16;  // output channels of a block
constexpr int kStepColumns = 64;
constexpr int kTokenGroups = kSmallMTokens / 8;
constexpr int kPrefetch = 2;  // steps whose weights are loaded ahead: memory latency is hundreds of cycles

struct SmallMPlan {
  WeightPlan weight;
  SmallM f;
  int64_t first;  // token
  bool aligned_x;
};

// Adds the sums of the warps of a block in order, the bias, and stores the outputs. `sums` is shared memory
// for (kWarps, kTokenGroups, 16 rows, 8 tokens).
DTQ_DEV void store_sums(const SmallMPlan& p, int groups, float* sums, const float (&acc)[kTokenGroups][4]) {
  const SmallM& f = p.f;
  const int64_t rows = p.weight.w.rows;
  DTQ_UNROLL for (int h = 0; h < kTokenGroups; h++)
    DTQ_UNROLL for (int i = 0; i < 4; i++) {
      const int row = lane() / 4 + i / 2 * 8, token = lane() % 4 * 2 + i % 2;
      sts(sums + ((warp() * kTokenGroups + h) * 16 + row) * 8 + token, acc[h][i]);
    }
  sync_threads();
  for (int i = tid(); i < groups * 128; i += kWarps * 32) {
    const int64_t token = p.first + i / 128 * 8 + i % 8;
    const int64_t row = (int64_t)block_x() * kRowsTile + i / 8 % 16;
    if (token >= f.tokens || row >= rows) continue;
    float sum = lds<float>(sums + i);
    for (int s = 1; s < kWarps; s++) sum = sum + lds<float>(sums + s * kTokenGroups * 128 + i);
    if (f.bias) sum = sum + to_float(ldg((const uint16_t*)f.bias + row), f.type);
    stg((uint16_t*)f.y + token * rows + row, to_16(sum, f.type));
  }
}

// Sums of 16 rows by 8 tokens of the type.
template <Float kType>
DTQ_DEV void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (kType == kBFloat16) mma_bf16(c, a, b0, b1);
  else mma_f16(c, a, b0, b1);
}

template <Encoding kEncoding, int kBits, Float kType>
DTQ_KERNEL void DTQ_BOUNDS(kWarps * 32, 4) small_m_kernel(const DTQ_CONSTANT SmallMPlan p) {
  DTQ_SHARED(shared);
  const SmallM& f = p.f;
  const int64_t columns = p.weight.w.columns;
  const int64_t n = (int64_t)block_x() * kRowsTile + lane() / 4;
  float* codebook = (float*)shared;
  float* sums = codebook + 16;  // (kWarps, kTokenGroups, 16 rows, 8 tokens)
  const int groups = f.tokens - p.first > 8 ? kTokenGroups : 1;  // of 8 tokens
  load_codebook(p.weight.w, codebook);

  float acc[kTokenGroups][4] = {};
  constexpr int64_t kRoundColumns = kWarps * kStepColumns;
  const int64_t first = warp() * kStepColumns + lane() % 4 * kVec;
  PackedVector<kEncoding, kBits> prefetched[kPrefetch][2];  // [step][row g or g + 8]
  DTQ_UNROLL for (int s = 0; s < kPrefetch; s++)
    DTQ_UNROLL for (int h = 0; h < 2; h++)
      load_packed(p.weight, n + h * 8, first + s * kRoundColumns, prefetched[s][h]);

  // One step. `now` has its weights, and gets those of the step kPrefetch later.
  auto step = [&](int64_t at, PackedVector<kEncoding, kBits>(&now)[2]) {
    uint32_t x[kTokenGroups][kVec / 2] = {};
    DTQ_UNROLL for (int h = 0; h < kTokenGroups; h++) {
      const int64_t token = p.first + h * 8 + lane() / 4;
      if (token < f.tokens && at < columns)
        read_pairs((const uint16_t*)f.x + token * f.stride, at, columns, p.aligned_x, x[h]);
    }
    uint32_t w[2][kVec / 2];  // [row][pair]
    DTQ_UNROLL for (int h = 0; h < 2; h++) {
      const PackedVector<kEncoding, kBits> packed = now[h];
      load_packed(p.weight, n + h * 8, at + kPrefetch * kRoundColumns, now[h]);
      float v[kVec];
      decode_vector(p.weight, packed, at, codebook, v);
      DTQ_UNROLL for (int i = 0; i < kVec / 2; i++) w[h][i] = pair_of(v[i * 2], v[i * 2 + 1], kType);
    }
    DTQ_UNROLL for (int h = 0; h < kTokenGroups; h++) {
      if (h == groups) break;
      DTQ_UNROLL for (int j = 0; j < 4; j++) {
        const uint32_t a[4] = {w[0][j * 2], w[1][j * 2], w[0][j * 2 + 1], w[1][j * 2 + 1]};
        multiply<kType>(acc[h], a, x[h][j * 2], x[h][j * 2 + 1]);
      }
    }
  };
  // steps past the end of the row add zeros
  for (int64_t k = warp() * kStepColumns; k < columns; k += kPrefetch * kRoundColumns)
    DTQ_UNROLL for (int s = 0; s < kPrefetch; s++)
      step(k + s * kRoundColumns + lane() % 4 * kVec, prefetched[s]);

  store_sums(p, groups, sums, acc);
}

// dequantize and expand: one row vector per thread.
struct DecodePlan {
  WeightPlan weight;
  void* out;
  Float type;
  bool int8;        // the values are integers, and stored as int8
  int64_t vectors;  // of a row
  bool aligned_out;
};

constexpr int kDecodeThreads = 128;

template <Encoding kEncoding, int kBits>
DTQ_KERNEL void DTQ_BOUNDS(kDecodeThreads, 4) decode_kernel(const DTQ_CONSTANT DecodePlan p) {
  DTQ_SHARED(shared);
  load_codebook(p.weight.w, (float*)shared);
  const int64_t at = (int64_t)block_x() * kDecodeThreads + tid();
  const int64_t columns = p.weight.w.columns, n = at / p.vectors, k = at % p.vectors * kVec;
  if (n >= p.weight.w.rows) return;
  float v[kVec];
  PackedVector<kEncoding, kBits> packed;
  load_packed(p.weight, n, k, packed);
  decode_vector(p.weight, packed, k, (const float*)shared, v);
  if (p.int8) {
    uint32_t words[4] = {};
    DTQ_UNROLL for (int i = 0; i < kVec; i++)
      words[i / 4] |= ((uint32_t)round_to_int(v[i]) & 255) << i % 4 * 8;
    write_bytes((unsigned char*)p.out + n * columns, k, columns, p.aligned_out, words);
    return;
  }
  if (p.type == kFloat32) write_floats((float*)p.out + n * columns, k, columns, p.aligned_out, v);
  else write_halves((uint16_t*)p.out + n * columns, k, columns, p.aligned_out, p.type, v);
}

}  // namespace dtq
