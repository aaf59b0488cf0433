// SPDX-License-Identifier: Apache-2.0
// GEMM for few bfloat16 tokens with 4- and 8-bit integers, as small_m.cuh, for rows of whole steps of 64
// columns.
//
// A word of 4-bit codes has those of 8 columns. The codes of columns i and i + 4 are 16 bits apart:
// one mask gives both as a pair of halves. So the columns of a product are taken in the order 0, 4, 1, 5,
// 2, 6, 3, 7 of each 8, and the pairs of x are put into this order as well.
//
// A pair of codes below the exponent of 128 is a pair of bfloat16, 128 + code. The zero point is subtracted
// exactly; with a scale in bfloat16 the product is rounded once, to the value of the checkpoint rounded to
// bfloat16. With a scale in float32, and for 8-bit codes, the product is one of floats.
#pragma once
#include <type_traits>

#include "small_m.cuh"

namespace dtq {

constexpr int kRoundColumns = kWarps * kStepColumns;

constexpr uint32_t kPairOf128 = 0x43004300, kPairOfOne = 0x3f803f80, kPairOfMinusZero = 0x80008000;

// Both halves.
DTQ_DEV uint32_t pair_with(uint32_t half) { return byte_perm(half, half, 0x1010); }

// Codes i and i + 4 of a word in the low bits of the halves.
DTQ_DEV uint32_t codes_at(uint32_t word, int i) { return word >> i * 4 & 0x000f000f; }

// Code i of a word as the float `base` + code, where the mantissa of `base` is 0 and its unit is bit
// 8 * kByte.
template <int kByte>
DTQ_DEV float code_above(uint32_t even, uint32_t odd, uint32_t base, int i) {
  const uint32_t byte = uint32_t(i / 2);
  return bits_float(byte_perm(i % 2 ? odd : even, base, kByte ? 0x7504 | byte << 4 : 0x7540 | byte));
}

// The 16 columns of x from `from` on, in the order of the pairs of 4-bit codes.
DTQ_DEV void read_in_order(const uint16_t* from, uint32_t (&pairs)[kVec / 2]) {
  DTQ_UNROLL for (int i = 0; i < 2; i++) {
    const U4 q = ldg((const U4*)(from + i * 8));
    pairs[i * 4] = byte_perm(q.x, q.z, 0x5410);
    pairs[i * 4 + 1] = byte_perm(q.x, q.z, 0x7632);
    pairs[i * 4 + 2] = byte_perm(q.y, q.w, 0x5410);
    pairs[i * 4 + 3] = byte_perm(q.y, q.w, 0x7632);
  }
}

// The parameters of a group are loaded as they are stored, and used long after. One struct for each kind of
// codes and stored scale; decode() has the pairs of a vector.

// A scale of a group or row, and the zero point, which the weight may have for each group or for all.
template <bool kHasZero, ScaleType kScale>
struct Affine {
  uint32_t scale, zero;
  DTQ_DEV void load(const Weight& w, uint32_t at) {
    if constexpr (kScale == kScaleBFloat16) scale = ldg((const uint16_t*)w.scale + at);
    else scale = ldg((const uint32_t*)w.scale + at);
    zero = kHasZero ? ldg((const uint8_t*)w.zero + at) : (uint32_t)w.offset;
  }
};

// The pairs of a word of 4-bit codes by way of floats: `value` gets the even codes, the odd codes, and which.
template <class Value>
DTQ_DEV void pairs_of_floats(uint32_t word, uint32_t (&pairs)[4], Value value) {
  const uint32_t even = word & 0x0f0f0f0f, odd = word >> 4 & 0x0f0f0f0f;
  DTQ_UNROLL for (int i = 0; i < 4; i++)
    pairs[i] = floats_to_bf16x2(value(even, odd, i), value(even, odd, i + 4));
}

// What all kinds of 4-bit codes have in common; Own has pairs 0 to 3 of a word.
template <class Own>
struct Int4 {
  using Vector = U2;
  static constexpr int kPrefetch = 4;  // steps whose weights are loaded ahead
  template <class Ready>
  DTQ_DEV static void decode(const Ready& r, const U2& words, uint32_t (&pairs)[kVec / 2]) {
    uint32_t low[4], high[4];
    Own::decode_word(r, words.x, low);
    Own::decode_word(r, words.y, high);
    DTQ_UNROLL for (int i = 0; i < 4; i++) pairs[i] = low[i], pairs[i + 4] = high[i];
  }
  DTQ_DEV static void read_x(const uint16_t* from, uint32_t (&pairs)[kVec / 2]) {
    read_in_order(from, pairs);
  }
};

// int4 with a bfloat16 scale for each group.
template <bool kHasZero>
struct Int4Bf16 : Int4<Int4Bf16<kHasZero>>, Affine<kHasZero, kScaleBFloat16> {
  struct Ready {
    uint32_t scale, minus_zero;
  };
  DTQ_DEV Ready ready(float) const {
    return {pair_with(this->scale), this->zero * 0x00010001 + (kPairOf128 | 0x80008000)};  // -(128 + zero)
  }
  DTQ_DEV static void decode_word(const Ready& r, uint32_t word, uint32_t (&pairs)[4]) {
    DTQ_UNROLL for (int i = 0; i < 4; i++) {
      const uint32_t level = fma_bf16x2(codes_at(word, i) | kPairOf128, kPairOfOne, r.minus_zero);
      pairs[i] = fma_bf16x2(level, r.scale, kPairOfMinusZero);  // keeps the sign of 0
    }
  }
};

// int4 with a float32 scale for each group or row.
template <bool kHasZero>
struct Int4Float : Int4<Int4Float<kHasZero>>, Affine<kHasZero, kScaleFloat32> {
  struct Ready {
    float scale, base;
  };
  DTQ_DEV Ready ready(float) const { return {bits_float(this->scale), biased(this->zero)}; }
  DTQ_DEV static void decode_word(const Ready& r, uint32_t word, uint32_t (&pairs)[4]) {
    pairs_of_floats(word, pairs, [&](uint32_t even, uint32_t odd, int i) {
      return fmul(code_above<0>(even, odd, 0x4b000000, i) - r.base, r.scale);
    });
  }
};

// Two-level int4. Group bytes are those that a checkpoint may have: (code - zero) * scale2 is an int8.
struct Int4TwoLevel : Int4<Int4TwoLevel> {
  uint32_t group;
  DTQ_DEV void load(const Weight& w, uint32_t at) { group = ldg(w.group_bytes + at); }
  struct Ready {
    float scale, scale2, minus_zero;
  };
  DTQ_DEV Ready ready(float row_scale) const {
    const float scale2 = biased(group >> 4) - (kBase - 1);
    return {row_scale, scale2, fmul(-bits_float(0x47000000 | (group & 15) << 8), scale2)};
  }
  DTQ_DEV static void decode_word(const Ready& r, uint32_t word, uint32_t (&pairs)[4]) {
    // (2^15 + code) * scale2 - (2^15 + zero) * scale2, exactly
    pairs_of_floats(word, pairs, [&](uint32_t even, uint32_t odd, int i) {
      return fmul(ffma(code_above<1>(even, odd, 0x47000000, i), r.scale2, r.minus_zero), r.scale);
    });
  }
};

// int8 with a float32 or bfloat16 scale for each group or row, and zero points of the same range.
template <bool kHasZero, ScaleType kScale>
struct Int8Codes : Affine<kHasZero, kScale> {
  using Vector = U4;
  static constexpr int kPrefetch = 2;
  struct Ready {
    float scale, base;
  };
  DTQ_DEV Ready ready(float) const {
    // codes and zero points are biased by 128, so that they are not negative
    const uint32_t bits = kScale == kScaleBFloat16 ? this->scale << 16 : this->scale;
    return {bits_float(bits), biased(this->zero ^ 128)};
  }
  DTQ_DEV static void decode(const Ready& r, const U4& words, uint32_t (&pairs)[kVec / 2]) {
    const uint32_t word[4] = {words.x ^ 0x80808080, words.y ^ 0x80808080, words.z ^ 0x80808080,
                              words.w ^ 0x80808080};
    auto value = [&](int i) {
      const uint32_t float_bits = byte_perm(word[i / 4], 0x4b000000, 0x7540 | uint32_t(i % 4));
      return fmul(bits_float(float_bits) - r.base, r.scale);
    };
    DTQ_UNROLL for (int i = 0; i < kVec / 2; i++)
      pairs[i] = floats_to_bf16x2(value(i * 2), value(i * 2 + 1));
  }
  DTQ_DEV static void read_x(const uint16_t* from, uint32_t (&pairs)[kVec / 2]) {
    read_pairs(from, 0, kVec, true, pairs);
  }
};

template <class Codes, int kGroups>
DTQ_KERNEL void DTQ_BOUNDS(kWarps * 32, 4) small_m_integers_kernel(const DTQ_CONSTANT SmallMPlan p) {
  DTQ_SHARED(shared);
  using Vector = typename Codes::Vector;
  constexpr int kAhead = Codes::kPrefetch, kRoundBytes = kRoundColumns / kVec * int(sizeof(Vector));
  const SmallM& f = p.f;
  const Weight& w = p.weight.w;
  const int columns = (int)w.columns, last_row = (int)w.rows - 1, row = block_x() * kRowsTile + lane() / 4;
  int k = warp() * kStepColumns + lane() % 4 * kVec;
  // past the last row or token the last one is read: what is computed from it is not stored
  const uint8_t* codes[2];
  uint32_t groups[2];  // where those of the row begin
  float row_scale[2];
  DTQ_UNROLL for (int h = 0; h < 2; h++) {
    const int n = row + h * 8 < last_row ? row + h * 8 : last_row;
    codes[h] = w.weight + n * p.weight.row_bytes + k / kVec * sizeof(Vector);
    groups[h] = uint32_t(n) * uint32_t(w.groups);
    row_scale[h] = 0;
    if constexpr (std::is_same_v<Codes, Int4TwoLevel>) row_scale[h] = ldg((const float*)w.scale + n);
  }
  const uint16_t* x[kGroups];
  DTQ_UNROLL for (int h = 0; h < kGroups; h++) {
    const int64_t token = p.first + h * 8 + lane() / 4;
    x[h] = (const uint16_t*)f.x + (token < f.tokens ? token : f.tokens - 1) * f.stride + k;
  }

  Vector words[kAhead][2];
  Codes stored[kAhead][2];
  auto load = [&](int s, int ahead) {  // step s of this round, or of the next
    if (k + (s + ahead) * kRoundColumns >= columns) return;
    DTQ_UNROLL for (int h = 0; h < 2; h++) {
      words[s][h] = ldg((const Vector*)(codes[h] + (s + ahead) * kRoundBytes));
      stored[s][h].load(w, groups[h] + (uint32_t(k + (s + ahead) * kRoundColumns) >> p.weight.shift));
    }
  };
  DTQ_UNROLL for (int s = 0; s < kAhead; s++) load(s, 0);
  float acc[kTokenGroups][4] = {};
  for (; k < columns; k += kAhead * kRoundColumns) {
    DTQ_UNROLL for (int s = 0; s < kAhead; s++) {
      if (k + s * kRoundColumns >= columns) break;
      uint32_t pairs[2][kVec / 2], in_order[kGroups][kVec / 2];
      DTQ_UNROLL for (int h = 0; h < kGroups; h++) Codes::read_x(x[h] + s * kRoundColumns, in_order[h]);
      DTQ_UNROLL for (int h = 0; h < 2; h++)
        Codes::decode(stored[s][h].ready(row_scale[h]), words[s][h], pairs[h]);
      load(s, kAhead);
      DTQ_UNROLL for (int h = 0; h < kGroups; h++)
        DTQ_UNROLL for (int j = 0; j < 4; j++) {
          const uint32_t a[4] = {pairs[0][j * 2], pairs[1][j * 2], pairs[0][j * 2 + 1], pairs[1][j * 2 + 1]};
          mma_bf16(acc[h], a, in_order[h][j * 2], in_order[h][j * 2 + 1]);
        }
    }
    DTQ_UNROLL for (int h = 0; h < 2; h++) codes[h] += kAhead * kRoundBytes;
    DTQ_UNROLL for (int h = 0; h < kGroups; h++) x[h] += kAhead * kRoundColumns;
  }
  store_sums(p, kGroups, (float*)shared, acc);
}

// Whether the kernel above can run.
inline bool fits_integers(const SmallMPlan& p) {
  const Weight& w = p.weight.w;
  const bool scale = w.scale_type == kScaleBFloat16 || w.scale_type == kScaleFloat32;
  const bool affine = w.encoding == kAffine && (w.bits == 4 || w.bits == 8) && scale;
  const bool two_level = w.encoding == kTwoLevel && w.bits == 4 && w.scale_type == kScaleFloat32;
  return (affine || two_level) && p.f.type == kBFloat16 && p.weight.aligned && p.aligned_x &&
         w.columns % kStepColumns == 0 && p.weight.shift >= 0;
}

}  // namespace dtq
