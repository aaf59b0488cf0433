// SPDX-License-Identifier: Apache-2.0
// AVX2, and AVX-VNNI when compiled with -mavxvnni.
//
// AVX2 multiplies in 16 bits: vpmaddwd is exact for any int8 values, unlike vpmaddubsw, which saturates,
// and takes as many instructions as handling the signs separately.
#include <immintrin.h>

#include "blocks.h"
#include "lanes.h"
#include "weights.h"

namespace dtq {
namespace {

struct Avx2Vectors : Lanes<8> {
  template <int h>
  static V swap_lanes(V v) {
    if constexpr (h == 1) return (V)_mm256_permute_ps((__m256)v, 0xb1);
    if constexpr (h == 2) return (V)_mm256_permute_ps((__m256)v, 0x4e);
    return (V)_mm256_permute2f128_ps((__m256)v, (__m256)v, 1);
  }

  static void transpose8(const float* in, int64_t stride, float* out) {
    __m256 a[8], b[8];
    for (int i = 0; i < 8; i++) a[i] = _mm256_loadu_ps(in + i * stride);
    for (int i = 0; i < 8; i += 2) {
      b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
      b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
      a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
      a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
      a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
      a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
    }
    for (int i = 0; i < 4; i++) {
      _mm256_storeu_ps(out + i * 16, _mm256_permute2f128_ps(a[i], a[4 + i], 0x20));
      _mm256_storeu_ps(out + (4 + i) * 16, _mm256_permute2f128_ps(a[i], a[4 + i], 0x31));
    }
  }

  static void transpose16(const int32_t* in, int64_t stride, int32_t* out) {
    for (int i = 0; i < 16; i += 8)
      for (int j = 0; j < 16; j += 8)
        transpose8((const float*)in + i * stride + j, stride, (float*)out + j * 16 + i);
  }

  static __m128i low_halves(U v) {
    const __m256i low = _mm256_and_si256((__m256i)v, _mm256_set1_epi32(0xffff));
    return _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
  }

  static void store_low_halves(U v, uint16_t* out) { _mm_storeu_si128((__m128i*)out, low_halves(v)); }

  static void store_low_bytes(U v, int8_t* out) {
    const __m128i bytes = low_halves(v & 0xff);
    _mm_storel_epi64((__m128i*)out, _mm_packus_epi16(bytes, bytes));
  }

  static U load_bytes(const uint8_t* p) {
    return (U)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
  }

  static U load_halves(const void* p) {
    return (U)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
  }

  static I load_signed_bytes(const uint8_t* p) {
    return (I)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p));
  }

  static V load_part(const float* p, int count) {
    V v = {};
    for (int i = 0; i < count; i++) v[i] = p[i];
    return v;
  }

  static U load_part(const uint16_t* p, int count) {
    U v = {};
    for (int i = 0; i < count; i++) v[i] = p[i];
    return v;
  }

  static V lookup(const float* table, U codes) {
    const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i)codes);
    const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), (__m256i)codes);
    return (V)_mm256_blendv_ps(low, high, (__m256)(codes << 28));
  }

  static V fma(V a, V b, V c) { return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }

  // the instructions return the second operand if one is NaN
  static V at_least(V v, V limit) { return (V)_mm256_max_ps((__m256)limit, (__m256)v); }
  static V at_most(V v, V limit) { return (V)_mm256_min_ps((__m256)limit, (__m256)v); }

  // -------------------------------------------------------------------------- weights

#ifdef __AVXVNNI__
  typedef int8_t Activation;
  typedef uint8_t Weight;
  static constexpr int kDotWidth = 4, kWeightOffset = 128;

  static void store_weights(const __m256i* weights, Weight* out) {
    for (int i = 0; i < 2; i++)
      _mm256_store_si256((__m256i*)out + i,
                         _mm256_xor_si256(weights[i], _mm256_set1_epi8((char)0x80)));
  }

  static __m256i add_products(__m256i sum, __m256i weight, __m256i x) {
    return _mm256_dpbusd_avx_epi32(sum, weight, x);
  }
#else
  typedef int16_t Activation;
  typedef int16_t Weight;
  static constexpr int kDotWidth = 2, kWeightOffset = 0;

  static void store_weights(const __m256i* weights, Weight* out) {
    for (int i = 0; i < 4; i++) {
      const __m256i both = weights[i / 2];
      const __m128i half = i % 2 ? _mm256_extracti128_si256(both, 1) : _mm256_castsi256_si128(both);
      _mm256_store_si256((__m256i*)out + i, _mm256_cvtepi8_epi16(half));
    }
  }

  static __m256i add_products(__m256i sum, __m256i weight, __m256i x) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(weight, x));
  }
