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
  typedef void (*AddBytes)(const Decode&, int64_t n, int count, float* sums);
  DecodeColumns decode_columns;
  DecodeBfloat16 decode_bfloat16;
  AddBytes add_bytes;  // null: weights are decoded to memory
  alignas(64) float floats[kChunk + kColumnMultiple];

  explicit Bfloat16Product(const Decode& d)
      : decode_columns(decoder_of(d.weight)), decode_bfloat16(bfloat16_decoder_of(d.weight)),
        add_bytes(bytes_of(d)) {}

  void add_rows(const Decode& d, int64_t n, int count, T* weights, float* sums) {
    if (add_bytes) add_bytes(d, n, count, sums);
    else dtq::add_rows(*this, d, n, count, weights, sums);
  }

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

  // For up to four tokens, what decode_bytes and add do, without memory in between.
  template <int tokens, bool has_zero>
  DTQ_BF16 static void add_bytes_of(const Decode& d, int64_t n, int count, float* sums) {
    const StoredWeight& w = d.weight;
    const int64_t group_size = w.columns / w.groups;
    const T* x = (const T*)d.x;
    __m512 sum[tokens][kRowsAtOnce];
    const uint8_t* row[kRowsAtOnce];
    for (int r = 0; r < kRowsAtOnce; r++) {
      row[r] = w.weight + (n + (r < count ? r : 0)) * w.row_bytes;
      for (int t = 0; t < tokens; t++) sum[t][r] = _mm512_setzero_ps();
    }
    for (int64_t k = 0, g = 0; k < w.columns; g++) {
      V zero[kRowsAtOnce], scale[kRowsAtOnce];
      for (int r = 0; r < kRowsAtOnce; r++) {
        const int64_t at = (n + (r < count ? r : 0)) * w.groups + g;
        zero[r] = splat(group_zero<kAffine>(w, at)), scale[r] = splat(group_scale<kAffine>(w, n, at));
      }
      for (const int64_t stop = k + group_size; k < stop; k += kColumnMultiple) {
        __m512bh token[tokens];
        for (int t = 0; t < tokens; t++) token[t] = (__m512bh)_mm512_loadu_si512(x + t * d.x_stride + k);
#pragma GCC unroll 4
        for (int r = 0; r < kRowsAtOnce; r++) {
          const uint8_t* p = row[r] + k;
          __builtin_prefetch(p + kRowsAtOnce * w.row_bytes);
          V low = __builtin_convertvector(Isa::load_signed_bytes(p), V);
          V high = __builtin_convertvector(Isa::load_signed_bytes(p + 16), V);
          if (has_zero) low = low - zero[r], high = high - zero[r];
          const __m512bh two = _mm512_cvtne2ps_pbh((__m512)(high * scale[r]), (__m512)(low * scale[r]));
#pragma GCC unroll 4
          for (int t = 0; t < tokens; t++) sum[t][r] = _mm512_dpbf16_ps(sum[t][r], two, token[t]);
        }
      }
    }
    for (int t = 0; t < tokens; t++)
      for (int r = 0; r < kRowsAtOnce; r++) _mm512_storeu_ps(sums + (t * kRowsAtOnce + r) * kLanes, sum[t][r]);
  }

  static AddBytes bytes_of(const Decode& d) {
    const StoredWeight& w = d.weight;
    const bool whole = w.columns % (w.groups * kColumnMultiple) == 0;
    if (w.encoding != kAffine || w.bits != 8 || !whole) return nullptr;
    const bool has_zero = w.zero || w.offset;
    switch (d.tokens) {
      case 1: return has_zero ? add_bytes_of<1, true> : add_bytes_of<1, false>;
      case 2: return has_zero ? add_bytes_of<2, true> : add_bytes_of<2, false>;
      case 3: return has_zero ? add_bytes_of<3, true> : add_bytes_of<3, false>;
      case 4: return has_zero ? add_bytes_of<4, true> : add_bytes_of<4, false>;
      default: return nullptr;
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
