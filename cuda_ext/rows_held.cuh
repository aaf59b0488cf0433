// SPDX-License-Identifier: Apache-2.0
// Rows that registers hold, to int8: every array aligned and its columns whole runs.
#pragma once
#include "rows.cuh"

namespace dtq {

// Threads of a block of rows that `threads` threads hold.
#define DTQ_BLOCK_OF(threads) ((threads) < 128 ? 128 : (threads))

// 768 threads of a multiprocessor leave each 85 registers, of which 48 hold the row.
// Shared memory: [kWarpWords][exchange, if blocks are longer than a warp's 512 columns][sums of runs,
// kNorm]; none for rows of one warp, of which a block has several.
template <int kThreads, int kTiles, Before kBefore>
DTQ_KERNEL void DTQ_BOUNDS(DTQ_BLOCK_OF(kThreads), (kTiles < 3 ? 1024 : 768) / DTQ_BLOCK_OF(kThreads))
    held_rows_kernel(const DTQ_CONSTANT RowPlan p) {
  DTQ_SHARED(shared);
  constexpr int kRows = DTQ_BLOCK_OF(kThreads) / kThreads;
  const Rows& r = p.r;
  const int thread = tid() % kThreads;
  const int64_t row = (int64_t)block_x() * kRows + tid() / kThreads;
  if (row >= r.rows) return;  // a whole warp; rows of more threads are a block of their own
  uint32_t* words = (uint32_t*)shared;
  float* exchange = (float*)shared + kWarpWords;
  float* runs = exchange + (r.block > 32 * kRun ? kThreads * kRun : 0);

  float held[kTiles][kRun];
  auto column = [&](int tile) { return (int64_t)(tile * kThreads + thread) * kRun; };
  auto inside = [&](int tile) { return column(tile) < r.columns; };
  // body(tile, v); every thread runs it, also for columns beyond the row: those are 0
  auto each_tile = [&](auto&& body) {
    DTQ_UNROLL for (int i = 0; i < kTiles; i++)
      if (i < p.tiles) body(i, held[i]);
  };

  const void* x = row_of(r.x, r.type, row, r.stride);
  each_tile([&](int tile, float (&v)[kRun]) {
    if (inside(tile)) read_whole_run(x, r.type, column(tile), v);
    else DTQ_UNROLL for (int i = 0; i < kRun; i++) v[i] = 0;
  });

  if constexpr (kBefore == kNorm) {
    float own = 0;
    auto add_run = [&](int tile, const float (&v)[kRun]) {
      const float s = sum_of_run(v);
      if (kThreads == 32) own = own + s;
      else if (inside(tile)) sts(runs + column(tile) / kRun, s);
    };
    auto mean_of_row = [&] {
      const float s = kThreads == 32 ? sum_of_lanes(own) : sum_of_block(runs, r.columns / kRun);
      return fdiv(s, int_to_float((int32_t)r.columns));
    };
    each_tile([&](int tile, float (&v)[kRun]) { add_run(tile, v); });
    const float mean = mean_of_row();
    own = 0;
    each_tile([&](int tile, float (&v)[kRun]) {
      float square[kRun];
      DTQ_UNROLL for (int i = 0; i < kRun; i++) {
        if (inside(tile)) v[i] = v[i] - mean;
        square[i] = fmul(v[i], v[i]);
      }
      add_run(tile, square);
    });
    const float rstd = fdiv(1, fsqrt(mean_of_row() + r.eps));
    const int64_t by = r.modulate_scale ? row / r.rows_per_modulate : 0;
    const void* scale = row_of(r.modulate_scale, r.modulate_type, by, r.modulate_stride);
    const void* shift = row_of(r.modulate_shift, r.modulate_type, by, r.modulate_stride);
    each_tile([&](int tile, float (&v)[kRun]) {
      if (!inside(tile)) return;
      float other[kRun];
      DTQ_UNROLL for (int i = 0; i < kRun; i++) v[i] = fmul(v[i], rstd);
      if (!r.modulate_scale) return;
      read_whole_run(scale, r.modulate_type, column(tile), other);
      DTQ_UNROLL for (int i = 0; i < kRun; i++) v[i] = fmul(v[i], 1.0f + other[i]);
      read_whole_run(shift, r.modulate_type, column(tile), other);
      DTQ_UNROLL for (int i = 0; i < kRun; i++) v[i] = v[i] + other[i];
    });
  }

  uint32_t peak = 0;  // the bits of magnitudes order as the magnitudes do, and NaN is above all
  each_tile([&](int tile, float (&v)[kRun]) {
    if constexpr (kBefore == kGelu) DTQ_UNROLL for (int i = 0; i < kRun; i++) v[i] = gelu(v[i]);
    if (r.pre_scale && inside(tile)) {
      float other[kRun];
      read_whole_run(r.pre_scale, kBFloat16, column(tile), other);
      DTQ_UNROLL for (int i = 0; i < kRun; i++) v[i] = fmul(v[i], other[i]);
    }
    rotate<kThreads>(v, thread, r.block, p.unit, exchange);
    DTQ_UNROLL for (int i = 0; i < kRun; i++) peak = larger(peak, float_bits(v[i]) & 0x7fffffff);
  });

  if (!r.fixed) peak = largest<kThreads>(peak, thread, words);
  const Quantizer q = quantizer(r, peak);
  if (thread == 0) stg(r.scale + row, q.scale);
  unsigned char* out = (unsigned char*)r.out + row * r.out_stride;
  int32_t sum = 0;
  each_tile([&](int tile, float (&v)[kRun]) {
    if (column(tile) >= r.width) return;
    uint32_t packed[4];
    sum += codes_of(q, v, packed);
    stg((U4*)(out + column(tile)), U4{packed[0], packed[1], packed[2], packed[3]});
  });
  if (r.sums) {
    sum = total<kThreads>(sum, thread, words);
    if (thread == 0) stg(r.sums + row, sum);
  }
}

}  // namespace dtq
