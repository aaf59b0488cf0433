// SPDX-License-Identifier: Apache-2.0
// What the torch glue hands to a kernel, and the table of functions that each instruction set has.
//
// No C++ library and no torch headers here: the files that include this are compiled for
// instruction sets that the machine may lack, and an inline function of a shared header compiled
// there could be the copy that the linker keeps for everybody.
#pragma once
#include <stdint.h>

#include "../common_ext/formats.h"

namespace dtq {

constexpr int kStep = 64;    // input channels of one step: a cache line of int8
constexpr int kTokens = 16;  // tokens side by side in a block: the int32 lanes of 512 bits
constexpr int kRows = 32;    // output channels of a panel; two AMX tiles, four register blocks
constexpr int kGroup = 3;    // token blocks whose sums lie side by side
constexpr int kFew = 8;      // up to this many tokens each weight is read once and not rearranged

// quantize_rows, e2m1_quantize_rows, transform_rows, round_rows
struct Rows {
  const void* x;  // (M, K), rows `stride` elements apart
  Float type;
  int64_t stride, columns;
  const float* pre_scale;  // (K) or null
  const int32_t* order;    // (K), the channel that moves to each place, or null
  int64_t block;           // of the Hadamard transform; 1 for none
  int turns;               // 1, or 2: again, with the channels of each block dealt out over all
  float unit;              // block ** -0.5
  const float* fixed;      // one scale for all rows, or null
  int levels;              // the largest code; 0 for E2M1 levels times two
  int8_t* codes;           // (M, K)
  float* scale;            // (M)
  void* out;               // (M, K): the changed rows and no codes; or null
  Rounding rounding;       // of what goes to `out`
  Float out_type;
};

// Products of int8 codes: w8a8_linear, w4a8_linear, w3a8_linear, lut4a8_linear, group_a8_linear, and
// those that go on with an epilogue.
struct Linear {
  int64_t tokens, rows, columns;  // M, N, K
  int64_t steps;                  // of kStep channels
  const int8_t* codes;            // (M, K)
  const float* row_scale;         // (M)
  const int8_t* weight;           // (N, K * bits / 8)
  int bits;                       // 8, 4 or 3

  // what codes below 8 bits stand for: a byte of scale2 - 1 and zero for each group, or 16 int8
  const uint8_t* groups;  // (N, row_groups)
  const int8_t* tables;   // (N, row_groups, 16); neither of both: the codes themselves
  const int8_t (*levels)[16];  // of a byte: `levels_of` the bits
  int64_t row_groups, group;
  int group_bits;  // a channel's group in its row is at >> group_bits; or -1 for any other group
  const float* weight_scale;  // (N)

  // float scales inside a row: each section is a whole number of steps, filled with zeros, whose
  // sum becomes a float of its own
  const float* section_scale;  // (N, sections), or null: one section, weight_scale
  const int8_t* section_zero;  // (N, sections), or null for `zero` everywhere
  int zero;
  int64_t sections;
  int32_t* section_sums;  // of codes, for each block and section of kTokens; for few, of kFew
  const float* bias;          // (N) or null

  // what follows the bias: GELU, then gate * y + residual
  bool gelu;
  const void* gate;      // (M / gated, N), or null and no residual
  const void* residual;  // (M, N)
  int64_t gated;         // tokens of a row of gates
  Float given;           // the type of both

  void* out;  // (M, N)
  Float type;

  void* packed;  // codes as the multiplier reads them, see `pack`
};

// A matrix (N, K) of any format in the packing of the file (docs/formats.md), and how it is spelt.
struct Stored {
  Encoding encoding;
  int bits;
  int64_t rows, columns;  // N, K
  int64_t row_bytes;
  const uint8_t *weight, *end;
  const uint8_t* tail;  // kTrits: (N, K % 5) codes one a byte, null when K % 5 == 0

  ScaleType scale_type;
  const void* scale;     // (N, groups)
  const float* scale_2;  // (1), kScaleE4m3
  int64_t groups;        // of a row, more than one of a multiple of 16 columns each; of kTwoLevel:
                         // group bytes, its scale is one per row