#endif

  // -------------------------------------------------------------------------- attention

  static constexpr int kAttentionRows = 4, kQueryVectors = 2, kProbabilityOffset = 0;

  static I dot_scores(I sum, uint32_t key, I query) {
    return (I)add_products((__m256i)sum, _mm256_set1_epi32((int)key), (__m256i)query);
  }

  static I dot_values(I sum, U probability, uint32_t value) {
    return (I)add_products((__m256i)sum, (__m256i)probability, _mm256_set1_epi32((int)value));
  }

  static void add_activations(const Activation* x, int32_t* sums) {
    const __m256i one = sizeof(Weight) == 1 ? _mm256_set1_epi8(1) : _mm256_set1_epi16(1);
    for (int i = 0; i < kStep * 2 / kDotWidth; i++) {
      __m256i* to = (__m256i*)sums + i % 2;
      const __m256i v = _mm256_load_si256((const __m256i*)x + i);
      _mm256_storeu_si256(to, add_products(_mm256_loadu_si256(to), one, v));
    }
  }

  // 32 codes of 16 bytes.
  static __m256i codes_of_4(const int8_t* w) {
    const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)w));
    return _mm256_and_si256(_mm256_or_si256(wide, _mm256_slli_epi16(wide, 4)), _mm256_set1_epi8(15));
  }

  // Splits each field of 24, 12 or 6 bits into two by moving its upper half up; `mask` has the new fields.
  template <int shift>
  static __m256i spread_bits(__m256i v, int64_t mask) {
    return _mm256_and_si256(_mm256_or_si256(v, _mm256_slli_epi64(v, shift)), _mm256_set1_epi64x(mask));
  }

  // 32 codes of 12 bytes; reads 16. Three bytes to each 64-bit lane, then a byte to each code.
  static __m256i codes_of_3(const int8_t* w) {
    const __m128i threes = _mm_shuffle_epi8(
        _mm_loadu_si128((const __m128i*)w),
        _mm_set_epi8(-1, 11, 10, 9, -1, 8, 7, 6, -1, 5, 4, 3, -1, 2, 1, 0));
    __m256i v = _mm256_cvtepu32_epi64(threes);
    v = spread_bits<20>(v, 0x00000fff00000fff);
    v = spread_bits<10>(v, 0x003f003f003f003f);
    return spread_bits<5>(v, 0x0707070707070707);
  }

  // 64 weights of a row as two vectors of int8.
  static void load_int8(const int8_t* w, int width, __m256i* out) {
    alignas(32) int8_t end[kStep] = {};
    if (width < kStep) {
      for (int i = 0; i < width; i++) end[i] = w[i];
      w = end;
    }
    for (int i = 0; i < 2; i++) out[i] = _mm256_loadu_si256((const __m256i*)w + i);
  }

  template <int bits>
  static void load_codes(const int8_t* w, int width, const Codebooks& codebooks, __m256i* out) {
    constexpr int half = kStep * bits / 16;  // bytes of 32 codes
    alignas(32) int8_t line[2 * half + 4] = {};
    if (width < kStep) {
      for (int i = 0; i < width * bits / 8; i++) line[i] = w[i];
      w = line;
    } else if (bits == 3) {  // codes_of_3 reads 4 bytes more
      __builtin_memcpy(line, w, 2 * half);
      w = line;
    }
    for (int i = 0; i < 2; i++) {
      const __m256i codes = bits == 4 ? codes_of_4(w + half * i) : codes_of_3(w + half * i);
      const __m256i table = _mm256_loadu2_m128i((const __m128i*)codebooks.of[2 * i + 1],
                                                (const __m128i*)codebooks.of[2 * i]);
      out[i] = _mm256_shuffle_epi8(table, codes);
    }
  }

  static void unpack8(const int8_t* w, int width, Weight* out) {
    __m256i weights[2];
    load_int8(w, width, weights);
    store_weights(weights, out);
  }

  template <int bits>
  static void unpack(const int8_t* w, int width, const Codebooks& codebooks, Weight* out) {
    __m256i weights[2];
    load_codes<bits>(w, width, codebooks, weights);
    store_weights(weights, out);
  }
};

struct Avx2 : StepWeights<Avx2Vectors> {
  static constexpr int kBlockRows = 4;

