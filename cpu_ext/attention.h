// SPDX-License-Identifier: Apache-2.0
// int8 attention, see dtq/kernels/ops_attention.py, which defines the numbers. Needs `struct Isa`, see isa.h.
//
// Lanes are queries. A block of queries is multiplied with a tile of keys: scores, their maximum,
// probabilities in 8 bits, the product with the values; the N x N matrix is never in memory. Operands lie
// in words of 32 bits: kDotWidth neighbouring channels of a query or a key, or neighbouring keys of a
// value's channel.
#pragma once
#include "floats.h"
#include "gelu.h"

namespace dtq {
namespace {

constexpr int kAttentionRows = Isa::kAttentionRows;    // keys, or channels of values, multiplied at a time
constexpr int kQueryVectors = Isa::kQueryVectors;      // vectors of a block of queries
constexpr int kQueryBlock = kQueryVectors * kLanes;    // queries of a block
constexpr int kWidestRow = kWidestHead + 16;           // floats of a row, padded
constexpr int kWordBits = 32 / Isa::kDotWidth;

template <Float value>
struct Constant {
  constexpr Float operator()() const { return value; }
};

// ---------------------------------------------------------------------------- memory

inline int64_t up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

// A packed head of keys and values; each part begins at a cache line.
struct Head {
  uint32_t* keys;      // [key][words]: kDotWidth channels each, plus kWeightOffset
  float* key_scale;    // [key]
  uint32_t* values;    // [key / kDotWidth][channels]: kDotWidth keys each
  float *value_scale, *value_mean;  // [channels]
  int32_t* value_sums;              // [tile][channels], for kProbabilityOffset
  float* poison;                    // NaN if a key is not finite, else 0
  int64_t words, channels, bytes;

  Head(const Attention& a, void* memory) {
    words = up(a.width, Isa::kDotWidth) / Isa::kDotWidth;
    channels = up(a.value_width, 16);
    const int64_t keys_padded = up(a.keys, kKeyTile), tiles = keys_padded / kKeyTile;
    char* at = (char*)memory;
    const auto take = [&at](int64_t count) {
      char* here = at;
      at += up(count * 4, 64);
      return here;
    };
    keys = (uint32_t*)take(keys_padded * words);
    key_scale = (float*)take(keys_padded);
    values = (uint32_t*)take(keys_padded / Isa::kDotWidth * channels);
    value_scale = (float*)take(channels);
    value_mean = (float*)take(channels);
    value_sums = (int32_t*)take(tiles * channels);
    poison = (float*)take(1);
    bytes = at - (char*)memory;
  }
};

// What a thread needs for a block of queries.
struct Block {
  uint32_t* queries;       // [16 queries][words, up to a multiple of 16][16]
  float* scores;           // [key of the tile][kQueryBlock], of base 2
  float* bias;             // likewise
  uint32_t* probabilities; // [key / kDotWidth][kQueryBlock]
  float* total;            // [channels][kQueryBlock]
  int64_t words, bytes;

  Block(const Attention& a, void* memory) {
    words = up(up(a.width, Isa::kDotWidth) / Isa::kDotWidth, 16);
    char* at = (char*)memory;
    const auto take = [&at](int64_t count) {
      char* here = at;
      at += up(count * 4, 64);
      return here;
    };
    queries = (uint32_t*)take(up(kQueryBlock, 16) * words);
    scores = (float*)take(kKeyTile * kQueryBlock);
    bias = (float*)take(a.mask ? kKeyTile * kQueryBlock : 0);
    probabilities = (uint32_t*)take(kKeyTile / Isa::kDotWidth * kQueryBlock);
    total = (float*)take(up(a.value_width, 16) * kQueryBlock);
    bytes = at - (char*)memory;
  }
};

int64_t head_bytes(const Attention& a) { return Head(a, nullptr).bytes; }
int64_t block_bytes(const Attention& a) { return Block(a, nullptr).bytes; }

// ---------------------------------------------------------------------------- rows

// Reads the rows of an operand as floats; channels from the width on are zero.
template <Float type>
struct Reader {
  typedef typename Storage<type == kFloat32>::T T;
  const T* row;
  int width;

