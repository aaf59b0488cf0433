// SPDX-License-Identifier: Apache-2.0
// Float types of tensors, for the CPU and the CUDA library alike.
//
// cpu_ext and cuda_ext include this folder as "../common_ext/...", in a checkout and in a wheel. It
// holds enums and constants and no functions: some files that include it are compiled for
// instruction sets that the machine may lack (see cpu_ext/kernels.h), others for a GPU.
#pragma once

namespace dtq {

enum Float { kFloat32, kBFloat16, kFloat16 };

}  // namespace dtq
