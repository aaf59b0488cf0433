// SPDX-License-Identifier: Apache-2.0
// What the kernels and the code that calls them both speak of. No CUDA and no torch headers.
#pragma once
#include <stdint.h>

#include "../common_ext/float_types.h"

namespace dtq {

using Stream = void*;  // a cudaStream_t

// Beside the cudaError_t values, which are positive.
enum Status {
  kOk = 0,
  kUnsupported = -1,  // this kernel cannot do that: shapes, alignment or architecture
  kWorkspace = -2,    // the workspace is too small
  kEmulator = -3,     // sim::session().error says what
};

}  // namespace dtq