  // Row `at` of an operand, counted in elements.
  Reader(const Operand& x, int64_t at, int width) : row((const T*)x.data + at), width(width) {}

  V operator()(int c) const {
    if (c + kLanes <= width) return load_as_float(row + c, type);
    if constexpr (type == kFloat32) return Isa::load_part(row + c, width - c);
    else {
      const U half = Isa::load_part(row + c, width - c);
      return type == kBFloat16 ? (V)(half << 16) : from_half(half);
    }
  }
};

// Calls `run` with the type of an operand as a constant.
template <class Run>
inline void with_type(Float type, const Run& run) {
  if (type == kFloat32) run(Constant<kFloat32>());
  else if (type == kBFloat16) run(Constant<kBFloat16>());
  else run(Constant<kFloat16>());
}

// The largest magnitude of some lanes; as bits, with NaN above all.
inline float amax_of(I largest) {
  const auto fold = [&](V other) {
    const I bits = (I)other;
    largest = bits > largest ? bits : largest;
  };
  fold(Isa::template swap_lanes<1>((V)largest));
  fold(Isa::template swap_lanes<2>((V)largest));
  if constexpr (kLanes > 4) fold(Isa::template swap_lanes<4>((V)largest));
  if constexpr (kLanes > 8) fold(Isa::template swap_lanes<8>((V)largest));
  return ((V)largest)[0];
}

// Codes of a row less `mean`, as int8 or as int16; returns the scale.
template <Float type>
inline float row_codes(const Reader<type>& row, const float* mean, int offset, Activation* out) {
  alignas(64) float centred[kWidestRow];
  I largest = {};
  for (int c = 0; c < row.width; c += kLanes) {
    const V x = row(c) - load(mean + c);
    const I bits = (I)x & 0x7fffffff;
    largest = bits > largest ? bits : largest;
    store(centred + c, x);
  }
  const float amax = amax_of(largest);
  const bool nothing = amax < kSmallestAmax;
  const V inverse = splat(nothing ? 0 : kInt8Max / amax);
  for (int c = 0; c < row.width; c += kLanes) {
    const U code = (U)(load(centred + c) * inverse + splat(kRoundToInt)) + (uint32_t)offset;
    if constexpr (sizeof(Activation) == 1) Isa::store_low_bytes(code, (int8_t*)out + c);
    else Isa::store_low_halves(code, (uint16_t*)out + c);
  }
  return nothing ? 0 : amax / kInt8Max;
}

// ---------------------------------------------------------------------------- keys and values

// Adds the tokens of a tile one after the other, then the tiles; divides by the number of tokens. With
// `ranges`, `low` and `high` are the smallest and the largest value of each channel.
template <Float type, bool ranges>
inline void column_mean(const Operand& x, int64_t base, int64_t tokens, int width, float* mean, float* low,
                        float* high) {
  const V divisor = splat((float)tokens);
  for (int c = 0; c < width; c += kLanes) {
    V total = {}, least = {}, most = {};
    for (int64_t first = 0; first < tokens; first += kKeyTile) {
      const int64_t last = first + kKeyTile < tokens ? first + kKeyTile : tokens;
      V sum = {};
      for (int64_t t = first; t < last; t++) {
        const V v = Reader<type>(x, base + t * x.token, width)(c);
        sum = sum + v;
        if constexpr (ranges) {
          if (!t) least = most = v;
          least = v < least ? v : least;
          most = v > most ? v : most;
        }
      }
      total = total + sum;
    }
    store(mean + c, total / divisor);
    if constexpr (ranges) store(low + c, least), store(high + c, most);
  }
}

template <Float type>
inline void pack_keys(const Attention& a, int64_t base, const Head& head) {
  alignas(64) float mean[kWidestRow] = {};
  alignas(64) Activation line[kWidestRow] = {};
  column_mean<type, false>(a.k, base, a.keys, a.width, mean, nullptr, nullptr);
  float poison = 0;
  for (int64_t t = 0; t < a.keys; t++) {
    const Reader<type> row(a.k, base + t * a.k.token, a.width);
    // all of it may lie in front of the next row, which is written later
    const bool fits = t + 1 < a.keys && head.words * 4 >= kLanes * (int64_t)sizeof(Activation);
    Activation* out = fits ? (Activation*)(head.keys + t * head.words) : line;
    head.key_scale[t] = row_codes(row, mean, Isa::kWeightOffset, out);
    poison += head.key_scale[t] * 0;
    if (out == line) memcpy(head.keys + t * head.words, line, head.words * 4);
  }
  *head.poison = poison;
  const int64_t end = up(a.keys, kAttentionRows);
  memset(head.keys + a.keys * head.words, 0, (end - a.keys) * head.words * 4);
  for (int64_t t = a.keys; t < end; t++) head.key_scale[t] = 0;
}

template <Float type>
inline void pack_values(const Attention& a, int64_t base, const Head& head) {
  constexpr int width = Isa::kDotWidth;
  alignas(64) float low[kWidestRow] = {}, high[kWidestRow] = {}, inverse[kWidestRow], mean[kWidestRow] = {};
  const V smallest = splat(kSmallestAmax);
  column_mean<type, true>(a.v, base, a.keys, a.value_width, mean, low, high);
  for (int64_t c = 0; c < head.channels; c += kLanes) {
    const V above = load(high + c) - load(mean + c), below = load(mean + c) - load(low + c);
    const V amax = above > below ? above : below;
    store(head.value_mean + c, load(mean + c));
    store(head.value_scale + c, amax < smallest ? (V){} : amax / splat(kInt8Max));
    store(inverse + c, amax < smallest ? (V){} : splat(kInt8Max) / amax);
  }
  memset(head.values, 0, up(a.keys, width) / width * head.channels * 4);
  if (Isa::kProbabilityOffset) memset(head.value_sums, 0, up(a.keys, kKeyTile) / kKeyTile * head.channels * 4);
  for (int64_t t = 0; t < a.keys; t += width) {
    const int count = (int)(a.keys - t < width ? a.keys - t : width);
    int32_t* sums = head.value_sums + t / kKeyTile * head.channels;
    for (int c = 0; c < a.value_width; c += kLanes) {
      const V middle = load(mean + c), factor = load(inverse + c);
      U word = {};
      I sum = {};
      for (int i = 0; i < count; i++) {
        const V v = Reader<type>(a.v, base + (t + i) * a.v.token, a.value_width)(c);
        const U code = (U)((v - middle) * factor + splat(kRoundToInt));
        word |= (code & (uint32_t)((1ull << kWordBits) - 1)) << kWordBits * i;
        if constexpr (Isa::kProbabilityOffset != 0) sum += ((I)code << 24) >> 24;
      }
      memcpy(head.values + t / width * head.channels + c, &word, sizeof word);
      if constexpr (Isa::kProbabilityOffset != 0) {
        I before;
        memcpy(&before, sums + c, sizeof before);
        sum += before;
        memcpy(sums + c, &sum, sizeof sum);
      }
    }
  }
}

// Heads [first, last) of keys and values, counted over the batch.
void pack_heads(const Attention& a, int64_t first, int64_t last) {
  for (int64_t h = first; h < last; h++) {
    const int64_t batch = h / a.key_heads, of = h % a.key_heads;
    const Head head(a, (char*)a.packed + h * a.head_bytes);
    with_type(a.k.type, [&](auto type) { pack_keys<type()>(a, batch * a.k.batch + of * a.k.head, head); });
    with_type(a.v.type, [&](auto type) { pack_values<type()>(a, batch * a.v.batch + of * a.v.head, head); });
  }
}

// ---------------------------------------------------------------------------- a block of queries

// Queries from `token` on, at most kQueryBlock; lanes without a query are zero. `factor` is what turns a
// product with a key's codes, times the key's scale, into a score of base 2.
template <Float type>
inline void pack_queries(const Attention& a, int64_t base, int64_t token, int count, const Block& b,
                         float* factor) {
  constexpr int kRowWords = kWidestHead / Isa::kDotWidth + 16;
  alignas(64) static const float zeros[kWidestRow] = {};
  alignas(64) uint32_t rows[16][kRowWords];
  for (int first = 0; first < kQueryBlock && first < count; first += 16) {
    for (int t = 0; t < 16; t++) {
      memset(rows[t], 0, b.words * 4);
      factor[first + t] = 0;
      if (first + t >= count) continue;
      const Reader<type> row(a.q, base + (token + first + t) * a.q.token, a.width);
      factor[first + t] = row_codes(row, zeros, 0, (Activation*)rows[t]) * a.factor;
    }
    for (int64_t w = 0; w < b.words; w += 16)
      Isa::transpose16((const int32_t*)rows[0] + w, kRowWords,
                       (int32_t*)b.queries + first * b.words + w * 16);
  }
}

// Vector v of word w of the block's queries.
inline I query_vector(const Block& b, int v, int64_t w) {
  I words;
  const int lane = v * kLanes;
  memcpy(&words, b.queries + lane / 16 * 16 * b.words + w * 16 + lane % 16, sizeof words);
  return words;
}

// What is added to the scores of a tile, as [key][kQueryBlock].
inline void load_bias(const Attention& a, int64_t at, int64_t first, int keys, int queries, float* bias) {
  for (int k = 0; k < keys; k++)
    for (int q = 0; q < queries; q++) {
      float* to = bias + k * kQueryBlock + q;
      if (q && !a.mask_query) {
        *to = to[-1];
        continue;
      }
      const int64_t from = at + (first + k) * a.mask_key + q * a.mask_query;
      if (a.mask_is_bool) {
        *to = ((const uint8_t*)a.mask)[from] ? 0 : -__builtin_inff();
        continue;
      }
      const float value = ((const float*)a.mask)[from], scaled = value * kLog2E;
      *to = value == -__builtin_inff() ? value : scaled < kLowestBias ? kLowestBias : scaled;
    }
}

// Scores of a tile, and the largest of each query.
template <int vectors, bool masked>
inline void score_tile(const Block& b, const Head& head, int64_t first, int keys, const V* factor,
                       const I* start, V* top) {
  for (int v = 0; v < vectors; v++) top[v] = splat(kNoScore);
  for (int k = 0; k < keys; k += kAttentionRows) {
    I sum[kAttentionRows][vectors];
#pragma GCC unroll 16
    for (int r = 0; r < kAttentionRows; r++)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; v++) sum[r][v] = start[v];
    const uint32_t* row = head.keys + (first + k) * head.words;
    for (int64_t w = 0; w < head.words; w++) {
      I query[vectors];
#pragma GCC unroll 4
      for (int v = 0; v < vectors; v++) query[v] = query_vector(b, v, w);
#pragma GCC unroll 16
      for (int r = 0; r < kAttentionRows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
          sum[r][v] = Isa::dot_scores(sum[r][v], row[r * head.words + w], query[v]);
    }
#pragma GCC unroll 16
    for (int r = 0; r < kAttentionRows; r++) {
      const V scale = splat(head.key_scale[first + k + r]);
      float* to = b.scores + (k + r) * kQueryBlock;
#pragma GCC unroll 4
      for (int v = 0; v < vectors; v++) {
        V score = __builtin_convertvector(sum[r][v], V) * scale * factor[v];
        if (masked) score = score + load(b.bias + (k + r) * kQueryBlock + v * kLanes);
        if (k + r >= keys) score = splat(-__builtin_inff());
        top[v] = score > top[v] ? score : top[v];
        store(to + v * kLanes, score);
      }
    }
  }
}

// round(255 * 2^x) as a float of its own spacing of one: the low bits are the number.
inline U probability(V x) {
  x = x < splat(kLeastExponent) ? splat(kLeastExponent) : x;
  const V shifted = x + splat(kRoundToInt);
  const V r = x - (shifted - splat(kRoundToInt));
  const V p = ((splat(kProbability3) * r + splat(kProbability2)) * r + splat(kProbability1)) * r +
              splat(kProbability0);
  return (U)((V)((U)p + ((U)shifted << 23)) + splat(kRoundToInt)) & 0xff;
}

// Probabilities of a tile from its scores; returns nothing, adds to the sums of each query.
template <int vectors>
inline void probability_tile(const Block& b, int keys, const V* top, I* sums) {
  constexpr int width = Isa::kDotWidth;
  for (int v = 0; v < vectors; v++) sums[v] = (I){};
  for (int k = 0; k < keys; k += width)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++) {
      U word = {};
#pragma GCC unroll 4
      for (int i = 0; i < width; i++) {
        const U p = probability(load(b.scores + (k + i) * kQueryBlock + v * kLanes) - top[v]);
        word |= p << kWordBits * i;
        if constexpr (Isa::kProbabilityOffset != 0) sums[v] += (I)p;
      }
      if constexpr (Isa::kProbabilityOffset != 0) word ^= (U){} + 0x80808080;
      else sums[v] = Isa::dot_values(sums[v], word, width == 4 ? 0x01010101 : 0x00010001);
      memcpy(b.probabilities + k / width * kQueryBlock + v * kLanes, &word, sizeof word);
    }
}

// total * before + (probabilities x values) * now
template <int vectors>
inline void value_tile(const Attention& a, const Block& b, const Head& head, int64_t first, int keys,
                       const V* before, const V* now) {
  const int64_t words = up(keys, Isa::kDotWidth) / Isa::kDotWidth;
  const uint32_t* values = head.values + first / Isa::kDotWidth * head.channels;
  const int32_t* start = head.value_sums + first / kKeyTile * head.channels;
  for (int64_t c = 0; c < a.value_width; c += kAttentionRows) {
    I sum[kAttentionRows][vectors];
#pragma GCC unroll 16
    for (int r = 0; r < kAttentionRows; r++)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; v++) {
        sum[r][v] = (I){};
        if constexpr (Isa::kProbabilityOffset != 0) sum[r][v] += start[c + r] * Isa::kProbabilityOffset;
      }
    for (int64_t w = 0; w < words; w++) {
      U p[vectors];
#pragma GCC unroll 4
      for (int v = 0; v < vectors; v++)
        memcpy(&p[v], b.probabilities + w * kQueryBlock + v * kLanes, sizeof p[v]);
      const uint32_t* value = values + w * head.channels + c;
#pragma GCC unroll 16
      for (int r = 0; r < kAttentionRows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) sum[r][v] = Isa::dot_values(sum[r][v], p[v], value[r]);
    }
#pragma GCC unroll 16
    for (int r = 0; r < kAttentionRows; r++)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; v++) {
        float* to = b.total + (c + r) * kQueryBlock + v * kLanes;
        store(to, load(to) * before[v] + __builtin_convertvector(sum[r][v], V) * now[v]);
      }
  }
}

