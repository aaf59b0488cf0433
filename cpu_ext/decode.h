// SPDX-License-Identifier: Apache-2.0
// Stored weights of every format: decoded, and multiplied with float tokens. Needs `struct Isa`, see isa.h.
//
// A value equals that of the format's `unpack` bit for bit, rounded once to the requested type. Most
// formats have at most 16 values per group: these are computed once per group, then looked up.
#pragma once
#include "floats.h"

namespace dtq {
namespace {

constexpr int kRun = 16;  // columns decoded by one call of decode_run
constexpr int kVectors = kRun / kLanes;
// kTileTokens tokens x kRowsAtOnce output channels are multiplied together, sums in registers.
constexpr int kTileTokens = kLanes == 16 ? 4 : 2;

inline U lanes() {
  U lane;
  for (int i = 0; i < kLanes; i++) lane[i] = i;
  return lane;
}

inline V rounded_to(V v, Float type, bool finite) {
  if (type == kFloat32) return v;
  if (type == kFloat16) return from_half(to_half(v));
  const U w = (U)v;
  return finite ? (V)((w + 0x7fff + ((w >> 16) & 1)) & 0xffff0000) : (V)(to_bfloat16(v) << 16);
}

inline float from_bfloat16(uint16_t bits) {
  const uint32_t wide = (uint32_t)bits << 16;
  float value;
  memcpy(&value, &wide, 4);
  return value;
}

// e4m3 bytes, one per lane. Their exponent bias is 120 below that of a float.
inline V from_e4m3(U byte) {
  V v = (V)((byte & 0x7f) << 20) * splat(0x1p120f);
  U nan = (U)((byte & 0x7f) == 0x7f) & 0x7fc00000;
  return (V)((U)v | nan | ((byte & 0x80) << 24));
}

inline float scale_at(const StoredWeight& w, int64_t at) {
  switch (w.scale_type) {
    case kNoScale: return 1;
    case kScaleFloat32: return ((const float*)w.scale)[at];
    case kScaleBFloat16: return from_bfloat16(((const uint16_t*)w.scale)[at]);
    case kScaleE4m3: return e4m3_of[((const uint8_t*)w.scale)[at]] * *w.scale_2;
    default: {
      const uint32_t bits = (uint32_t)((const uint8_t*)w.scale)[at] << 23;
      float value;
      memcpy(&value, &bits, 4);
      return value;
    }
  }
}

inline uint32_t word_at(const uint8_t* p) {
  uint32_t word;
  memcpy(&word, p, 4);
  return word;
}

// Vector `part` of the codes of 16 columns. 4-bit codes may have other bits above them.
template <int bits>
inline U codes_at(const uint8_t* p, int part) {
  if constexpr (bits == 8) return Isa::load_bytes(p + part * kLanes);
  const int bit = part * kLanes * bits;
  U words;
  if constexpr (kLanes == 16 && bits > 2) {  // more than 32 bits: two words of eight codes
    words = (lanes() & 8) != 0 ? (U){} + word_at(p + bits) : (U){} + word_at(p);
    words = words >> (lanes() & 7) * bits;
  } else {
    words = ((U){} + (word_at(p + bit / 8) >> bit % 8)) >> lanes() * bits;
  }
  return bits == 4 ? words : words & ((1u << bits) - 1);
}

// The values of the codes of a group.
struct Group {
  alignas(64) float table[kRun];
  float scale, zero;
  bool finite;  // the scale and the codebook
};

constexpr bool uses_table(Encoding kind, int bits) {
  return kind == kTable || kind == kTwoLevel || kind == kTrits || (kind == kAffine && bits < 8);
}

template <Encoding kind>
inline float group_scale(const StoredWeight& w, int64_t n, int64_t at) {
  return scale_at(w, kind == kTwoLevel || kind == kWords ? n : at);
}

template <Encoding kind>
inline float group_zero(const StoredWeight& w, int64_t at) {
  return kind == kTrits ? 1 : w.zero ? w.zero[at] : w.offset;
}

// The values of codes [i * kLanes, (i + 1) * kLanes), before the scale.
template <Encoding kind, int bits>
inline V values_of_codes(const StoredWeight& w, int64_t at, int i) {
  const I code = (I)(lanes() + i * kLanes);
  if constexpr (kind == kTable) return load(w.codebook + i * kLanes);
  if constexpr (kind != kTwoLevel)
    return __builtin_convertvector(code, V) - splat(group_zero<kind>(w, at));
  const int byte = w.group_bytes[at], zero = byte & ((1 << bits) - 1);
  const I wide = (code - zero) * ((byte >> bits) + 1);
  return __builtin_convertvector((wide << 24) >> 24, V);  // wraps as int8 does
}

template <Encoding kind, int bits>
inline void fill_group(const Decode& d, int64_t n, int64_t at, Group& group) {
  const StoredWeight& w = d.weight;
  group.scale = group_scale<kind>(w, n, at);
  group.zero = group_zero<kind>(w, at);
  group.finite = group.scale - group.scale == 0 && w.finite;
  if constexpr (!uses_table(kind, bits)) return;
  for (int i = 0; i < kVectors; i++) {
    const V value = values_of_codes<kind, bits>(w, at, i) * splat(group.scale);
    store(group.table + i * kLanes, rounded_to(value, d.type, group.finite));
  }
}

// 16 columns of a group whose codes are at p.
template <Encoding kind, int bits>
inline void decode_run(const Decode& d, const uint8_t* p, const Group& group, float* out) {
  uint16_t words[kRun];
  if constexpr (kind == kWords) {
    constexpr int vector = bits == 8 ? 4 : 2;
    uint64_t all;
    memcpy(&all, p, 8);
    for (int i = 0; i < kRun / vector; i++, all >>= bits)
      memcpy(words + i * vector, d.weight.words + (all & ((1 << bits) - 1)) * vector, vector * 2);
  }
  for (int i = 0; i < kVectors; i++) {
    V v;
    if constexpr (uses_table(kind, bits)) {
      v = Isa::lookup(group.table, codes_at<kind == kTrits ? 8 : bits>(p, i));
    } else {
      if constexpr (kind == kWords) v = load_as_float(words + i * kLanes, kBFloat16);
      else if constexpr (kind == kFloat8) v = from_e4m3(Isa::load_bytes(p + i * kLanes));
      else v = __builtin_convertvector(Isa::load_signed_bytes(p + i * kLanes), V) - splat(group.zero);
      v = rounded_to(v * splat(group.scale), d.type, kind == kAffine && group.finite);
    }
    store(out + i * kLanes, v);
  }
}

// Unpacks the ternary codes of columns [first, last) of row n to one a byte.
inline const uint8_t* unpack_trits(const StoredWeight& w, int64_t n, int64_t first, int64_t last,
                                   uint8_t* codes) {
  const uint8_t* row = w.weight + n * w.row_bytes;
  const int64_t packed = w.columns / 5 * 5, skip = first % 5;
  uint8_t* to = codes;
  for (int64_t byte = first / 5; byte < w.row_bytes && byte * 5 < last; byte++, to += 5)
    memcpy(to, trits_of[row[byte]], 8);
  for (int64_t k = first > packed ? first : packed; k < last; k++)
    codes[skip + k - first] = w.tail[n * (w.columns - packed) + k - packed];
  return codes + skip;
}

// Decodes columns [first, last) of row n: at most kChunk of them, `first` a multiple of 16. Writes whole
// runs of 16 columns.
template <Encoding kind, int bits>
void decode_columns(const Decode& d, int64_t n, int64_t first, int64_t last, float* out) {
  const StoredWeight& w = d.weight;
  constexpr int vector = kind != kWords ? 1 : bits == 8 ? 4 : 2;
  constexpr int run_bytes = kind == kTrits ? kRun : kRun / vector * bits / 8;
  const int64_t group_size = kind == kWords || w.groups == 1 ? w.columns : w.columns / w.groups;
  const uint8_t *p = w.weight + n * w.row_bytes + first / kRun * run_bytes, *end = w.end;
  uint8_t codes[kind == kTrits ? kChunk + 2 * kRun : 1] = {};
  if constexpr (kind == kTrits) {
    p = unpack_trits(w, n, first, last, codes);
    end = codes + sizeof codes;
  }
  for (int64_t k = first, g = first / group_size; k < last; g++) {
    const int64_t stop = (g + 1) * group_size < last ? (g + 1) * group_size : last;
    Group group;
    fill_group<kind, bits>(d, n, n * w.groups + g, group);
    if (p + (stop - k + kRun) / kRun * run_bytes + kRun <= end) {
      for (; k < stop; k += kRun, p += run_bytes, out += kRun)
        decode_run<kind, bits>(d, p, group, out);
    } else {  // reading a whole run could read past the matrix
      for (; k < stop; k += kRun, p += run_bytes, out += kRun) {
        uint8_t copy[kRun] = {};
        if (p < end) memcpy(copy, p, end - p < kRun ? end - p : kRun);
        decode_run<kind, bits>(d, copy, group, out);
      }
    }
    k = stop;
  }
}

// The same of a weight that is not quantized.
void float_columns(const Decode& d, int64_t n, int64_t first, int64_t last, float* out) {
  const uint8_t* row = d.weight.weight + n * d.weight.row_bytes;
  for (int64_t k = first; k < last; k += kLanes, out += kLanes) store(out, part_as_float(row, k, last - k, d.type));
}

typedef void (*DecodeColumns)(const Decode&, int64_t n, int64_t first, int64_t last, float* out);

// Null if no format has this encoding and number of bits.
inline DecodeColumns decoder_of(const StoredWeight& w) {
  if (w.encoding == kFloats) return float_columns;
  switch (w.encoding * 16 + w.bits) {
    case kAffine * 16 + 2: return decode_columns<kAffine, 2>;
    case kAffine * 16 + 3: return decode_columns<kAffine, 3>;
    case kAffine * 16 + 4: return decode_columns<kAffine, 4>;
    case kAffine * 16 + 8: return decode_columns<kAffine, 8>;
    case kTable * 16 + 3: return decode_columns<kTable, 3>;
    case kTable * 16 + 4: return decode_columns<kTable, 4>;
    case kFloat8 * 16 + 8: return decode_columns<kFloat8, 8>;
    case kWords * 16 + 6: return decode_columns<kWords, 6>;
    case kWords * 16 + 8: return decode_columns<kWords, 8>;
    case kTrits * 16 + 2: return decode_columns<kTrits, 2>;
    case kTwoLevel * 16 + 3: return decode_columns<kTwoLevel, 3>;
    case kTwoLevel * 16 + 4: return decode_columns<kTwoLevel, 4>;
    default: return nullptr;
  }
}

void decode(const Decode& d, int64_t first, int64_t last, float* scratch) {
  const DecodeColumns decode_columns = decoder_of(d.weight);
  for (int64_t n = first; n < last; n++)
    for (int64_t k = 0; k < d.weight.columns; k += kChunk) {
      const int64_t end = k + kChunk < d.weight.columns ? k + kChunk : d.weight.columns;
      decode_columns(d, n, k, end, scratch);
      store_floats(d.out, n * d.weight.columns + k, scratch, (int)(end - k), d.type);
    }
}

inline float sum_of_lanes(const float* lane) {
  float sum[kLanes];
  memcpy(sum, lane, sizeof sum);
  for (int half = kLanes / 2; half; half /= 2)
    for (int i = 0; i < half; i++) sum[i] += sum[i + half];
  return sum[0];
}

// Prefetches columns [first, last) of a row.
inline void prefetch(const StoredWeight& w, int64_t n, int64_t first, int64_t last) {
  const uint8_t* row = w.weight + n * w.row_bytes;
  const uint8_t *p = row + first * w.row_bytes / w.columns, *end = row + last * w.row_bytes / w.columns;
  for (; p < end && p < w.end; p += 64) __builtin_prefetch(p);
}

// Adds the products of `count` rows from n on with all tokens to `sums`. Weights are decoded to memory, kChunk columns
// at a time.
template <class Product>
inline void add_rows(Product& product, const Decode& d, int64_t n, int count, typename Product::T* weights,
                     float* sums) {
  typedef typename Product::T T;
  const T* x = (const T*)d.x;
  const int64_t columns = d.weight.columns;
  if (count < kRowsAtOnce) memset(weights, 0, kRowsAtOnce * kChunk * sizeof(T));
  for (int64_t k = 0; k < columns; k += kChunk) {
    const int64_t end = k + kChunk < columns ? k + kChunk : columns;
    for (int r = 0; r < count; r++) {
      prefetch(d.weight, n + r + kRowsAtOnce, k, end);
      product.decode(d, n + r, k, end, weights + r * kChunk);
    }
    constexpr int multiple = Product::kColumnMultiple;
    const int width = (int)(end - k + multiple - 1) / multiple * multiple;
    int64_t t = 0;
    for (; t + kTileTokens <= d.tokens; t += kTileTokens)
      Product::template add<kTileTokens>(weights, x + t * d.x_stride + k, d.x_stride, width,
                                         sums + t * kRowsAtOnce * kLanes);
    for (; t < d.tokens; t++)
      Product::template add<1>(weights, x + t * d.x_stride + k, d.x_stride, width,
                               sums + t * kRowsAtOnce * kLanes);
  }
}

// Multiplies float32 weights and tokens; the `Product` of multiply_with.
struct FloatProduct {
  typedef float T;
  static constexpr int kColumnMultiple = kRun;  // tokens are padded with zeros to a multiple of it
  DecodeColumns decode_columns;

