// SPDX-License-Identifier: Apache-2.0
// Rows of activations: [GELU | LayerNorm and modulate], pre_scale, order, rotation, quantize.
//
// A block of threads does a row, a thread runs of 16 columns side by side. Two kernels: rows_held.cuh for
// rows of which each thread holds one run, everything aligned: read once, written once;
// rows_streamed.cuh for all the rest, tile by tile of as many runs as there are threads.
//
// Order of float32 operations (dtq/kernels/ops.py and fused.py do the same in torch):
//   norm       mean = sum(x) / K; rstd = 1 / sqrt(sum((x - mean)^2) / K + eps);
//              ((x - mean) * rstd) * (1 + modulate_scale) + modulate_shift
//   sum        each run of 16 columns by halves (i with i + 8, then 4, 2, 1); lane l of 32 adds the
//              runs l, l + 32, l + 64 ... one after the other; lanes by halves (16, 8, 4, 2, 1)
//   then       * pre_scale; order; butterflies, smallest distance first; * block^-0.5
//   int8       scale = max|x| / levels, at least 1e-8, 1 for a row of zeros, NaN for one
//              with a NaN; round(x / scale), ties to even, within +-levels, 0 for NaN
//   e4m3       scale = max|x| / 448; x / scale, 0 where the scale is 0, rounded to e4m3
//   E2M1       scale = max|x| / 6; x / scale, 0 where the scale is 0, rounded to E2M1; codes are twice
//              that, the scale half
//   NVFP4      peak = max|x|, at least 1e-30; u = x / peak; of each 16 columns the scale is max|u| /
//              (1 / 2688) / 6, at least 2^-9, rounded to e4m3; u / (scale * (1 / 2688)) rounded to E2M1
//   MXFP4      of each 32 columns the scale is 2^(floor(log2(max|x|)) - 2), at least 2^-126; x / scale
//              rounded to E2M1. Codes of a row that is not finite are any.
#pragma once
#include "launch_rows.h"
#include "numbers.cuh"
#include "runs.cuh"