// (total / weight) * value_scale + value_mean, transposed to rows of tokens and rounded to the output type.
inline void store_queries(const Attention& a, const Block& b, const Head& head, int64_t out, int count,
                          const float* weight, const float* factor) {
  alignas(64) float by_channel[16][16], by_query[16][16], inverse[kQueryBlock + 16], live[kQueryBlock + 16];
  alignas(64) float poison[kQueryBlock + 16];
  for (int q = 0; q < kQueryBlock; q++) {
    live[q] = weight[q] > 0 ? 1 : 0;
    inverse[q] = weight[q] > 0 ? 1 / weight[q] : 0;
    poison[q] = factor[q] * 0 + *head.poison;
  }
  for (int q = 0; q < count; q += 16)
    for (int c = 0; c < a.value_width; c += 16) {
      for (int i = 0; i < 16; i++) {
        const V scale = splat(head.value_scale[c + i]), mean = splat(head.value_mean[c + i]);
        for (int t = 0; t < 16; t += kLanes) {
          V y = load(b.total + (c + i) * kQueryBlock + q + t) * load(inverse + q + t) * scale;
          y = y + (load(live + q + t) != (V){} ? mean : (V){});
          store(&by_channel[i][t], y + load(poison + q + t));
        }
      }
      Isa::transpose16((const int32_t*)by_channel, 16, (int32_t*)by_query);
      const int channels = a.value_width - c < 16 ? a.value_width - c : 16;
      for (int t = 0; t < 16 && q + t < count; t++)
        store_floats(a.out, out + (q + t) * a.heads * a.value_width + c, by_query[t], channels,
                     a.out_type);
    }
}

