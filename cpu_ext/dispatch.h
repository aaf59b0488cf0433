// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "kernels.h"

namespace dtq {

// The kernels in use: the fastest that the machine has, unless `use` said otherwise.
const Kernels& kernels();

// Use these, or the fastest below them that the machine has; null for the fastest. False when the
// machine lacks them or nobody knows the name.
bool use(const char* name);

// Whether the machine multiplies pairs of bfloat16.
bool has_bfloat16();

}  // namespace dtq
