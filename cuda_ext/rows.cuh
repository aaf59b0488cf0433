// SPDX-License-Identifier: Apache-2.0
// Rows of activations: [GELU | LayerNorm and modulation], pre_scale, permutation, rotation, quantization.
//
// A thread block processes one row, a thread row vectors of kVec = 16 columns. There are two kernels:
// rows_register.cuh for aligned rows of which each thread holds one vector in registers, read once and
// written once; rows_tiled.cuh for all others, one tile of as many vectors as there are threads at a time.
//
// Order of float32 operations (dtq/kernels/ops.py and ops_quantize.py do the same in torch):
//   norm       mean = sum(x) / K; rstd = 1 / sqrt(sum((x - mean)^2) / K + eps);
//              ((x - mean) * rstd) * (1 + modulate_scale) + modulate_shift
//   sum        each vector of 16 columns by halves (i with i + 8, then 4, 2, 1); then neighbours, pairs of
//              neighbours and so on (0 with 1, then 0-1 with 2-3 ...) up to 512 columns; place l of 32 adds
//              those sums l, l + 32, l + 64 ... one after the other; then again neighbours, up to all 32.
//              So the order does not depend on how many vectors a thread holds.
//   transform  * pre_scale; permutation; butterflies, smallest stride first; * hadamard_block^-0.5
//   int8       scale = amax / qmax, at least 1e-8, 1 for a row of zeros, NaN for one with a NaN;
//              round(x / scale), ties to even, clamped to +-qmax, 0 for NaN
//   e4m3       scale = amax / 448; x / scale, 0 if the scale is 0, rounded to e4m3
//   E2M1       scale = amax / 6; x / scale, 0 if the scale is 0, rounded to E2M1; the int8 is twice that,
//              the stored scale half
//   NVFP4      amax at least 1e-30; u = x / amax; the scale of each 16 columns is max|u| / (1 / 2688) / 6,
//              at least 2^-9, rounded to e4m3; u / (scale * (1 / 2688)) rounded to E2M1
//   MXFP4      the scale of each 32 columns is 2^(floor(log2(max|x|)) - 2), at least 2^-126; x / scale
//              rounded to E2M1. The codes of a row with values that are not finite are arbitrary.
#pragma once
#include "exact_math.cuh"
#include "launch_rows.h"
#include "row_vectors.cuh"