template <int vectors>
inline void attend_block(const Attention& a, const Block& b, const Head& head, int64_t mask, int queries,
                         float* weights, const float* factors) {
  V factor[vectors], most[vectors], weight[vectors], top[vectors], before[vectors], now[vectors];
  I start[vectors], sums[vectors];
  for (int v = 0; v < vectors; v++) {
    factor[v] = load(factors + v * kLanes);
    most[v] = splat(kNoScore);
    weight[v] = (V){};
    start[v] = (I){};
    if constexpr (Isa::kWeightOffset != 0)  // subtracts what pack_keys added
      for (int64_t w = 0; w < head.words; w++)
        start[v] = Isa::dot_scores(start[v], 0x01010101, query_vector(b, v, w));
    start[v] *= -Isa::kWeightOffset;
  }
  memset(b.total, 0, up(a.value_width, 16) * kQueryBlock * 4);
  for (int64_t first = 0; first < a.keys; first += kKeyTile) {
    const int keys = (int)(a.keys - first < kKeyTile ? a.keys - first : kKeyTile);
    if (a.mask) {
      load_bias(a, mask, first, keys, queries, b.bias);
      score_tile<vectors, true>(b, head, first, keys, factor, start, top);
    } else {
      score_tile<vectors, false>(b, head, first, keys, factor, start, top);
    }
    probability_tile<vectors>(b, keys, top, sums);
    for (int v = 0; v < vectors; v++) {
      const V after = most[v] > top[v] ? most[v] : top[v];
      before[v] = exponential((most[v] - after) * splat(kLn2));
      now[v] = exponential((top[v] - after) * splat(kLn2));
      most[v] = after;
      weight[v] = weight[v] * before[v] + __builtin_convertvector(sums[v], V) * now[v];
    }
    value_tile<vectors>(a, b, head, first, keys, before, now);
  }
  for (int v = 0; v < vectors; v++) store(weights + v * kLanes, weight[v]);
}

