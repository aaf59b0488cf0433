// SPDX-License-Identifier: Apache-2.0
#include "gemm_fp4.cuh"

namespace dtq {

namespace {

template <Weights kind>
int run_kind(const Gemm& g, const Plan& plan, Stream s) {
  const int64_t tiles = tiles_of(g, plan.tile);
  if (plan.tile == kFp4Large) return run_fp4<Fp4Tile<kind, 128, 128, 64, 32, 4>>(g, tiles, s);
  return run_fp4<Fp4Tile<kind, 64, 64, 32, 32, 5>>(g, tiles, s);
}

}  // namespace

int gemm_fp4(const Gemm& g, const Plan& plan, Stream s) {
  return g.weights == kNvFp4 ? run_kind<kNvFp4>(g, plan, s) : run_kind<kMxFp4>(g, plan, s);
}

}  // namespace dtq
