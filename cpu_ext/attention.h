// SPDX-License-Identifier: Apache-2.0
// int8 attention, see dtq/kernels/ops_attention.py, which defines the numbers. Needs `struct Isa`, see isa.h.
//
// Lanes are queries. A block of queries is multiplied with a tile of keys: scores, their maximum,
// probabilities in 8 bits, the product with the values; the N x N matrix is never in memory.
#pragma once
#include "attention_pack.h"
#include "gelu.h"

namespace dtq {
namespace {

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
        top[v] = Isa::at_least(top[v], score);
        store(to + v * kLanes, score);
      }
    }
  }
}

// round(255 * 2^x) as a float of its own spacing of one: the low bits are the number.
inline U probability(V x) {
  x = Isa::at_least(x, splat(kLeastExponent));
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

// Fetches `width` channels of `count` tokens, which lie `stride` elements apart.
template <int write>
inline void fetch_tokens(const void* first, Float type, int64_t stride, int count, int width) {
  const int size = type == kFloat32 ? 4 : 2;
  for (int t = 0; t < count; t++)
    for (int at = 0; at < width * size; at += 64)
      __builtin_prefetch((const char*)first + t * stride * size + at, write);
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
    // what is needed next, while the tiles are computed: memory for the outputs, and the next queries
    const int64_t out = ((batch * a.queries + token) * a.heads + of) * a.value_width;
    const int out_size = a.out_type == kFloat32 ? 4 : 2, q_size = a.q.type == kFloat32 ? 4 : 2;
    fetch_tokens<1>((const char*)a.out + out * out_size, a.out_type, a.heads * a.value_width, count, a.value_width);
    const int64_t next = batch * a.q.batch + of * a.q.head + (token + count) * a.q.token;
    const int after = (int)(left - count < kQueryBlock ? left - count : kQueryBlock);
    fetch_tokens<0>((const char*)a.q.data + next * q_size, a.q.type, a.q.token, after, a.width);
    const int64_t mask = batch * a.mask_batch + of * a.mask_head + token * a.mask_query;
    if (count <= kLanes) attend_block<1>(a, b, head, mask, count, weight, factor);
    else attend_block<kQueryVectors>(a, b, head, mask, count, weight, factor);
    store_queries(a, b, head, out, count, weight, factor);
  }
}

}  // namespace
}  // namespace dtq
