// SPDX-License-Identifier: Apache-2.0
// dtq::* on CUDA for products of int8 codes: launch.h.
#include "launch.h"

#include "binding.h"

namespace {

using namespace dtq::binding;

// Which kernels there are for a device: those of one generation alone must be in this file, its PTX lacks
// them.
int arch_of(const Tensor& t) {
  const int found = capability(t);
#if !defined(DTQ_SIM)
  const std::string built = std::string(" ") + DTQ_ARCHS + " ", own = std::to_string(found);
  auto has = [&](const std::string& arch) { return built.find(" sm_" + arch + " ") != std::string::npos; };
  if (found == 90 && !has("90a")) return 89;
  if (found / 10 == 12 && !has("120f") && !has(own + "a")) return 100;
#endif
  return found;
}

// What every product of codes has: the operands but for the scales of the weight, checked.
dtq::Gemm product(const Tensor& codes, const Tensor& row_scale, const Tensor& weight, const Maybe& bias,
                  ScalarType type) {
  STD_TORCH_CHECK(codes.dim() == 2 && weight.dim() == 2, "dtq: codes and weight must be matrices");
  check(codes, "codes", codes, ScalarType::Char);
  check(row_scale, "row_scale", codes, ScalarType::Float);
  check(weight, "weight", codes, ScalarType::Char);
  int64_t tokens = codes.size(0), rows = weight.size(0);
  STD_TORCH_CHECK(row_scale.numel() == tokens, "dtq: ", row_scale.numel(), " row scales for ", tokens,
                  " tokens; there must be one scale per token");
  dtq::Gemm g{};
  g.tokens = tokens;
  g.rows = rows;
  g.columns = codes.size(1);
  g.codes = static_cast<const int8_t*>(codes.data_ptr());
  g.row_scale = static_cast<const float*>(row_scale.data_ptr());
  g.weight = weight.data_ptr();
  if (bias) {
    check(*bias, "bias", codes, bias->scalar_type());
    check_count(*bias, "bias", rows);
    STD_TORCH_CHECK(has_kernels(bias->scalar_type()), "dtq: bias is ", name_of(bias->scalar_type()));
    g.bias = bias->data_ptr();
    g.bias_type = float_of(bias->scalar_type());
  }
  g.out_type = float_of(type);
  g.arch = arch_of(codes);
  g.sms = multiprocessors(codes);
  return g;
}

// That of int8 codes, whose weights have a scale for each row.
dtq::Gemm product(const Tensor& codes, const Tensor& row_scale, const Tensor& weight,
                  const Tensor& weight_scale, const Maybe& bias, ScalarType type) {
  dtq::Gemm g = product(codes, row_scale, weight, bias, type);
  check(weight_scale, "weight_scale", codes, ScalarType::Float);
  check_count(weight_scale, "weight_scale", g.rows);
  g.weight_scale = static_cast<const float*>(weight_scale.data_ptr());
  return g;
}

// The product, or nothing where no kernel can do it.
std::optional<Tensor> multiplied(dtq::Gemm& g, const Tensor& codes, ScalarType type) {
  if (!has_kernels(type) || !served(codes)) return std::nullopt;
  Tensor out = torch::stable::new_empty(codes, {g.tokens, g.rows}, type);
  if (g.tokens == 0 || g.rows == 0) return out;
  if (g.columns == 0 || dtq_gemm_refusal(&g)) return std::nullopt;
  g.out = out.data_ptr();
  g.workspace_bytes = dtq_gemm_workspace(&g);
  Tensor workspace;  // lives until the launch: the allocator of torch knows the stream
  if (g.workspace_bytes > 0) {
    workspace = torch::stable::new_empty(codes, {g.workspace_bytes}, ScalarType::Char);
    g.workspace = workspace.data_ptr();
  }
  int code = dtq_gemm(&g, stream_of(codes));
  if (!launched(code, "the product of codes")) return std::nullopt;
  return out;
}

// The weight of a product: what its dimensions and further parts say.
void set_int8(dtq::Gemm& g, const Tensor& weight) {
  STD_TORCH_CHECK(weight.size(1) == g.columns, "dtq: codes with ", g.columns,
                  " columns do not fit the weight, which has ", weight.size(1));
  g.weights = dtq::kInt8;
}

// `parts` has a row for each of the weight and a column for each group.
void set_groups(dtq::Gemm& g, const Tensor& weight, const Tensor& parts, const char* name) {
  check(parts, name, weight, ScalarType::Char);
  STD_TORCH_CHECK(2 * weight.size(1) == g.columns, "dtq: codes with ", g.columns,
                  " columns do not fit the weight, which has ", 2 * weight.size(1));
  STD_TORCH_CHECK(parts.dim() >= 2 && parts.size(0) == g.rows && parts.size(1) > 0 &&
                      g.columns % parts.size(1) == 0,
                  "dtq: ", name, " must be (", g.rows, ", groups), and ", g.columns,
                  " columns whole groups");
  g.group = g.columns / parts.size(1);
}

void set_two_level(dtq::Gemm& g, const Tensor& weight, const Tensor& groups) {
  set_groups(g, weight, groups, "weight_scale_2");
  STD_TORCH_CHECK(groups.dim() == 2, "dtq: weight_scale_2 must be a matrix");
  g.weights = dtq::kTwoLevel;
  g.groups = static_cast<const uint8_t*>(groups.data_ptr());
}

void set_table(dtq::Gemm& g, const Tensor& weight, const Tensor& tables) {
  set_groups(g, weight, tables, "tables");
  STD_TORCH_CHECK(tables.dim() == 3 && tables.size(2) == 16, "dtq: tables must have 16 entries");
  g.weights = dtq::kTable;
  g.tables = static_cast<const int8_t*>(tables.data_ptr());
}

// Scales of blocks of both operands, e4m3 or biased exponents, and the one of the matrix.
void set_fp4(dtq::Gemm& g, const Tensor& weight, const Tensor& code_scale, const Tensor& weight_scale,
             const Maybe& outer) {
  const bool mx = code_scale.scalar_type() == ScalarType::Byte;
  const ScalarType type = mx ? ScalarType::Byte : ScalarType::Float8_e4m3fn;
  check(code_scale, "code_scale", weight, type);
  check(weight_scale, "weight_scale", weight, type);
  STD_TORCH_CHECK(weight.size(1) == g.columns, "dtq: codes with ", 2 * g.columns,
                  " columns do not fit the weight, which has ", 2 * weight.size(1));
  g.columns *= 2;
  g.group = mx ? 32 : 16;
  g.weights = mx ? dtq::kMxFp4 : dtq::kNvFp4;
  STD_TORCH_CHECK(g.columns % g.group == 0, "dtq: ", g.columns, " columns are not whole groups of ",
                  g.group);
  check_count(code_scale, "code_scale", g.tokens * (g.columns / g.group));
  check_count(weight_scale, "weight_scale", g.rows * (g.columns / g.group));
  g.code_scales = static_cast<const uint8_t*>(code_scale.data_ptr());
  g.groups = static_cast<const uint8_t*>(weight_scale.data_ptr());
  if (!outer) return;
  check(*outer, "weight_scale_2", weight, ScalarType::Float);
  check_count(*outer, "weight_scale_2", 1);
  g.weight_scale = static_cast<const float*>(outer->data_ptr());
}

void set_branch(dtq::Gemm& g, const Tensor& codes, const Maybe& low, const Maybe& up) {
  STD_TORCH_CHECK(low.has_value() == up.has_value(), "dtq: a low-rank branch has two factors");
  if (!low) return;
  const ScalarType type = low->scalar_type();
  STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half, "dtq: low is ", name_of(type),
                  ", expected bfloat16 or float16");
  check(*low, "low", codes, type);
  check(*up, "up", codes, type);
  STD_TORCH_CHECK(low->dim() == 2 && low->size(0) == g.tokens, "dtq: low must be (", g.tokens, ", rank)");
  STD_TORCH_CHECK(up->dim() == 2 && up->size(0) == g.rows && up->size(1) == low->size(1),
                  "dtq: up must be (", g.rows, ", ", low->size(1), ")");
  g.down = low->data_ptr();
  g.up = up->data_ptr();
  g.rank = low->size(1);
  g.lowrank_type = float_of(type);
}