// Blocks of queries [first, last), counted over heads and the batch.
void attend(const Attention& a, int64_t first, int64_t last, void* scratch) {
  const int64_t blocks = up(a.queries, kQueryBlock) / kQueryBlock;
  const Block b(a, scratch);
  alignas(64) float factor[kQueryBlock + 16] = {}, weight[kQueryBlock + 16] = {};
  for (int64_t i = first; i < last; i++) {
    const int64_t h = i / blocks, batch = h / a.heads, of = h % a.heads;
    const int64_t token = i % blocks * kQueryBlock, left = a.queries - token;
    const int count = (int)(left < kQueryBlock ? left : kQueryBlock);
    const int64_t shared = a.heads / a.key_heads;
    const Head head(a, (char*)a.packed + (batch * a.key_heads + of / shared) * a.head_bytes);
    with_type(a.q.type, [&](auto type) {
      pack_queries<type()>(a, batch * a.q.batch + of * a.q.head, token, count, b, factor);
    });
    const int64_t mask = batch * a.mask_batch + of * a.mask_head + token * a.mask_query;
    if (count <= kLanes) attend_block<1>(a, b, head, mask, count, weight, factor);
    else attend_block<kQueryVectors>(a, b, head, mask, count, weight, factor);
    store_queries(a, b, head, ((batch * a.queries + token) * a.heads + of) * a.value_width, count,
                  weight, factor);
  }
}

}  // namespace
}  // namespace dtq
