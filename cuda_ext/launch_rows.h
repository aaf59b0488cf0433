// SPDX-License-Identifier: Apache-2.0
// What the torch binding calls for rows of activations, for few tokens, and to decode weights.
//
// Plain C++: no torch, no exceptions, no memory of its own, nothing but a launch on the stream given.
// Pointers are device pointers; row strides count elements. Every function returns kOk, a cudaError_t
// (positive), or why it will not do the task (negative, `refusal` says it in words); nothing was
// launched then. Nothing to do is not an error: zero rows return kOk without a launch.
#pragma once
#include "../common_ext/formats.h"
#include "types.h"

namespace dtq {

// Beside those of Status.
enum Refusal {
  kBadBlock = -16,   // not a power of two, or the columns are not whole blocks of it
  kLongBlock = -17,  // longer than kLongestBlock
  kLongRow = -18,    // two turns, quantized, of a row that shared memory does not hold
  kBadLevels = -19,  // not 1 to 127
  kBadWeight = -20,  // bits, groups and columns do not fit together
  kBadGroup = -21,   // groups of a number of columns that is no multiple of 16
  kBadFp4 = -22,     // FP4 rows that are not whole groups, or not aligned
};

const char* refusal(int code);

constexpr int64_t kLongestBlock = 8192;

// ---------------------------------------------------------------------------- rows of activations

enum Before {
  kAsIs,
  kGelu,  // tanh approximation
  kNorm,  // LayerNorm without weights, then * (1 + modulate_scale) + modulate_shift
};

enum Output {
  kInt8,   // codes, one scale per row
  kE4m3,   // the same with float8_e4m3fn codes
  kFloat,  // float32, not quantized
  kE2m1,   // as kInt8: E2M1 levels times two
  // E2M1 codes, two a byte; one scale per row, NaN if something is not finite; and
  kNvRow,  // an e4m3 for every 16 columns
  kMxRow,  // a biased exponent for every 32: the row's scale is 1
  kRounded,  // floats, rounded with a format and back
};

// Row by row: `before`, times pre_scale, order, rotation, quantize. Strided rows need columns side by
// side. All in float32, in the order that rows.cuh writes down.
struct Rows {
  const void* x;  // (M, K)
  Float type;
  int64_t rows, columns, stride;

  Before before;
  // kNorm: row r is modulated with row r / rows_per_modulate of these; both null for none
  const void *modulate_scale, *modulate_shift;  // (M / rows_per_modulate, K)
  Float modulate_type;
  int64_t modulate_stride, rows_per_modulate;
  float eps;

  const uint16_t* pre_scale;  // (K) bfloat16, or null
  const int32_t* order;       // (K), the channel that moves to each place, or null
  int64_t block;              // of the Hadamard transform, 1 for none
  int turns;                  // 1 or 2, see dtq.transforms.hadamard.rotate

  Output output;
  int levels;          // kInt8: the largest code, 1 to 127
  const float* fixed;  // a scale for all rows, or a table of them; null to measure each row
  const int64_t* bin;  // (1), the place in that table; null for the first
  Rounding rounding;   // kRounded
  Float out_type;      // kRounded
  void* out;           // (M, width) of int8, e4m3 bytes or floats; FP4: (M, K / 2) bytes
  int64_t out_stride;
  uint8_t* block_scale;  // FP4: (M, K / 16 or K / 32)
  int64_t width;       // columns written, at least K, those beyond it as 0; 0 for K
  float* scale;        // (M); unused by kFloat and kRounded
  int32_t* sums;       // (M), kInt8: the sum of the codes of each row, or null
};

int launch_rows(const Rows& rows, Stream stream);

// ---------------------------------------------------------------------------- weights as stored

// A matrix (N, K) in the packing of the file (docs/formats.md), not rearranged.
struct Weight {
  Encoding encoding;
  int bits;
  int64_t rows, columns;  // N, K
  const uint8_t* weight;
  const uint8_t* tail;  // kTrits: (N, K % 5) codes one a byte, null when K % 5 == 0

  ScaleType scale_type;
  const void* scale;     // (N, groups)
  const float* scale_2;  // (1), kScaleE4m3
  int64_t groups;        // of a row; of kTwoLevel: group bytes, its scale is one per row

  const int8_t* zero;          // kAffine: (N, groups), or null for `offset` everywhere
  int offset;                  // what symmetric codes below 8 bits were raised by
  const uint8_t* group_bytes;  // kTwoLevel: (N, groups), zero in the low bits, scale2 - 1 above

  const float* table;     // kTable: (2^bits) on the device, or null for `levels`
  float levels[16];       // kTable: the constants of a format
  const uint16_t* words;  // kWords: (2^bits, vector) bfloat16
  int vector;             // 2 or 4
};

// out (N, K) = the float32 values that the format stands for, rounded once to `type`.
int launch_dequantize(const Weight& weight, void* out, Float type, Stream stream);

// out (N, K) = the int8 of a kTwoLevel weight without a scale (kNoScale), before the row's.
int launch_expand(const Weight& weight, int8_t* out, Stream stream);

// y (M, N) = x (M, K) W^T + bias for few tokens, each weight read once and rounded to the type of x
// first. Sums are float32 in an order that depends on K alone (see few.cuh), so that a token's
// output does not depend on its batch.
struct Few {
  Weight weight;
  const void* x;  // (M, K)
  Float type;     // of x, bias and y
  int64_t tokens, stride;
  const void* bias;  // (N) or null
  void* y;           // (M, N)
};

int launch_few(const Few& few, Stream stream);

constexpr int64_t kFewTokens = 16;  // above this a product with decoded weights is faster

}  // namespace dtq
