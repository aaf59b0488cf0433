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
          DTQ_UNROLL for (int i = 0; i < kRun; i++)
            v[i] = k + i < r.columns ? fmul(v[i] - mean, v[i] - mean) : 0;
        }
        sts(runs + k / kRun, sum_of_run(v));
      }
      const float s = sum_of_block(runs, (r.columns + kRun - 1) / kRun);
      return fdiv(s, int_to_float((int32_t)r.columns));
    };
    mean = mean_of_row(false);
    rstd = fdiv(1, fsqrt(mean_of_row(true) + r.eps));
  }

  // A run as it comes out of the first turn.
  auto first_turn = [&](int64_t tile, float (&v)[kRun]) {
    const int64_t k = column(tile);
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
        along(row_of(r.modulate_scale, r.modulate_type, by, r.modulate_stride), r.modulate_type,
              p.whole_modulate, other);
        DTQ_UNROLL for (int i = 0; i < kRun; i++) v[i] = fmul(v[i], 1.0f + other[i]);
        along(row_of(r.modulate_shift, r.modulate_type, by, r.modulate_stride), r.modulate_type,
              p.whole_modulate, other);
        DTQ_UNROLL for (int i = 0; i < kRun; i++) v[i] = v[i] + other[i];
      }
      DTQ_UNROLL for (int i = 0; i < kRun; i++)
        if (k + i >= r.columns) v[i] = 0;
    }
    if (r.pre_scale) {
      along(r.pre_scale, kBFloat16, p.whole_pre, other);
      DTQ_UNROLL for (int i = 0; i < kRun; i++) v[i] = fmul(v[i], other[i]);
    }
    rotate(v, r.block, p.unit, exchange);
  };

  if (r.turns == 2) {
    const int64_t blocks = r.columns / r.block;
    DTQ_ROLLED for (int64_t tile = 0; tile < p.tiles; tile++) {
      float v[kRun];
      first_turn(tile, v);
      DTQ_UNROLL for (int i = 0; i < kRun; i++) {
        const int64_t k = column(tile) + i;
        if (k >= r.columns) continue;
        float* to = dealt + k % r.block * blocks + k / r.block;
        if (p.dealt < 0) *to = v[i];
        else sts(to, v[i]);
      }
    }
    sync_threads();
  }

  auto changed = [&](int64_t tile, float (&v)[kRun]) {
    if (r.turns == 1) return first_turn(tile, v);
    DTQ_UNROLL for (int i = 0; i < kRun; i++) {
      const int64_t k = column(tile) + i;
      v[i] = k >= r.columns ? 0 : p.dealt < 0 ? dealt[k] : lds<float>(dealt + k);
    }
    rotate(v, r.block, p.unit, exchange);
  };

  Quantizer q = {};
  if (r.output != kFloat) {
    uint32_t peak = 0;
    if (!r.fixed) {
      DTQ_ROLLED for (int64_t tile = 0; tile < p.tiles; tile++) {
        float v[kRun];
        changed(tile, v);
        peak = larger(peak, peak_of_run(v));
      }
      peak = largest(peak, words);
    }
    if (r.output == kInt8) q = quantizer(r, peak);
    else q.scale = r.fixed ? stored_scale(r) : fdiv(bits_float(peak), 448);
    if (tid() == 0) stg(r.scale + row, q.scale);
  }
  const float divisor = q.scale == 0 ? bits_float(0x7f800000) : q.scale;
  const int64_t start = row * r.out_stride;
  int32_t sum = 0;
  DTQ_ROLLED for (int64_t tile = 0; tile < p.tiles; tile++) {
    float v[kRun];
    const int64_t k = column(tile);
    changed(tile, v);
    if (r.output == kFloat) {
      write_floats((float*)r.out + start, k, r.width, p.whole_out, v);
      continue;
    }
    uint32_t packed[4] = {};
    if (r.output == kInt8) {
      sum += codes_of(q, v, packed);
    } else {
      DTQ_UNROLL for (int i = 0; i < kRun; i++)
        if (k + i < r.columns) packed[i / 4] |= to_e4m3(fdiv(v[i], divisor)) << i % 4 * 8;
    }
    write_bytes((unsigned char*)r.out + start, k, r.width, p.whole_out, packed);
  }
  if (r.output == kInt8 && r.sums) {
    sum = total(sum, words);
    if (tid() == 0) stg(r.sums + row, sum);
  }
}

}  // namespace dtq
