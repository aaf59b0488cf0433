// SPDX-License-Identifier: Apache-2.0
// The interface between the torch bindings and the kernels: the operands of each kernel, and the table
// of functions that each instruction set provides.
//
// No C++ library and no torch headers here: the files that include this are compiled for
// instruction sets that the machine may lack, and an inline function of a shared header compiled
// there could be the copy that the linker keeps for all files.
#pragma once
#include <stdint.h>

#include "../common_ext/formats.h"

namespace dtq {

constexpr int kStep = 64;         // input channels of one step: a cache line of int8
constexpr int kBlockTokens = 16;  // tokens of a token block: the int32 lanes of 512 bits
constexpr int kPanelRows = 32;    // output channels of a panel: two AMX tiles, four register blocks
constexpr int kGroupBlocks = 3;   // token blocks whose int32 sums are stored next to each other
constexpr int kSmallM = 8;        // up to this many tokens each weight is read once and not packed

// quantize_rows, binned_quantize_rows, norm_quantize_rows, e2m1_quantize_rows, transform_rows, round_rows. A row
// is one token; it is normalized and modulated, scaled, permuted, rotated and then quantized.
struct Rows {
  const void* x;  // (M, K), row stride `stride` elements
  Float type;
  int64_t stride, columns;
  bool norm;                    // LayerNorm without weights, then * (1 + scale) + shift
  float eps;                    // added to the variance
  const float* modulate_scale;  // (M / rows_per_modulate, K), or null: no modulation
  const float* modulate_shift;  // likewise
  int64_t rows_per_modulate;    // tokens that share a row of them
  const float* pre_scale;  // (K), or null
  const int32_t* perm;     // (K), place k gets input channel perm[k]; or null
  int64_t hadamard_block;  // block size of the Hadamard transform; 1 for none
  int num_rotations;       // 1, or 2: rotate, transpose the blocks (K / block, block), rotate again
  float hadamard_scale;    // hadamard_block ** -0.5
  const float* static_scale;  // one scale for all tokens, or null for a scale per token
  int qmax;                // largest quantized value; 0: twice the E2M1 value as int8
  int8_t* x_q;             // (M, K)
  float* scale;            // (M)
  void* out;               // (M, K): the transformed rows as floats, and no x_q; or null
  Rounding rounding;       // fake quantization of `out`
  Float out_type;
};

constexpr int64_t kRowWarp = 512;  // columns that `sum_rows` adds first: 32 runs of 16

// Floats of a row in memory.
static inline int64_t padded_row(int64_t columns) { return (columns + kRowWarp - 1) / kRowWarp * kRowWarp; }

// int8 GEMM: w8a8_linear, w4a8_linear, w3a8_linear, lut4a8_linear, group_a8_linear, and those with an
// epilogue.
struct Linear {
  int64_t tokens, rows, columns;  // M, N, K
  int64_t steps;                  // of kStep channels
  const int8_t* x_q;              // (M, K)
  const float* row_scale;         // (M), per-token scale
  const int8_t* weight;           // (N, K * bits / 8)
  int bits;                       // 8, 4 or 3

  // How 3- and 4-bit codes of a group become int8: through a byte of zero and scale2 - 1, or through a
  // codebook of 16 int8. Neither: the codes are the values.
  const uint8_t* group_bytes;          // (N, groups_per_row), or null
  const int8_t* codebooks;             // (N, groups_per_row, 16), or null
  const int8_t (*byte_codebooks)[16];  // the codebook of each group byte, see `byte_codebooks`
  int64_t groups_per_row, group_size;
  int group_shift;            // log2(group_size), so that a channel's group is channel >> group_shift;
                              // -1 if group_size is not a power of two, or below 16
  const float* weight_scale;  // (N), per-channel scale

  // Float scales inside a row (group_a8_linear): a row is divided into sections that share a scale. Each
  // section is padded with zeros to whole steps, and its int32 sum is scaled before it is added.
  const float* section_scale;  // (N, sections), or null: one section, weight_scale
  const int8_t* section_zero;  // (N, sections) zero points, or null: `zero` everywhere
  int zero;
  int64_t sections;
  int32_t* section_sums;  // sums of x_q: [token block][section][kBlockTokens], or [section][kSmallM]
  const float* bias;      // (N), or null

  // epilogue: GELU, then gate * y + residual
  bool gelu;
  const void* gate;         // (M / tokens_per_gate, N); null: neither gate nor residual
  const void* residual;     // (M, N)
  int64_t tokens_per_gate;  // tokens that share a row of the gate
  Float gate_type;          // of gate and residual

  void* out;  // (M, N)
  Float type;

  void* packed;  // x_q in the layout of the instruction set, see `pack`
};

// A weight matrix (N, K) of any format, in the packing of the checkpoint (docs/formats.md).
struct StoredWeight {
  Encoding encoding;
  int bits;
  int64_t rows, columns;  // N, K
  int64_t row_bytes;
  const uint8_t *weight, *end;
  const uint8_t* tail;  // kTrits: (N, K % 5) one code a byte; null if K % 5 == 0

  ScaleType scale_type;
  const void* scale;     // (N, groups)
  const float* scale_2;  // (1), kScaleE4m3
  int64_t groups;        // of a row; more than one: of a multiple of 16 columns each. kTwoLevel: number
                         // of group bytes, its scale is one per row

  const int8_t* zero;          // kAffine: (N, groups), or null: `offset` everywhere
  int offset;                  // added to symmetric codes below 8 bits when they were stored
  const uint8_t* group_bytes;  // kTwoLevel: (N, groups), zero in the low bits, scale2 - 1 above

