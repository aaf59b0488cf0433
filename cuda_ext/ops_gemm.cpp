// SPDX-License-Identifier: Apache-2.0
// dtq::* on CUDA: GEMM of int8 and FP4 activations, by launch.h.
#include "launch.h"

#include "binding.h"

namespace {

using namespace dtq::binding;

// The architecture whose kernels a device can use. Those of a single generation must be compiled into this
// file: its PTX does not have them.
int arch_of(const Tensor& t) {
  const int arch = capability(t);
#if !defined(DTQ_SIM)
  const std::string built = std::string(" ") + DTQ_ARCHS + " ", own = std::to_string(arch);
  auto has = [&](const std::string& name) { return built.find(" sm_" + name + " ") != std::string::npos; };
  if (arch == 90 && !has("90a")) return 89;
  if (arch / 10 == 12 && !has("120f") && !has(own + "a")) return 100;
#endif
  return arch;
}

// The checked operands of every GEMM, without the scales of the weight.
dtq::Gemm gemm_operands(const Tensor& x_q, const Tensor& row_scale, const Tensor& weight,
                        const OptionalTensor& bias, ScalarType type) {
  STD_TORCH_CHECK(x_q.dim() == 2 && weight.dim() == 2, "dtq: x_q and weight must be matrices");
  check(x_q, "x_q", x_q, ScalarType::Char);
  check(row_scale, "row_scale", x_q, ScalarType::Float);
  check(weight, "weight", x_q, ScalarType::Char);
  int64_t tokens = x_q.size(0), rows = weight.size(0);
  STD_TORCH_CHECK(row_scale.numel() == tokens, "dtq: ", row_scale.numel(), " row scales for ", tokens,
                  " tokens; there must be one scale per token");
  dtq::Gemm g{};
  g.tokens = tokens;
  g.rows = rows;
  g.columns = x_q.size(1);
  g.x_q = static_cast<const int8_t*>(x_q.data_ptr());
  g.row_scale = static_cast<const float*>(row_scale.data_ptr());
  g.weight = weight.data_ptr();
  if (bias) {
    check(*bias, "bias", x_q, bias->scalar_type());
    check_count(*bias, "bias", rows);
    STD_TORCH_CHECK(is_kernel_dtype(bias->scalar_type()), "dtq: bias is ", name_of(bias->scalar_type()));
    g.bias = bias->data_ptr();
    g.bias_type = float_type(bias->scalar_type());
  }
  g.out_type = float_type(type);
  g.arch = arch_of(x_q);
  g.sms = multiprocessors(x_q);
  g.options = options.load(std::memory_order_relaxed);
  return g;
}

// The same with the per-channel scale of int8 GEMM.
dtq::Gemm gemm_operands(const Tensor& x_q, const Tensor& row_scale, const Tensor& weight,
                        const Tensor& weight_scale, const OptionalTensor& bias, ScalarType type) {
  dtq::Gemm g = gemm_operands(x_q, row_scale, weight, bias, type);
  check(weight_scale, "weight_scale", x_q, ScalarType::Float);
  check_count(weight_scale, "weight_scale", g.rows);
  g.weight_scale = static_cast<const float*>(weight_scale.data_ptr());
  return g;
}

// The result, or nothing if no kernel supports it.
std::optional<Tensor> run_gemm(dtq::Gemm& g, const Tensor& x_q, ScalarType type) {
  if (!is_kernel_dtype(type) || !is_supported(x_q)) return std::nullopt;
  Tensor out = torch::stable::new_empty(x_q, {g.tokens, g.rows}, type);
  if (g.tokens == 0 || g.rows == 0) return out;
  if (g.columns == 0 || dtq_gemm_refusal(&g)) return std::nullopt;
  g.out = out.data_ptr();
  g.workspace_bytes = dtq_gemm_workspace(&g);
  Tensor workspace;  // freed after the launch: torch's allocator orders reuse by stream
  if (g.workspace_bytes > 0) {
    workspace = torch::stable::new_empty(x_q, {g.workspace_bytes}, ScalarType::Char);
    g.workspace = workspace.data_ptr();
  }
  int code = dtq_gemm(&g, stream_of(x_q));
  if (!launched(code, "GEMM")) return std::nullopt;
  return out;
}

// The kinds of weights.
void set_int8(dtq::Gemm& g, const Tensor& weight) {
  STD_TORCH_CHECK(weight.size(1) == g.columns, "dtq: x_q with ", g.columns,
                  " columns does not fit the weight, which has ", weight.size(1));
  g.weights = dtq::kInt8;
}

// `groups` has a row for each row of the weight and a column for each group.
void set_groups(dtq::Gemm& g, const Tensor& weight, const Tensor& groups, const char* name) {
  check(groups, name, weight, ScalarType::Char);
  STD_TORCH_CHECK(2 * weight.size(1) == g.columns, "dtq: x_q with ", g.columns,
                  " columns does not fit the weight, which has ", 2 * weight.size(1));
  STD_TORCH_CHECK(groups.dim() >= 2 && groups.size(0) == g.rows && groups.size(1) > 0 &&
                      g.columns % groups.size(1) == 0,
                  "dtq: ", name, " must be (", g.rows, ", groups), and ", g.columns,
                  " columns whole groups");
  g.group = g.columns / groups.size(1);
}

void set_two_level(dtq::Gemm& g, const Tensor& weight, const Tensor& groups) {
  set_groups(g, weight, groups, "weight_scale_2");
  STD_TORCH_CHECK(groups.dim() == 2, "dtq: weight_scale_2 must be a matrix");
  g.weights = dtq::kTwoLevel;
  g.groups = static_cast<const uint8_t*>(groups.data_ptr());
}

void set_codebooks(dtq::Gemm& g, const Tensor& weight, const Tensor& tables) {
  set_groups(g, weight, tables, "tables");
  STD_TORCH_CHECK(tables.dim() == 3 && tables.size(2) == 16, "dtq: tables must have 16 entries");
  g.weights = dtq::kTable;
  g.codebooks = static_cast<const int8_t*>(tables.data_ptr());
}

// The block scales of both operands, e4m3 or biased exponents, and the scale of the weight matrix.
void set_fp4(dtq::Gemm& g, const Tensor& weight, const Tensor& x_block_scale, const Tensor& weight_scale,
             const OptionalTensor& weight_scale_2) {
  const bool mx = x_block_scale.scalar_type() == ScalarType::Byte;
  const ScalarType type = mx ? ScalarType::Byte : ScalarType::Float8_e4m3fn;
  check(x_block_scale, "x_block_scale", weight, type);
  check(weight_scale, "weight_scale", weight, type);
  STD_TORCH_CHECK(weight.size(1) == g.columns, "dtq: x_q with ", 2 * g.columns,
                  " columns does not fit the weight, which has ", 2 * weight.size(1));
  g.columns *= 2;
  g.group = mx ? 32 : 16;
  g.weights = mx ? dtq::kMxFp4 : dtq::kNvFp4;
  STD_TORCH_CHECK(g.columns % g.group == 0, "dtq: ", g.columns, " columns are not whole groups of ",
                  g.group);
  check_count(x_block_scale, "x_block_scale", g.tokens * (g.columns / g.group));
  check_count(weight_scale, "weight_scale", g.rows * (g.columns / g.group));
  g.x_block_scale = static_cast<const uint8_t*>(x_block_scale.data_ptr());
  g.groups = static_cast<const uint8_t*>(weight_scale.data_ptr());
  if (!weight_scale_2) return;
  check(*weight_scale_2, "weight_scale_2", weight, ScalarType::Float);
  check_count(*weight_scale_2, "weight_scale_2", 1);
  g.weight_scale = static_cast<const float*>(weight_scale_2->data_ptr());
}

void set_branch(dtq::Gemm& g, const Tensor& x_q, const OptionalTensor& low, const OptionalTensor& up) {
  STD_TORCH_CHECK(low.has_value() == up.has_value(), "dtq: a low-rank branch has two factors");
  if (!low) return;
  const ScalarType type = low->scalar_type();
  STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half, "dtq: low is ", name_of(type),
                  ", expected bfloat16 or float16");
  check(*low, "low", x_q, type);
  check(*up, "up", x_q, type);
  STD_TORCH_CHECK(low->dim() == 2 && low->size(0) == g.tokens, "dtq: low must be (", g.tokens, ", rank)");
  STD_TORCH_CHECK(up->dim() == 2 && up->size(0) == g.rows && up->size(1) == low->size(1),
                  "dtq: up must be (", g.rows, ", ", low->size(1), ")");
  check_alignment(*low, "low", 4);  // pairs
  check_alignment(*up, "up", 4);
  g.down = low->data_ptr();
  g.up = up->data_ptr();
  g.rank = low->size(1);
  g.lowrank_type = float_type(type);
}

