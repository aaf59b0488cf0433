// SPDX-License-Identifier: Apache-2.0
// Stored weights times bfloat16 tokens with vdpbf16ps, two products per lane: half the work of decode.h.
// For instruction sets with 512-bit vectors; runs if the machine has AVX512_BF16 as well.
//
// Weights are rounded as in decode.h, but subnormal ones count as zero, as in the instruction.
#pragma once
#include "decode.h"

#define DTQ_BF16 __attribute__((target("avx512bf16")))

namespace dtq {
namespace {

struct Bfloat16Product {
  typedef uint16_t T;
  static constexpr int kColumnMultiple = 32;
  typedef void (*DecodeBfloat16)(Bfloat16Product&, const Decode&, int64_t n, int64_t first, int64_t last,
                                 T* out);
  DecodeColumns decode_columns;
  DecodeBfloat16 decode_bfloat16;
  alignas(64) float floats[kChunk + kColumnMultiple];

  explicit Bfloat16Product(const Decode& d)
      : decode_columns(decoder_of(d.weight)), decode_bfloat16(bfloat16_decoder_of(d.weight)) {}

  void decode(const Decode& d, int64_t n, int64_t first, int64_t last, T* out) {
    decode_bfloat16(*this, d, n, first, last, out);
  }

  static DecodeBfloat16 bfloat16_decoder_of(const StoredWeight& w) {
    // the special decoders look 32 columns up in the table of one group
    const bool whole = w.groups == 1 || w.columns / w.groups % kColumnMultiple == 0;
    if (w.bits == 4 && whole) {
      if (w.encoding == kAffine) return decode_nibbles<kAffine>;
      if (w.encoding == kTable) return decode_nibbles<kTable>;
      if (w.encoding == kTwoLevel) return decode_nibbles<kTwoLevel>;
    }
    if (w.bits == 8 && w.encoding == kAffine && whole) return decode_bytes;
    if (w.encoding == kFloats) return copy_floats;
    return decode_any;
  }

  static void copy_floats(Bfloat16Product&, const Decode& d, int64_t n, int64_t first, int64_t last, T* out) {
    memcpy(out, d.weight.weight + n * d.weight.row_bytes + first * sizeof(T), (last - first) * sizeof(T));
    const int64_t over = (last - first) % kColumnMultiple;
    if (over) memset(out + (last - first), 0, (kColumnMultiple - over) * sizeof(T));
  }

  // Through float32.
  DTQ_BF16 static void decode_any(Bfloat16Product& self, const Decode& d, int64_t n, int64_t first,
                                  int64_t last, T* out) {
    const int width = (int)(last - first + kColumnMultiple - 1) / kColumnMultiple * kColumnMultiple;
    memset(self.floats + width - kColumnMultiple, 0, kColumnMultiple * sizeof(float));
    self.decode_columns(d, n, first, last, self.floats);
    for (int k = 0; k < width; k += kColumnMultiple) {
      const __m512 low = _mm512_load_ps(self.floats + k), high = _mm512_load_ps(self.floats + k + 16);
      _mm512_storeu_si512(out + k, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
  }

  template <Encoding kind>
  DTQ_BF16 static void decode_nibbles(Bfloat16Product&, const Decode& d, int64_t n, int64_t first,
                                      int64_t last, T* out) {
    const StoredWeight& w = d.weight;
    const int64_t group_size = w.groups == 1 ? w.columns : w.columns / w.groups;
    const uint8_t* p = w.weight + n * w.row_bytes + first / 2;
    for (int64_t k = first, g = first / group_size; k < last; g++) {
      const int64_t stop = (g + 1) * group_size < last ? (g + 1) * group_size : last;
      const int64_t at = n * w.groups + g;
      const V value = values_of_codes<kind, 4>(w, at, 0) * splat(group_scale<kind>(w, n, at));
      const __m256i half = (__m256i)_mm512_cvtneps_pbh((__m512)value);
      const __m512i table = _mm512_inserti64x4(_mm512_castsi256_si512(half), half, 1);
      for (; k < stop; k += kColumnMultiple, p += 16, out += kColumnMultiple) {
        __m128i bytes;
        if (stop - k >= kColumnMultiple) {
          bytes = _mm_loadu_si128((const __m128i*)p);
        } else {
          uint8_t copy[16] = {};
          memcpy(copy, p, (stop - k + 1) / 2);
          bytes = _mm_loadu_si128((const __m128i*)copy);
        }
        // each byte in 32 bits: its low code in the low 16 bits, its high code in the high 16. The
        // instruction reads five bits of each; both halves of the table are the same
        const __m512i codes = _mm512_cvtepu8_epi32(bytes);
        const __m512i both = _mm512_or_si512(codes, _mm512_slli_epi32(codes, 12));
        _mm512_storeu_si512(out, _mm512_permutexvar_epi16(both, table));
      }
      k = stop;
    }
  }

  DTQ_BF16 static void decode_bytes(Bfloat16Product&, const Decode& d, int64_t n, int64_t first,
                                    int64_t last, T* out) {
    const StoredWeight& w = d.weight;
    const int64_t group_size = w.groups == 1 ? w.columns : w.columns / w.groups;
    const uint8_t* p = w.weight + n * w.row_bytes + first;
    for (int64_t k = first, g = first / group_size; k < last; g++) {
      const int64_t stop = (g + 1) * group_size < last ? (g + 1) * group_size : last;
      const int64_t at = n * w.groups + g;
      const V zero = splat(group_zero<kAffine>(w, at)), scale = splat(group_scale<kAffine>(w, n, at));
      for (; k < stop; k += kColumnMultiple, p += kColumnMultiple, out += kColumnMultiple) {
        uint8_t copy[kColumnMultiple] = {};
        if (stop - k < kColumnMultiple) memcpy(copy, p, stop - k);
        const uint8_t* from = stop - k < kColumnMultiple ? copy : p;
        const V low = (__builtin_convertvector(Isa::load_signed_bytes(from), V) - zero) * scale;
        const V high = (__builtin_convertvector(Isa::load_signed_bytes(from + 16), V) - zero) * scale;
        _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
      }
      k = stop;
    }
  }

  template <int tokens>
  DTQ_BF16 static void add(const T* weights, const T* x, int64_t x_stride, int width, float* sums) {
    __m512 sum[tokens][kRowsAtOnce];
    for (int t = 0; t < tokens; t++)
      for (int r = 0; r < kRowsAtOnce; r++)
        sum[t][r] = _mm512_loadu_ps(sums + (t * kRowsAtOnce + r) * kLanes);
    for (int k = 0; k < width; k += kColumnMultiple) {
      __m512bh w[kRowsAtOnce];
      for (int r = 0; r < kRowsAtOnce; r++) w[r] = (__m512bh)_mm512_loadu_si512(weights + r * kChunk + k);
#pragma GCC unroll 4
      for (int t = 0; t < tokens; t++) {
        const __m512bh token = (__m512bh)_mm512_loadu_si512(x + t * x_stride + k);
#pragma GCC unroll 4
        for (int r = 0; r < kRowsAtOnce; r++) sum[t][r] = _mm512_dpbf16_ps(sum[t][r], w[r], token);
      }
    }
    for (int t = 0; t < tokens; t++)
      for (int r = 0; r < kRowsAtOnce; r++)
        _mm512_storeu_ps(sums + (t * kRowsAtOnce + r) * kLanes, sum[t][r]);
  }
};

void multiply_bfloat16(const Decode& d, int64_t first, int64_t last, float* scratch) {
  multiply_with<Bfloat16Product>(d, first, last, scratch);
}

}  // namespace
}  // namespace dtq
