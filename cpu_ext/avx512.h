// SPDX-License-Identifier: Apache-2.0
// AVX-512: vectors of 16; weights are made unsigned for vpdpbusd (unsigned by signed bytes).
#pragma once
#include <immintrin.h>

#include "lanes.h"
#include "weights.h"

namespace dtq {
namespace {

struct Avx512Vectors : Lanes<16> {
  template <int h>
  static V swap_lanes(V v) {
    if constexpr (h == 1) return (V)_mm512_permute_ps((__m512)v, 0xb1);
    if constexpr (h == 2) return (V)_mm512_permute_ps((__m512)v, 0x4e);
    if constexpr (h == 4) return (V)_mm512_shuffle_f32x4((__m512)v, (__m512)v, 0xb1);
    return (V)_mm512_shuffle_f32x4((__m512)v, (__m512)v, 0x4e);
  }

  static void transpose16(const int32_t* in, int64_t stride, int32_t* out) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(in + i * stride);
    for (int i = 0; i < 16; i += 2) {  // pairs of rows
      b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
      b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {  // fours: column j of each 128-bit lane in a[i + j]
      a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
      a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
      a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
      a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    for (int j = 0; j < 4; j++) {  // lanes
      const __m512i p = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x88);
      const __m512i q = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x88);
      const __m512i r = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xdd);
      const __m512i s = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xdd);
      _mm512_store_si512(out + j * 16, _mm512_shuffle_i32x4(p, q, 0x88));
      _mm512_store_si512(out + (4 + j) * 16, _mm512_shuffle_i32x4(r, s, 0x88));
      _mm512_store_si512(out + (8 + j) * 16, _mm512_shuffle_i32x4(p, q, 0xdd));
      _mm512_store_si512(out + (12 + j) * 16, _mm512_shuffle_i32x4(r, s, 0xdd));
    }
  }

  static void store_low_bytes(U v, int8_t* out) {
    _mm_storeu_si128((__m128i*)out, _mm512_cvtepi32_epi8((__m512i)v));
  }

  static void store_low_halves(U v, uint16_t* out) {
    _mm256_storeu_si256((__m256i*)out, _mm512_cvtepi32_epi16((__m512i)v));
  }

  static U load_bytes(const uint8_t* p) {
    return (U)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
  }

  static U load_halves(const void* p) {
    return (U)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
  }

  static I load_signed_bytes(const uint8_t* p) {
    return (I)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p));
  }

  static V load_part(const float* p, int count) {
    return (V)_mm512_maskz_loadu_ps((__mmask16)((1 << count) - 1), p);
  }

  static U load_part(const uint16_t* p, int count) {
    return (U)_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16((__mmask16)((1 << count) - 1), p));
  }

  static V lookup(const float* table, U codes) {
    return (V)_mm512_permutexvar_ps((__m512i)codes, _mm512_loadu_ps(table));
  }

  static V fma(V a, V b, V c) { return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }

  // the instructions return the second operand if one is NaN
  static V at_least(V v, V limit) { return (V)_mm512_max_ps((__m512)limit, (__m512)v); }
  static V at_most(V v, V limit) { return (V)_mm512_min_ps((__m512)limit, (__m512)v); }

  // -------------------------------------------------------------------------- weights

  typedef int8_t Activation;
  typedef uint8_t Weight;
  static constexpr int kDotWidth = 4, kWeightOffset = 128;

  static void add_activations(const Activation* x, int32_t* sums) {
    __m512i sum = _mm512_loadu_si512(sums);
    for (int i = 0; i < 16; i++)
      sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), _mm512_loadu_si512(x + 64 * i));
    _mm512_storeu_si512(sums, sum);
  }

  // -------------------------------------------------------------------------- attention

  static constexpr int kAttentionRows = 8, kQueryVectors = 2, kProbabilityOffset = 0;

  static I dot_scores(I sum, uint32_t key, I query) {
    return (I)_mm512_dpbusd_epi32((__m512i)sum, _mm512_set1_epi32((int)key), (__m512i)query);
  }

  static I dot_values(I sum, U probability, uint32_t value) {
    return (I)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)probability, _mm512_set1_epi32((int)value));
  }

  static __m512i load_int8(const int8_t* w, int width) {
    const __mmask64 inside = width >= 64 ? ~0ull : (1ull << width) - 1;
    return _mm512_maskz_loadu_epi8(inside, w);
  }

  // 64 codes of 32 bytes: each byte is extended to 16 bits, its high code moved to the high byte.
  static __m512i codes_of_4(const int8_t* w, int width) {
    const __m256i bytes =
        width >= 64 ? _mm256_loadu_si256((const __m256i*)w)
                    : _mm256_maskz_loadu_epi8((1u << (width / 2)) - 1, (const void*)w);
    const __m512i wide = _mm512_cvtepu8_epi16(bytes);
    return _mm512_and_si512(_mm512_or_si512(wide, _mm512_slli_epi16(wide, 4)), _mm512_set1_epi8(15));
  }

  // Splits each field of 24, 12 or 6 bits into two by moving its upper half up; `mask` has the new fields.
  template <int shift>
  static __m512i spread_bits(__m512i v, int64_t mask) {
    constexpr int kEither = 0xa8;  // (a | b) & c
    return _mm512_ternarylogic_epi64(v, _mm512_slli_epi64(v, shift), _mm512_set1_epi64(mask), kEither);
  }

  // 64 codes of 24 bytes: eight codes, three bytes, to each 64-bit lane, then a byte to each code.
  static __m512i codes_of_3(const int8_t* w, int width) {
    const __m256i loaded =
        width >= 64 ? _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)w)),
                                              _mm_loadl_epi64((const __m128i*)(w + 16)), 1)
                    : _mm256_maskz_loadu_epi8((1u << (width / 8 * 3)) - 1, (const void*)w);
    const __m512i bytes = _mm512_castsi256_si512(loaded);
    const __m512i at = _mm512_set_epi16(0, 0, 11, 10, 0, 0, 10, 9, 0, 0, 8, 7, 0, 0, 7, 6,  //
                                        0, 0, 5, 4, 0, 0, 4, 3, 0, 0, 2, 1, 0, 0, 1, 0);
    const __m512i odd = _mm512_set_epi64(8, 0, 8, 0, 8, 0, 8, 0);  // odd lanes begin at a high byte
    __m512i v = _mm512_srlv_epi64(_mm512_maskz_permutexvar_epi16(0x33333333, at, bytes), odd);
    v = spread_bits<20>(v, 0x00000fff00000fff);
    v = spread_bits<10>(v, 0x003f003f003f003f);
    return spread_bits<5>(v, 0x0707070707070707);
  }

  template <int bits>
  static __m512i load_codes(const int8_t* w, int width, const Codebooks& codebooks) {
    const __m512i codes = bits == 4 ? codes_of_4(w, width) : codes_of_3(w, width);
    __m512i table;
    if (codebooks.same) {  // groups of 64 and more
      table = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)codebooks.of[0]));
    } else {
      table = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i*)codebooks.of[0]));
      table = _mm512_inserti32x4(table, _mm_loadu_si128((const __m128i*)codebooks.of[1]), 1);
      table = _mm512_inserti32x4(table, _mm_loadu_si128((const __m128i*)codebooks.of[2]), 2);
      table = _mm512_inserti32x4(table, _mm_loadu_si128((const __m128i*)codebooks.of[3]), 3);
    }
    return _mm512_shuffle_epi8(table, codes);
  }

  // Adds kWeightOffset to each byte.
  static __m512i to_unsigned(__m512i weights) {
    return _mm512_xor_si512(weights, _mm512_set1_epi8((char)0x80));
  }

  static void unpack8(const int8_t* w, int width, Weight* out) {
    _mm512_store_si512(out, to_unsigned(load_int8(w, width)));
  }

  template <int bits>
  static void unpack(const int8_t* w, int width, const Codebooks& codebooks, Weight* out) {
    _mm512_store_si512(out, to_unsigned(load_codes<bits>(w, width, codebooks)));
  }
};

