// SPDX-License-Identifier: Apache-2.0
// Stored weights of every format, decoded in registers, one row vector of kVec columns at a time.
//
// Every value equals that of the format's `unpack` bit for bit: float32, one product with the scale. A code
// is converted to a float without a conversion instruction: as the mantissa of 2^23 + code.
#pragma once
#include "exact_math.cuh"
#include "launch_rows.h"
#include "row_vectors.cuh"

namespace dtq {

// Weight, and what the host derives from it.
struct WeightPlan {
  Weight w;
  int64_t row_bytes;
  int group;     // columns that share a scale: all of a row, or a multiple of 16
  int shift;     // log2(group), -1 if it is not a power of two; 31 for a row
  bool aligned;  // each vector starts at an address from which it can be read at once
};

constexpr float kBase = 8388608.0f;  // 2^23

// 2^23 + code, exactly.
DTQ_DEV float biased(uint32_t code) { return bits_float(0x4b000000 | code); }

// ---------------------------------------------------------------------------- codes

// Byte i of a row; 0 past its end.
DTQ_DEV uint32_t byte_at(const uint8_t* row, int64_t i, int64_t bytes) {
  return i < bytes ? ldg(row + i) : 0;
}

// The kCount bytes from `at` on in 32-bit words, lowest first.
template <int kCount>
DTQ_DEV void read_bytes(const uint8_t* row, int64_t at, int64_t bytes, bool aligned,
                        uint32_t (&words)[(kCount + 3) / 4]) {
  if (aligned && at + kCount <= bytes) {
    if constexpr (kCount == 16) {
      const U4 q = ldg((const U4*)(row + at));
      words[0] = q.x, words[1] = q.y, words[2] = q.z, words[3] = q.w;
      return;
    } else if constexpr (kCount == 8) {
      const U2 q = ldg((const U2*)(row + at));
      words[0] = q.x, words[1] = q.y;
      return;
    } else if constexpr (kCount == 4) {
      words[0] = ldg((const uint32_t*)(row + at));
      return;
    } else if constexpr (kCount == 6) {
      const uint16_t* p = (const uint16_t*)(row + at);
      words[0] = ldg(p) | (uint32_t)ldg(p + 1) << 16;
      words[1] = ldg(p + 2);
      return;
    }
  }
  DTQ_UNROLL for (int i = 0; i < (kCount + 3) / 4; i++) words[i] = 0;
  DTQ_UNROLL for (int i = 0; i < kCount; i++)
    words[i / 4] |= byte_at(row, at + i, bytes) << i % 4 * 8;
}

// Code i of packed kBits-bit codes.
template <int kBits>
DTQ_DEV uint32_t code_at(const uint32_t* words, int i) {
  const int bit = i * kBits, low = bit % 32;
  uint32_t code = words[bit / 32] >> low;
  if (low + kBits > 32) code |= words[bit / 32 + 1] << (32 - low);
  return code & ((1u << kBits) - 1);
}

// 2^23 + code i; for signed bytes 2^23 + 128 + code. Codes at the same position within their bytes are
// masked together, then a byte permutation puts each into the mantissa.
template <int kBits>
DTQ_DEV float biased_at(const uint32_t* words, int i) {
  if constexpr (kBits == 3) {
    return biased(code_at<3>(words, i));
  } else {
    constexpr int kInByte = 8 / kBits;
    uint32_t plane = words[i * kBits / 32] >> i % kInByte * kBits;
    if constexpr (kBits < 8) plane &= ((1u << kBits) - 1) * 0x01010101u;
    else plane ^= 0x80808080;
    return bits_float(byte_perm(plane, 0x4b000000, 0x7540 | (uint32_t)(i / kInByte % 4)));
  }
}

// Columns k to k + 15 of ternary codes as 2-bit codes. They are stored as base-3 digits, five a byte; the
// last K % 5 columns are one code a byte in w.tail.
DTQ_DEV uint32_t read_trits(const Weight& w, const uint8_t* row, int64_t n, int64_t k) {
  const int64_t packed = w.columns / 5, rest = w.columns % 5;
  int64_t at = k / 5;
  int digit = (int)(k - at * 5);
  uint32_t byte = byte_at(row, at, packed), codes = 0;
  for (int i = 0; i < digit; i++) byte /= 3;
  DTQ_UNROLL for (int i = 0; i < kVec; i++) {
    if (digit == 5) {
      digit = 0;
      byte = byte_at(row, ++at, packed);
    }
    uint32_t code = byte % 3;
    byte /= 3;
    digit++;
    if (k + i >= packed * 5)
      code = k + i < w.columns ? ldg(w.tail + n * rest + k + i - packed * 5) : 0;
    codes |= code << i * 2;
  }
  return codes;
}

// ---------------------------------------------------------------------------- scales

// As stored: it is converted later, so that nothing waits for the load. The most frequent types first.
DTQ_DEV uint32_t scale_bits(const Weight& w, int at) {
  if (w.scale_type == kScaleBFloat16) return ldg((const uint16_t*)w.scale + at);
  if (w.scale_type == kScaleFloat32) return ldg((const uint32_t*)w.scale + at);
  if (w.scale_type == kNoScale) return 0x3f800000;  // 1
  return ldg((const uint8_t*)w.scale + at);
}

DTQ_DEV float scale_of(const Weight& w, uint32_t bits) {
  if (w.scale_type == kScaleBFloat16) return bf16_to_float((uint16_t)bits);
  if (w.scale_type == kScalePower) return bits_float(bits << 23);
  if (w.scale_type == kScaleE4m3) return fmul(from_e4m3(bits), ldg(w.scale_2));
  return bits_float(bits);
}

// ---------------------------------------------------------------------------- row vectors

// Copies the codebook of a kTable format to `shared`, 16 floats; nothing for other formats. All threads of
// the thread block must call it.
DTQ_DEV void load_codebook(const Weight& w, float* shared) {
  if (w.encoding != kTable) return;
  if (tid() < (1 << w.bits))
    sts(shared + tid(), w.codebook ? ldg(w.codebook + tid()) : w.format_codebook[tid()]);
  sync_threads();
}

// A vector as it is loaded, long before it is decoded.
template <Encoding kEncoding, int kBits>
struct PackedVector {
  static constexpr int kCodeColumns = kEncoding != kWords ? 1 : kBits == 8 ? 4 : 2;
  static constexpr int kBytes = kVec / kCodeColumns * kBits / 8;
  uint32_t words[(kBytes + 3) / 4];
  uint32_t scale;  // bits
  uint32_t zero;   // a byte; kTwoLevel: the group byte
};

// Columns [k, k + kVec) of row n, k a multiple of kVec. Past the end of the matrix the scale is 0.
template <Encoding kEncoding, int kBits>
DTQ_DEV void load_packed(const WeightPlan& p, int64_t n, int64_t k,
                         PackedVector<kEncoding, kBits>& packed) {
  using P = PackedVector<kEncoding, kBits>;
  const Weight& w = p.w;
  DTQ_UNROLL for (int i = 0; i < (P::kBytes + 3) / 4; i++) packed.words[i] = 0;
  packed.scale = 0;
  packed.zero = 0;
  if (n >= w.rows || k >= w.columns) return;
  const uint8_t* row = w.weight + n * p.row_bytes;
  if constexpr (kEncoding == kTrits) packed.words[0] = read_trits(w, row, n, k);
  else read_bytes<P::kBytes>(row, k / P::kCodeColumns * kBits / 8, p.row_bytes, p.aligned, packed.words);
  const int group = p.shift < 0 ? (int)k / p.group : (int)k >> p.shift;
  const int at = (int)n * (int)w.groups + group;  // the host has checked that it fits into an int
  const bool by_row = kEncoding == kTwoLevel || kEncoding == kWords;
  packed.scale = scale_bits(w, by_row ? (int)n : at);
  if constexpr (kEncoding == kAffine) {
    if (w.zero) packed.zero = ldg((const uint8_t*)w.zero + at);
    else packed.zero = (uint32_t)w.offset;
  }
  if constexpr (kEncoding == kTwoLevel) packed.zero = ldg(w.group_bytes + at);
}

// The values of a vector. Columns past the end of the row are 0.
template <Encoding kEncoding, int kBits>
DTQ_DEV void decode_vector(const WeightPlan& p, const PackedVector<kEncoding, kBits>& packed, int64_t k,
                           const float* codebook, float (&v)[kVec]) {
  if constexpr (kEncoding == kWords) {
    constexpr int kCodeColumns = PackedVector<kEncoding, kBits>::kCodeColumns;
    DTQ_UNROLL for (int i = 0; i < kVec / kCodeColumns; i++) {
      const uint16_t* word = p.w.words + code_at<kBits>(packed.words, i) * kCodeColumns;
      uint32_t pair[kCodeColumns / 2];
      if constexpr (kCodeColumns == 4) {
        const U2 four = ldg((const U2*)word);
        pair[0] = four.x, pair[1] = four.y;
      } else {
        pair[0] = ldg((const uint32_t*)word);
      }
      DTQ_UNROLL for (int j = 0; j < kCodeColumns; j++)
        v[i * kCodeColumns + j] = bf16_to_float((uint16_t)(pair[j / 2] >> j % 2 * 16));
    }
  } else if constexpr (kEncoding == kTwoLevel) {
    const int scale2 = (int)(packed.zero >> kBits) + 1, zero = (int)(packed.zero & ((1 << kBits) - 1));
    DTQ_UNROLL for (int i = 0; i < kVec; i++)  // wraps as int8 does
      v[i] = int_to_float((int8_t)(((int)code_at<kBits>(packed.words, i) - zero) * scale2));
  } else if constexpr (kEncoding == kAffine || kEncoding == kTrits) {
    const int zero = kEncoding == kTrits ? 1 : (int8_t)packed.zero + (kBits == 8 ? 128 : 0);
    const float base = kBase + int_to_float(zero);
    DTQ_UNROLL for (int i = 0; i < kVec; i++) v[i] = biased_at<kBits>(packed.words, i) - base;
  } else {
    DTQ_UNROLL for (int i = 0; i < kVec; i++) {
      const uint32_t code = code_at<kBits>(packed.words, i);
      v[i] = kEncoding == kTable ? lds<float>(codebook + code) : from_e4m3(code);
    }
  }
  const float scale = scale_of(p.w, packed.scale);
  DTQ_UNROLL for (int i = 0; i < kVec; i++) v[i] = fmul(v[i], scale);
  zero_beyond(v, k, p.w.columns);
}

}  // namespace dtq
