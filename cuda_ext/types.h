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

}  // namespace dtq
