// SPDX-License-Identifier: Apache-2.0
// Rows of any length, alignment, permutation and output, one tile at a time. Between passes over a row
// only its scale is kept: values that are needed twice are read, from the second-level cache, and computed
// twice.
#pragma once
#include "rows.cuh"

namespace dtq {

constexpr int kTiledThreads = 512;  // so that a tile has kLongestBlock columns

// Shared memory: as in rows_register.cuh, then the row between two rotations if it fits.
template <Prologue kPrologue>
DTQ_KERNEL void DTQ_BOUNDS(kTiledThreads, 1) rows_tiled_kernel(const DTQ_CONSTANT RowPlan p) {
  DTQ_SHARED(shared);
  const Rows& r = p.r;
  if (r.next_may_start) let_next_kernel_start();
  const int64_t row = block_x();
  uint32_t* words = (uint32_t*)shared + kAmaxWords;
  float* exchange = (float*)shared + kWarpWords;
  float* warp_sums = exchange + (r.hadamard_block > 32 * kVec ? block_threads() * kVec : 0);
  // the row between two rotations; a float32 row may be in the output: each thread reads its vector before
  // it writes it
  float* transposed = p.transposed_offset < 0 ? (float*)r.out + row * r.out_stride
                                              : (float*)shared + p.transposed_offset;
  auto column = [&](int64_t tile) { return (tile * block_threads() + tid()) * kVec; };
  const void* x = row_of(r.x, r.type, row, r.stride);

  const int64_t by = modulate_row(p, (uint32_t)row);
  float mean = 0, rstd = 1;
  if constexpr (kPrologue == kNorm) {
    auto mean_of_row = [&](bool squared) {
      DTQ_ROLLED for (int64_t tile = 0; tile < p.tiles; tile++) {
        float v[kVec];
        const int64_t k = column(tile);
        read_vector(x, r.type, k, r.columns, p.aligned_x, v);
        if (squared) {
          DTQ_UNROLL for (int i = 0; i < kVec; i++) v[i] = fmul(v[i] - mean, v[i] - mean);
          zero_beyond(v, k, r.columns);
        }
        const float sum = sum_of_lanes(sum_of_vector(v));
        if (lane() == 0) sts(warp_sums + k / (32 * kVec), sum);
      }
      sync_threads();
      const float s = sum_of_warps(warp_sums, p.tiles * warps_of_block());
      sync_threads();  // they may be overwritten now
      return fdiv(s, int_to_float((int32_t)r.columns));
    };
    DTQ_ROLLED for (int squared = 0; squared < 2; squared++) {
      const float m = mean_of_row(squared);
      if (squared) rstd = fdiv(1, fsqrt(m + r.eps));
      else mean = m;
    }
  }

  // A vector before the first rotation.
  auto load_input = [&](int64_t k, float (&v)[kVec]) {
    auto load = [&](const void* from, Float type, bool aligned, float (&into)[kVec]) {
      if (r.perm) gather_vector(from, type, r.perm, k, r.columns, into);
      else read_vector(from, type, k, r.columns, aligned, into);
    };
    float other[kVec];
    load(x, r.type, p.aligned_x, v);
    if constexpr (kPrologue == kGelu) DTQ_UNROLL for (int i = 0; i < kVec; i++) v[i] = gelu(v[i]);
    if constexpr (kPrologue == kNorm) {
      DTQ_UNROLL for (int i = 0; i < kVec; i++) v[i] = fmul(v[i] - mean, rstd);
      if (r.modulate_scale) {
        const Float type = r.modulate_type;
        load(row_of(r.modulate_scale, type, by, r.modulate_stride), type, p.aligned_modulate, other);
        DTQ_UNROLL for (int i = 0; i < kVec; i++) v[i] = fmul(v[i], 1.0f + other[i]);
        load(row_of(r.modulate_shift, type, by, r.modulate_stride), type, p.aligned_modulate, other);
        DTQ_UNROLL for (int i = 0; i < kVec; i++) v[i] = v[i] + other[i];
      }
      zero_beyond(v, k, r.columns);
    }
    if (r.pre_scale) {
      load(r.pre_scale, kBFloat16, p.aligned_pre, other);
      DTQ_UNROLL for (int i = 0; i < kVec; i++) v[i] = fmul(v[i], other[i]);
    }
  };

  // After the first rotation the row is transposed: (blocks, hadamard_block) to (hadamard_block, blocks).
  const int64_t blocks = r.columns / r.hadamard_block;
  auto store_transposed = [&](int64_t k, const float (&v)[kVec]) {
    DTQ_UNROLL for (int i = 0; i < kVec; i++) {
      if (k + i >= r.columns) continue;
      float* to = transposed + (k + i) % r.hadamard_block * blocks + (k + i) / r.hadamard_block;
      if (p.transposed_offset < 0) *to = v[i];
      else sts(to, v[i]);
    }
  };
  auto load_transposed = [&](int64_t k, float (&v)[kVec]) {
    DTQ_UNROLL for (int i = 0; i < kVec; i++)
      v[i] = k + i >= r.columns ? 0
             : p.transposed_offset < 0 ? transposed[k + i] : lds<float>(transposed + k + i);
  };

  Quantizer q = {};
  uint32_t amax = 0;
  float divisor = 1;
  int32_t sum = 0;
  const int64_t start = row * r.out_stride;
  auto write = [&](int64_t k, float (&v)[kVec]) {
    if (r.output == kFakeQuantized) {
      fake_quantize_vector(r, amax, v);
      return write_rounded(r, row, k, p.aligned_out, v);
    }
    if (r.output == kNvRow) return write_fp4<true>(r, row, k, amax, v);
    if (r.output == kMxRow) return write_fp4<false>(r, row, k, amax, v);
    if (r.output == kFloat) return write_rounded(r, row, k, p.aligned_out, v);
    uint32_t packed[4] = {};
    if (r.output == kInt8) {
      quantize_vector(q, v, packed);
      sum += sum_of_codes(packed);
    } else if (r.output == kE2m1) {
      doubled_e2m1(divisor, v, packed);
    } else {
      DTQ_UNROLL for (int i = 0; i < kVec; i++)
        if (k + i < r.columns) packed[i / 4] |= to_e4m3(fdiv(v[i], divisor)) << i % 4 * 8;
    }
    write_bytes((unsigned char*)r.out + start, k, r.width, p.aligned_out, packed);
  };

  enum { kTranspose, kAmax, kWrite };
  DTQ_ROLLED for (int pass = kTranspose; pass <= kWrite; pass++) {
    if (pass == kTranspose && r.num_rotations == 1) continue;
    if (pass == kAmax && (r.output == kFloat || r.static_scale)) continue;
    if (pass == kWrite && r.output == kFakeQuantized) amax = amax_of_block(amax, words);
    if (pass == kWrite && r.output != kFloat && r.output != kFakeQuantized) {
      if (!r.static_scale) amax = amax_of_block(amax, words);
      if (r.output == kInt8) q = quantizer(p, amax);
      else if (r.output >= kNvRow) q.scale = fp4_row_scale(r, amax);
      else if (r.static_scale) q.scale = static_scale(r);
      else q.scale = fdiv(bits_float(amax), r.output == kE2m1 ? kE2m1Max : kE4m3Max);
      divisor = q.scale == 0 ? bits_float(0x7f800000) : q.scale;
      if (tid() == 0) stg(r.scale + row, r.output == kE2m1 ? fmul(q.scale, 0.5f) : q.scale);
    }
    DTQ_ROLLED for (int64_t tile = 0; tile < p.tiles; tile++) {
      float v[1][kVec];
      const int64_t k = column(tile);
      if (pass > kTranspose && r.num_rotations == 2) load_transposed(k, v[0]);
      else load_input(k, v[0]);
      rotate(v, (int)r.hadamard_block, p.hadamard_scale, exchange);
      if (pass == kTranspose) store_transposed(k, v[0]);
      else if (pass == kAmax) amax = umax(amax, amax_of_vector(v[0]));
      else write(k, v[0]);
    }
    if (pass == kTranspose) sync_threads();  // the second rotation reads what other threads stored
  }
  if (r.output == kInt8 && r.sums) {
    sum = sum_of_threads(sum, (uint32_t*)shared + kSumWords);
    if (tid() == 0) stg(r.sums + row, sum);
  }
}

}  // namespace dtq
