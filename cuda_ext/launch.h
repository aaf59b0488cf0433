// SPDX-License-Identifier: Apache-2.0
// GEMM of int8 and FP4 activations: the interface for the torch binding, in pointers, sizes and a stream.
// Nothing here allocates, waits or throws.
#pragma once
#include "types.h"

namespace dtq {

enum Weights {
  kInt8,      // (N, K) int8
  kTwoLevel,  // (N, K / 2), two codes a byte, the low nibble first; and a byte per group
  kTable,     // (N, K / 2) as above; each code is an index into a codebook of 16 int8
  // FP4: E2M1 codes of both operands, two a byte, with a scale per group of columns:
  kNvFp4,  // e4m3, groups of 16
  kMxFp4,  // a biased exponent, groups of 32
};

// out = float(x_q @ weight^T) * row_scale * weight_scale + bias, in float32 and in this order; then, if
// given, + low-rank branch; GELU; gate * that + residual; and one rounding to out_type.
struct Gemm {
  int64_t tokens, rows, columns;  // M, N, K
  const int8_t* x_q;              // (M, K), or FP4 (M, K / 2)
  const uint8_t* x_block_scale;   // FP4: (M, K / group)
  const float* row_scale;         // (M), per-token scale

  Weights weights;
  const void* weight;
  const uint8_t* groups;      // kTwoLevel: (N, K / group), zero in the low nibble, scale2 - 1 above;
                              // FP4: (N, K / group) scales
  const int8_t* codebooks;    // kTable: (N, K / group, 16)
  int64_t group;              // columns: 32, 64 or 128, or K for one group per row; FP4: 16 or 32
  const float* weight_scale;  // (N), per-channel scale; FP4: (1), or null for 1
  const void* bias;           // (N) of bias_type, or null
  Float bias_type;
  void* out;  // (M, N) of out_type
  Float out_type;

  // epilogue after the bias
  const void* down;  // (M, rank) of lowrank_type, bfloat16 or float16; null for none
  const void* up;    // (N, rank): + down @ up^T, summed in float32
  int64_t rank;      // a multiple of 16
  Float lowrank_type;
  bool gelu;             // tanh form, see gelu_approximate in epilogue.cuh
  const void* gate;      // (M / gate_tokens, N) of out_type; null for none
  int64_t gate_tokens;   // tokens that share a row of the gate
  const void* residual;  // (M, N) of out_type; with gate

  void* workspace;          // of dtq_gemm_workspace bytes, 16-byte aligned; need not be initialized
  int64_t workspace_bytes;  // size of the buffer

  int arch;  // compute capability: 80, 86, 89, 90, 100, 120
  int sms;   // multiprocessors of the device
  int options;  // of Options
};

}  // namespace dtq

extern "C" {

// Launches the GEMM on the stream of the current device. Returns a cudaError_t or a negative dtq::Status.
int dtq_gemm(const dtq::Gemm* g, dtq::Stream stream);

// Bytes of workspace that it needs; mostly 0.
int64_t dtq_gemm_workspace(const dtq::Gemm* g);

// The kernel that would run, e.g. "wgmma 256x128"; the text is valid until the thread's next call. Null if
// there is none: see dtq_gemm_refusal.
const char* dtq_gemm_kernel(const dtq::Gemm* g);

// Why there is no kernel for this, or null.
const char* dtq_gemm_refusal(const dtq::Gemm* g);
}
