// SPDX-License-Identifier: Apache-2.0
// The products of int8 and FP4 activations, as the code that knows of torch calls them: pointers, sizes,
// a stream. Nothing here allocates, waits or throws.
#pragma once
#include "types.h"

namespace dtq {

enum Weights {
  kInt8,      // (N, K) int8
  kTwoLevel,  // (N, K / 2), two codes a byte, the low nibble first; and a byte a group
  kTable,     // (N, K / 2) as above; each code names an entry of a table of int8
  // E2M1 codes of both operands, two a byte, with a scale for each group of columns:
  kNvFp4,  // an e4m3 for 16
  kMxFp4,  // a biased exponent for 32
};

// out = float(codes @ weight^T) * row_scale * weight_scale + bias, in float32 and in this order;
// then, where given, + low-rank; GELU; gate * that + residual; and one rounding to out_type.
struct Gemm {
  int64_t tokens, rows, columns;  // M, N, K
  const int8_t* codes;            // (M, K), or FP4 (M, K / 2)
  const uint8_t* code_scales;     // FP4: (M, K / group)
  const float* row_scale;         // (M)

  Weights weights;
  const void* weight;
  const uint8_t* groups;      // kTwoLevel: (N, K / group), zero in the low nibble, scale2 - 1 above;
                              // FP4: (N, K / group) scales
  const int8_t* tables;       // kTable: (N, K / group, 16)
  int64_t group;              // columns: 32, 64 or 128, or K, one for a row; 16 or 32 of FP4
  const float* weight_scale;  // (N); of FP4 (1), or null for 1
  const void* bias;           // (N) of bias_type, or null
  Float bias_type;
  void* out;  // (M, N) of out_type
  Float out_type;

  // what may follow the bias
  const void* down;  // (M, rank), bfloat16 or float16 as lowrank_type says; null for none
  const void* up;    // (N, rank): + down @ up^T, summed in float32
  int64_t rank;      // a multiple of 16
  Float lowrank_type;
  bool gelu;             // in its tanh form: that of numbers.cuh
  const void* gate;      // (M / gate_tokens, N) of out_type; null for none
  int64_t gate_tokens;   // tokens that share a row of the gate
  const void* residual;  // (M, N) of out_type; with gate

  void* workspace;          // of dtq_gemm_workspace bytes, 16-byte aligned; contents do not matter
  int64_t workspace_bytes;  // the buffer's size

  int arch;  // compute capability: 80, 86, 89, 90, 100, 120
  int sms;   // multiprocessors of the device
};

}  // namespace dtq

extern "C" {

// Starts the product on the stream of the current device. A cudaError_t or a negative dtq::Status.
int dtq_gemm(const dtq::Gemm* g, dtq::Stream stream);

// Bytes of workspace that it needs; mostly 0.
int64_t dtq_gemm_workspace(const dtq::Gemm* g);

// The kernel that would run, "wgmma 128x256" or "mma 16x128 split 4"; the text lives until the
// thread's next call. Null where none can: then dtq_gemm_refusal says why.
const char* dtq_gemm_kernel(const dtq::Gemm* g);

// Why no kernel can do this, or null.
const char* dtq_gemm_refusal(const dtq::Gemm* g);
}
