// SPDX-License-Identifier: Apache-2.0
// Few tokens: y (M, N) = x (M, K) W^T + bias with W as the file keeps it, read once for 16 tokens.
//
// Such a product waits for the weights, so what counts is instructions per weight: they are decoded
// straight into the registers of a tensor-core product, weights as its 16 rows, tokens as its 8
// columns. In which order a product takes the columns is free as long as both sides agree, so a lane
// takes 16 that lie side by side: lane (g, t) = (lane / 4, lane % 4) decodes columns 16 t .. 16 t + 15
// of rows g and g + 8 and loads the same columns of token g.
//
// Order of the float32 sum: steps of 64 columns go in turn to kWarps warps, each adds up its own, then
// the warps are added, the first one first. Inside a product of 16 columns the order is the hardware's.
// Nothing depends on the other tokens.
#pragma once
#include "weights.cuh"

namespace dtq {

constexpr int kWarps = 4;      // of a block: more rows of the file in flight than one warp asks for
constexpr int kRowsTile = 16;  // output channels of a block
constexpr int kStepColumns = 64;
constexpr int kHalves = kFewTokens / 8;
constexpr int kAhead = 2;  // steps whose weights are on their way: memory answers after hundreds of cycles

struct FewPlan {
  WeightPlan weight;
  Few f;
  int64_t first;  // token
  bool whole_x;
};

template <Encoding kEncoding, int kBits>
DTQ_KERNEL void DTQ_BOUNDS(kWarps * 32, 4) few_kernel(const DTQ_CONSTANT FewPlan p) {
  DTQ_SHARED(shared);
  const Few& f = p.f;
  const int64_t rows = p.weight.w.rows, columns = p.weight.w.columns;
  const int64_t n = (int64_t)block_x() * kRowsTile + lane() / 4;
  float* table = (float*)shared;
  float* sums = table + 16;  // (kWarps, kHalves, 16 rows, 8 tokens)
  const bool brain = f.type == kBFloat16;
  const int halves = f.tokens - p.first > 8 ? kHalves : 1;  // groups of 8 tokens
  share_table(p.weight.w, table);

  float acc[kHalves][4] = {};
  constexpr int64_t kTurn = kWarps * kStepColumns;
  const int64_t first = warp() * kStepColumns + lane() % 4 * kRun;
  Run<kEncoding, kBits> coming[kAhead][2];  // [step][row g or g + 8]
  DTQ_UNROLL for (int s = 0; s < kAhead; s++)
    DTQ_UNROLL for (int h = 0; h < 2; h++)
      fetch(p.weight, n + h * 8, first + s * kTurn, coming[s][h]);

  // One step; `now` becomes the step kAhead further on.
  auto step = [&](int64_t at, Run<kEncoding, kBits>(&now)[2]) {
    uint32_t x[kHalves][kRun / 2] = {};
    DTQ_UNROLL for (int h = 0; h < kHalves; h++) {
      const int64_t token = p.first + h * 8 + lane() / 4;
      if (token < f.tokens && at < columns)
        read_pairs((const uint16_t*)f.x + token * f.stride, at, columns, p.whole_x, x[h]);
    }
    uint32_t w[2][kRun / 2];  // [row][pair]
    DTQ_UNROLL for (int h = 0; h < 2; h++) {
      const Run<kEncoding, kBits> run = now[h];
      fetch(p.weight, n + h * 8, at + kAhead * kTurn, now[h]);
      float v[kRun];
      expand(p.weight, run, at, table, v);
      DTQ_UNROLL for (int i = 0; i < kRun / 2; i++) w[h][i] = pair_of(v[i * 2], v[i * 2 + 1], f.type);
    }
    DTQ_UNROLL for (int h = 0; h < kHalves; h++) {
      if (h == halves) break;
      DTQ_UNROLL for (int j = 0; j < 4; j++) {
        const uint32_t a[4] = {w[0][j * 2], w[1][j * 2], w[0][j * 2 + 1], w[1][j * 2 + 1]};
        if (brain) mma_bf16(acc[h], a, x[h][j * 2], x[h][j * 2 + 1]);
        else mma_f16(acc[h], a, x[h][j * 2], x[h][j * 2 + 1]);
      }
    }
  };
  // steps beyond the row add zeros
  for (int64_t k = warp() * kStepColumns; k < columns; k += kAhead * kTurn)
    DTQ_UNROLL for (int s = 0; s < kAhead; s++) step(k + s * kTurn + lane() % 4 * kRun, coming[s]);

  DTQ_UNROLL for (int h = 0; h < kHalves; h++)
    DTQ_UNROLL for (int i = 0; i < 4; i++) {
      const int row = lane() / 4 + i / 2 * 8, token = lane() % 4 * 2 + i % 2;
      sts(sums + ((warp() * kHalves + h) * 16 + row) * 8 + token, acc[h][i]);
    }
  sync_threads();
  for (int i = tid(); i < halves * 128; i += kWarps * 32) {
    const int64_t token = p.first + i / 128 * 8 + i % 8;
    const int64_t row = (int64_t)block_x() * kRowsTile + i / 8 % 16;
    if (token >= f.tokens || row >= rows) continue;
    float sum = lds<float>(sums + i);
    for (int s = 1; s < kWarps; s++) sum = sum + lds<float>(sums + s * kHalves * 128 + i);
    if (f.bias) sum = sum + to_float(ldg((const uint16_t*)f.bias + row), f.type);
    stg((uint16_t*)f.y + token * rows + row, to_16(sum, f.type));
  }
}

// One run of 16 columns a thread.
struct DecodePlan {
  WeightPlan weight;
  void* out;
  Float type;
  bool integers;  // int8 instead, of values that are such
  int64_t runs;   // of a row
  bool whole_out;
};

constexpr int kDecodeThreads = 128;

template <Encoding kEncoding, int kBits>
DTQ_KERNEL void DTQ_BOUNDS(kDecodeThreads, 4) decode_kernel(const DTQ_CONSTANT DecodePlan p) {
  DTQ_SHARED(shared);
  share_table(p.weight.w, (float*)shared);
  const int64_t at = (int64_t)block_x() * kDecodeThreads + tid();
  const int64_t columns = p.weight.w.columns, n = at / p.runs, k = at % p.runs * kRun;
  if (n >= p.weight.w.rows) return;
  float v[kRun];
  Run<kEncoding, kBits> run;
  fetch(p.weight, n, k, run);
  expand(p.weight, run, k, (const float*)shared, v);
  if (p.integers) {
    uint32_t words[4] = {};
    DTQ_UNROLL for (int i = 0; i < kRun; i++)
      words[i / 4] |= ((uint32_t)round_to_int(v[i]) & 255) << i % 4 * 8;
    write_bytes((unsigned char*)p.out + n * columns, k, columns, p.whole_out, words);
    return;
  }
  if (p.type == kFloat32) write_floats((float*)p.out + n * columns, k, columns, p.whole_out, v);
  else write_halves((uint16_t*)p.out + n * columns, k, columns, p.whole_out, p.type, v);
}

}  // namespace dtq
