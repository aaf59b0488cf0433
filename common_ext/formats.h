// SPDX-License-Identifier: Apache-2.0
// Formats as numbers, for the CPU and the CUDA library alike.
#pragma once
#include <stdint.h>

#include "float_types.h"

namespace dtq {

// How the codes of a stored weight encode values. dtq/kernels/compile/format_codes.py has the same numbers.
enum Encoding {
  kAffine,    // bits 2, 3, 4: code - zero; bits 8: signed bytes
  kTable,     // bits 3, 4: codebook[code]
  kFloat8,    // bits 8: e4m3
  kWords,     // bits 6, 8: words[code], a vector of `vector` columns (vector quantization)
  kTrits,     // ternary codes, five a byte: digit - 1
  kTwoLevel,  // bits 3, 4: int8 of (code - zero) * scale2
  kFloats,    // not quantized: floats of the type of the tokens. No format has it
};

// Of the scales of a stored weight; dtq/kernels/compile/format_codes.py has the same numbers.
enum ScaleType {
  kNoScale,
  kScaleFloat32,
  kScaleBFloat16,
  kScaleE4m3,   // times scale_2
  kScalePower,  // a byte: 2^(byte - 127)
};

// Activation formats that rows are rounded with and converted back to floats (round_rows).
enum Rounding {
  kRoundNone,
  kRoundInt4G64,
  kRoundInt4AsymG64,
  kRoundInt8AsymG128,
  kRoundFp8Row,
  kRoundNvFp4,
  kRoundMxFp4,
  kRoundings
};

struct RoundingFormat {
  const char* name;  // of the activation format in dtq/formats
  int64_t group;     // columns that share a scale; a row is a whole number of them
};

constexpr RoundingFormat kRoundingFormats[kRoundings] = {
    {"", 1},
    {"int4-g64", 64},
    {"int4-asym-g64", 64},
    {"int8-asym-g128", 128},
    {"fp8-row", 1},
    {"nvfp4", 16},
    {"mxfp4", 32},
};

}  // namespace dtq
