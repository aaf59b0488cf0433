// SPDX-License-Identifier: Apache-2.0
// Types that the kernels share with their callers. No CUDA and no torch headers.
#pragma once
#include <stdint.h>

#include "../common_ext/float_types.h"

namespace dtq {

using Stream = void*;  // a cudaStream_t

// Negative, unlike the cudaError_t values.
enum Status {
  kOk = 0,
  kUnsupported = -1,  // no kernel for these shapes, alignments or architecture
  kWorkspace = -2,    // the workspace is too small
  kEmulator = -3,     // see sim::session().error
};

// What no GPU has run yet and is therefore not the default.
enum Options {
  kPersistentBlocks = 1,  // sm_90: a block of a GEMM computes one tile after the other
  kDependentLaunch = 2,   // sm_90: a GEMM may start while the kernel that quantizes its rows ends
};
constexpr int kDefaultOptions = 0;

}  // namespace dtq