namespace dtq {

// Rows, and what the host derives from it.
struct RowPlan {
  Rows r;
  float hadamard_scale;                                        // hadamard_block^-0.5
  bool aligned_x, aligned_modulate, aligned_pre, aligned_out;  // 16-byte access is allowed
  int64_t tiles;                                               // of a row; 1 in registers
  int transposed_offset;  // of the row between two rotations in shared memory, in floats; -1: in `out`
  float inverse_qmax;     // rounded
  // of r.rows_per_modulate, see modulate_row
  uint32_t modulate_multiplier;
  int modulate_shift;
  // in registers: bytes from row to row, below 2^32
  uint32_t x_pitch, modulate_pitch, out_pitch;
  float inverse_columns;
};

// At the start of shared memory: a word of each warp for every reduction over a thread block, so that each
// needs one barrier only.
constexpr int kWarpWords = 128;
constexpr int kAmaxWords = 0, kSumWords = 32, kMeanWords = 64, kVarianceWords = 96;

// row / rows_per_modulate without a division: both are below 2^31, and the multiplier is
// floor(2^(31 + shift) / rows_per_modulate) + 1 with 2^shift >= rows_per_modulate.
DTQ_DEV int64_t modulate_row(const RowPlan& p, uint32_t row) {
  return uint32_t(uint64_t(row * 2) * p.modulate_multiplier >> 32) >> p.modulate_shift;
}

// ---------------------------------------------------------------------------- rotation

// All of it on the columns of a thread: n vectors that follow one another.

// One stage inside each vector: (a + b, a - b) of columns `half` apart.
template <int half, int n>
DTQ_DEV void stage_in_vector(float (&v)[n][kVec]) {
  DTQ_UNROLL for (int h = 0; h < n; h++)
    DTQ_UNROLL for (int i = 0; i < kVec; i++)
      if (!(i & half)) {
        const float a = v[h][i], b = v[h][i + half];
        v[h][i] = a + b;
        v[h][i + half] = a - b;
      }
}

// One stage between the two vectors of a thread.
DTQ_DEV void stage_in_thread(float (&v)[2][kVec]) {
  DTQ_UNROLL for (int i = 0; i < kVec; i++) {
    const float a = v[0][i], b = v[1][i];
    v[0][i] = a + b;
    v[1][i] = a - b;
  }
}

// One stage between lanes: the lower lane gets the sum, the upper one the difference.
template <int n>
DTQ_DEV void stage_in_warp(float (&v)[n][kVec], int stride) {
  const float sign = lane() & stride ? -1.0f : 1.0f;
  DTQ_UNROLL for (int h = 0; h < n; h++)
    DTQ_UNROLL for (int i = 0; i < kVec; i++)
      v[h][i] = ffma(sign, v[h][i], shfl_xor(v[h][i], stride));
}

// One stage between warps, through memory for a vector of each thread. Neighbouring threads store to
// neighbouring words, without bank conflicts.
template <int n>
DTQ_DEV void stage_in_block(float (&v)[n][kVec], int stride, float* exchange) {
  const int threads = block_threads();
  // threads past the end of the row may have no partner; their values are zeros
  const int partner = (tid() ^ stride) < threads ? tid() ^ stride : tid();
  const float sign = tid() & stride ? -1.0f : 1.0f;
  DTQ_UNROLL for (int h = 0; h < n; h++) {
    sync_threads();
    DTQ_UNROLL for (int i = 0; i < kVec; i++) sts(exchange + i * threads + tid(), v[h][i]);
    sync_threads();
    DTQ_UNROLL for (int i = 0; i < kVec; i++)
      v[h][i] = ffma(sign, v[h][i], lds<float>(exchange + i * threads + partner));
  }
}

// Rotates the Hadamard blocks of a tile; all threads of the thread block must call it.
template <int n>
DTQ_DEV void rotate(float (&v)[n][kVec], int block, float scale, float* exchange) {
  if (block == 1) return;
  stage_in_vector<1>(v);
  if (block >= kVec) {  // the usual lengths, without a question before each stage
    stage_in_vector<2>(v);
    stage_in_vector<4>(v);
    stage_in_vector<8>(v);
  } else {
    if (block > 2) stage_in_vector<2>(v);
    if (block > 4) stage_in_vector<4>(v);
  }
  if constexpr (n == 2)
    if (block > kVec) stage_in_thread(v);
  constexpr int kColumns = n * kVec;
  DTQ_ROLLED for (int lanes = 1; lanes < 32 && lanes * kColumns < block; lanes *= 2)
    stage_in_warp(v, lanes);
  DTQ_ROLLED for (int threads = 32; threads * kColumns < block; threads *= 2)
    stage_in_block(v, threads, exchange);
  DTQ_UNROLL for (int h = 0; h < n; h++)
    DTQ_UNROLL for (int i = 0; i < kVec; i++) v[h][i] = fmul(v[h][i], scale);
}

// ---------------------------------------------------------------------------- reductions

DTQ_DEV float sum_of_vector(const float (&v)[kVec]) {
  float s[8];
  DTQ_UNROLL for (int i = 0; i < 8; i++) s[i] = v[i] + v[i + 8];
  DTQ_UNROLL for (int half = 4; half; half /= 2)
    DTQ_UNROLL for (int i = 0; i < half; i++) s[i] = s[i] + s[i + half];
  return s[0];
}

// Neighbours first.
DTQ_DEV float sum_of_lanes(float x) {
  DTQ_UNROLL for (int lanes = 1; lanes < 32; lanes *= 2) x = x + shfl_xor(x, lanes);
  return x;
}

DTQ_DEV uint32_t umax(uint32_t a, uint32_t b) { return a > b ? a : b; }

// As bits: those of magnitudes are ordered as the magnitudes are, with NaN above all.
DTQ_DEV uint32_t amax_of_vector(const float (&v)[kVec]) {
  float m[4];  // four, so that fewer instructions wait for one another
  DTQ_UNROLL for (int i = 0; i < 4; i++) m[i] = fabsf(v[i]);
  DTQ_UNROLL for (int i = 4; i < kVec; i++) m[i % 4] = max_magnitude(m[i % 4], v[i]);
  return float_bits(max_magnitude(max_magnitude(m[0], m[1]), max_magnitude(m[2], m[3])));
}

DTQ_DEV int warps_of_block() { return int(unsigned(block_threads()) / 32); }

// Stores a word of each warp, and returns that of warp `lane`, 0 for lanes from the number of warps on.
DTQ_DEV uint32_t words_of_warps(uint32_t mine, uint32_t* words, int warps) {
  if (lane() == 0) sts(words + warp(), mine);
  sync_threads();
  return lane() < warps ? lds<uint32_t>(words + lane()) : 0;
}

// The maximum over all threads of the block; to be called once. `words` are the kAmaxWords.
DTQ_DEV uint32_t amax_of_block(uint32_t x, uint32_t* words) {
  x = max_of_warp(x);
  const int warps = warps_of_block();
  return warps == 1 ? x : max_of_warp(words_of_warps(x, words, warps));
}

// The sum over all threads of the block, at most 32 warps; to be called once for each `words`.
DTQ_DEV float sum_of_block(float x, uint32_t* words) {
  x = sum_of_lanes(x);
  const int warps = warps_of_block();
  return warps == 1 ? x : sum_of_lanes(bits_float(words_of_warps(float_bits(x), words, warps)));
}

// The sum of the `count` sums of warps in shared memory, computed by every warp.
DTQ_DEV float sum_of_warps(const float* sums, int64_t count) {
  float x = lane() < count ? lds<float>(sums + lane()) : 0;
  DTQ_ROLLED for (int64_t j = lane() + 32; j < count; j += 32) x = x + lds<float>(sums + j);
  return sum_of_lanes(x);
}

DTQ_DEV int32_t sum_of_threads(int32_t x, uint32_t* words) {
  DTQ_UNROLL for (int lanes = 16; lanes; lanes /= 2) x += shfl_xor(x, lanes);
  const int warps = warps_of_block();
  if (warps == 1) return x;
  x = (int32_t)words_of_warps((uint32_t)x, words, warps);
  DTQ_UNROLL for (int lanes = 16; lanes; lanes /= 2) x += shfl_xor(x, lanes);
  return x;
}

// ---------------------------------------------------------------------------- quantization

// x / scale, to be rounded to an integer, from inverse = RN(1 / scale). With one refinement the error is
// below 1.5 * 2^-24 units in the last place before rounding. Only few quotients are so close to a tie that
// this could move them across a half-integer below 128; tests/test_rows.cpp tries all of them. Not for
// scales and quotients near the limits of float32.
DTQ_DEV float quotient(float x, float scale, float inverse) {
  const float q = fmul(x, inverse);
  return ffma(ffma(-q, scale, x), inverse, q);
}

// x / n for an integer n up to 2^16, from inverse = RN(1 / n): the float nearest to the quotient. x n^-1 is
// within 1.5 units in the last place of it, and its remainder, fewer than 2^18 such units, is exact. So the
// corrected quotient is as near as 2^-23 units before it is rounded, and x / n is at least 2^-18 units from
// any tie. Not for quotients below 2^-100.
DTQ_DEV float divide_by_integer(float x, float n, float inverse) {
  const float q = fmul(x, inverse);
  // an infinite quotient has no remainder
  return fabsf(q) < bits_float(0x7f800000) ? ffma(ffma(-q, n, x), inverse, q) : q;
}

// q rounded to an integer, |q| < 2^22, ties to even, in the low bits.
DTQ_DEV uint32_t nearest(float q) { return float_bits(q + kRoundToInt); }

// Static scales are at least 1e-8, as dtq writes them.
struct Quantizer {
  float scale, inverse, qmax;
  bool in_range;  // all values are finite and their quotients at most qmax
};

DTQ_DEV float static_scale(const Rows& r) { return ldg(r.static_scale + (r.bin ? ldg(r.bin) : 0)); }

DTQ_DEV Quantizer quantizer(const RowPlan& p, uint32_t amax) {
  const Rows& r = p.r;
  Quantizer q;
  q.qmax = int_to_float(r.qmax);
  q.in_range = !r.static_scale && amax < 0x7f800000;
  q.scale = 1;
  if (r.static_scale) {
    q.scale = static_scale(r);
  } else if (amax) {  // true for NaN: the int8 of such a row are numbers, its scale must be NaN
    q.scale = divide_by_integer(bits_float(amax), q.qmax, p.inverse_qmax);
    q.scale = q.scale < kMinInt8Scale ? kMinInt8Scale : q.scale;
  }
  q.inverse = reciprocal(q.scale);
  return q;
}

DTQ_DEV uint32_t quantize_value(const Quantizer& q, float x) {
  // beyond the range of `quotient` only the sign matters; with an infinite scale the result is 0, but
  // `quotient` would be NaN
  const float rough = fmul(x, q.inverse);
  float v = fabsf(rough) < 512 ? quotient(x, q.scale, q.inverse) : rough;
  v = v > q.qmax ? q.qmax : v;
  v = v < -q.qmax ? -q.qmax : v;
  return v == v ? nearest(v) & 0xff : 0;
}

// The low bytes of four words.
DTQ_DEV uint32_t low_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  return byte_perm(byte_perm(a, b, 0x0040), byte_perm(c, d, 0x0040), 0x5410);
}

