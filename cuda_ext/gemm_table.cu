// SPDX-License-Identifier: Apache-2.0
#include "gemm_run.cuh"

namespace dtq {
int gemm_table(const Gemm& g, const Plan& plan, Stream s) { return run<Table>(g, plan, s); }
}  // namespace dtq
