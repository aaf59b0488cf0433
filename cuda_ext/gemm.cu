// SPDX-License-Identifier: Apache-2.0
// The functions of launch.h.
#include "gemm_plan.h"

namespace dtq {

int gemm_int8(const Gemm&, const Plan&, Stream);
int gemm_two_level(const Gemm&, const Plan&, Stream);
int gemm_table(const Gemm&, const Plan&, Stream);
int gemm_fp4(const Gemm&, const Plan&, Stream);

}  // namespace dtq

using namespace dtq;

extern "C" {

int dtq_gemm(const Gemm* g, Stream stream) {
  if (refusal(*g)) return kUnsupported;
  if (!g->tokens) return kOk;  // an empty grid is an error
  const Plan plan = plan_of(*g);
  if (workspace_of(*g, plan) > g->workspace_bytes) return kWorkspace;
  if (g->weights == kInt8) return gemm_int8(*g, plan, stream);
  if (g->weights == kTwoLevel) return gemm_two_level(*g, plan, stream);
  if (is_fp4(*g)) return gemm_fp4(*g, plan, stream);
  return gemm_table(*g, plan, stream);
}

int64_t dtq_gemm_workspace(const Gemm* g) {
  return refusal(*g) || !g->tokens ? 0 : workspace_of(*g, plan_of(*g));
}

const char* dtq_gemm_kernel(const Gemm* g) {
  static thread_local char text[64];
  if (refusal(*g)) return nullptr;
  const Plan plan = plan_of(*g);
  if (!plan.partial) return kTileSizes[plan.tile].name;
  snprintf(text, sizeof text, "%s, K in %d, summed after", kTileSizes[plan.tile].name, plan.splits);
  return text;
}

const char* dtq_gemm_refusal(const Gemm* g) { return refusal(*g); }
}