  float codebook[16];     // kTable: of the format or of the checkpoint
  bool finite;            // all of them
  const uint16_t* words;  // kWords: (2^bits, vector) bfloat16
  int vector;             // 2 or 4
};

// dequantize and weight_linear
struct Decode {
  StoredWeight weight;
  Float type;  // that weights are rounded to
  void* out;   // dequantize: (N, K); weight_linear: (M, N)

  const void* x;             // (M, x_stride), 0 from column K on: float32; bfloat16 for `multiply_bfloat16`
  int64_t tokens, x_stride;  // M, at most kSmallMFloat; K rounded up to 32
  const float* bias;         // (N), or null
};

// A tensor (batch, heads, tokens, channels) whose channels are neighbours; strides in elements.
struct Operand {
  const void* data;
  Float type;
  int64_t batch, head, token;
};

// int8_attention: softmax(scale * q k^T + mask) v, see attention.h
struct Attention {
  int64_t batch, heads, key_heads;  // key_heads divides heads
  int64_t queries, keys;
  int width, value_width;  // channels of a head, at most kWidestHead
  Operand q, k, v;
  float factor;          // scale * log2(e)
  const void* mask;      // bool or float32; null for none
  bool mask_is_bool;
  int64_t mask_batch, mask_head, mask_query, mask_key;  // strides
  void* packed;          // (batch * key_heads, head_bytes)
  int64_t head_bytes;
  void* out;             // (batch, queries, heads, value_width)
  Float out_type;
};

constexpr int kKeyTile = 64;      // keys of a tile: part of the definition of the result
constexpr int kWidestHead = 256;  // sums of products stay below 2^24

constexpr int kChunk = 1024;      // columns decoded at a time
constexpr int kRowsAtOnce = 4;    // output channels decoded at a time
constexpr int kSmallMFloat = 16;  // with more tokens it is faster to decode the weight, then multiply
constexpr int kDecodeScratch = kRowsAtOnce * (kChunk + kSmallMFloat * 16);

struct Kernels {
  const char* name;
  int x_bytes;       // of a packed activation
  int weight_bytes;  // of a weight in a panel
  // rows [first, last); `scratch` holds two rows of K floats, see `padded_row`
  void (*quantize)(const Rows&, int64_t first, int64_t last, float* scratch);
  // token blocks [first, last), for `multiply`
  void (*pack)(const Linear&, int64_t first, int64_t last);
  // token blocks [block, block_end) x panels [panel, panel_end); `scratch` holds `scratch_bytes`
  void (*multiply)(const Linear&, int64_t block, int64_t block_end, int64_t panel,
                   int64_t panel_end, void* scratch);
  // up to kSmallM tokens: packs all of them; multiplies output channels [first, last)
  void (*pack_small_m)(const Linear&);
  void (*multiply_small_m)(const Linear&, int64_t first, int64_t last);
  // output channels [first, last) of a stored weight; `scratch` holds kDecodeScratch floats
  void (*decode)(const Decode&, int64_t first, int64_t last, float* scratch);
  void (*multiply_stored)(const Decode&, int64_t first, int64_t last, float* scratch);
  // the same with bfloat16 tokens, if `has_bfloat16`; null if no instruction does it
  void (*multiply_bfloat16)(const Decode&, int64_t first, int64_t last, float* scratch);
  // elements [first, last) of a dense tensor
  void (*gelu)(const void* x, void* out, Float type, int64_t first, int64_t last);
  // int8 attention: queries of a block; bytes of a packed head, and of the scratch memory of a block
  int query_block;
  int64_t (*head_bytes)(const Attention&);
  int64_t (*block_bytes)(const Attention&);
  // heads [first, last) of keys and values; then blocks of queries [first, last) of all heads
  void (*pack_heads)(const Attention&, int64_t first, int64_t last);
  void (*attend)(const Attention&, int64_t first, int64_t last, void* scratch);
  // peak throughput: runs `rounds` rounds of multiply-adds in registers, returns the number of integer
  // operations
  int64_t (*peak)(int64_t rounds);
};

// A panel of weights, then the sums of every two of `blocks` token blocks. Only AMX uses the latter, for
// panels that it multiplies in parts.
static inline int64_t scratch_bytes(const Kernels& kernels, const Linear& g, int64_t blocks) {
  return g.steps * kStep * kPanelRows * kernels.weight_bytes +
         (blocks + 1) / 2 * kPanelRows * kGroupBlocks * kBlockTokens * (int64_t)sizeof(int32_t);
}

extern const Kernels portable;
#ifdef __x86_64__
extern const Kernels avx2, avxvnni, vnni, amx;
#endif
#ifdef __aarch64__
extern const Kernels neon;
#endif

// The int8 values of the codes under each group byte, for 3- and for 4-bit codes:
// (code - zero) * scale2, wrapped as torch wraps.
extern int8_t codebook_of_byte[2][256][16];

inline const int8_t (*byte_codebooks(int bits))[16] { return codebook_of_byte[bits == 4]; }

// The five ternary codes of a byte, lowest first.
extern uint8_t trits_of[256][8];

extern float e4m3_of[256];

// The channels of a step within a row.
struct Span {
  int64_t at;
  int width;
};

// The codebooks of 64 columns, one for every 16 of them.
struct Codebooks {
  const int8_t* of[4];
  bool same;  // all four
};

}  // namespace dtq