// The int8 of a vector, four in a word.
DTQ_DEV void quantize_vector(const Quantizer& q, const float (&v)[kVec], uint32_t (&packed)[4]) {
  uint32_t c[kVec];
  if (q.in_range)
    DTQ_UNROLL for (int i = 0; i < kVec; i++) c[i] = nearest(quotient(v[i], q.scale, q.inverse));
  else
    DTQ_UNROLL for (int i = 0; i < kVec; i++) c[i] = quantize_value(q, v[i]);
  DTQ_UNROLL for (int i = 0; i < 4; i++)
    packed[i] = low_bytes(c[i * 4], c[i * 4 + 1], c[i * 4 + 2], c[i * 4 + 3]);
}

DTQ_DEV int32_t sum_of_codes(const uint32_t (&packed)[4]) {
  int32_t sum = 0;
  DTQ_UNROLL for (int i = 0; i < 4; i++) sum = dp4a(packed[i], 0x01010101, sum);
  return sum;
}

// ---------------------------------------------------------------------------- FP4

// x rounded to an E2M1 code, ties to even; 0 has no sign.
DTQ_DEV uint32_t to_e2m1(float x) {
  const float size = fabsf(x);
  const uint32_t code = uint32_t(size > 0.25f) + (size >= 0.75f) + (size > 1.25f) +
                        (size >= 1.75f) + (size > 2.5f) + (size >= 3.5f) + (size > 5.0f);
  return code ? code | (float_bits(x) >> 28 & 8) : 0;
}