  // kBlockRows output channels x 16 tokens: 8 sums, 2 of activations and 1 of weights, of 16 registers.
  static void multiply_block(const Weight* weights, const Activation* x_q, int64_t steps, bool more,
                             int32_t* sums, Ahead& ahead) {
    __m256i sum[kBlockRows][2];
    for (int r = 0; r < kBlockRows; r++)
      for (int i = 0; i < 2; i++)
        sum[r][i] = more ? _mm256_load_si256((__m256i*)(sums + r * kGroupBlocks * kBlockTokens) + i)
                         : _mm256_setzero_si256();
    for (int64_t s = 0; s < steps; s++) {
      const Weight* w = weights + s * kPanelRows * kStep;
      const Activation* x = x_q + s * kStep * kBlockTokens;
      ahead.fetch();
      for (int q = 0; q < kStep; q += kDotWidth, x += kDotWidth * kBlockTokens) {
        const __m256i low = _mm256_load_si256((const __m256i*)x);
        const __m256i high = _mm256_load_si256((const __m256i*)x + 1);
#pragma GCC unroll 8
        for (int r = 0; r < kBlockRows; r++) {
          const __m256i weight = _mm256_set1_epi32(*(const int32_t*)(w + r * kStep + q));
          sum[r][0] = add_products(sum[r][0], weight, low);
          sum[r][1] = add_products(sum[r][1], weight, high);
        }
      }
    }
    for (int r = 0; r < kBlockRows; r++)
      for (int i = 0; i < 2; i++)
        _mm256_store_si256((__m256i*)(sums + r * kGroupBlocks * kBlockTokens) + i, sum[r][i]);
  }

  static int32_t sum_of_lanes(__m256i v) {
    int32_t lane[8], sum = 0;
    _mm256_storeu_si256((__m256i*)lane, v);
    for (int i = 0; i < 8; i++) sum += lane[i];
    return sum;
  }

  // Each step of the weight row is unpacked to memory, then multiplied with every token.
  template <int tokens>
  static void dot_tokens(const Linear& g, int64_t n, int64_t s, int64_t end, int32_t* sums) {
    constexpr int vectors = kStep * sizeof(Weight) / 32;
    alignas(64) Weight line[kStep];
    __m256i sum[tokens];
    for (int t = 0; t < tokens; t++) sum[t] = _mm256_setzero_si256();
    for (; s < end; s++) {
      unpack_step(g, n, s, line);
      for (int t = 0; t < tokens; t++) {
        const __m256i* x = (const __m256i*)((const Activation*)g.packed + (t * g.steps + s) * kStep);
        for (int i = 0; i < vectors; i++)
          sum[t] = add_products(sum[t], _mm256_load_si256((const __m256i*)line + i),
                                _mm256_load_si256(x + i));
      }
    }
    for (int t = 0; t < tokens; t++) sums[t] = sum_of_lanes(sum[t]);
  }

  static void dot_small_m(const Linear& g, int64_t n, int64_t s, int64_t end, int32_t* sums) {
    switch (g.tokens) {
      case 1: return dot_tokens<1>(g, n, s, end, sums);
      case 2: return dot_tokens<2>(g, n, s, end, sums);
      case 3: return dot_tokens<3>(g, n, s, end, sums);
      case 4: return dot_tokens<4>(g, n, s, end, sums);
      case 5: return dot_tokens<5>(g, n, s, end, sums);
      case 6: return dot_tokens<6>(g, n, s, end, sums);
      case 7: return dot_tokens<7>(g, n, s, end, sums);
      default: return dot_tokens<8>(g, n, s, end, sums);
    }
  }

  static int64_t peak(int64_t rounds) {
    // in assembly: compilers put moves between the intrinsics
#ifdef __AVXVNNI__
#define DTQ_ADD(sum) "%{vex%} vpdpbusd %0, %0, %%ymm" #sum "\n\t"
#else
#define DTQ_ADD(sum) \
  "vpmaddwd %0, %0, %%ymm2\n\tvpaddd %%ymm2, %%ymm" #sum ", %%ymm" #sum "\n\t"
#endif
    const __m256i one = _mm256_set1_epi8(1);
    for (int64_t r = 0; r < rounds; r++)
      asm volatile(
          DTQ_ADD(4) DTQ_ADD(5) DTQ_ADD(6) DTQ_ADD(7) DTQ_ADD(8) DTQ_ADD(9)
          DTQ_ADD(10) DTQ_ADD(11) DTQ_ADD(12) DTQ_ADD(13) DTQ_ADD(14) DTQ_ADD(15)
          ::"x"(one)
          : "xmm2", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13",
            "xmm14", "xmm15");
#undef DTQ_ADD
    return rounds * 12 * (32 / sizeof(Weight)) * 2;
  }
};

struct Isa : ByBlocks<Avx2> {};

}  // namespace
}  // namespace dtq

#include "attention.h"
#include "decode.h"
#include "gelu.h"
#include "gemm.h"
#include "rows.h"

namespace dtq {
#ifdef __AVXVNNI__
const Kernels avxvnni = {"avxvnni", sizeof(Activation), sizeof(Weight), quantize, pack, multiply,
#else
const Kernels avx2 = {"avx2", sizeof(Activation), sizeof(Weight), quantize, pack, multiply,
#endif
                      pack_small_m, multiply_small_m, decode, multiply_stored, nullptr, gelu,
                      kQueryBlock, head_bytes, block_bytes, pack_heads, attend, Isa::peak};
}
