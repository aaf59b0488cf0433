// SPDX-License-Identifier: Apache-2.0
// Rows of any length, alignment, order and output, a tile at a time. Nothing is kept but the scale: what
// is needed twice is read and computed twice, from the second-level cache.
#pragma once
#include "rows.cuh"

namespace dtq {

constexpr int kStreamedThreads = 512;  // and their tile is kLongestBlock

// Shared memory: as for held rows, then the row between two turns if there is room.
template <Before kBefore>
DTQ_KERNEL void DTQ_BOUNDS(kStreamedThreads, 1) streamed_rows_kernel(const DTQ_CONSTANT RowPlan p) {
  DTQ_SHARED(shared);
  const Rows& r = p.r;
  const int64_t row = block_x();
  uint32_t* words = (uint32_t*)shared;
  float* exchange = (float*)shared + kWarpWords;
  float* runs = exchange + (r.block > 32 * kRun ? block_threads() * kRun : 0);
  // between two turns a float32 row may lie where it is written to: each thread reads its run and
  // writes it afterwards
  float* dealt = p.dealt < 0 ? (float*)r.out + row * r.out_stride : (float*)shared + p.dealt;
  auto column = [&](int64_t tile) { return (tile * block_threads() + tid()) * kRun; };
  const void* x = row_of(r.x, r.type, row, r.stride);

  float mean = 0, rstd = 1;
  if constexpr (kBefore == kNorm) {
    auto mean_of_row = [&](bool squared) {
      DTQ_ROLLED for (int64_t tile = 0; tile < p.tiles; tile++) {
        float v[kRun];
        const int64_t k = column(tile);
        if (k >= r.columns) continue;
        read_run(x, r.type, k, r.columns, p.whole_x, v);
        if (squared) {
          DTQ_UNROLL for (int i = 0; i < kRun; i++) v[i] = fmul(v[i] - mean, v[i] - mean);
          clear_beyond(v, k, r.columns);
        }
        sts(runs + k / kRun, sum_of_run(v));
      }
      const float s = sum_of_block(runs, (r.columns + kRun - 1) / kRun);
      return fdiv(s, int_to_float((int32_t)r.columns));
    };
    DTQ_ROLLED for (int squared = 0; squared < 2; squared++) {
      const float m = mean_of_row(squared);
      if (squared) rstd = fdiv(1, fsqrt(m + r.eps));
      else mean = m;
    }
  }

  // A run as it enters the first turn.
  auto source = [&](int64_t k, float (&v)[kRun]) {
    auto along = [&](const void* from, Float type, bool whole, float (&into)[kRun]) {
      if (r.order) gather_run(from, type, r.order, k, r.columns, into);
      else read_run(from, type, k, r.columns, whole, into);
    };
    float other[kRun];
    along(x, r.type, p.whole_x, v);
    if constexpr (kBefore == kGelu) DTQ_UNROLL for (int i = 0; i < kRun; i++) v[i] = gelu(v[i]);
    if constexpr (kBefore == kNorm) {
      DTQ_UNROLL for (int i = 0; i < kRun; i++) v[i] = fmul(v[i] - mean, rstd);
      if (r.modulate_scale) {
        const int64_t by = row / r.rows_per_modulate;
        const Float type = r.modulate_type;
        along(row_of(r.modulate_scale, type, by, r.modulate_stride), type, p.whole_modulate, other);
        DTQ_UNROLL for (int i = 0; i < kRun; i++) v[i] = fmul(v[i], 1.0f + other[i]);
        along(row_of(r.modulate_shift, type, by, r.modulate_stride), type, p.whole_modulate, other);
        DTQ_UNROLL for (int i = 0; i < kRun; i++) v[i] = v[i] + other[i];
      }
      clear_beyond(v, k, r.columns);
    }
    if (r.pre_scale) {
      along(r.pre_scale, kBFloat16, p.whole_pre, other);
      DTQ_UNROLL for (int i = 0; i < kRun; i++) v[i] = fmul(v[i], other[i]);
    }
  };

  // The first turn deals the columns of each block out over all blocks.
  const int64_t blocks = r.columns / r.block;
  auto deal = [&](int64_t k, const float (&v)[kRun]) {
    DTQ_UNROLL for (int i = 0; i < kRun; i++) {
      if (k + i >= r.columns) continue;
      float* to = dealt + (k + i) % r.block * blocks + (k + i) / r.block;
      if (p.dealt < 0) *to = v[i];
      else sts(to, v[i]);
    }
  };
  auto take = [&](int64_t k, float (&v)[kRun]) {
    DTQ_UNROLL for (int i = 0; i < kRun; i++)
      v[i] = k + i >= r.columns ? 0 : p.dealt < 0 ? dealt[k + i] : lds<float>(dealt + k + i);
  };

  Quantizer q = {};
  uint32_t peak = 0;
  float divisor = 1;
  int32_t sum = 0;
  const int64_t start = row * r.out_stride;
  auto write = [&](int64_t k, float (&v)[kRun]) {
    if (r.output == kRounded) {
      round_run(r, peak, v);
      return write_rounded(r, row, k, p.whole_out, v);
    }
    if (r.output >= kNvRow) return write_fp4(r, row, k, peak, v);
    if (r.output == kFloat) {
      write_floats((float*)r.out + start, k, r.width, p.whole_out, v);
      return;
    }
    uint32_t packed[4] = {};
    if (r.output == kInt8) {
      sum += codes_of(q, v, packed);
    } else if (r.output == kE2m1) {
      doubled_levels(divisor, v, packed);
    } else {
      DTQ_UNROLL for (int i = 0; i < kRun; i++)
        if (k + i < r.columns) packed[i / 4] |= to_e4m3(fdiv(v[i], divisor)) << i % 4 * 8;
    }
    write_bytes((unsigned char*)r.out + start, k, r.width, p.whole_out, packed);
  };

  enum { kDeal, kMeasure, kWrite };
  DTQ_ROLLED for (int pass = kDeal; pass <= kWrite; pass++) {
    if (pass == kDeal && r.turns == 1) continue;
    if (pass == kMeasure && (r.output == kFloat || r.fixed)) continue;
    if (pass == kWrite && r.output == kRounded) peak = largest(peak, words);
    if (pass == kWrite && r.output != kFloat && r.output != kRounded) {
      if (!r.fixed) peak = largest(peak, words);
      if (r.output == kInt8) q = quantizer(r, peak);
      else if (r.output >= kNvRow) q.scale = fp4_row_scale(r, peak);
      else q.scale = r.fixed ? stored_scale(r) : fdiv(bits_float(peak), r.output == kE2m1 ? kE2m1Max : kE4m3Max);
      divisor = q.scale == 0 ? bits_float(0x7f800000) : q.scale;
      if (tid() == 0) stg(r.scale + row, r.output == kE2m1 ? fmul(q.scale, 0.5f) : q.scale);
    }
    DTQ_ROLLED for (int64_t tile = 0; tile < p.tiles; tile++) {
      float v[kRun];
      const int64_t k = column(tile);
      if (pass > kDeal && r.turns == 2) take(k, v);
      else source(k, v);
      rotate(v, r.block, p.unit, exchange);
      if (pass == kDeal) deal(k, v);
      else if (pass == kMeasure) peak = larger(peak, peak_of_run(v));
      else write(k, v);
    }
    if (pass == kDeal) sync_threads();  // the second turn reads what others dealt
  }
  if (r.output == kInt8 && r.sums) {
    sum = total(sum, words);
    if (tid() == 0) stg(r.sums + row, sum);
  }
}

}  // namespace dtq