// What follows the bias.
void set_epilogue(dtq::Gemm& g, const Tensor& codes, bool gelu, const Maybe& gate, const Maybe& residual,
                  ScalarType type) {
  g.gelu = gelu;
  STD_TORCH_CHECK(gate.has_value() == residual.has_value(), "dtq: a gate comes with a residual");
  if (!gate) return;
  check(*gate, "gate", codes, type);
  check(*residual, "residual", codes, type);
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

Tensor w8a8_linear(const Tensor& codes, const Tensor& row_scale, const Tensor& weight,
                   const Tensor& weight_scale, const Maybe& bias, ScalarType type) {
  Guard guard(codes);
  dtq::Gemm g = product(codes, row_scale, weight, weight_scale, bias, type);
  set_int8(g, weight);
  if (auto done = multiplied(g, codes, type)) return *done;
  return reference<Tensor>("dtq_reference::w8a8_linear", codes, row_scale, weight, weight_scale, bias,
                           type);
}

Tensor w4a8_linear(const Tensor& codes, const Tensor& row_scale, const Tensor& weight,
                   const Tensor& weight_scale, const Tensor& groups, const Maybe& bias, ScalarType type) {
  Guard guard(codes);
  dtq::Gemm g = product(codes, row_scale, weight, weight_scale, bias, type);
  set_two_level(g, weight, groups);
  if (auto done = multiplied(g, codes, type)) return *done;
  return reference<Tensor>("dtq_reference::w4a8_linear", codes, row_scale, weight, weight_scale, groups,
                           bias, type);
}

Tensor lut4a8_linear(const Tensor& codes, const Tensor& row_scale, const Tensor& weight,
                     const Tensor& weight_scale, const Tensor& tables, const Maybe& bias,
                     ScalarType type) {
  Guard guard(codes);
  dtq::Gemm g = product(codes, row_scale, weight, weight_scale, bias, type);
  set_table(g, weight, tables);
  if (auto done = multiplied(g, codes, type)) return *done;
  return reference<Tensor>("dtq_reference::lut4a8_linear", codes, row_scale, weight, weight_scale, tables,
                           bias, type);
}

Tensor w8a8_epilogue_linear(const Tensor& codes, const Tensor& row_scale, const Tensor& weight,
                            const Tensor& weight_scale, const Maybe& bias, bool gelu, const Maybe& gate,
                            const Maybe& residual, ScalarType type, const Maybe& low, const Maybe& up) {
  Guard guard(codes);
  dtq::Gemm g = product(codes, row_scale, weight, weight_scale, bias, type);
  set_int8(g, weight);
  set_branch(g, codes, low, up);
  set_epilogue(g, codes, gelu, gate, residual, type);
  if (auto done = multiplied(g, codes, type)) return *done;
  return reference<Tensor>("dtq_reference::w8a8_epilogue_linear", codes, row_scale, weight, weight_scale,
                           bias, gelu, gate, residual, type, low, up);
}

Tensor w4a8_epilogue_linear(const Tensor& codes, const Tensor& row_scale, const Tensor& weight,
                            const Tensor& weight_scale, const Tensor& groups, const Maybe& bias, bool gelu,
                            const Maybe& gate, const Maybe& residual, ScalarType type, const Maybe& low,
                            const Maybe& up) {
  Guard guard(codes);
  dtq::Gemm g = product(codes, row_scale, weight, weight_scale, bias, type);
  set_two_level(g, weight, groups);
  set_branch(g, codes, low, up);
  set_epilogue(g, codes, gelu, gate, residual, type);
  if (auto done = multiplied(g, codes, type)) return *done;
  return reference<Tensor>("dtq_reference::w4a8_epilogue_linear", codes, row_scale, weight, weight_scale,
                           groups, bias, gelu, gate, residual, type, low, up);
}

Tensor fp4_linear(const Tensor& codes, const Tensor& row_scale, const Tensor& weight,
                  const Tensor& weight_scale, const Tensor& code_scale, const Maybe& weight_scale_2,
                  const Maybe& bias, bool gelu, const Maybe& gate, const Maybe& residual, ScalarType type,
                  const Maybe& low, const Maybe& up) {
  Guard guard(codes);
  dtq::Gemm g = product(codes, row_scale, weight, bias, type);
  set_fp4(g, weight, code_scale, weight_scale, weight_scale_2);
  set_branch(g, codes, low, up);
  set_epilogue(g, codes, gelu, gate, residual, type);
  if (auto done = multiplied(g, codes, type)) return *done;
  return reference<Tensor>("dtq_reference::fp4_linear", codes, row_scale, weight, weight_scale, code_scale,
                           weight_scale_2, bias, gelu, gate, residual, type, low, up);
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

// "wgmma 256x128" or why there is none, for a product of these sizes with (N, K) int8 or, with a
// group, 4-bit weights: for people, and for the benchmark. The text lives until the next call.
DTQ_EXPORT const char* dtq_cuda_gemm(int arch, int sms, int64_t m, int64_t n, int64_t k, int group) {
  dtq::Gemm g{};
  g.tokens = m;
  g.rows = n;
  g.columns = k;
  g.weights = group ? dtq::kTwoLevel : dtq::kInt8;
  g.group = group;
  g.out_type = g.bias_type = dtq::kBFloat16;
  g.arch = arch;
  g.sms = sms;
  const char* refusal = dtq_gemm_refusal(&g);
  return refusal ? refusal : dtq_gemm_kernel(&g);
}