// Twice the E2M1 values of a vector as bytes, four in a word.
DTQ_DEV void doubled_e2m1(float divisor, const float (&v)[kVec], uint32_t (&packed)[4]) {
  DTQ_UNROLL for (int i = 0; i < 4; i++) packed[i] = 0;
  DTQ_UNROLL for (int i = 0; i < kVec; i++) {
    const uint32_t code = to_e2m1(fdiv(v[i], divisor)), index = code & 7;
    const uint32_t size = index < 4 ? index : (2 | (index & 1)) << (index / 2 - 1);
    packed[i / 4] |= ((code & 8 ? 0u - size : size) & 255) << i % 4 * 8;
  }
}

// The block scale of 16 columns of NVFP4 that were divided by the row's amax; divides v by it.
DTQ_DEV uint32_t nvfp4_scale(float (&v)[kVec]) {
  float s = fdiv(fdiv(bits_float(amax_of_vector(v)), kNvFp4TokenScale), kE2m1Max);
  s = s < kE4m3Min ? kE4m3Min : s;
  const uint32_t byte = to_e4m3(s);
  const float scale = fmul(from_e4m3(byte), kNvFp4TokenScale);
  DTQ_UNROLL for (int i = 0; i < kVec; i++) v[i] = fdiv(v[i], scale);
  return byte;
}

