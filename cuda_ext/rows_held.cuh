// SPDX-License-Identifier: Apache-2.0
// Rows of up to kHeld columns, a run a thread, to int8, FP4 or rounded floats; every array aligned, its
// columns whole runs.
#pragma once
#include "rows.cuh"

namespace dtq {

constexpr int kHeldThreads = 1024;
constexpr int64_t kHeld = kHeldThreads * kRun;

DTQ_DEV void write_codes(const Rows& r, int64_t row, int64_t k, const uint32_t (&packed)[4]) {
  stg((U4*)((unsigned char*)r.out + row * r.out_stride + k),
      U4{packed[0], packed[1], packed[2], packed[3]});
}

// Shared memory: [kWarpWords][exchange, if rotation blocks are longer than a warp's 512 columns][sums of
// runs, kNorm].
template <Before kBefore>
DTQ_KERNEL void DTQ_BOUNDS(kHeldThreads, 1) held_rows_kernel(const DTQ_CONSTANT RowPlan p) {
  DTQ_SHARED(shared);
  const Rows& r = p.r;
  const int64_t row = block_x(), k = (int64_t)tid() * kRun;
  const bool inside = k < r.columns;
  uint32_t* words = (uint32_t*)shared;
  float* exchange = (float*)shared + kWarpWords;

  float v[kRun], other[kRun];
  DTQ_UNROLL for (int i = 0; i < kRun; i++) v[i] = 0;  // what is beyond the row stays so
  if (inside) read_whole_run(row_of(r.x, r.type, row, r.stride), r.type, k, v);
  if constexpr (kBefore == kGelu) DTQ_UNROLL for (int i = 0; i < kRun; i++) v[i] = gelu(v[i]);

  if constexpr (kBefore == kNorm) {
    float* runs = exchange + (r.block > 32 * kRun ? block_threads() * kRun : 0);
    auto mean_of_row = [&](const float(&u)[kRun]) {
      if (inside) sts(runs + tid(), sum_of_run(u));
      return fdiv(sum_of_block(runs, r.columns / kRun), int_to_float((int32_t)r.columns));
    };
    const float mean = mean_of_row(v);
    DTQ_UNROLL for (int i = 0; i < kRun; i++) {
      v[i] = inside ? v[i] - mean : 0;
      other[i] = fmul(v[i], v[i]);
    }
    const float rstd = fdiv(1, fsqrt(mean_of_row(other) + r.eps));
    DTQ_UNROLL for (int i = 0; i < kRun; i++) v[i] = fmul(v[i], rstd);
    if (r.modulate_scale && inside) {
      const int64_t by = row / r.rows_per_modulate;
      const Float type = r.modulate_type;
      read_whole_run(row_of(r.modulate_scale, type, by, r.modulate_stride), type, k, other);
      DTQ_UNROLL for (int i = 0; i < kRun; i++) v[i] = fmul(v[i], 1.0f + other[i]);
      read_whole_run(row_of(r.modulate_shift, type, by, r.modulate_stride), type, k, other);
      DTQ_UNROLL for (int i = 0; i < kRun; i++) v[i] = v[i] + other[i];
    }
  }

  if (r.pre_scale && inside) {
    read_whole_run(r.pre_scale, kBFloat16, k, other);
    DTQ_UNROLL for (int i = 0; i < kRun; i++) v[i] = fmul(v[i], other[i]);
  }
  rotate(v, r.block, p.unit, exchange);

  uint32_t peak = 0;
  if (!r.fixed) peak = largest(peak_of_run(v), words);
  if (r.output == kRounded) {
    round_run(r, peak, v);
    return write_rounded(r, row, k, true, v);
  }
  if (r.output >= kNvRow) {
    write_fp4(r, row, k, peak, v);
    if (tid() == 0) stg(r.scale + row, fp4_row_scale(r, peak));
    return;
  }
  uint32_t packed[4];
  if (r.output == kE2m1) {
    const float scale = fdiv(bits_float(peak), kE2m1Max);
    doubled_levels(scale == 0 ? bits_float(0x7f800000) : scale, v, packed);
    if (k < r.width) write_codes(r, row, k, packed);
    if (tid() == 0) stg(r.scale + row, fmul(scale, 0.5f));
    return;
  }
  const Quantizer q = quantizer(r, peak);
  int32_t sum = codes_of(q, v, packed);
  if (k < r.width) write_codes(r, row, k, packed);
  if (tid() == 0) stg(r.scale + row, q.scale);
  if (r.sums) {
    sum = total(sum, words);
    if (tid() == 0) stg(r.sums + row, sum);
  }
}

}  // namespace dtq