void set_epilogue(dtq::Gemm& g, const Tensor& x_q, bool gelu, const OptionalTensor& gate,
                  const OptionalTensor& residual, ScalarType type) {
  g.gelu = gelu;
  STD_TORCH_CHECK(gate.has_value() == residual.has_value(), "dtq: a gate comes with a residual");
  if (!gate) return;
  check(*gate, "gate", x_q, type);
  check(*residual, "residual", x_q, type);
  STD_TORCH_CHECK(gate->dim() == 2 && gate->size(1) == g.rows && gate->size(0) > 0 &&
                      g.tokens % gate->size(0) == 0,
                  "dtq: gate must be (images, ", g.rows, "), and the tokens, ", g.tokens,
                  ", a multiple of the images");
  STD_TORCH_CHECK(residual->dim() == 2 && residual->size(0) == g.tokens && residual->size(1) == g.rows,
                  "dtq: residual must be (", g.tokens, ", ", g.rows, ")");
  g.gate = gate->data_ptr();
  g.gate_tokens = std::max<int64_t>(1, g.tokens / gate->size(0));
  g.residual = residual->data_ptr();
}

Tensor w8a8_linear(const Tensor& x_q, const Tensor& row_scale, const Tensor& weight,
                   const Tensor& weight_scale, const OptionalTensor& bias, ScalarType type) {
  Guard guard(x_q);
  dtq::Gemm g = gemm_operands(x_q, row_scale, weight, weight_scale, bias, type);
  set_int8(g, weight);
  if (auto out = run_gemm(g, x_q, type)) return *out;
  return call_reference<Tensor>("dtq_reference::w8a8_linear", x_q, row_scale, weight, weight_scale, bias,
                                type);
}