  const int8_t* zero;          // kAffine: (N, groups), or null for `offset` everywhere
  int offset;                  // what symmetric codes below 8 bits were raised by
  const uint8_t* group_bytes;  // kTwoLevel: (N, groups), zero in the low bits, scale2 - 1 above

  float levels[16];       // kTable: of the format or of the file
  bool finite;            // all of them
  const uint16_t* words;  // kWords: (2^bits, vector) bfloat16
  int vector;             // 2 or 4
};

// dequantize and weight_linear
struct Decode {
  Stored weight;
  Float type;  // that weights are rounded to
  void* out;   // (N, K) of it, or of products (M, N)

  const void* x;         // (M, line), 0 past K: float32, or bfloat16 for `multiply_bfloat`
  int64_t tokens, line;  // M, at most kFewFloats; K rounded up to 32
  const float* bias;     // (N) or null
};

constexpr int kChunk = 1024;    // columns decoded together
constexpr int kTogether = 4;    // output channels decoded together
constexpr int kFewFloats = 16;  // above this a product with decoded weights is faster
constexpr int kScratch = kTogether * (kChunk + kFewFloats * 16);

struct Kernels {
  const char* name;
  int code_bytes;   // of a packed code
  int panel_bytes;  // of a weight in a panel
  // rows [first, last); `scratch` holds two rows of K floats, each rounded up to a multiple of 16
  void (*quantize)(const Rows&, int64_t first, int64_t last, float* scratch);
  // token blocks [first, last), for `multiply`
  void (*pack)(const Linear&, int64_t first, int64_t last);
  // token blocks [block, block_end) by panels [panel, panel_end); `scratch` holds `scratch_bytes`
  void (*multiply)(const Linear&, int64_t block, int64_t block_end, int64_t panel,
                   int64_t panel_end, void* scratch);
  // up to kFew tokens: all of them packed, or output channels [first, last)
  void (*pack_few)(const Linear&);
  void (*multiply_few)(const Linear&, int64_t first, int64_t last);
  // rows [first, last) of a stored matrix, and their products; `scratch` holds kScratch floats
  void (*decode)(const Decode&, int64_t first, int64_t last, float* scratch);
  void (*multiply_stored)(const Decode&, int64_t first, int64_t last, float* scratch);
  // the same of bfloat16 tokens, for machines that `has_bfloat16`; null where no instruction does it
  void (*multiply_bfloat)(const Decode&, int64_t first, int64_t last, float* scratch);
  // elements [first, last) of a dense tensor
  void (*gelu)(const void* x, void* out, Float type, int64_t first, int64_t last);
  // integer operations, a product and a sum each, done `rounds` times in registers; returns how many
  int64_t (*peak)(int64_t rounds);
};

// A panel of weights, and behind it the sums of every two of so many token blocks: AMX keeps them there
// where a panel passes by in parts; others do not touch that memory.
static inline int64_t scratch_bytes(const Kernels& kernels, const Linear& g, int64_t blocks) {
  return g.steps * kStep * kRows * kernels.panel_bytes +
         (blocks + 1) / 2 * kRows * kGroup * kTokens * (int64_t)sizeof(int32_t);
}

extern const Kernels portable;
#ifdef __x86_64__
extern const Kernels avx2, avxvnni, vnni, amx;
#endif
#ifdef __aarch64__
extern const Kernels neon;
#endif

// The int8 levels of a group byte, of 3- and of 4-bit codes: (code - zero) * scale2, wrapped as
// torch wraps.
extern int8_t levels_of[2][256][16];

inline const int8_t (*levels_of_bits(int bits))[16] { return levels_of[bits == 4]; }

// The five ternary codes of a byte, lowest first.
extern uint8_t trits_of[256][8];

extern float e4m3_of[256];

// Where the channels of a step are in a row.
struct Span {
  int64_t at;
  int width;
};

// The levels of 64 columns, for each 16 of them.
struct Levels {
  const int8_t* of[4];
  bool same;  // all four
};

}  // namespace dtq
