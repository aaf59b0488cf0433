// SPDX-License-Identifier: Apache-2.0
#include "gemm_run.cuh"

namespace dtq {
int gemm_two_level(const Gemm& g, const Plan& plan, Stream s) { return run<TwoLevel>(g, plan, s); }
}  // namespace dtq