struct Avx512 : StepWeights<Avx512Vectors> {
  // Up to kSmallM tokens: 64 channels of a weight row by 64 of each token; lanes are added at the end.
  // Weights whose group size is not a power of two go through memory, others stay in registers.
  enum Source { kInt8, kInt4, kInt3, kInMemory };

  // Whether the 4-bit codes of two steps are unpacked together, low nibbles and high nibbles: the
  // activations are then deinterleaved by pack_small_m.
  static bool splits(const Linear& g) { return g.bits == 4 && g.group_shift >= 6 && g.sections == 1; }

  // The weights of two steps: 64 even channels and 64 odd ones.
  struct Halves {
    __m512i low, high;
  };

  static Halves halves_of(__m512i bytes, const int8_t* first, const int8_t* second) {
    const __m512i codebooks = to_unsigned(_mm512_mask_broadcast_i32x4(
        _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)first)), 0xff00,
        _mm_loadu_si128((const __m128i*)second)));
    const __m512i low = _mm512_set1_epi8(15);
    return {_mm512_shuffle_epi8(codebooks, _mm512_and_si512(bytes, low)),
            _mm512_shuffle_epi8(codebooks, _mm512_and_si512(_mm512_srli_epi16(bytes, 4), low))};
  }

  template <Source source>
  static __m512i weights_of(const Linear& g, int64_t n, int64_t s) {
    const Span span = span_of(g, s);
    const int8_t* w = weights_at(g, n, span.at);
    if constexpr (source == kInt8) {
      return to_unsigned(span.width == kStep ? _mm512_loadu_si512(w) : load_int8(w, span.width));
    } else if constexpr (source != kInMemory) {
      constexpr int bits = source == kInt4 ? 4 : 3;
      return to_unsigned(load_codes<bits>(w, span.width, codebooks_at(g, n, span.at)));
    } else {
      alignas(64) Weight line[kStep];
      unpack_step(g, n, s, line);
      return _mm512_load_si512(line);
    }
  }

  template <int tokens, Source source>
  static void dot_tokens(const Linear& g, int64_t n, int64_t s, int64_t end, int32_t* sums) {
    const Activation* packed = (const Activation*)g.packed;
    __m512i even[tokens], odd[tokens];  // two sums per token hide the latency of the instruction
    for (int t = 0; t < tokens; t++) even[t] = odd[t] = _mm512_setzero_si512();
    if (source == kInt4 && splits(g)) {
      const int64_t row = n * g.groups_per_row, columns = g.columns;
      const int shift = g.group_shift;
      const int8_t *w = g.weight + n * columns / 2, *codebooks = g.codebooks + row * 16;
      const uint8_t* groups = g.group_bytes ? g.group_bytes + row : nullptr;
      const int8_t (*byte_codebooks)[16] = g.byte_codebooks;
      const bool has_codebooks = g.codebooks != nullptr;
      const auto of = [=](int64_t group) {  // codebook_of_group, with all that it reads in registers
        return has_codebooks ? codebooks + group * 16 : byte_codebooks[groups ? groups[group] : 0];
      };
      for (; s + 1 < end; s += 2) {
        const int64_t at = s * kStep, left = (columns - at) >> 1;  // channels, bytes
        const __m512i bytes =
            left >= kStep ? _mm512_loadu_si512(w + at / 2) : load_int8(w + at / 2, (int)left);
        const Halves halves = halves_of(bytes, of(at >> shift), of((at + kStep) >> shift));
        for (int t = 0; t < tokens; t++) {
          const Activation* x = packed + (t * g.steps + s) * kStep;
          even[t] = _mm512_dpbusd_epi32(even[t], halves.low, _mm512_load_si512(x));
          odd[t] = _mm512_dpbusd_epi32(odd[t], halves.high, _mm512_load_si512(x + kStep));
        }
      }
    }
    for (; s + 1 < end; s += 2) {
      const __m512i first = weights_of<source>(g, n, s), second = weights_of<source>(g, n, s + 1);
      for (int t = 0; t < tokens; t++) {
        const Activation* x = packed + (t * g.steps + s) * kStep;
        even[t] = _mm512_dpbusd_epi32(even[t], first, _mm512_load_si512(x));
        odd[t] = _mm512_dpbusd_epi32(odd[t], second, _mm512_load_si512(x + kStep));
      }
    }
    if (s < end) {
      const __m512i last = weights_of<source>(g, n, s);
      for (int t = 0; t < tokens; t++)
        even[t] = _mm512_dpbusd_epi32(even[t], last,
                                      _mm512_load_si512(packed + (t * g.steps + s) * kStep));
    }
    for (int t = 0; t < tokens; t++)
      sums[t] = _mm512_reduce_add_epi32(_mm512_add_epi32(even[t], odd[t]));
  }

  // Not inlined: in a function of its own the sums stay in registers, whatever its caller does.
  template <Source source>
  __attribute__((noinline)) static void dot_from(const Linear& g, int64_t n, int64_t s, int64_t end,
                                                 int32_t* sums) {
    switch (g.tokens) {
      case 1: return dot_tokens<1, source>(g, n, s, end, sums);
      case 2: return dot_tokens<2, source>(g, n, s, end, sums);
      case 3: return dot_tokens<3, source>(g, n, s, end, sums);
      case 4: return dot_tokens<4, source>(g, n, s, end, sums);
      case 5: return dot_tokens<5, source>(g, n, s, end, sums);
      case 6: return dot_tokens<6, source>(g, n, s, end, sums);
      case 7: return dot_tokens<7, source>(g, n, s, end, sums);
      default: return dot_tokens<8, source>(g, n, s, end, sums);
    }
  }

  static void dot_small_m(const Linear& g, int64_t n, int64_t s, int64_t end, int32_t* sums) {
    if (g.bits == 8) return dot_from<kInt8>(g, n, s, end, sums);
    if (g.group_shift < 0) return dot_from<kInMemory>(g, n, s, end, sums);
    g.bits == 4 ? dot_from<kInt4>(g, n, s, end, sums) : dot_from<kInt3>(g, n, s, end, sums);
  }
};

}  // namespace
}  // namespace dtq