namespace dtq {

// What the host works out from Rows.
struct RowPlan {
  Rows r;
  float unit;                                          // block^-0.5
  bool whole_x, whole_modulate, whole_pre, whole_out;  // 16-byte access is allowed
  int64_t tiles;                                       // of a row; one if it is held
  int dealt;  // floats before the row in shared memory between two turns; -1: it is in `out`
};

constexpr int kWarpWords = 64;  // at the start of shared memory: what `largest` and `total` use

// ---------------------------------------------------------------------------- rotation

// One step inside a thread: (a + b, a - b) of columns `half` apart.
template <int half>
DTQ_DEV void step_in_thread(float (&v)[kRun]) {
  DTQ_UNROLL for (int i = 0; i < kRun; i++)
    if (!(i & half)) {
      const float a = v[i], b = v[i + half];
      v[i] = a + b;
      v[i + half] = a - b;
    }
}

// One step between lanes: the partner's values, plus ours in the lower half, minus ours in the upper.
DTQ_DEV void step_in_warp(float (&v)[kRun], int distance) {
  const float sign = lane() & distance ? -1.0f : 1.0f;
  DTQ_UNROLL for (int i = 0; i < kRun; i++)
    v[i] = ffma(sign, v[i], shfl_xor(v[i], distance));
}

// One step between warps; values lie thread by thread, so that neighbours use different banks.
DTQ_DEV void step_in_block(float (&v)[kRun], int distance, float* exchange) {
  const int threads = block_threads();
  // threads beyond the row may have no partner; theirs are zeros
  const int partner = (tid() ^ distance) < threads ? tid() ^ distance : tid();
  sync_threads();
  DTQ_UNROLL for (int i = 0; i < kRun; i++) sts(exchange + i * threads + tid(), v[i]);
  sync_threads();
  const float sign = tid() & distance ? -1.0f : 1.0f;
  DTQ_UNROLL for (int i = 0; i < kRun; i++)
    v[i] = ffma(sign, v[i], lds<float>(exchange + i * threads + partner));
}

// The blocks of a tile; every thread of the block calls it.
DTQ_DEV void rotate(float (&v)[kRun], int64_t block, float unit, float* exchange) {
  if (block == 1) return;
  step_in_thread<1>(v);
  if (block > 2) step_in_thread<2>(v);
  if (block > 4) step_in_thread<4>(v);
  if (block > 8) step_in_thread<8>(v);
  DTQ_ROLLED for (int lanes = 1; lanes < 32 && lanes * kRun < block; lanes *= 2)
    step_in_warp(v, lanes);
  DTQ_ROLLED for (int threads = 32; threads * kRun < block; threads *= 2)
    step_in_block(v, threads, exchange);
  DTQ_UNROLL for (int i = 0; i < kRun; i++) v[i] = fmul(v[i], unit);
}

// ---------------------------------------------------------------------------- over a row

DTQ_DEV float sum_of_run(const float (&v)[kRun]) {
  float s[8];
  DTQ_UNROLL for (int i = 0; i < 8; i++) s[i] = v[i] + v[i + 8];
  DTQ_UNROLL for (int half = 4; half; half /= 2)
    DTQ_UNROLL for (int i = 0; i < half; i++) s[i] = s[i] + s[i + half];
  return s[0];
}

DTQ_DEV float sum_of_lanes(float x) {
  DTQ_UNROLL for (int lanes = 16; lanes; lanes /= 2) x = x + shfl_xor(x, lanes);
  return x;
}

// The sums of all runs of a row lie in `runs`; every warp of the block adds them up for itself.
DTQ_DEV float sum_of_block(const float* runs, int64_t count) {
  sync_threads();
  float x = 0;
  for (int64_t j = lane(); j < count; j += 32) x = x + lds<float>(runs + j);
  x = sum_of_lanes(x);
  sync_threads();  // they may be written again
  return x;
}

DTQ_DEV uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

// The bits of magnitudes order as the magnitudes do, and NaN is above all.
DTQ_DEV uint32_t peak_of_run(const float (&v)[kRun]) {
  uint32_t peak = 0;
  DTQ_UNROLL for (int i = 0; i < kRun; i++) peak = larger(peak, float_bits(v[i]) & 0x7fffffff);
  return peak;
}

// Of all threads of the block, called once; `words` holds one a warp.
DTQ_DEV uint32_t largest(uint32_t x, uint32_t* words) {
  DTQ_UNROLL for (int lanes = 16; lanes; lanes /= 2) x = larger(x, shfl_xor(x, lanes));
  const int warps = block_threads() / 32;
  if (warps == 1) return x;
  if (lane() == 0) sts(words + warp(), x);
  sync_threads();
  x = lane() < warps ? lds<uint32_t>(words + lane()) : 0;
  DTQ_UNROLL for (int lanes = 16; lanes; lanes /= 2) x = larger(x, shfl_xor(x, lanes));
  return x;
}

DTQ_DEV int32_t total(int32_t x, uint32_t* words) {
  DTQ_UNROLL for (int lanes = 16; lanes; lanes /= 2) x += shfl_xor(x, lanes);
  const int warps = block_threads() / 32;
  if (warps == 1) return x;
  words += 32;  // others may not have read the largest yet
  if (lane() == 0) sts(words + warp(), (uint32_t)x);
  sync_threads();
  x = lane() < warps ? lds<int32_t>(words + lane()) : 0;
  DTQ_UNROLL for (int lanes = 16; lanes; lanes /= 2) x += shfl_xor(x, lanes);
  return x;
}

// ---------------------------------------------------------------------------- quantizing

// x / scale for rounding to an integer, from inverse = RN(1 / scale). With one refinement the error is
// below 1.5 * 2^-24 units in the last place before rounding; the quotients so near to a tie that this
// could move them across a half-integer below 128 are few, and tests/test_rows.cpp tries every one.
// For scales and quotients far from the ends of the float range.
DTQ_DEV float quotient(float x, float scale, float inverse) {
  const float q = fmul(x, inverse);
  return ffma(ffma(-q, scale, x), inverse, q);
}

// The integer next to q, |q| < 2^22, ties to even, in the low bits.
DTQ_DEV uint32_t nearest(float q) { return float_bits(q + kRoundToInt); }

// How the numbers of a row become codes. A static scale is at least 1e-8, as dtq writes them.
struct Quantizer {
  float scale, inverse, levels;
  bool plain;  // every number is finite and within the levels
};

DTQ_DEV float stored_scale(const Rows& r) { return ldg(r.fixed + (r.bin ? ldg(r.bin) : 0)); }

DTQ_DEV Quantizer quantizer(const Rows& r, uint32_t peak) {
  Quantizer q;
  q.levels = int_to_float(r.levels);
  q.plain = !r.fixed && peak < 0x7f800000;
  q.scale = 1;
  if (r.fixed) {
    q.scale = stored_scale(r);
  } else if (peak) {  // NaN too: the codes of such a row are numbers, its scale must say so
    q.scale = fdiv(bits_float(peak), q.levels);
    q.scale = q.scale < kMinInt8Scale ? kMinInt8Scale : q.scale;
  }
  q.inverse = fdiv(1, q.scale);
  return q;
}

DTQ_DEV uint32_t code_of(const Quantizer& q, float x) {
  // where the quotient is out of reach of `quotient`, its sign is all that counts; by an infinite
  // scale everything is 0, and there `quotient` gives NaN
  const float rough = fmul(x, q.inverse);
  float v = fabsf(rough) < 512 ? quotient(x, q.scale, q.inverse) : rough;
  v = v > q.levels ? q.levels : v;
  v = v < -q.levels ? -q.levels : v;
  return v == v ? nearest(v) & 0xff : 0;
}

// The codes of a run, four in a word. Returns their sum.
DTQ_DEV int32_t codes_of(const Quantizer& q, const float (&v)[kRun], uint32_t (&packed)[4]) {
  int32_t sum = 0;
  DTQ_UNROLL for (int i = 0; i < 4; i++) {
    uint32_t c[4];
    if (q.plain)
      DTQ_UNROLL for (int j = 0; j < 4; j++)
        c[j] = nearest(quotient(v[i * 4 + j], q.scale, q.inverse));
    else
      DTQ_UNROLL for (int j = 0; j < 4; j++) c[j] = code_of(q, v[i * 4 + j]);
    // the low bytes of four words
    packed[i] = byte_perm(byte_perm(c[0], c[1], 0x0040), byte_perm(c[2], c[3], 0x0040), 0x5410);
    sum = dp4a(packed[i], 0x01010101, sum);
  }
  return sum;
}

// ---------------------------------------------------------------------------- FP4

// The E2M1 code next to x, ties to the even one; what rounds to 0 has no sign.
DTQ_DEV uint32_t e2m1_of(float x) {
  const float size = fabsf(x);
  const uint32_t code = uint32_t(size > 0.25f) + (size >= 0.75f) + (size > 1.25f) +
                        (size >= 1.75f) + (size > 2.5f) + (size >= 3.5f) + (size > 5.0f);
  return code ? code | (float_bits(x) >> 28 & 8) : 0;
}

// Codes of a run as bytes of twice the level, four in a word.
DTQ_DEV void doubled_levels(float divisor, const float (&v)[kRun], uint32_t (&packed)[4]) {
  DTQ_UNROLL for (int i = 0; i < 4; i++) packed[i] = 0;
  DTQ_UNROLL for (int i = 0; i < kRun; i++) {
    const uint32_t code = e2m1_of(fdiv(v[i], divisor)), index = code & 7;
    const uint32_t size = index < 4 ? index : (2 | (index & 1)) << (index / 2 - 1);
    packed[i / 4] |= ((code & 8 ? 0u - size : size) & 255) << i % 4 * 8;
  }
}

// The scale of a run of 16 columns of NVFP4 that were divided by the row's peak, and their quotients.
DTQ_DEV uint32_t nv_scale(float (&v)[kRun]) {
  float s = fdiv(fdiv(bits_float(peak_of_run(v)), kNvFp4TokenScale), kE2m1Max);
  s = s < kE4m3Min ? kE4m3Min : s;
  const uint32_t byte = to_e4m3(s);
  const float scale = fmul(from_e4m3(byte), kNvFp4TokenScale);
  DTQ_UNROLL for (int i = 0; i < kRun; i++) v[i] = fdiv(v[i], scale);
  return byte;
}

// The same of MXFP4, whose 32 columns two neighbouring lanes hold; all lanes come here.
DTQ_DEV uint32_t mx_scale(float (&v)[kRun]) {
  const uint32_t mine = peak_of_run(v), peak = larger(mine, shfl_xor(mine, 1));
  // a block of zeros has the exponent that frexp gives 0
  const uint32_t exponent = peak >> 23, byte = !peak ? 124 : exponent > 3 ? exponent - 2 : 1;
  const float inverse = bits_float((254 - byte) << 23);
  DTQ_UNROLL for (int i = 0; i < kRun; i++) v[i] = fmul(v[i], inverse);
  return byte;
}

// ---------------------------------------------------------------------------- rounding and back

// The largest or smallest of a group of `lanes` neighbours.
DTQ_DEV float over_lanes(float x, int lanes, bool most) {
  for (int i = 1; i < lanes; i *= 2) {
    const float other = shfl_xor(x, i);
    x = (other > x) == most ? other : x;
  }
  return x;
}

// Rounds to an integer, |x| < 2^22, ties to even.
DTQ_DEV float integer(float x) { return (x + kRoundToInt) - kRoundToInt; }

// A scale as bfloat16 keeps it, at least 1e-30.
DTQ_DEV float stored_scale(float s) {
  return bf16_to_float(float_to_bf16(s < kMinGroupScale ? kMinGroupScale : s));
}

// Integers of `bits` bits with a scale, and a zero, for each group of `lanes` threads.
DTQ_DEV void round_integers(int bits, int lanes, bool asymmetric, float (&v)[kRun]) {
  float low = 0, high = 0;
  uint32_t peak = 0;
  DTQ_UNROLL for (int i = 0; i < kRun; i++) {
    low = v[i] < low ? v[i] : low;
    high = v[i] > high ? v[i] : high;
    peak = larger(peak, float_bits(v[i]) & 0x7fffffff);
  }
  for (int i = 1; i < lanes; i *= 2) peak = larger(peak, shfl_xor(peak, i));
  low = over_lanes(low, lanes, false), high = over_lanes(high, lanes, true);
  const float top = int_to_float((1 << (asymmetric ? bits : bits - 1)) - 1);
  // a NaN is in the peak alone: comparisons pass over it
  const float range = peak > 0x7f800000 || !asymmetric ? bits_float(peak) : high - low;
  const float scale = stored_scale(fdiv(range, top));
  float zero = 0, least = -top - 1;
  if (asymmetric) {
    zero = integer(fdiv(-low, scale));
    zero = zero < 0 ? 0 : zero > top ? top : zero;
    least = 0;
  }
  DTQ_UNROLL for (int i = 0; i < kRun; i++) {
    float code = integer(fdiv(v[i], scale)) + zero;
    code = code < least ? least : code > top ? top : code;
    v[i] = fmul(code - zero, scale);
  }
}

// The number of a small float type next to x, ties to the even one: spaced `step` times the power of two
// below it, which is at least `least`; 3 * 2^22 * step times that is spaced so in float32.
DTQ_DEV float on_grid(float x, float least, float top, float step) {
  float size = fabsf(x);
  size = size > top ? top : size;
  const float below = bits_float(float_bits(size < least ? least : size) & 0x7f800000);
  const float magic = fmul(below, step * kRoundToInt), level = (size + magic) - magic;
  return float_bits(x) >> 31 ? -level : level;
}

DTQ_DEV float on_e2m1(float x) { return on_grid(x, kE2m1MinNormal, kE2m1Max, kE2m1Step) + 0.0f; }  // -0 becomes 0

// The scale of the whole row, from the bits of its largest magnitude.
DTQ_DEV float fp4_peak(uint32_t peak) {
  const float p = bits_float(peak);
  return p < kMinGroupScale ? kMinGroupScale : p;
}

DTQ_DEV float fp4_row_scale(const Rows& r, uint32_t peak) {
  if (peak >= 0x7f800000) return bits_float(0x7fc00000);
  return r.output == kNvRow ? fmul(kNvFp4TokenScale, fp4_peak(peak)) : 1;
}

// A run as the format leaves it; all lanes come here, those beyond the row as well.
DTQ_DEV void round_run(const Rows& r, uint32_t peak, float (&v)[kRun]) {
  if (r.rounding == kRoundInt4G64) return round_integers(4, 4, false, v);
  if (r.rounding == kRoundInt4AsymG64) return round_integers(4, 4, true, v);
  if (r.rounding == kRoundInt8AsymG128) return round_integers(8, 8, true, v);
  if (r.rounding == kRoundFp8Row) {
    const float scale = fdiv(bits_float(peak), kE4m3Max);
    const float divisor = scale == 0 ? bits_float(0x7f800000) : scale;
    DTQ_UNROLL for (int i = 0; i < kRun; i++)
      v[i] = fmul(on_grid(fdiv(v[i], divisor), kE4m3MinNormal, kE4m3Max, kE4m3Step), scale);
    return;
  }
  const bool nv = r.rounding == kRoundNvFp4;
  float scale, whole = 1;
  if (nv) {
    whole = fp4_peak(peak);
    DTQ_UNROLL for (int i = 0; i < kRun; i++) v[i] = fdiv(v[i], whole);
    scale = fmul(from_e4m3(nv_scale(v)), kNvFp4TokenScale);
  } else {
    scale = bits_float(mx_scale(v) << 23);
  }
  DTQ_UNROLL for (int i = 0; i < kRun; i++) v[i] = fmul(fmul(on_e2m1(v[i]), scale), whole);
}

DTQ_DEV void write_rounded(const Rows& r, int64_t row, int64_t k, bool whole, const float (&v)[kRun]) {
  const int64_t at = row * r.out_stride;
  if (r.out_type == kFloat32) write_floats((float*)r.out + at, k, r.width, whole, v);
  else write_halves((uint16_t*)r.out + at, k, r.width, whole, r.out_type, v);
}

// Writes a run; all lanes come here, those beyond the row as well.
DTQ_DEV void write_fp4(const Rows& r, int64_t row, int64_t k, uint32_t peak, float (&v)[kRun]) {
  const bool nv = r.output == kNvRow;
  uint32_t byte;
  if (nv) {
    const float whole = fp4_peak(peak);
    DTQ_UNROLL for (int i = 0; i < kRun; i++) v[i] = fdiv(v[i], whole);
    byte = nv_scale(v);
  } else {
    byte = mx_scale(v);
  }
  if (k >= r.columns) return;
  uint32_t words[2] = {};
  DTQ_UNROLL for (int i = 0; i < kRun; i++) words[i / 8] |= e2m1_of(v[i]) << (i % 8 * 4);
  stg((U2*)((unsigned char*)r.out + row * r.out_stride + k / 2), U2{words[0], words[1]});
  const int64_t block = nv ? 16 : 32;
  if (k % block == 0) stg(r.block_scale + row * (r.columns / block) + k / block, (uint8_t)byte);
}

}  // namespace dtq
