// SPDX-License-Identifier: Apache-2.0
// Weights as the file keeps them, decoded in registers: runs of 16 columns of a row.
//
// Every value is that of the format's `unpack` bit for bit: float32, one product with the scale. A code
// is turned into a float without a conversion instruction: its bits under the exponent of 2^23.
#pragma once
#include "runs.cuh"

namespace dtq {

// What the host works out from Weight.
struct WeightPlan {
  Weight w;
  int64_t row_bytes;
  int64_t group;    // columns that share a scale
  bool whole;       // each run starts at a multiple of its bytes, or of 8
  bool one_group;   // no run has columns of two groups
};

constexpr float kBase = 8388608.0f;  // 2^23

// 2^23 + code, exactly.
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

// Five base-3 digits a byte, then one code a byte.
DTQ_DEV uint32_t trit_at(const Weight& w, const uint8_t* row, int64_t n, int64_t k) {
  const int64_t packed = w.columns / 5;
  if (k >= w.columns) return 1;
  if (k / 5 >= packed) return ldg(w.tail + n * (w.columns % 5) + k % 5);
  uint32_t byte = ldg(row + k / 5);
  for (int64_t digit = k % 5; digit; digit--) byte /= 3;
  return byte % 3;
}

// ---------------------------------------------------------------------------- scales

DTQ_DEV float scale_at(const Weight& w, int64_t n, int64_t group) {
  const int64_t groups = w.codes == kTwoLevel ? 1 : w.groups;
  const int64_t at = n * groups + (w.codes == kTwoLevel ? 0 : group);
  switch (w.scale_type) {
    case kScaleFloat32: return ldg((const float*)w.scale + at);
    case kScaleBFloat16: return bf16_to_float(ldg((const uint16_t*)w.scale + at));
    case kScaleE4m3: return fmul(from_e4m3(ldg((const uint8_t*)w.scale + at)), ldg(w.scale_2));
    case kScalePower: return bits_float((uint32_t)ldg((const uint8_t*)w.scale + at) << 23);
    case kNoScale: return 1;
  }
  return 1;
}

// ---------------------------------------------------------------------------- runs

// The 16 entries of a kTable format as every thread of the block reads them; `shared` holds 16 floats
// for kTable, else nothing. Every thread of the block calls it.
DTQ_DEV void share_table(const Weight& w, float* shared) {
  if (w.codes != kTable) return;
  if (tid() < (1 << w.bits)) sts(shared + tid(), w.table ? ldg(w.table + tid()) : w.levels[tid()]);
  sync_threads();
}

// Columns [k, k + 16) of row n, k a multiple of 16. Columns beyond the row are 0.
template <Codes kCodes, int kBits>
DTQ_DEV void decode(const WeightPlan& p, int64_t n, int64_t k, const float* table,
                    float (&v)[kRun]) {
  const Weight& w = p.w;
  const uint8_t* row = w.weight + n * p.row_bytes;
  const int64_t groups = w.groups;
  auto group_of = [&](int i) {
    if (p.one_group) return k / p.group;
    return k + i < w.columns ? (k + i) / p.group : 0;
  };

  if constexpr (kCodes == kWords) {
    constexpr int kVector = kBits == 8 ? 4 : 2, kCount = kRun / kVector;
    uint32_t words[(kCount * kBits / 8 + 3) / 4];
    read_bytes<kCount * kBits / 8>(row, k / kVector * kBits / 8, p.row_bytes, p.whole, words);
    const float scale = w.scale_type == kNoScale ? 1 : scale_at(w, n, 0);
    DTQ_UNROLL for (int i = 0; i < kCount; i++) {
      const uint16_t* word = w.words + code_at<kBits>(words, i) * kVector;
      if constexpr (kVector == 4) {
        const U2 four = ldg((const U2*)word);
        const uint32_t pair[2] = {four.x, four.y};
        DTQ_UNROLL for (int j = 0; j < 4; j++)
          v[i * 4 + j] = bf16_to_float((uint16_t)(pair[j / 2] >> j % 2 * 16));
      } else {
        const uint32_t pair = ldg((const uint32_t*)word);
        v[i * 2] = bf16_to_float((uint16_t)pair);
        v[i * 2 + 1] = bf16_to_float((uint16_t)(pair >> 16));
      }
    }
    DTQ_UNROLL for (int i = 0; i < kRun; i++)
      v[i] = k + i < w.columns ? fmul(v[i], scale) : 0;  // times 1 changes nothing
    return;
  }

  if constexpr (kCodes == kTrits) {
    DTQ_UNROLL for (int i = 0; i < kRun; i++)
      v[i] = raised(trit_at(w, row, n, k + i)) - (kBase + 1);
  } else {
    uint32_t words[(kRun * kBits / 8 + 3) / 4];
    read_bytes<kRun * kBits / 8>(row, k * kBits / 8, p.row_bytes, p.whole, words);
    DTQ_UNROLL for (int i = 0; i < kRun; i++) {
      const uint32_t code = code_at<kBits>(words, i);
      if constexpr (kCodes == kTable) v[i] = lds<float>(table + code);
      else if constexpr (kCodes == kFloat8) v[i] = from_e4m3(code);
      else if constexpr (kCodes == kTwoLevel) v[i] = (float)code;
      else v[i] = raised(kBits == 8 ? code ^ 0x80 : code);  // a signed byte, plus 128
    }
  }

  auto each = [&](auto&& change) {  // change(value, parameters of its group)
    if (p.one_group) {
      const auto group = change(group_of(0));
      DTQ_UNROLL for (int i = 0; i < kRun; i++) v[i] = group(v[i]);
    } else {
      DTQ_UNROLL for (int i = 0; i < kRun; i++) v[i] = change(group_of(i))(v[i]);
    }
  };
  if constexpr (kCodes == kAffine)
    each([&](int64_t group) {
      const int zero = w.zero ? (int8_t)ldg((const uint8_t*)w.zero + n * groups + group) : w.offset;
      const float base = kBase + int_to_float(zero + (kBits == 8 ? 128 : 0));
      return [base](float x) { return x - base; };
    });
  if constexpr (kCodes == kTwoLevel)
    each([&](int64_t group) {
      const uint32_t byte = ldg(w.group_bytes + n * groups + group);
      const int scale2 = (int)(byte >> kBits) + 1, zero = (int)(byte & ((1 << kBits) - 1));
      return [scale2, zero](float x) {  // wraps as int8 does
        return int_to_float((int8_t)(((int)x - zero) * scale2));
      };
    });
  each([&](int64_t group) {
    const float scale = scale_at(w, n, group);
    return [scale](float x) { return fmul(x, scale); };
  });
  DTQ_UNROLL for (int i = 0; i < kRun; i++)
    if (k + i >= w.columns) v[i] = 0;
}

}  // namespace dtq
