// SPDX-License-Identifier: Apache-2.0
// Operands of int8 attention: memory, quantization of queries, keys and values. Needs `struct Isa`, see isa.h.
//
// Operands lie in words of 32 bits: kDotWidth neighbouring channels of a query or a key, or neighbouring keys
// of a value's channel.
#pragma once
#include "floats.h"

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

// ---------------------------------------------------------------------------- queries

// Queries from `token` on, at most kQueryBlock; lanes without a query are zero. A product with
// a key's codes, times the key's scale, times `factor` is a score of base 2.
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

}  // namespace
}  // namespace dtq