Tensor w4a8_linear(const Tensor& x_q, const Tensor& row_scale, const Tensor& weight,
                   const Tensor& weight_scale, const Tensor& weight_scale_2, const OptionalTensor& bias,
                   ScalarType type) {
  Guard guard(x_q);
  dtq::Gemm g = gemm_operands(x_q, row_scale, weight, weight_scale, bias, type);
  set_two_level(g, weight, weight_scale_2);
  if (auto out = run_gemm(g, x_q, type)) return *out;
  return call_reference<Tensor>("dtq_reference::w4a8_linear", x_q, row_scale, weight, weight_scale,
                                weight_scale_2, bias, type);
}

Tensor lut4a8_linear(const Tensor& x_q, const Tensor& row_scale, const Tensor& weight,
                     const Tensor& weight_scale, const Tensor& tables, const OptionalTensor& bias,
                     ScalarType type) {
  Guard guard(x_q);
  dtq::Gemm g = gemm_operands(x_q, row_scale, weight, weight_scale, bias, type);
  set_codebooks(g, weight, tables);
  if (auto out = run_gemm(g, x_q, type)) return *out;
  return call_reference<Tensor>("dtq_reference::lut4a8_linear", x_q, row_scale, weight, weight_scale,
                                tables, bias, type);
}

Tensor w8a8_epilogue_linear(const Tensor& x_q, const Tensor& row_scale, const Tensor& weight,
                            const Tensor& weight_scale, const OptionalTensor& bias, bool gelu,
                            const OptionalTensor& gate, const OptionalTensor& residual, ScalarType type,
                            const OptionalTensor& low, const OptionalTensor& up) {
  Guard guard(x_q);
  dtq::Gemm g = gemm_operands(x_q, row_scale, weight, weight_scale, bias, type);
  set_int8(g, weight);
  set_branch(g, x_q, low, up);
  set_epilogue(g, x_q, gelu, gate, residual, type);
  if (auto out = run_gemm(g, x_q, type)) return *out;
  return call_reference<Tensor>("dtq_reference::w8a8_epilogue_linear", x_q, row_scale, weight,
                                weight_scale, bias, gelu, gate, residual, type, low, up);
}

