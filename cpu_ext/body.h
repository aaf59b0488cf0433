// SPDX-License-Identifier: Apache-2.0
// What every instruction set does alike. Included once per file, after the file has defined
//
//   kLanes          floats of a vector
//   swapped<h>(v)   v with lanes i and i ^ h exchanged
//   transpose16     a 16 x 16 block of 32-bit values
//   low_bytes, low_halves   of each 32-bit lane, stored one after the other
//   add_codes       the codes of a step, added to the sums of 16 tokens
//   Code            how a packed code is kept
//   kQuad           codes of one token that lie side by side: what one instruction adds up
//   what weights.h asks for, and weights.h itself
//   multiply_group  some steps of a panel by 1 to kBlocks token blocks, added to the sums if `more`
//   kBlocks, kAtOnce   token blocks multiplied together, at most kGroup; steps after which their sums
//                   go to memory
//   splits          whether dot_few wants the codes of two steps in another order
//   dot_few         some steps of one output channel by up to kFew tokens
//
// Everything is in an anonymous namespace: see kernels.h.
#pragma once
#include <stddef.h>
#include <string.h>

#include "../common_ext/constants.h"

namespace dtq {
namespace {

constexpr int64_t kBlockStep = kStep * kBlockTokens;  // codes of a token block in a step
constexpr int kDots = kStep / kDotWidth;

typedef uint16_t H __attribute__((vector_size(kLanes * 2)));

inline V splat(float x) { return x - (V){}; }

inline V load(const float* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}

inline void store(float* p, V v) { memcpy(p, &v, sizeof v); }

// ---------------------------------------------------------------------------- number formats

inline V from_half(U h) {
  // the exponent of a half sits 112 below that of a float; a product by a power of two is exact
  V small = (V)((h & 0x7fff) << 13) * splat(0x1p112f);
  U inf = (U)((h & 0x7c00) == 0x7c00) & 0x7f800000;
  return (V)((U)small | inf | ((h & 0x8000) << 16));
}

inline U to_half(V f) {
  // the sum with 2^(exponent + 13) rounds the mantissa to 10 bits, ties to even
  U w = (U)f, doubled = w + w;
  V base = (V)(w & 0x7fffffff) * splat(0x1p112f) * splat(0x1p-110f);
  U bias = doubled & 0xff000000, least = (U){} + 0x71000000;
  bias = bias < least ? least : bias;
  U bits = (U)((V)((bias >> 1) + 0x07800000) + base);
  U rest = ((bits >> 13) & 0x7c00) + (bits & 0xfff), nan = (U){} + 0x7e00;
  rest = doubled > 0xff000000 ? nan : rest;
  return ((w & 0x80000000) >> 16) | rest;
}

inline U to_bfloat(V f) {
  U w = (U)f, nan = (U){} + 0x7fc0;
  U quantized = (w + 0x7fff + ((w >> 16) & 1)) >> 16;
  return (w & 0x7fffffff) > 0x7f800000 ? nan : quantized;
}

inline V load_as_float(const void* p, Float type) {
  if (type == kFloat32) return load((const float*)p);
  H h;
  memcpy(&h, p, sizeof h);
  U u = __builtin_convertvector(h, U);
  return type == kBFloat16 ? (V)(u << 16) : from_half(u);
}

// How a float of a type is kept.
template <bool wide>
struct Storage {
  typedef uint16_t T;
};
template <>
struct Storage<true> {
  typedef float T;
};

template <Float type, typename T>
inline void store_whole(T* out, V v) {
  if constexpr (type == kFloat32) store(out, v);
  else store_low_halves(type == kBFloat16 ? to_bfloat(v) : to_half(v), out);
}

inline void store_line(void* out, int64_t at, const float* values, int count, Float type) {
  for (int i = 0; i < count; i += kLanes) {
    const int left = count - i < kLanes ? count - i : kLanes;
    const V v = load(values + i);
    if (type == kFloat32) {
      memcpy((float*)out + at + i, &v, left * 4);
    } else {
      uint16_t halves[kLanes], *to = (uint16_t*)out + at + i;
      store_low_halves(type == kBFloat16 ? to_bfloat(v) : to_half(v), left < kLanes ? halves : to);
      if (left < kLanes) memcpy(to, halves, left * 2);
    }
  }
}

// ---------------------------------------------------------------------------- quantize_rows

// One step of the transform inside a vector: (a + b, a - b) of lanes h apart.
template <int h>
inline V butterfly(V v, I lane) {
  I odd = ((lane & h) != 0) & (I)((U){} + 0x80000000);
  return swap_lanes<h>(v) + (V)((I)v ^ odd);  // b + a, and a + (-b)
}

inline V butterflies(V v, I lane, int64_t block) {
  if (block > 1) v = butterfly<1>(v, lane);
  if (block > 2) v = butterfly<2>(v, lane);
  if constexpr (kLanes > 4)
    if (block > 4) v = butterfly<4>(v, lane);
  if constexpr (kLanes > 8)
    if (block > 8) v = butterfly<8>(v, lane);
  return v;
}

// Distances of a whole vector and more, count vectors a block, kept in registers.
template <int count>
inline void transform_vectors(float* x) {
  V v[count];
  for (int i = 0; i < count; i++) v[i] = load(x + i * kLanes);
  for (int half = 1; half < count; half *= 2)
    for (int i = 0; i < count; i++)
      if (!(i & half)) {
        V a = v[i], b = v[i + half];
        v[i] = a + b;
        v[i + half] = a - b;
      }
  for (int i = 0; i < count; i++) store(x + i * kLanes, v[i]);
}

inline void transform_long(float* x, int64_t block) {
  for (int64_t half = kLanes; half < block; half *= 2)
    for (int64_t at = 0; at < block; at += 2 * half)
      for (int64_t i = at; i < at + half; i += kLanes) {
        V a = load(x + i), b = load(x + i + half);
        store(x + i, a + b);
        store(x + i + half, a - b);
      }
}

inline void long_stages(float* x, int64_t columns, int64_t block) {
  for (int64_t at = 0; at < columns; at += block) {
    if (block == 2 * kLanes) transform_vectors<2>(x + at);
    else if (block == 4 * kLanes) transform_vectors<4>(x + at);
    else if (block == 8 * kLanes) transform_vectors<8>(x + at);
    else transform_long(x + at, block);
  }
}

// Row `r` as floats, scaled; the short distances of the transform go along where no order comes first.
inline void load_row(const Rows& q, int64_t r, float* row, I lane) {
  const int size = q.type == kFloat32 ? 4 : 2;
  const int64_t block = q.perm ? 1 : q.hadamard_block;
  const char* x = (const char*)q.x + r * q.stride * size;
  for (int64_t k = 0; k < q.columns; k += kLanes) {
    const int64_t left = q.columns - k;
    V v;
    if (left >= kLanes) {
      v = load_as_float(x + k * size, q.type);
      if (q.pre_scale) v = v * load(q.pre_scale + k);
    } else {
      char end[kLanes * 4] = {};
      float scale[kLanes] = {};
      memcpy(end, x + k * size, left * size);
      v = load_as_float(end, q.type);
      if (q.pre_scale) {
        memcpy(scale, q.pre_scale + k, left * 4);
        v = v * load(scale);
      }
    }
    store(row + k, butterflies(v, lane, block));
  }
}

inline void short_stages(const Rows& q, float* row, I lane) {
  for (int64_t k = 0; k < q.columns; k += kLanes)
    store(row + k, butterflies(load(row + k), lane, q.hadamard_block));
}

// The other distances, and the length that rows had.
inline void finish_transform(const Rows& q, float* row) {
  if (q.hadamard_block > kLanes) long_stages(row, q.columns, q.hadamard_block);
  if (q.hadamard_block > 1)
    for (int64_t k = 0; k < q.columns; k += kLanes) store(row + k, load(row + k) * splat(q.hadamard_scale));
}

// Row `r` scaled, in its order and rotated, in one of the two rows of `scratch`.
inline float* transformed_row(const Rows& q, int64_t r, float* scratch, I lane) {
  const int64_t wide = (q.columns + 15) / 16 * 16, blocks = q.columns / q.hadamard_block;
  float *row = scratch, *other = scratch + wide;
  load_row(q, r, row, lane);
  if (q.perm) {
    for (int64_t k = q.columns; k < wide; k++) other[k] = 0;
    for (int64_t k = 0; k < q.columns; k++) other[k] = row[q.perm[k]];
    float* ordered = other;
    other = row, row = ordered;
    short_stages(q, row, lane);
  }
  finish_transform(q, row);
  if (q.num_rotations < 2) return row;
  for (int64_t k = q.columns; k < wide; k++) other[k] = 0;
  for (int64_t b = 0; b < blocks; b++)
    for (int64_t i = 0; i < q.hadamard_block; i++) other[i * blocks + b] = row[b * q.hadamard_block + i];
  short_stages(q, other, lane);
  finish_transform(q, other);
  return other;
}

inline float amax(const float* row, int64_t columns) {
  I peak = {};  // the bits of magnitudes order as the magnitudes do, and NaN is above all
  for (int64_t k = 0; k < columns; k += kLanes) {
    I bits = (I)load(row + k) & 0x7fffffff;
    peak = bits > peak ? bits : peak;
  }
  int32_t most = 0;
  for (int i = 0; i < kLanes; i++) most = peak[i] > most ? peak[i] : most;
  float value;
  memcpy(&value, &most, 4);
  return value;
}

inline U quantized(V x, V scale, V levels) {
  V v = x / scale;
  v = v > levels ? levels : v;
  v = v < -levels ? -levels : v;
  return (U)(v + splat(kRoundToInt));  // its low byte is the integer
}

// The number of a small float type next to x, ties to the even one: spaced `step` times the power of two
// below it, which is at least `least`.
inline V round_to_grid(V x, float least, float top, float step) {
  V size = (V)((I)x & 0x7fffffff);
  size = size > splat(top) ? splat(top) : size;
  const V whole = size < splat(least) ? splat(least) : size;
  const V below = (V)((I)whole & 0x7f800000);
  const V magic = below * splat(step * kRoundToInt);  // float32 is spaced like them there
  const V level = (size + magic) - magic;
  const I sign = (I)x & (I)((U){} + 0x80000000);
  return (V)((I)level | sign);
}

inline V round_to_e2m1(V x) { return round_to_grid(x, kE2m1MinNormal, kE2m1Max, kE2m1Step) + splat(0); }  // -0 becomes 0
inline V round_to_e4m3(V x) { return round_to_grid(x, kE4m3MinNormal, kE4m3Max, kE4m3Step); }

// Twice the E2M1 level next to x / scale in the low byte.
inline U doubled_e2m1(V x, V scale) {
  const V level = round_to_e2m1(x / scale);
  return (U)(level + level + splat(kRoundToInt));
}

// Rounds to an integer, |x| < 2^22, ties to even.
inline V round_to_int(V x) { return (x + splat(kRoundToInt)) - splat(kRoundToInt); }

// A scale as bfloat16 keeps it, at least kMinGroupScale.
inline float bfloat16_scale(float scale) {
  uint32_t bits;
  scale = scale < kMinGroupScale ? kMinGroupScale : scale;
  memcpy(&bits, &scale, 4);
  if ((bits & 0x7fffffff) <= 0x7f800000) bits += 0x7fff + (bits >> 16 & 1);
  bits &= 0xffff0000;
  memcpy(&scale, &bits, 4);
  return scale;
}

// Integers of `bits` bits with a scale, and a zero, for the group.
inline void fake_quantize_int(float* x, int64_t group, int bits, bool asymmetric) {
  const float top = (float)((1 << (asymmetric ? bits : bits - 1)) - 1);
  float range = amax(x, group), zero = 0, least = -top - 1, low = 0;
  if (asymmetric && range == range) {  // a NaN is in the range already: comparisons pass over it
    V lows = {}, highs = {};
    for (int64_t k = 0; k < group; k += kLanes) {
      const V v = load(x + k);
      lows = v < lows ? v : lows;
      highs = v > highs ? v : highs;
    }
    float high = 0;
    for (int i = 0; i < kLanes; i++) {
      low = lows[i] < low ? lows[i] : low;
      high = highs[i] > high ? highs[i] : high;
    }
    range = high - low;
  }
  const V scale = splat(bfloat16_scale(range / top));
  if (asymmetric) {
    zero = round_to_int(splat(-low) / scale)[0];
    zero = zero < 0 ? 0 : zero > top ? top : zero;
    least = 0;
  }
  for (int64_t k = 0; k < group; k += kLanes) {
    V code = round_to_int(load(x + k) / scale) + splat(zero);
    code = code < splat(least) ? splat(least) : code;
    code = code > splat(top) ? splat(top) : code;
    store(x + k, (code - splat(zero)) * scale);
  }
}

// The block of a row of NVFP4, divided by the row's peak already, or of MXFP4.
inline void fake_quantize_fp4(float* x, int64_t group, float peak) {
  const float most = amax(x, group);
  float scale;
  if (group == 16) {
    const float wanted = (most / kNvFp4TokenScale) / kE2m1Max;
    scale = round_to_e4m3(splat(wanted < kE4m3Min ? kE4m3Min : wanted))[0] * kNvFp4TokenScale;
  } else {
    uint32_t bits;
    memcpy(&bits, &most, 4);
    const uint32_t exponent = bits >> 23;
    bits = (!bits ? 124 : exponent > 3 ? exponent - 2 : 1) << 23;
    memcpy(&scale, &bits, 4);
  }
  for (int64_t k = 0; k < group; k += kLanes)
    store(x + k, round_to_e2m1(load(x + k) / splat(scale)) * splat(scale) * splat(peak));
}

inline void fake_quantize_row(const Rows& q, float* row) {
  const bool wide = q.rounding == kRoundInt8AsymG128;
  if (q.rounding == kRoundNone) return;
  if (q.rounding == kRoundFp8Row) {
    const float scale = amax(row, q.columns) / kE4m3Max;
    const V divisor = splat(scale == 0 ? __builtin_inff() : scale);
    for (int64_t k = 0; k < q.columns; k += kLanes)
      store(row + k, round_to_e4m3(load(row + k) / divisor) * splat(scale));
    return;
  }
  if (q.rounding == kRoundInt4G64 || q.rounding == kRoundInt4AsymG64 || wide) {
    const int64_t group = wide ? 128 : 64;
    for (int64_t k = 0; k < q.columns; k += group)
      fake_quantize_int(row + k, group, wide ? 8 : 4, q.rounding != kRoundInt4G64);
    return;
  }
  float peak = 1;
  if (q.rounding == kRoundNvFp4) {
    peak = amax(row, q.columns);
    peak = peak < kMinGroupScale ? kMinGroupScale : peak;
    for (int64_t k = 0; k < q.columns; k += kLanes) store(row + k, load(row + k) / splat(peak));
  }
  const int64_t group = q.rounding == kRoundNvFp4 ? 16 : 32;
  for (int64_t k = 0; k < q.columns; k += group) fake_quantize_fp4(row + k, group, peak);
}

void quantize(const Rows& q, int64_t first, int64_t last, float* scratch) {
  I lane;
  for (int i = 0; i < kLanes; i++) lane[i] = i;
  const V levels = splat((float)q.qmax);
  for (int64_t r = first; r < last; r++) {
    float* row = transformed_row(q, r, scratch, lane);
    if (q.out) {
      fake_quantize_row(q, row);
      for (int64_t k = 0; k < q.columns; k += 1024)
        store_line(q.out, r * q.columns + k, row + k,
                   (int)(q.columns - k < 1024 ? q.columns - k : 1024), q.out_type);
      continue;
    }
    float scale = 1;
    if (q.static_scale) {
      scale = *q.static_scale;
    } else {
      const float peak = amax(row, q.columns);
      if (!q.qmax) {
        scale = peak / kE2m1Max;
      } else if (peak != 0) {  // NaN too: the codes of such a row are numbers, its scale must say so
        scale = peak / (float)q.qmax;
        scale = scale < kMinInt8Scale ? kMinInt8Scale : scale;
      }
    }
    q.scale[r] = q.qmax ? scale : scale / 2;
    const V divisor = splat(scale == 0 ? __builtin_inff() : scale);  // such a row is zeros
    int8_t* codes = q.x_q + r * q.columns;
    for (int64_t k = 0; k < q.columns; k += kLanes) {
      int8_t bytes[kLanes];
      const int64_t left = q.columns - k;
      const V x = load(row + k);
      store_low_bytes(q.qmax ? quantized(x, divisor, levels) : doubled_e2m1(x, divisor),
                left < kLanes ? bytes : codes + k);
      if (left < kLanes) memcpy(codes + k, bytes, left);
    }
  }
}

// ---------------------------------------------------------------------------- gelu

// e^t as dtq/kernels/fused.py writes it down.
inline V exponential(V t) {
  t = t < splat(kExpMin) ? splat(kExpMin) : t;
  t = t > splat(kExpMax) ? splat(kExpMax) : t;
  const V n = round_to_int(t * splat(kLog2E));
  const V r = (t - n * splat(kLn2High)) - n * splat(kLn2Low);
  const float taylor[] = {kExp1Over120, kExp1Over24, kExp1Over6, 0.5f, 1.0f, 1.0f};
  V p = splat(kExp1Over720);
  for (float c : taylor) p = p * r + splat(c);
  const V whole = n == n ? n : splat(0);
  return p * (V)((U)(__builtin_convertvector(whole, I) + 127) << 23);
}

inline V gelu_of(V x) {
  const V cube = x * x * x, u2 = (x + cube * splat(kGeluCubic)) * splat(kGelu2SqrtTwoOverPi);
  return x / (splat(1) + exponential(-u2));
}

template <Float type>
inline void gelu_of(const void* x, void* out, int64_t first, int64_t last) {
  typedef typename Storage<type == kFloat32>::T T;
  int64_t k = first;
  for (; k + kLanes <= last; k += kLanes)
    store_whole<type>((T*)out + k, gelu_of(load_as_float((const T*)x + k, type)));
  if (k == last) return;
  T end[kLanes] = {};
  memcpy(end, (const T*)x + k, (last - k) * sizeof(T));
  store_whole<type>(end, gelu_of(load_as_float(end, type)));
  memcpy((T*)out + k, end, (last - k) * sizeof(T));
}

void gelu(const void* x, void* out, Float type, int64_t first, int64_t last) {
  if (type == kFloat32) gelu_of<kFloat32>(x, out, first, last);
  else if (type == kBFloat16) gelu_of<kBFloat16>(x, out, first, last);
  else gelu_of<kFloat16>(x, out, first, last);
}

// ---------------------------------------------------------------------------- packing of codes

// Tokens lie in lanes: [block][step][kQuads][kTokens][kQuad]. Their sums take back what unsigned
// weights and zeros add: (w + 128) * x = w * x + 128 * x.
void pack(const Linear& g, int64_t first, int64_t last) {
  alignas(64) Activation rows[kBlockTokens][kStep];
  for (int64_t b = first; b < last; b++) {
    int32_t* sums = g.section_sums + b * g.sections * kBlockTokens;
    memset(sums, 0, g.sections * kBlockTokens * 4);
    const int8_t* codes = g.x_q + b * kBlockTokens * g.columns;
    const bool whole = g.tokens - b * kBlockTokens >= kBlockTokens && g.columns % 4 == 0;
    Activation* out = (Activation*)g.packed + b * g.steps * kBlockStep;
    const int64_t steps = g.steps / g.sections;
    for (int64_t s = 0, left = steps; s < g.steps; s++, out += kBlockStep) {
      const Span span = span_of(g, s);
      if (sizeof(Activation) == 1 && whole && span.width == kStep) {  // as they lie
        transpose16((const int32_t*)(codes + span.at), g.columns / 4, (int32_t*)out);
      } else {
        memset(rows, 0, sizeof rows);
        for (int t = 0; t < kBlockTokens && b * kBlockTokens + t < g.tokens; t++)
          for (int i = 0; i < span.width; i++) rows[t][i] = codes[t * g.columns + span.at + i];
        for (int part = 0; part < (int)sizeof(Activation); part++)
          transpose16((const int32_t*)rows + part * 16, sizeof(Activation) * 16,
                      (int32_t*)out + part * 256);
      }
      add_activations(out, sums);
      if (--left == 0) left = steps, sums += kBlockTokens;
    }
  }
}

// Tokens one after the other, each (steps, kStep); where an instruction set `splits`, even channels of
// two steps come before the odd ones.
void pack_small_m(const Linear& g) {
  const int64_t steps = g.steps / g.sections;
  memset(g.packed, 0, g.tokens * g.steps * kStep * sizeof(Activation));
  for (int64_t t = 0; t < g.tokens; t++)
    for (int64_t c = 0; c < g.sections; c++) {
      const int64_t wide = g.columns / g.sections;
      const int8_t* codes = g.x_q + t * g.columns + c * wide;
      Activation* out = (Activation*)g.packed + (t * g.steps + c * steps) * kStep;
      int32_t sum = 0;
      for (int64_t k = 0; k < wide; k++) {
        out[k] = codes[k];
        sum += codes[k];
      }
      g.section_sums[c * kSmallM + t] = sum;
      for (int64_t s = 0; splits(g) && s + 1 < steps; s += 2, out += 2 * kStep) {
        Activation two[2 * kStep];
        memcpy(two, out, sizeof two);
        for (int i = 0; i < kStep; i++) {
          out[i] = two[2 * i];
          out[kStep + i] = two[2 * i + 1];
        }
      }
    }
}

// ---------------------------------------------------------------------------- the product

// What a stored code is raised by, of a section: its zero and what makes weights unsigned.
inline int weight_offset(const Linear& g, int64_t n, int64_t section) {
  return kWeightOffset + (g.section_zero ? g.section_zero[n * g.sections + section] : g.zero);
}

// The sums of a section as floats, times its scale, added to those before it.
inline void add_section(const Linear& g, int64_t n, int64_t rows, int64_t block, int count,
                        int64_t section, const int32_t* sums, float* totals) {
  for (int64_t i = 0; i < rows; i++) {
    const V scale = splat(g.section_scale[(n + i) * g.sections + section]);
    const int raised = weight_offset(g, n + i, section);
    for (int c = 0; c < count; c++) {
      const int32_t* codes = g.section_sums + ((block + c) * g.sections + section) * kBlockTokens;
      for (int t = 0; t < kBlockTokens; t += kLanes) {
        const int64_t at = (i * kGroupBlocks + c) * kBlockTokens + t;
        I sum, code;
        memcpy(&sum, sums + at, sizeof sum);
        memcpy(&code, codes + t, sizeof code);
        const V y = __builtin_convertvector(sum - code * raised, V) * scale;
        store(totals + at, section ? load(totals + at) + y : y);
      }
    }
  }
}

inline V load_part(const void* from, int64_t at, int left, Float type) {
  const int bytes = type == kFloat32 ? 4 : 2;
  if (left >= kLanes) return load_as_float((const char*)from + at * bytes, type);
  float end[kLanes] = {};
  memcpy(end, (const char*)from + at * bytes, left * bytes);
  return load_as_float(end, type);
}

// What follows the bias, on up to 16 channels of a token.
inline void apply_epilogue(const Linear& g, int64_t token, int64_t n, int count, float* line) {
  for (int i = 0; g.gelu && i < count; i += kLanes) store(line + i, gelu_of(load(line + i)));
  for (int i = 0; g.residual && i < count; i += kLanes) {
    const V gate = load_part(g.gate, token / g.tokens_per_gate * g.rows + n + i, count - i, g.gate_type);
    const V rest = load_part(g.residual, token * g.rows + n + i, count - i, g.gate_type);
    store(line + i, gate * load(line + i) + rest);
  }
}

// float(sum) * row_scale * weight_scale + bias in this order, or total * row_scale + bias where there
// are sections; what follows; then one rounding.
inline void store_block(const Linear& g, int64_t n, int64_t token, const int32_t* sums,
                   const float* totals) {
  alignas(64) float by_row[kBlockTokens][kBlockTokens], by_token[kBlockTokens][kBlockTokens];
  const int64_t rows = g.rows - n < 16 ? g.rows - n : 16;
  float scale[kBlockTokens] = {};
  const int64_t tokens = g.tokens - token < kBlockTokens ? g.tokens - token : kBlockTokens;
  memcpy(scale, g.row_scale + token, tokens * 4);
  for (int64_t i = 0; i < rows; i++) {
    const V bias = splat(g.bias ? g.bias[n + i] : 0);
    const V weight = splat(g.section_scale ? 1 : g.weight_scale[n + i]);
    for (int t = 0; t < kBlockTokens; t += kLanes) {
      V y;
      if (g.section_scale) {
        y = load(totals + i * kGroupBlocks * kBlockTokens + t) * load(scale + t);
      } else {
        I sum, code;
        memcpy(&sum, sums + i * kGroupBlocks * kBlockTokens + t, sizeof sum);
        memcpy(&code, g.section_sums + token + t, sizeof code);
        y = __builtin_convertvector(sum - code * kWeightOffset, V) * load(scale + t) * weight;
      }
      store(&by_row[i][t], g.bias ? y + bias : y);
    }
  }
  transpose16((const int32_t*)by_row, 16, (int32_t*)by_token);
  for (int64_t t = 0; t < tokens; t++) {
    apply_epilogue(g, token + t, n, (int)rows, by_token[t]);
    store_line(g.out, (token + t) * g.rows + n, by_token[t], (int)rows, g.type);
  }
}

// Panel p in `weights`, [step][kRows][kStep]; returns how many output channels it has.
inline int64_t unpack_panel(const Linear& g, int64_t p, Weight* weights) {
  const int64_t n = p * kPanelRows, rows = g.rows - n < kPanelRows ? g.rows - n : kPanelRows;
  for (int64_t i = 0; i < rows; i++)
    for (int64_t s = 0; s < g.steps; s++) unpack_step(g, n + i, s, weights + (s * kPanelRows + i) * kStep);
  return rows;
}

inline void store_group(const Linear& g, int64_t n, int64_t rows, int64_t block, int count,
                         const int32_t* sums, const float* totals) {
  for (int c = 0; c < count; c++)
    for (int i = 0; i < rows; i += 16) {
      const int first = (i * kGroupBlocks + c) * kBlockTokens;
      store_block(g, n + i, (block + c) * kBlockTokens, sums + first, totals ? totals + first : nullptr);
    }
}

void multiply(const Linear& g, int64_t block, int64_t block_end, int64_t panel, int64_t panel_end,
              void* scratch) {
  alignas(64) int32_t sums[kPanelRows * kGroupBlocks * kBlockTokens];
  alignas(64) float totals[kPanelRows * kGroupBlocks * kBlockTokens];
  Weight* weights = (Weight*)scratch;
  const int64_t steps = g.steps / g.sections, next = g.steps * kBlockStep;
  for (int64_t p = panel; p < panel_end; p++) {
    const int64_t n = p * kPanelRows, rows = unpack_panel(g, p, weights);
    int64_t at = block, groups = (block_end - block + kMaxBlocks - 1) / kMaxBlocks;
    for (; groups; groups--) {
      // as even as they come: a block alone makes poor use of the registers
      const int count = (int)((block_end - at + groups - 1) / groups);
      const Activation* codes = (const Activation*)g.packed + at * next;
      for (int64_t section = 0; section < g.sections; section++) {
        const int64_t end = (section + 1) * steps;
        for (int64_t step = section * steps, some; step < end; step += some) {
          some = end - step < kMaxSteps ? end - step : kMaxSteps;
          multiply_group(weights + step * kPanelRows * kStep, codes + step * kBlockStep, some, next, count,
                         step > section * steps, sums);
        }
        if (g.section_scale) add_section(g, n, rows, at, count, section, sums, totals);
      }
      store_group(g, n, rows, at, count, sums, totals);
      at += count;
    }
  }
}

void multiply_small_m(const Linear& g, int64_t first, int64_t last) {
  alignas(64) float line[kSmallM][16];
  for (int64_t n = first; n < last; n += 16) {
    const int rows = (int)(last - n < 16 ? last - n : 16);
    for (int i = 0; i < rows; i++) {
      int32_t sums[kSmallM];
      float y[kSmallM];
      const int64_t steps = g.steps / g.sections;
      for (int64_t section = 0; section < g.sections; section++) {
        const int32_t* codes = g.section_sums + section * kSmallM;
        dot_small_m(g, n + i, section * steps, (section + 1) * steps, sums);
        if (!g.section_scale) {
          for (int t = 0; t < g.tokens; t++)
            y[t] = (float)(sums[t] - codes[t] * kWeightOffset) * g.row_scale[t] * g.weight_scale[n + i];
          break;
        }
        const float scale = g.section_scale[(n + i) * g.sections + section];
        const int raised = weight_offset(g, n + i, section);
        for (int t = 0; t < g.tokens; t++) {
          const float part = (float)(sums[t] - codes[t] * raised) * scale;
          y[t] = section ? y[t] + part : part;
        }
      }
      for (int t = 0; t < g.tokens; t++) {
        if (g.section_scale) y[t] = y[t] * g.row_scale[t];
        line[t][i] = g.bias ? y[t] + g.bias[n + i] : y[t];
      }
    }
    for (int t = 0; t < g.tokens; t++) {
      apply_epilogue(g, t, n, rows, line[t]);
      store_line(g.out, t * g.rows + n, line[t], rows, g.type);
    }
  }
}

}  // namespace
}  // namespace dtq
