// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "kernels.h"

namespace dtq {

// The kernels in use: the fastest that the machine supports, unless `use` chose others.
const Kernels& kernels();

// Use the kernels of this name, or the fastest below them that the machine supports; null for the
// fastest. False if the machine does not support them or the name is unknown.
bool use(const char* name);

// Whether the machine has bfloat16 dot products (AVX512_BF16).
bool has_bfloat16();

}  // namespace dtq