Tensor w4a8_epilogue_linear(const Tensor& x_q, const Tensor& row_scale, const Tensor& weight,
                            const Tensor& weight_scale, const Tensor& weight_scale_2,
                            const OptionalTensor& bias, bool gelu, const OptionalTensor& gate,
                            const OptionalTensor& residual, ScalarType type, const OptionalTensor& low,
                            const OptionalTensor& up) {
  Guard guard(x_q);
  dtq::Gemm g = gemm_operands(x_q, row_scale, weight, weight_scale, bias, type);
  set_two_level(g, weight, weight_scale_2);
  set_branch(g, x_q, low, up);
  set_epilogue(g, x_q, gelu, gate, residual, type);
  if (auto out = run_gemm(g, x_q, type)) return *out;
  return call_reference<Tensor>("dtq_reference::w4a8_epilogue_linear", x_q, row_scale, weight,
                                weight_scale, weight_scale_2, bias, gelu, gate, residual, type, low, up);
}

Tensor fp4_linear(const Tensor& x_q, const Tensor& row_scale, const Tensor& weight,
                  const Tensor& weight_scale, const Tensor& x_block_scale,
                  const OptionalTensor& weight_scale_2, const OptionalTensor& bias, bool gelu,
                  const OptionalTensor& gate, const OptionalTensor& residual, ScalarType type,
                  const OptionalTensor& low, const OptionalTensor& up) {
  Guard guard(x_q);
  dtq::Gemm g = gemm_operands(x_q, row_scale, weight, bias, type);
  set_fp4(g, weight, x_block_scale, weight_scale, weight_scale_2);
  set_branch(g, x_q, low, up);
  set_epilogue(g, x_q, gelu, gate, residual, type);
  if (auto out = run_gemm(g, x_q, type)) return *out;
  return call_reference<Tensor>("dtq_reference::fp4_linear", x_q, row_scale, weight, weight_scale,
                                x_block_scale, weight_scale_2, bias, gelu, gate, residual, type, low, up);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(DTQ_NAMESPACE, DTQ_KEY, m) {
  m.impl("w8a8_linear", TORCH_BOX(&w8a8_linear));
  m.impl("w4a8_linear", TORCH_BOX(&w4a8_linear));
  m.impl("lut4a8_linear", TORCH_BOX(&lut4a8_linear));
  m.impl("fp4_linear", TORCH_BOX(&fp4_linear));
  m.impl("w8a8_epilogue_linear", TORCH_BOX(&w8a8_epilogue_linear));
  m.impl("w4a8_epilogue_linear", TORCH_BOX(&w4a8_epilogue_linear));
}

// Sets Options of all later launches, for tests and measurements, and returns those before.
DTQ_EXPORT int dtq_cuda_options(int chosen) { return options.exchange(chosen); }

// The name of the kernel for a GEMM of these sizes, or why there is none: for messages, tests and the
// benchmark. The weights are int8 with group 0, NVFP4 with -16, MXFP4 with -32, else 4-bit integers in groups.
// The text is valid until the next call.
DTQ_EXPORT const char* dtq_cuda_gemm(int arch, int sms, int64_t m, int64_t n, int64_t k, int group) {
  dtq::Gemm g{};
  g.tokens = m;
  g.rows = n;
  g.columns = k;
  g.weights = group == 0     ? dtq::kInt8
              : group == -16 ? dtq::kNvFp4
              : group == -32 ? dtq::kMxFp4
                             : dtq::kTwoLevel;
  g.group = group < 0 ? -group : group;
  g.out_type = g.bias_type = dtq::kBFloat16;
  g.arch = arch;
  g.sms = sms;
  g.options = options.load(std::memory_order_relaxed);
  const char* refusal = dtq_gemm_refusal(&g);
  return refusal ? refusal : dtq_gemm_kernel(&g);
}