// The same for MXFP4, whose 32 columns are in two neighbouring lanes; all lanes must call it.
DTQ_DEV uint32_t mxfp4_scale(float (&v)[kVec]) {
  const uint32_t mine = amax_of_vector(v), amax = umax(mine, shfl_xor(mine, 1));
  // 124 for zeros, as frexp returns exponent 0 for 0
  const uint32_t exponent = amax >> 23, byte = !amax ? 124 : exponent > 3 ? exponent - 2 : 1;
  const float inverse = bits_float((254 - byte) << 23);
  DTQ_UNROLL for (int i = 0; i < kVec; i++) v[i] = fmul(v[i], inverse);
  return byte;
}

// ---------------------------------------------------------------------------- fake quantization

// The maximum or minimum over a group of `lanes` neighbouring lanes.
DTQ_DEV float reduce_lanes(float x, int lanes, bool maximum) {
  for (int i = 1; i < lanes; i *= 2) {
    const float other = shfl_xor(x, i);
    x = (other > x) == maximum ? other : x;
  }
  return x;
}

// Rounds to an integer, |x| < 2^22, ties to even.
DTQ_DEV float round_to_integer(float x) { return (x + kRoundToInt) - kRoundToInt; }

// A scale rounded to bfloat16, at least kMinGroupScale.
DTQ_DEV float bfloat16_scale(float s) {
  return bf16_to_float(float_to_bf16(s < kMinGroupScale ? kMinGroupScale : s));
}

// Integers with a scale, and a zero point if asymmetric, for each group of `lanes` threads.
DTQ_DEV void fake_quantize_int(int bits, int lanes, bool asymmetric, float (&v)[kVec]) {
  float low = 0, high = 0;
  uint32_t amax = 0;
  DTQ_UNROLL for (int i = 0; i < kVec; i++) {
    low = v[i] < low ? v[i] : low;
    high = v[i] > high ? v[i] : high;
    amax = umax(amax, float_bits(v[i]) & 0x7fffffff);
  }
  for (int i = 1; i < lanes; i *= 2) amax = umax(amax, shfl_xor(amax, i));
  low = reduce_lanes(low, lanes, false), high = reduce_lanes(high, lanes, true);
  const float qmax = int_to_float((1 << (asymmetric ? bits : bits - 1)) - 1);
  // only amax is NaN if there is one: comparisons skip it
  const float range = amax > 0x7f800000 || !asymmetric ? bits_float(amax) : high - low;
  const float scale = bfloat16_scale(fdiv(range, qmax));
  float zero = 0, qmin = -qmax - 1;
  if (asymmetric) {
    zero = round_to_integer(fdiv(-low, scale));
    zero = zero < 0 ? 0 : zero > qmax ? qmax : zero;
    qmin = 0;
  }
  DTQ_UNROLL for (int i = 0; i < kVec; i++) {
    float q = round_to_integer(fdiv(v[i], scale)) + zero;
    q = q < qmin ? qmin : q > qmax ? qmax : q;
    v[i] = fmul(q - zero, scale);
  }
}

// x rounded to a small float type, ties to even. Values are spaced by `step` times the power of two below
// them, which is at least `min_normal`; floats near `magic` have the same spacing.
DTQ_DEV float round_to_small_float(float x, float min_normal, float max, float step) {
  float size = fabsf(x);
  size = size > max ? max : size;
  const float power = bits_float(float_bits(size < min_normal ? min_normal : size) & 0x7f800000);
  const float magic = fmul(power, step * kRoundToInt), rounded = (size + magic) - magic;
  return float_bits(x) >> 31 ? -rounded : rounded;
}

