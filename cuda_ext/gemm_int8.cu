// SPDX-License-Identifier: Apache-2.0
#include "gemm_run.cuh"

namespace dtq {
int gemm_int8(const Gemm& g, const Plan& plan, Stream s) { return run<Int8>(g, plan, s); }
}  // namespace dtq
