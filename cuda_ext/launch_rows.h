// SPDX-License-Identifier: Apache-2.0
// Rows of activations, decoded weights, and GEMM for few tokens: the interface for the torch binding.
//
// Plain C++: no torch, no exceptions, no allocation, only a launch on the given stream. Pointers are device
// pointers; row strides count elements. Every function returns kOk, a cudaError_t (positive), or a negative
// code for an unsupported task (see `refusal`); in that case nothing was launched. With zero rows nothing
// is launched either, and kOk is returned.
#pragma once
#include "../common_ext/formats.h"
#include "types.h"

namespace dtq {

// In addition to those of Status.
enum Refusal {
  kBadBlock = -16,   // not a power of two, or the columns are not whole blocks of it
  kLongBlock = -17,  // longer than kLongestBlock
  kLongRow = -18,    // two rotations, quantized, of a row that does not fit into shared memory
  kBadQmax = -19,    // not 1 to 127
  kBadWeight = -20,  // bits, groups and columns do not fit together
  kBadGroup = -21,   // groups whose number of columns is not a multiple of 16
  kBadFp4 = -22,     // FP4 rows that are not whole groups, or not aligned
};

// The reason in words.
const char* refusal(int code);

constexpr int64_t kLongestBlock = 8192;

// ---------------------------------------------------------------------------- rows of activations

enum Prologue {
  kNoPrologue,
  kGelu,  // tanh approximation
  kNorm,  // LayerNorm without weights, then * (1 + modulate_scale) + modulate_shift
};

enum Output {
  kInt8,   // int8 with a per-token scale
  kE4m3,   // float8_e4m3fn with a per-token scale
  kFloat,  // floats, not quantized
  kE2m1,   // as kInt8: twice the E2M1 value
  // FP4: E2M1 codes, two a byte; a per-token scale, NaN if a value is not finite; and block scales:
  kNvRow,          // an e4m3 for every 16 columns
  kMxRow,          // a biased exponent for every 32; the per-token scale is 1
  kFakeQuantized,  // floats, rounded with a format and converted back
};

// One row (token) at a time: prologue, times pre_scale, permutation, rotation, quantization. The columns of
// a row must be contiguous. All in float32; rows.cuh defines the order of operations.
struct Rows {
  const void* x;  // (M, K)
  Float type;
  int64_t rows, columns, stride;

  Prologue prologue;
  // kNorm: row r is modulated with row r / rows_per_modulate of these; both null for none
  const void *modulate_scale, *modulate_shift;  // (M / rows_per_modulate, K)
  Float modulate_type;
  int64_t modulate_stride, rows_per_modulate;
  float eps;

  const uint16_t* pre_scale;  // (K) bfloat16, or null
  const int32_t* perm;        // (K), place k gets input channel perm[k]; or null
  int64_t hadamard_block;     // block size of the Hadamard transform, 1 for none
  int num_rotations;          // 1 or 2, see dtq.linalg.hadamard.rotate

  Output output;
  int qmax;                   // kInt8: the largest quantized value, 1 to 127
  const float* static_scale;  // a scale for all tokens, or a table of them; null for a scale per token
  const int64_t* bin;         // (1), index into that table; null for 0
  Rounding rounding;          // kFakeQuantized
  Float out_type;             // kFloat, kFakeQuantized
  void* out;                  // (M, width) of int8, e4m3 bytes or floats; FP4: (M, K / 2) bytes
  int64_t out_stride;
  uint8_t* block_scale;  // FP4: (M, K / 16 or K / 32)
  int64_t width;         // columns written, at least K; from K on they are 0. 0 means K
  float* scale;          // (M); not for kFloat and kFakeQuantized
  int32_t* sums;         // (M), kInt8: the sum of the quantized values of each row; or null
  bool next_may_start;   // kDependentLaunch
};

int launch_rows(const Rows& rows, Stream stream);

// ---------------------------------------------------------------------------- stored weights

// A matrix (N, K) in the packing of the checkpoint (docs/formats.md).
struct Weight {
  Encoding encoding;
  int bits;
  int64_t rows, columns;  // N, K
  const uint8_t* weight;
  const uint8_t* tail;  // kTrits: (N, K % 5) one code a byte; null if K % 5 == 0

  ScaleType scale_type;  // kNoScale: kWords, and for launch_expand
  const void* scale;     // (N, groups)
  const float* scale_2;  // (1), kScaleE4m3
  int64_t groups;        // of a row; kTwoLevel: number of group bytes, its scale is one per row

  const int8_t* zero;          // kAffine: (N, groups), or null: `offset` everywhere
  int offset;                  // added to symmetric codes below 8 bits when they were stored
  const uint8_t* group_bytes;  // kTwoLevel: (N, groups), zero in the low bits, scale2 - 1 above

  const float* codebook;      // kTable: (2^bits) on the device, or null: format_codebook
  float format_codebook[16];  // kTable: the constants of a format
  const uint16_t* words;      // kWords: (2^bits, vector) bfloat16
  int vector;                 // 2 or 4
};

// out (N, K) = the float32 values of the weight, rounded once to `type`.
int launch_dequantize(const Weight& weight, void* out, Float type, Stream stream);

// out (N, K) = the int8 values of a kTwoLevel weight, without the scale of the row (kNoScale).
int launch_expand(const Weight& weight, int8_t* out, Stream stream);

// y (M, N) = x (M, K) W^T + bias for few tokens: each weight is read once, and rounded to the type of x.
// Sums are float32 in an order that depends on K alone (see small_m.cuh), so that a token's output does not
// depend on its batch.
struct SmallM {
  Weight weight;
  const void* x;  // (M, K)
  Float type;     // of x, bias and y
  int64_t tokens, stride;
  const void* bias;  // (N) or null
  void* y;           // (M, N)
};

int launch_small_m(const SmallM& problem, Stream stream);

constexpr int64_t kSmallMTokens = 16;  // with more tokens it is faster to decode the weight, then multiply

}  // namespace dtq
