// SPDX-License-Identifier: Apache-2.0
// The table of weight formats that dtq/kernels/compile/format_codes.py registers when it loads a library. For the
// bindings alone: it uses the C++ library.
#pragma once
#include <map>
#include <string>
#include <vector>

#include "formats.h"

namespace dtq {
namespace {

// How a weight format is decoded.
struct FormatCode {
  Encoding encoding;
  int bits;
  int offset;  // added to symmetric codes below 8 bits when they were stored
  int vector;  // columns of a code
  ScaleType scale_type;
  std::vector<float> codebook;  // of kTable, where it is the same in every file; else empty
};

// By the name of the format, a key of FORMATS in dtq/formats.
std::map<std::string, FormatCode>& format_codes() {
  static std::map<std::string, FormatCode> known;
  return known;
}

void register_format(const char* name, int encoding, int bits, int offset, int vector, int scale_type,
                     const float* codebook, int count) {
  format_codes()[name] = {static_cast<Encoding>(encoding), bits, offset, vector,
                          static_cast<ScaleType>(scale_type), {codebook, codebook + count}};
}

}  // namespace
}  // namespace dtq
