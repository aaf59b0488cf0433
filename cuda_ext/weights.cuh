// SPDX-License-Identifier: Apache-2.0
// Weights as the file keeps them, decoded in registers: runs of 16 columns of a row.
//
// Every value is that of the format's `unpack` bit for bit: float32, one product with the scale. A code
// is turned into a float without a conversion instruction: its bits under the exponent of 2^23.
#pragma once
#include "launch_rows.h"
#include "numbers.cuh"
#include "runs.cuh"

namespace dtq {

// What the host works out from Weight.
struct WeightPlan {
  Weight w;
  int64_t row_bytes;
  int group;      // columns that share a scale: a row, or a multiple of 16
  int shift;      // its logarithm, -1 if it is no power of two; 31 for a row
  bool whole;     // each run starts where it can be read at once
};

constexpr float kBase = 8388608.0f;  // 2^23

// 2^23 + code, exactly: the code under that exponent.
DTQ_DEV float raised(uint32_t code) { return bits_float(0x4b000000 | code); }

// ---------------------------------------------------------------------------- codes

// Byte i of a row; 0 beyond its end.
DTQ_DEV uint32_t byte_at(const uint8_t* row, int64_t i, int64_t bytes) {
  return i < bytes ? ldg(row + i) : 0;
}

// The kCount bytes from `at` on in 32-bit words, lowest first.
template <int kCount>
DTQ_DEV void read_bytes(const uint8_t* row, int64_t at, int64_t bytes, bool whole,
                        uint32_t (&words)[(kCount + 3) / 4]) {
  if (whole && at + kCount <= bytes) {
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

// Code i of a stream of kBits-bit codes.
template <int kBits>
DTQ_DEV uint32_t code_at(const uint32_t* words, int i) {
  const int bit = i * kBits, low = bit % 32;
  uint32_t code = words[bit / 32] >> low;
  if (low + kBits > 32) code |= words[bit / 32 + 1] << (32 - low);
  return code & ((1u << kBits) - 1);
}

// 2^23 + code i, of a signed byte 2^23 + 128 + code. Codes that have the same place in their bytes are
// masked together, then a byte permutation puts each under the exponent.
template <int kBits>
DTQ_DEV float raised_at(const uint32_t* words, int i) {
  if constexpr (kBits == 3) {
    return raised(code_at<3>(words, i));
  } else {
    constexpr int kInByte = 8 / kBits;
    uint32_t plane = words[i * kBits / 32] >> i % kInByte * kBits;
    if constexpr (kBits < 8) plane &= ((1u << kBits) - 1) * 0x01010101u;
    else plane ^= 0x80808080;
    return bits_float(byte_perm(plane, 0x4b000000, 0x7540 | (uint32_t)(i / kInByte % 4)));
  }
}

// Columns k to k + 15 of base-3 digits, five a byte, behind the bytes one code a byte, as 2-bit codes.
DTQ_DEV uint32_t read_trits(const Weight& w, const uint8_t* row, int64_t n, int64_t k) {
  const int64_t packed = w.columns / 5, rest = w.columns % 5;
  int64_t at = k / 5;
  int digit = (int)(k - at * 5);
  uint32_t byte = byte_at(row, at, packed), codes = 0;
  for (int i = 0; i < digit; i++) byte /= 3;
  DTQ_UNROLL for (int i = 0; i < kRun; i++) {
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

// As stored: what is done to it would wait for it. The usual types first.
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

// ---------------------------------------------------------------------------- runs

// The 16 entries of a kTable format as every thread of the block reads them; `shared` holds 16 floats
// for kTable, else nothing. Every thread of the block calls it.
DTQ_DEV void share_table(const Weight& w, float* shared) {
  if (w.encoding != kTable) return;
  if (tid() < (1 << w.bits)) sts(shared + tid(), w.table ? ldg(w.table + tid()) : w.levels[tid()]);
  sync_threads();
}

// A run as it is loaded; loads are issued long before they are used.
template <Encoding kEncoding, int kBits>
struct Run {
  static constexpr int kVector = kEncoding != kWords ? 1 : kBits == 8 ? 4 : 2;
  static constexpr int kBytes = kRun / kVector * kBits / 8;
  uint32_t words[(kBytes + 3) / 4];
  uint32_t scale;  // bits
  uint32_t zero;   // a byte; kTwoLevel: of the group
};

// Columns [k, k + 16) of row n, k a multiple of 16; a row or run that is not there gets the scale 0.
template <Encoding kEncoding, int kBits>
DTQ_DEV void fetch(const WeightPlan& p, int64_t n, int64_t k, Run<kEncoding, kBits>& run) {
  using R = Run<kEncoding, kBits>;
  const Weight& w = p.w;
  DTQ_UNROLL for (int i = 0; i < (R::kBytes + 3) / 4; i++) run.words[i] = 0;
  run.scale = 0;
  run.zero = 0;
  if (n >= w.rows || k >= w.columns) return;
  const uint8_t* row = w.weight + n * p.row_bytes;
  if constexpr (kEncoding == kTrits) run.words[0] = read_trits(w, row, n, k);
  else read_bytes<R::kBytes>(row, k / R::kVector * kBits / 8, p.row_bytes, p.whole, run.words);
  const int group = p.shift < 0 ? (int)k / p.group : (int)k >> p.shift;
  const int at = (int)n * (int)w.groups + group;  // the host has made sure that there are fewer
  const bool by_row = kEncoding == kTwoLevel || kEncoding == kWords;
  run.scale = scale_bits(w, by_row ? (int)n : at);
  if constexpr (kEncoding == kAffine) {
    if (w.zero) run.zero = ldg((const uint8_t*)w.zero + at);
    else run.zero = (uint32_t)w.offset;
  }
  if constexpr (kEncoding == kTwoLevel) run.zero = ldg(w.group_bytes + at);
}

// What a run stands for. Columns beyond the row are 0.
template <Encoding kEncoding, int kBits>
DTQ_DEV void expand(const WeightPlan& p, const Run<kEncoding, kBits>& run, int64_t k,
                    const float* table, float (&v)[kRun]) {
  if constexpr (kEncoding == kWords) {
    constexpr int kVector = Run<kEncoding, kBits>::kVector;
    DTQ_UNROLL for (int i = 0; i < kRun / kVector; i++) {
      const uint16_t* word = p.w.words + code_at<kBits>(run.words, i) * kVector;
      uint32_t pair[kVector / 2];
      if constexpr (kVector == 4) {
        const U2 four = ldg((const U2*)word);
        pair[0] = four.x, pair[1] = four.y;
      } else {
        pair[0] = ldg((const uint32_t*)word);
      }
      DTQ_UNROLL for (int j = 0; j < kVector; j++)
        v[i * kVector + j] = bf16_to_float((uint16_t)(pair[j / 2] >> j % 2 * 16));
    }
  } else if constexpr (kEncoding == kTwoLevel) {
    const int scale2 = (int)(run.zero >> kBits) + 1, zero = (int)(run.zero & ((1 << kBits) - 1));
    DTQ_UNROLL for (int i = 0; i < kRun; i++)  // wraps as int8 does
      v[i] = int_to_float((int8_t)(((int)code_at<kBits>(run.words, i) - zero) * scale2));
  } else if constexpr (kEncoding == kAffine || kEncoding == kTrits) {
    const int zero = kEncoding == kTrits ? 1 : (int8_t)run.zero + (kBits == 8 ? 128 : 0);
    const float base = kBase + int_to_float(zero);
    DTQ_UNROLL for (int i = 0; i < kRun; i++) v[i] = raised_at<kBits>(run.words, i) - base;
  } else {
    DTQ_UNROLL for (int i = 0; i < kRun; i++) {
      const uint32_t code = code_at<kBits>(run.words, i);
      v[i] = kEncoding == kTable ? lds<float>(table + code) : from_e4m3(code);
    }
  }
  const float scale = scale_of(p.w, run.scale);
  DTQ_UNROLL for (int i = 0; i < kRun; i++) v[i] = fmul(v[i], scale);
  clear_beyond(v, k, p.w.columns);
}

}  // namespace dtq
