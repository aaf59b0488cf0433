// SPDX-License-Identifier: Apache-2.0
// Rows in registers: up to kRegisterColumns columns, to int8, E2M1, FP4 or floats. All arrays are aligned,
// and the number of columns is a multiple of those that a thread holds: one row vector, or two for int8,
// which halves what is done once per thread.
//
// What decides per value is a parameter of the template: the types of x and of the modulation, and the
// output. What is asked once per thread is not: static scales, pre_scale, the length of Hadamard blocks.
#pragma once
#include "rows.cuh"

namespace dtq {

constexpr int64_t kRegisterColumns = 16384;

// The modulation of a norm: none, vectors of the type of x, or float32 vectors.
enum Modulation { kPlain, kSameType, kFloatVectors };

template <Prologue kPrologue_, Modulation kModulation_, Float kType_, Output kOutput_>
struct RowKind {
  static constexpr Prologue kPrologue = kPrologue_;
  static constexpr Modulation kModulation = kModulation_;
  static constexpr Float kType = kType_;
  static constexpr Output kOutput = kOutput_;
  static constexpr int kVectors = kOutput == kInt8 ? 2 : 1;  // of a thread
  static constexpr int kColumns = kVectors * kVec;
  static constexpr int kMaxThreads = int(kRegisterColumns / kColumns);
};

// The columns of a thread.
template <class K>
using Held = float[K::kVectors][kVec];

// Address of a row whose rows are `pitch` bytes apart.
DTQ_DEV const void* row_at(const void* from, uint32_t row, uint32_t pitch) {
  return (const unsigned char*)from + uint64_t(row) * pitch;
}

template <Float kType, int n>
DTQ_DEV void read_held(const void* from, int k, float (&v)[n][kVec]) {
  DTQ_UNROLL for (int h = 0; h < n; h++) read_aligned_vector(from, kType, k + h * kVec, v[h]);
}

// The mean over the row of what `sum` has added up for this thread.
DTQ_DEV float mean_of_row(const RowPlan& p, float sum, uint32_t* words) {
  const float columns = int_to_float((int32_t)p.r.columns);
  return divide_by_integer(sum_of_block(sum, words), columns, p.inverse_columns);
}

// LayerNorm of the row whose columns are v, zeros past its end, where `inside` is false.
template <int n>
DTQ_DEV void normalize(const RowPlan& p, bool inside, uint32_t* words, float (&v)[n][kVec]) {
  float sum = sum_of_vector(v[0]), squares = 0;
  DTQ_UNROLL for (int h = 1; h < n; h++) sum = sum + sum_of_vector(v[h]);
  const float mean = mean_of_row(p, sum, words + kMeanWords);
  DTQ_UNROLL for (int h = 0; h < n; h++) {
    float square[kVec];
    DTQ_UNROLL for (int i = 0; i < kVec; i++) {
      if (inside) v[h][i] = v[h][i] - mean;
      square[i] = fmul(v[h][i], v[h][i]);
    }
    squares = h ? squares + sum_of_vector(square) : sum_of_vector(square);
  }
  const float variance = mean_of_row(p, squares, words + kVarianceWords);
  const float rstd = reciprocal(fsqrt(variance + p.r.eps));
  DTQ_UNROLL for (int h = 0; h < n; h++)
    DTQ_UNROLL for (int i = 0; i < kVec; i++) v[h][i] = fmul(v[h][i], rstd);
}

template <class K>
DTQ_DEV void modulate(const RowPlan& p, uint32_t row, int k, Held<K>& v) {
  constexpr Float kType = K::kModulation == kSameType ? K::kType : kFloat32;
  const uint32_t by = (uint32_t)modulate_row(p, row);
  Held<K> scale, shift;
  read_held<kType>(row_at(p.r.modulate_scale, by, p.modulate_pitch), k, scale);
  read_held<kType>(row_at(p.r.modulate_shift, by, p.modulate_pitch), k, shift);
  DTQ_UNROLL for (int h = 0; h < K::kVectors; h++)
    DTQ_UNROLL for (int i = 0; i < kVec; i++)
      v[h][i] = fmul(v[h][i], 1.0f + scale[h][i]) + shift[h][i];
}

DTQ_DEV void write_int8(const RowPlan& p, uint32_t row, int k, const uint32_t (&packed)[4]) {
  if (k < (int)p.r.width)
    stg((U4*)((unsigned char*)p.r.out + uint64_t(row) * p.out_pitch + k),
        U4{packed[0], packed[1], packed[2], packed[3]});
}

template <int n>
DTQ_DEV void quantize_int8(const RowPlan& p, uint32_t row, int k, uint32_t amax, uint32_t* words,
                           const float (&v)[n][kVec]) {
  const Quantizer q = quantizer(p, amax);
  uint32_t packed[n][4];
  DTQ_UNROLL for (int h = 0; h < n; h++) {
    quantize_vector(q, v[h], packed[h]);
    write_int8(p, row, k + h * kVec, packed[h]);
  }
  if (tid() == 0) stg(p.r.scale + row, q.scale);
  if (!p.r.sums) return;
  int32_t sum = 0;
  DTQ_UNROLL for (int h = 0; h < n; h++) sum += sum_of_codes(packed[h]);
  sum = sum_of_threads(sum, words + kSumWords);
  if (tid() == 0) stg(p.r.sums + row, sum);
}

DTQ_DEV void quantize_e2m1(const RowPlan& p, uint32_t row, int k, uint32_t amax, const float (&v)[kVec]) {
  const float scale = fdiv(bits_float(amax), kE2m1Max);
  uint32_t packed[4];
  doubled_e2m1(scale == 0 ? bits_float(0x7f800000) : scale, v, packed);
  write_int8(p, row, k, packed);
  if (tid() == 0) stg(p.r.scale + row, fmul(scale, 0.5f));
}

// Shared memory: [kWarpWords][exchange, if Hadamard blocks are longer than the columns of a warp].
template <class K>
DTQ_KERNEL void DTQ_BOUNDS(K::kMaxThreads, 1) rows_register_kernel(const DTQ_CONSTANT RowPlan p) {
  DTQ_SHARED(shared);
  const Rows& r = p.r;
  if (r.next_may_start) let_next_kernel_start();
  const uint32_t row = (uint32_t)block_x();
  const int k = tid() * K::kColumns;
  const bool inside = k < (int)r.columns;
  uint32_t* words = (uint32_t*)shared;

  Held<K> v = {};  // stays 0 past the end of the row
  if (inside) read_held<K::kType>(row_at(r.x, row, p.x_pitch), k, v);
  if constexpr (K::kPrologue == kGelu)
    DTQ_UNROLL for (int h = 0; h < K::kVectors; h++)
      DTQ_UNROLL for (int i = 0; i < kVec; i++) v[h][i] = gelu(v[h][i]);
  if constexpr (K::kPrologue == kNorm) normalize(p, inside, words, v);
  if constexpr (K::kModulation != kPlain)
    if (inside) modulate<K>(p, row, k, v);
  if (r.pre_scale && inside) {
    Held<K> scale;
    read_held<kBFloat16>(r.pre_scale, k, scale);
    DTQ_UNROLL for (int h = 0; h < K::kVectors; h++)
      DTQ_UNROLL for (int i = 0; i < kVec; i++) v[h][i] = fmul(v[h][i], scale[h][i]);
  }
  rotate(v, (int)r.hadamard_block, p.hadamard_scale, (float*)shared + kWarpWords);

  if constexpr (K::kOutput == kFloat) return write_rounded(r, row, k, true, v[0]);
  uint32_t amax = 0;
  if (!r.static_scale) {
    DTQ_UNROLL for (int h = 0; h < K::kVectors; h++) amax = umax(amax, amax_of_vector(v[h]));
    amax = amax_of_block(amax, words + kAmaxWords);
  }
  if constexpr (K::kOutput == kInt8) quantize_int8(p, row, k, amax, words, v);
  if constexpr (K::kOutput == kE2m1) quantize_e2m1(p, row, k, amax, v[0]);
  if constexpr (K::kOutput == kFakeQuantized) {
    fake_quantize_vector(r, amax, v[0]);
    write_rounded(r, row, k, true, v[0]);
  }
  if constexpr (K::kOutput == kNvRow || K::kOutput == kMxRow) {
    write_fp4<K::kOutput == kNvRow>(r, row, k, amax, v[0]);
    if (tid() == 0) stg(r.scale + row, fp4_row_scale(r, amax));
  }
}

}  // namespace dtq