  explicit FloatProduct(const Decode& d) : decode_columns(decoder_of(d.weight)) {}

  void add_rows(const Decode& d, int64_t n, int count, float* weights, float* sums) {
    dtq::add_rows(*this, d, n, count, weights, sums);
  }

  // Columns [first, last) of row n; up to the next multiple of kColumnMultiple some finite values.
  void decode(const Decode& d, int64_t n, int64_t first, int64_t last, float* out) {
    decode_columns(d, n, first, last, out);
  }

  // Adds the products of `width` columns, kRowsAtOnce output channels x `tokens` tokens.
  template <int tokens>
  static void add(const float* weights, const float* x, int64_t x_stride, int width, float* sums) {
    V sum[tokens][kRowsAtOnce];
    for (int t = 0; t < tokens; t++)
      for (int r = 0; r < kRowsAtOnce; r++) sum[t][r] = load(sums + (t * kRowsAtOnce + r) * kLanes);
    for (int k = 0; k < width; k += kLanes) {
      V w[kRowsAtOnce];
      for (int r = 0; r < kRowsAtOnce; r++) w[r] = load(weights + r * kChunk + k);
#pragma GCC unroll 4
      for (int t = 0; t < tokens; t++) {
        const V token = load(x + t * x_stride + k);
#pragma GCC unroll 4
        for (int r = 0; r < kRowsAtOnce; r++) sum[t][r] = Isa::fma(w[r], token, sum[t][r]);
      }
    }
    for (int t = 0; t < tokens; t++)
      for (int r = 0; r < kRowsAtOnce; r++) store(sums + (t * kRowsAtOnce + r) * kLanes, sum[t][r]);
  }
};

// The order of each sum depends only on K and the instruction set.
template <class Product>
inline void multiply_with(const Decode& d, int64_t first, int64_t last, float* scratch) {
  Product product(d);
  const int64_t rows = d.weight.rows;
  float* sums = scratch + kRowsAtOnce * kChunk;  // [token][kRowsAtOnce][kLanes]
  for (int64_t n = first; n < last; n += kRowsAtOnce) {
    const int count = (int)(last - n < kRowsAtOnce ? last - n : kRowsAtOnce);
    memset(sums, 0, d.tokens * kRowsAtOnce * kLanes * sizeof(float));
    product.add_rows(d, n, count, (typename Product::T*)scratch, sums);
    for (int64_t t = 0; t < d.tokens; t++) {
      float y[kRun];
      for (int r = 0; r < count; r++) {
        y[r] = sum_of_lanes(sums + (t * kRowsAtOnce + r) * kLanes);
        if (d.bias) y[r] += d.bias[n + r];
      }
      store_floats(d.out, t * rows + n, y, count, d.type);
    }
  }
}

void multiply_stored(const Decode& d, int64_t first, int64_t last, float* scratch) {
  multiply_with<FloatProduct>(d, first, last, scratch);
}

}  // namespace
}  // namespace dtq
