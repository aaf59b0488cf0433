// SPDX-License-Identifier: Apache-2.0
// Weights of every format from the bytes of the file: decoded, and multiplied with float tokens.
// Included after gemm.h; the file has also defined
//
//   bytes_at, signed_at   kLanes bytes, one a lane
//   look_up         table[code] for codes whose low four bits count, 16 floats
//   fused           a * b + c, rounded once where the machine can
//
// A value is that of the format's `unpack`, bit for bit, rounded once to the type asked for. Most
// formats have at most 16 values a group: those are worked out once a group, and looked up.
#pragma once

namespace dtq {
namespace {

constexpr int kRun = 16;  // columns at a time
constexpr int kVectors = kRun / kLanes;
constexpr int kTileTokens = kLanes == 16 ? 4 : 2;  // tokens by kTogether channels: sums in registers

inline U lanes() {
  U lane;
  for (int i = 0; i < kLanes; i++) lane[i] = i;
  return lane;
}

inline V rounded_to(V v, Float type, bool finite) {
  if (type == kFloat32) return v;
  if (type == kFloat16) return from_half(to_half(v));
  const U w = (U)v;
  return finite ? (V)((w + 0x7fff + ((w >> 16) & 1)) & 0xffff0000) : (V)(to_bfloat(v) << 16);
}

inline float bfloat(uint16_t bits) {
  const uint32_t wide = (uint32_t)bits << 16;
  float value;
  memcpy(&value, &wide, 4);
  return value;
}

// Of e4m3 bytes, one a lane: the exponent sits 120 below that of a float.
inline V from_e4m3(U byte) {
  V v = (V)((byte & 0x7f) << 20) * splat(0x1p120f);
  U nan = (U)((byte & 0x7f) == 0x7f) & 0x7fc00000;
  return (V)((U)v | nan | ((byte & 0x80) << 24));
}

inline float scale_at(const StoredWeight& w, int64_t at) {
  switch (w.scale_type) {
    case kNoScale: return 1;
    case kScaleFloat32: return ((const float*)w.scale)[at];
    case kScaleBFloat16: return bfloat(((const uint16_t*)w.scale)[at]);
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

// Vector `part` of the codes of 16 columns; of 4-bit codes with whatever is above them.
template <int bits>
inline U codes_at(const uint8_t* p, int part) {
  if constexpr (bits == 8) return load_bytes(p + part * kLanes);
  const int bit = part * kLanes * bits;
  U words;
  if constexpr (kLanes == 16 && bits > 2) {  // more than 32 bits: from two words of eight codes
    words = (lanes() & 8) != 0 ? (U){} + word_at(p + bits) : (U){} + word_at(p);
    words = words >> (lanes() & 7) * bits;
  } else {
    words = ((U){} + (word_at(p + bit / 8) >> bit % 8)) >> lanes() * bits;
  }
  return bits == 4 ? words : words & ((1u << bits) - 1);
}

// What the codes of a group stand for.
struct Group {
  alignas(64) float table[kRun];
  float scale, zero;
  bool finite;  // the scale
};

constexpr bool looked_up(Encoding kind, int bits) {
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

// What the codes from i * kLanes on stand for, before the scale.
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
  if constexpr (!looked_up(kind, bits)) return;
  for (int i = 0; i < kVectors; i++) {
    const V level = values_of_codes<kind, bits>(w, at, i) * splat(group.scale);
    store(group.table + i * kLanes, rounded_to(level, d.type, group.finite));
  }
}

// Sixteen columns of a group, the bytes of their codes at p.
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
    if constexpr (looked_up(kind, bits)) {
      v = look_up(group.table, codes_at<kind == kTrits ? 8 : bits>(p, i));
    } else {
      if constexpr (kind == kWords) v = load_as_float(words + i * kLanes, kBFloat16);
      else if constexpr (kind == kFloat8) v = from_e4m3(load_bytes(p + i * kLanes));
      else v = __builtin_convertvector(load_signed_bytes(p + i * kLanes), V) - splat(group.zero);
      v = rounded_to(v * splat(group.scale), d.type, kind == kAffine && group.finite);
    }
    store(out + i * kLanes, v);
  }
}

// Ternary codes of columns [first, last) of row n, one a byte.
inline const uint8_t* spread_trits(const StoredWeight& w, int64_t n, int64_t first, int64_t last,
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

// Columns [first, last) of row n, at most kChunk, `first` a multiple of 16; writes whole runs of 16.
template <Encoding kind, int bits>
void decode_line(const Decode& d, int64_t n, int64_t first, int64_t last, float* out) {
  const StoredWeight& w = d.weight;
  constexpr int vector = kind != kWords ? 1 : bits == 8 ? 4 : 2;
  constexpr int run_bytes = kind == kTrits ? kRun : kRun / vector * bits / 8;
  const int64_t wide = kind == kWords || w.groups == 1 ? w.columns : w.columns / w.groups;
  const uint8_t *p = w.weight + n * w.row_bytes + first / kRun * run_bytes, *end = w.end;
  uint8_t codes[kind == kTrits ? kChunk + 2 * kRun : 1] = {};
  if constexpr (kind == kTrits) {
    p = spread_trits(w, n, first, last, codes);
    end = codes + sizeof codes;
  }
  for (int64_t k = first, g = first / wide; k < last; g++) {
    const int64_t stop = (g + 1) * wide < last ? (g + 1) * wide : last;
    Group group;
    fill_group<kind, bits>(d, n, n * w.groups + g, group);
    if (p + (stop - k + kRun) / kRun * run_bytes + kRun <= end) {
      for (; k < stop; k += kRun, p += run_bytes, out += kRun)
        decode_run<kind, bits>(d, p, group, out);
    } else {  // what is read at once may lie beyond the matrix
      for (; k < stop; k += kRun, p += run_bytes, out += kRun) {
        uint8_t copy[kRun] = {};
        if (p < end) memcpy(copy, p, end - p < kRun ? end - p : kRun);
        decode_run<kind, bits>(d, copy, group, out);
      }
    }
    k = stop;
  }
}

typedef void (*Line)(const Decode&, int64_t n, int64_t first, int64_t last, float* out);

// Null for what no format has.
inline Line line_of(const StoredWeight& w) {
  switch (w.encoding * 16 + w.bits) {
    case kAffine * 16 + 2: return decode_line<kAffine, 2>;
    case kAffine * 16 + 3: return decode_line<kAffine, 3>;
    case kAffine * 16 + 4: return decode_line<kAffine, 4>;
    case kAffine * 16 + 8: return decode_line<kAffine, 8>;
    case kTable * 16 + 3: return decode_line<kTable, 3>;
    case kTable * 16 + 4: return decode_line<kTable, 4>;
    case kFloat8 * 16 + 8: return decode_line<kFloat8, 8>;
    case kWords * 16 + 6: return decode_line<kWords, 6>;
    case kWords * 16 + 8: return decode_line<kWords, 8>;
    case kTrits * 16 + 2: return decode_line<kTrits, 2>;
    case kTwoLevel * 16 + 3: return decode_line<kTwoLevel, 3>;
    case kTwoLevel * 16 + 4: return decode_line<kTwoLevel, 4>;
    default: return nullptr;
  }
}

void decode(const Decode& d, int64_t first, int64_t last, float* line) {
  const Line decoded = line_of(d.weight);
  for (int64_t n = first; n < last; n++)
    for (int64_t k = 0; k < d.weight.columns; k += kChunk) {
      const int64_t end = k + kChunk < d.weight.columns ? k + kChunk : d.weight.columns;
      decoded(d, n, k, end, line);
      store_line(d.out, n * d.weight.columns + k, line, (int)(end - k), d.type);
    }
}

// How float32 weights and tokens are multiplied.
struct FloatProduct {
  typedef float T;
  static constexpr int kColumnMultiple = kRun;  // columns, to whole ones of which tokens are filled with zeros
  Line line;

  explicit FloatProduct(const Decode& d) : line(line_of(d.weight)) {}

  // Columns [first, last) of row n, and what fills the last unit: numbers.
  void decode(const Decode& d, int64_t n, int64_t first, int64_t last, float* out) {
    line(d, n, first, last, out);
  }

  // kTogether channels by `tokens` of them, kChunk columns.
  template <int tokens>
  static void add(const float* lines, const float* x, int64_t line, int width, float* sums) {
    V sum[tokens][kRowsAtOnce];
    for (int t = 0; t < tokens; t++)
      for (int r = 0; r < kRowsAtOnce; r++) sum[t][r] = load(sums + (t * kRowsAtOnce + r) * kLanes);
    for (int k = 0; k < width; k += kLanes) {
      V w[kRowsAtOnce];
      for (int r = 0; r < kRowsAtOnce; r++) w[r] = load(lines + r * kChunk + k);
#pragma GCC unroll 4
      for (int t = 0; t < tokens; t++) {
        const V token = load(x + t * line + k);
#pragma GCC unroll 4
        for (int r = 0; r < kRowsAtOnce; r++) sum[t][r] = fma(w[r], token, sum[t][r]);
      }
    }
    for (int t = 0; t < tokens; t++)
      for (int r = 0; r < kRowsAtOnce; r++) store(sums + (t * kRowsAtOnce + r) * kLanes, sum[t][r]);
  }
};

inline float total(const float* lane) {
  float sum[kLanes];
  memcpy(sum, lane, sizeof sum);
  for (int half = kLanes / 2; half; half /= 2)
    for (int i = 0; i < half; i++) sum[i] += sum[i + half];
  return sum[0];
}

// Columns [first, last) of a row that comes next.
inline void fetch_ahead(const StoredWeight& w, int64_t n, int64_t first, int64_t last) {
  const uint8_t* row = w.weight + n * w.row_bytes;
  const uint8_t *p = row + first * w.row_bytes / w.columns, *end = row + last * w.row_bytes / w.columns;
  for (; p < end && p < w.end; p += 64) __builtin_prefetch(p);
}

// Each sum in an order that depends on K and the instruction set alone.
template <class Product>
inline void multiply_by(const Decode& d, int64_t first, int64_t last, float* scratch) {
  typedef typename Product::T T;
  Product product(d);
  const T* x = (const T*)d.x;
  T* lines = (T*)scratch;
  const int64_t columns = d.weight.columns, rows = d.weight.rows;
  float* sums = scratch + kRowsAtOnce * kChunk;  // [token][kTogether][kLanes]
  for (int64_t n = first; n < last; n += kRowsAtOnce) {
    const int count = (int)(last - n < kRowsAtOnce ? last - n : kRowsAtOnce);
    memset(sums, 0, d.tokens * kRowsAtOnce * kLanes * sizeof(float));
    if (count < kRowsAtOnce) memset(lines, 0, kRowsAtOnce * kChunk * sizeof(T));
    for (int64_t k = 0; k < columns; k += kChunk) {
      const int64_t end = k + kChunk < columns ? k + kChunk : columns;
      for (int r = 0; r < count; r++) {
        fetch_ahead(d.weight, n + r + kRowsAtOnce, k, end);
        product.decode(d, n + r, k, end, lines + r * kChunk);
      }
      const int width = (int)(end - k + Product::kColumnMultiple - 1) / Product::kColumnMultiple * Product::kColumnMultiple;
      int64_t t = 0;
      for (; t + kTileTokens <= d.tokens; t += kTileTokens)
        Product::template add<kTileTokens>(lines, x + t * d.x_stride + k, d.x_stride, width,
                                 sums + t * kRowsAtOnce * kLanes);
      for (; t < d.tokens; t++)
        Product::template add<1>(lines, x + t * d.x_stride + k, d.x_stride, width,
                             sums + t * kRowsAtOnce * kLanes);
    }
    for (int64_t t = 0; t < d.tokens; t++) {
      float y[kRun];
      for (int r = 0; r < count; r++) {
        y[r] = total(sums + (t * kRowsAtOnce + r) * kLanes);
        if (d.bias) y[r] += d.bias[n + r];
      }
      store_line(d.out, t * rows + n, y, count, d.type);
    }
  }
}

void multiply_stored(const Decode& d, int64_t first, int64_t last, float* scratch) {
  multiply_by<FloatProduct>(d, first, last, scratch);
}

}  // namespace
}  // namespace dtq