DTQ_DEV float round_to_e2m1(float x) {
  return round_to_small_float(x, kE2m1MinNormal, kE2m1Max, kE2m1Step) + 0.0f;  // -0 becomes 0
}

// The amax of an FP4 row from its bits.
DTQ_DEV float fp4_amax(uint32_t amax) {
  const float a = bits_float(amax);
  return a < kMinGroupScale ? kMinGroupScale : a;
}

DTQ_DEV float fp4_row_scale(const Rows& r, uint32_t amax) {
  if (amax >= 0x7f800000) return bits_float(0x7fc00000);
  return r.output == kNvRow ? fmul(kNvFp4TokenScale, fp4_amax(amax)) : 1;
}

// Fake-quantizes a vector; all lanes must call it, also those past the end of the row.
DTQ_DEV void fake_quantize_vector(const Rows& r, uint32_t amax, float (&v)[kVec]) {
  if (r.rounding == kRoundInt4G64) return fake_quantize_int(4, 4, false, v);
  if (r.rounding == kRoundInt4AsymG64) return fake_quantize_int(4, 4, true, v);
  if (r.rounding == kRoundInt8AsymG128) return fake_quantize_int(8, 8, true, v);
  if (r.rounding == kRoundFp8Row) {
    const float scale = fdiv(bits_float(amax), kE4m3Max);
    const float divisor = scale == 0 ? bits_float(0x7f800000) : scale;
    DTQ_UNROLL for (int i = 0; i < kVec; i++)
      v[i] = fmul(round_to_small_float(fdiv(v[i], divisor), kE4m3MinNormal, kE4m3Max, kE4m3Step), scale);
    return;
  }
  const bool nv = r.rounding == kRoundNvFp4;
  float scale, row_amax = 1;
  if (nv) {
    row_amax = fp4_amax(amax);
    DTQ_UNROLL for (int i = 0; i < kVec; i++) v[i] = fdiv(v[i], row_amax);
    scale = fmul(from_e4m3(nvfp4_scale(v)), kNvFp4TokenScale);
  } else {
    scale = bits_float(mxfp4_scale(v) << 23);
  }
  DTQ_UNROLL for (int i = 0; i < kVec; i++) v[i] = fmul(fmul(round_to_e2m1(v[i]), scale), row_amax);
}

// Floats of r.out_type, which is asked once.
DTQ_DEV void write_rounded(const Rows& r, int64_t row, int64_t k, bool aligned, const float (&v)[kVec]) {
  const int64_t at = row * r.out_stride;
  if (r.out_type == kFloat32) write_floats((float*)r.out + at, k, r.width, aligned, v);
  else if (r.out_type == kBFloat16) write_halves((uint16_t*)r.out + at, k, r.width, aligned, kBFloat16, v);
  else write_halves((uint16_t*)r.out + at, k, r.width, aligned, kFloat16, v);
}

// Quantizes and writes a vector; all lanes must call it, also those past the end of the row.
template <bool nv>
DTQ_DEV void write_fp4(const Rows& r, int64_t row, int64_t k, uint32_t amax, float (&v)[kVec]) {
  uint32_t byte;
  if constexpr (nv) {
    const float row_amax = fp4_amax(amax);
    DTQ_UNROLL for (int i = 0; i < kVec; i++) v[i] = fdiv(v[i], row_amax);
    byte = nvfp4_scale(v);
  } else {
    byte = mxfp4_scale(v);
  }
  if (k >= r.columns) return;
  uint32_t words[2] = {};
  DTQ_UNROLL for (int i = 0; i < kVec; i++) words[i / 8] |= to_e2m1(v[i]) << (i % 8 * 4);
  stg((U2*)((unsigned char*)r.out + row * r.out_stride + k / 2), U2{words[0], words[1]});
  const int64_t group = nv ? 16 : 32;
  if (k % group == 0) stg(r.block_scale + row * (r.columns / group) + k / group, (uint8_t)byte);
}

}  // namespace dtq
