// SPDX-License-Identifier: Apache-2.0
// Rows in registers: up to kRegisterColumns columns, one row vector per thread, to int8, FP4 or
// fake-quantized floats. All arrays are aligned, and the number of columns is a multiple of kVec.
#pragma once
#include "rows.cuh"

namespace dtq {

constexpr int kRegisterThreads = 1024;
constexpr int64_t kRegisterColumns = kRegisterThreads * kVec;

DTQ_DEV void write_int8(const Rows& r, int64_t row, int64_t k, const uint32_t (&packed)[4]) {
  stg((U4*)((unsigned char*)r.out + row * r.out_stride + k),
      U4{packed[0], packed[1], packed[2], packed[3]});
}

// Shared memory: [kWarpWords][exchange, if Hadamard blocks are longer than the 512 columns of a warp]
// [sums of vectors, kNorm].
template <Prologue kPrologue>
DTQ_KERNEL void DTQ_BOUNDS(kRegisterThreads, 1) rows_register_kernel(const DTQ_CONSTANT RowPlan p) {
  DTQ_SHARED(shared);
  const Rows& r = p.r;
  const int64_t row = block_x(), k = (int64_t)tid() * kVec;
  const bool inside = k < r.columns;
  uint32_t* words = (uint32_t*)shared;
  float* exchange = (float*)shared + kWarpWords;

  float v[kVec], other[kVec];
  DTQ_UNROLL for (int i = 0; i < kVec; i++) v[i] = 0;  // stays 0 past the end of the row
  if (inside) read_aligned_vector(row_of(r.x, r.type, row, r.stride), r.type, k, v);
  if constexpr (kPrologue == kGelu) DTQ_UNROLL for (int i = 0; i < kVec; i++) v[i] = gelu(v[i]);

  if constexpr (kPrologue == kNorm) {
    float* vector_sums = exchange + (r.hadamard_block > 32 * kVec ? block_threads() * kVec : 0);
    auto mean_of_row = [&](const float(&u)[kVec]) {
      if (inside) sts(vector_sums + tid(), sum_of_vector(u));
      return fdiv(sum_of_row(vector_sums, r.columns / kVec), int_to_float((int32_t)r.columns));
    };
    const float mean = mean_of_row(v);
    DTQ_UNROLL for (int i = 0; i < kVec; i++) {
      v[i] = inside ? v[i] - mean : 0;
      other[i] = fmul(v[i], v[i]);
    }
    const float rstd = fdiv(1, fsqrt(mean_of_row(other) + r.eps));
    DTQ_UNROLL for (int i = 0; i < kVec; i++) v[i] = fmul(v[i], rstd);
    if (r.modulate_scale && inside) {
      const int64_t by = row / r.rows_per_modulate;
      const Float type = r.modulate_type;
      read_aligned_vector(row_of(r.modulate_scale, type, by, r.modulate_stride), type, k, other);
      DTQ_UNROLL for (int i = 0; i < kVec; i++) v[i] = fmul(v[i], 1.0f + other[i]);
      read_aligned_vector(row_of(r.modulate_shift, type, by, r.modulate_stride), type, k, other);
      DTQ_UNROLL for (int i = 0; i < kVec; i++) v[i] = v[i] + other[i];
    }
  }

  if (r.pre_scale && inside) {
    read_aligned_vector(r.pre_scale, kBFloat16, k, other);
    DTQ_UNROLL for (int i = 0; i < kVec; i++) v[i] = fmul(v[i], other[i]);
  }
  rotate(v, r.hadamard_block, p.hadamard_scale, exchange);

  uint32_t amax = 0;
  if (!r.static_scale) amax = amax_of_block(amax_of_vector(v), words);
  if (r.output == kFakeQuantized) {
    fake_quantize_vector(r, amax, v);
    return write_fake_quantized(r, row, k, true, v);
  }
  if (r.output >= kNvRow) {
    write_fp4(r, row, k, amax, v);
    if (tid() == 0) stg(r.scale + row, fp4_row_scale(r, amax));
    return;
  }
  uint32_t packed[4];
  if (r.output == kE2m1) {
    const float scale = fdiv(bits_float(amax), kE2m1Max);
    doubled_e2m1(scale == 0 ? bits_float(0x7f800000) : scale, v, packed);
    if (k < r.width) write_int8(r, row, k, packed);
    if (tid() == 0) stg(r.scale + row, fmul(scale, 0.5f));
    return;
  }
  const Quantizer q = quantizer(r, amax);
  int32_t sum = quantize_vector(q, v, packed);
  if (k < r.width) write_int8(r, row, k, packed);
  if (tid() == 0) stg(r.scale + row, q.scale);
  if (r.sums) {
    sum = sum_of_threads(sum, words);
    if (tid() == 0) stg(r.sums + row, sum);
  }
}

}  // namespace dtq
