// SPDX-License-Identifier: Apache-2.0
// The dtq:: ops on the CPU: checks, threads, memory. The arithmetic is in the other files.
#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "dispatch.h"
#include "glue.h"

namespace {

using namespace dtq::glue;
using dtq::kBlockTokens;
using dtq::Kernels;
using dtq::kGroupBlocks;
using dtq::kPanelRows;
using dtq::kSmallM;
using dtq::kStep;

// The checked operands of an op on rows, and the tensors that own their memory.
struct RowOperands {
  RowOperands(const char* op, const Tensor& x_in, const OptionalTensor& pre_scale,
              const OptionalTensor& perm_in, int64_t hadamard_block, int64_t num_rotations) {
    STD_TORCH_CHECK(x_in.dim() == 2, op, ": x must be (M, K), got ", shape_of(x_in));
    const int64_t k = x_in.size(1);
    STD_TORCH_CHECK(hadamard_block >= 1 && (hadamard_block & (hadamard_block - 1)) == 0 &&
                        k % hadamard_block == 0,
                    op, ": ", k, " channels are not whole blocks of ", hadamard_block);
    STD_TORCH_CHECK(num_rotations == 1 || num_rotations == 2, op, ": num_rotations must be 1 or 2");
    x = to_kernel_dtype(x_in);
    if (k > 1 && x.stride(1) != 1) x = torch::stable::contiguous(x);
    if (pre_scale) {
      STD_TORCH_CHECK(pre_scale->numel() == k, op, ": pre_scale must have ", k, " entries");
      rows.pre_scale = floats.of(*pre_scale);
    }
    if (perm_in) {
      STD_TORCH_CHECK(perm_in->numel() == k, op, ": perm must have ", k, " entries");
      perm = to_contiguous(to_dtype(*perm_in, ScalarType::Int));
      rows.perm = data<int32_t>(perm);
      for (int64_t i = 0; i < k; i++)
        STD_TORCH_CHECK(rows.perm[i] >= 0 && rows.perm[i] < k, op, ": channel ", rows.perm[i],
                        " in a permutation of ", k);
    }
    rows.x = x.const_data_ptr();
    rows.type = float_type(x.scalar_type());
    rows.stride = x.stride(0);
    rows.columns = k;
    rows.hadamard_block = hadamard_block;
    rows.num_rotations = static_cast<int>(num_rotations);
    rows.hadamard_scale = static_cast<float>(std::pow(static_cast<double>(hadamard_block), -0.5));
  }

  void run() const {
    const Kernels& kernels = dtq::kernels();
    const int64_t k = rows.columns, grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(k, 1));
    parallel_for(0, x.size(0), grain, [&](int64_t first, int64_t last) {
      static thread_local Scratch scratch;
      kernels.quantize(rows, first, last, scratch.get<float>(2 * dtq::padded_row(k) * 4));
    });
  }

  // LayerNorm without weights and modulation before the transform.
  void set_norm(const char* op, const OptionalTensor& scale_in, const OptionalTensor& shift_in, double eps) {
    rows.norm = true;
    rows.eps = static_cast<float>(eps);
    rows.rows_per_modulate = 1;
    STD_TORCH_CHECK(scale_in.has_value() == shift_in.has_value(), op, ": a scale comes with a shift");
    if (!scale_in) return;
    STD_TORCH_CHECK(scale_in->dim() == 2 && same_shape(*scale_in, *shift_in) && scale_in->size(0) > 0 &&
                        scale_in->size(1) == rows.columns && x.size(0) % scale_in->size(0) == 0,
                    op, ": scale ", shape_of(*scale_in), " and shift ", shape_of(*shift_in), " for x ",
                    shape_of(x));
    rows.modulate_scale = floats.of(*scale_in);
    rows.modulate_shift = floats.of(*shift_in);
    rows.rows_per_modulate = std::max<int64_t>(1, x.size(0) / scale_in->size(0));
  }

  Tensor x, perm;
  Floats floats;
  dtq::Rows rows = {};
};

using Pair = std::tuple<Tensor, Tensor>;

// x_q and the scale of each token; `scale` is a table of static scales of which entry `bin` is taken, or
// null for a scale per token.
Pair quantized(const char* op, RowOperands operands, const OptionalTensor& scale, int64_t bin,
               int64_t qmax) {
  const int64_t m = operands.x.size(0), k = operands.x.size(1);
  if (scale) {
    STD_TORCH_CHECK(bin >= 0 && bin < scale->numel(), op, ": bin ", bin, " of ", scale->numel(),
                    " static scales");
    operands.rows.static_scale = operands.floats.of(*scale) + bin;
  }
  Tensor x_q = torch::stable::new_empty(operands.x, {m, k}, ScalarType::Char);
  Tensor scales = torch::stable::new_empty(operands.x, {m}, ScalarType::Float);
  operands.rows.qmax = static_cast<int>(qmax);
  operands.rows.x_q = static_cast<int8_t*>(x_q.mutable_data_ptr());
  operands.rows.scale = static_cast<float*>(scales.mutable_data_ptr());
  if (m) operands.run();
  return {x_q, scales};
}

void check_qmax(const char* op, int64_t qmax) {
  STD_TORCH_CHECK(qmax >= 1 && qmax <= 127, op, ": qmax must be 1 to 127");
}

Pair quantize_rows(const Tensor& x, const OptionalTensor& pre_scale, int64_t hadamard_block,
                   const OptionalTensor& scale, int64_t qmax) {
  STD_TORCH_CHECK(!scale || scale->numel() == 1, "quantize_rows: one static scale, got ",
                  scale ? scale->numel() : 0);
  constexpr const char* kOp = "quantize_rows";
  check_qmax(kOp, qmax);
  RowOperands operands(kOp, x, pre_scale, std::nullopt, hadamard_block, 1);
  return quantized(kOp, std::move(operands), scale, 0, qmax);
}

Pair binned_quantize_rows(const Tensor& x, const OptionalTensor& pre_scale, const OptionalTensor& perm,
                          int64_t hadamard_block, int64_t num_rotations, const OptionalTensor& scale,
                          const OptionalTensor& bin, int64_t qmax) {
  constexpr const char* kOp = "binned_quantize_rows";
  check_qmax(kOp, qmax);
  STD_TORCH_CHECK(!bin || bin->numel() == 1, kOp, ": one bin, got ", bin ? bin->numel() : 0);
  const int64_t at = bin ? *data<int64_t>(to_dtype(*bin, ScalarType::Long)) : 0;
  RowOperands operands(kOp, x, pre_scale, perm, hadamard_block, num_rotations);
  return quantized(kOp, std::move(operands), scale, at, qmax);
}

Pair norm_quantize_rows(const Tensor& x, const OptionalTensor& modulate_scale,
                        const OptionalTensor& modulate_shift, double eps, const OptionalTensor& pre_scale,
                        const OptionalTensor& perm, int64_t hadamard_block, int64_t num_rotations,
                        const OptionalTensor& scale, const OptionalTensor& bin, int64_t qmax) {
  constexpr const char* kOp = "norm_quantize_rows";
  check_qmax(kOp, qmax);
  STD_TORCH_CHECK(!bin || bin->numel() == 1, kOp, ": one bin, got ", bin ? bin->numel() : 0);
  const int64_t at = bin ? *data<int64_t>(to_dtype(*bin, ScalarType::Long)) : 0;
  RowOperands operands(kOp, x, pre_scale, perm, hadamard_block, num_rotations);
  operands.set_norm(kOp, modulate_scale, modulate_shift, eps);
  return quantized(kOp, std::move(operands), scale, at, qmax);
}

Pair e2m1_quantize_rows(const Tensor& x, const OptionalTensor& pre_scale, const OptionalTensor& perm,
                        int64_t hadamard_block, int64_t num_rotations) {
  constexpr const char* kOp = "e2m1_quantize_rows";
  RowOperands operands(kOp, x, pre_scale, perm, hadamard_block, num_rotations);
  return quantized(kOp, std::move(operands), std::nullopt, 0, 0);
}

Tensor transform_rows(const Tensor& x_in, const OptionalTensor& pre_scale, const OptionalTensor& perm,
                      int64_t hadamard_block, int64_t num_rotations) {
  RowOperands operands("transform_rows", x_in, pre_scale, perm, hadamard_block, num_rotations);
  const int64_t m = operands.x.size(0), k = operands.x.size(1);
  Tensor out = torch::stable::new_empty(operands.x, {m, k}, ScalarType::Float);
  operands.rows.out = out.mutable_data_ptr();
  if (m && k) operands.run();
  return out;
}

Tensor round_rows(const Tensor& x, const OptionalTensor& pre_scale, const OptionalTensor& perm,
                  int64_t hadamard_block, int64_t num_rotations, const std::string& activation_format,
                  ScalarType type) {
  RowOperands operands("round_rows", x, pre_scale, perm, hadamard_block, num_rotations);
  const int64_t m = operands.x.size(0), k = operands.x.size(1);
  for (int i = dtq::kRoundNone + 1; i < dtq::kRoundings; i++) {
    const dtq::RoundingFormat& format = dtq::kRoundingFormats[i];
    if (activation_format != format.name || !is_kernel_dtype(type)) continue;
    STD_TORCH_CHECK(k % format.group == 0, "round_rows: ", k, " columns are not whole groups of ",
                    format.group, " for ", activation_format);
    Tensor out = torch::stable::new_empty(operands.x, {m, k}, type);
    operands.rows.out = out.mutable_data_ptr();
    operands.rows.rounding = static_cast<dtq::Rounding>(i);
    operands.rows.out_type = float_type(type);
    if (m && k) operands.run();
    return out;
  }
  return call("dtq_reference::round_rows", x, pre_scale, perm, hadamard_block, num_rotations,
              activation_format, type);
}

// Token blocks that all panels are multiplied with. They are read from the third-level cache if they must be:
// one pass over them takes longer than reading them, and each panel is unpacked once for all of them.
int64_t blocks_at_once(int64_t blocks, int64_t block_bytes) {
  constexpr int64_t kCache = 2560 << 10;
  const int64_t most = std::max<int64_t>(2, kCache / block_bytes / kGroupBlocks) * kGroupBlocks;
  const int64_t parts = ceil_div(blocks, most);
  return round_up(ceil_div(blocks, parts), kGroupBlocks);
}

void multiply_large_m(dtq::Linear& g, const Kernels& kernels) {
  const int64_t blocks = ceil_div(g.tokens, kBlockTokens);
  const int64_t block_bytes = g.steps * kStep * kBlockTokens * kernels.x_bytes;
  static thread_local Scratch packed, sums;
  g.packed = packed.get(blocks * block_bytes);
  g.section_sums = sums.get<int32_t>(blocks * g.sections * kBlockTokens * 4);
  parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) { kernels.pack(g, first, last); });
  // a task: `block_count` token blocks x some panels
  const int64_t panels = ceil_div(g.rows, kPanelRows);
  const int64_t block_count = blocks_at_once(blocks, block_bytes);
  const int64_t tasks_m = ceil_div(blocks, block_count);
  const int64_t threads = torch::stable::get_num_threads();
  // a few tasks per thread, of about as many panels: a thread gets as many neighbouring tasks as the others
  const int64_t wanted = threads > 1 ? 4 * threads : 1;
  const int64_t tasks_n = std::clamp<int64_t>(wanted / tasks_m, 1, panels);
  parallel_for(0, tasks_m * tasks_n, 1, [&](int64_t first, int64_t last) {
    static thread_local Scratch panel;
    void* scratch = panel.get(dtq::scratch_bytes(kernels, g, block_count));
    for (int64_t task = first; task < last; task++) {
      const int64_t b = task / tasks_n * block_count, n = task % tasks_n;
      kernels.multiply(g, b, std::min(b + block_count, blocks), n * panels / tasks_n,
                       (n + 1) * panels / tasks_n, scratch);
    }
  });
}

void multiply_small_m(dtq::Linear& g, const Kernels& kernels) {
  static thread_local Scratch packed, sums;
  g.packed = packed.get(g.tokens * g.steps * kStep * kernels.x_bytes);
  g.section_sums = sums.get<int32_t>(g.sections * kSmallM * 4);
  kernels.pack_small_m(g);
  const int64_t grain = std::max<int64_t>(1, 65536 / (g.columns * kPanelRows));
  parallel_for(0, ceil_div(g.rows, kPanelRows), grain, [&](int64_t first, int64_t last) {
    kernels.multiply_small_m(g, first * kPanelRows, std::min(last * kPanelRows, g.rows));
  });
}

// The checked operands of an int8 GEMM; owns the tensors whose memory they point to.
class Gemm {
 public:
  Gemm(const Tensor& x_q, const Tensor& row_scale, const Tensor& weight, int bits,
       const OptionalTensor& bias)
      : x_q_(to_contiguous(x_q)), weight_(to_contiguous(weight)) {
    STD_TORCH_CHECK(x_q.dim() == 2 && weight.dim() == 2, "dtq linear: x_q and weight are 2-D");
    STD_TORCH_CHECK(x_q.scalar_type() == ScalarType::Char && weight.scalar_type() == ScalarType::Char,
                    "dtq linear: x_q and weight are int8");
    g.tokens = x_q.size(0);
    g.columns = x_q.size(1);
    g.rows = weight.size(0);
    g.bits = bits;
    g.byte_codebooks = dtq::byte_codebooks(bits);
    STD_TORCH_CHECK(g.columns * bits % 8 == 0 && weight.size(1) == g.columns * bits / 8,
                    "dtq linear: x_q ", shape_of(x_q), " does not fit the weight ", shape_of(weight));
    STD_TORCH_CHECK(row_scale.numel() == g.tokens, "dtq linear: one scale per token");
    g.x_q = data<int8_t>(x_q_);
    g.weight = data<int8_t>(weight_);
    g.row_scale = floats_.of(row_scale);
    if (bias) {
      STD_TORCH_CHECK(bias->numel() == g.rows, "dtq linear: bias must have ", g.rows, " entries");
      g.bias = floats_.of(*bias);
    }
    g.sections = 1;
    set_group(1);
  }

  // One scale for each output channel.
  void set_scale(const Tensor& weight_scale) {
    STD_TORCH_CHECK(weight_scale.numel() == g.rows, "dtq linear: one scale per output channel");
    g.weight_scale = floats_.of(weight_scale);
  }

  // The codebooks of 3- or 4-bit codes: a byte (entries = 1) or 16 int8 for each group of a row.
  void set_codebooks(const Tensor& groups, int64_t entries, const char* name) {
    STD_TORCH_CHECK(groups.dim() == (entries > 1 ? 3 : 2) && groups.size(0) == g.rows &&
                        groups.size(1) > 0 && g.columns % groups.size(1) == 0 &&
                        groups.element_size() == 1 && (entries == 1 || groups.size(2) == entries),
                    "dtq linear: ", name, " ", shape_of(groups), " do not fit the weight");
    const void* at = owned(to_contiguous(groups)).const_data_ptr();
    if (entries == 1) g.group_bytes = static_cast<const uint8_t*>(at);
    else g.codebooks = static_cast<const int8_t*>(at);
    set_group(groups.size(1));
  }

  // A float scale, and a zero point, for each section of a row.
  void set_sections(const Tensor& scale, const OptionalTensor& zero) {
    STD_TORCH_CHECK(scale.dim() == 2 && scale.size(0) == g.rows && scale.size(1) > 0 &&
                        g.columns % scale.size(1) == 0,
                    "dtq linear: scales ", shape_of(scale), " do not fit the weight");
    g.sections = scale.size(1);
    STD_TORCH_CHECK(g.bits == 8 || g.columns / g.sections % 2 == 0, "dtq linear: groups of ",
                    g.columns / g.sections, " 4-bit weights do not end on a byte");
    g.section_scale = floats_.of(scale);
    if (!zero) return;
    STD_TORCH_CHECK(same_shape(*zero, scale) && zero->scalar_type() == ScalarType::Char,
                    "dtq linear: zero points ", shape_of(*zero), " do not fit the scales");
    g.section_zero = data<int8_t>(owned(to_contiguous(*zero)));
  }

  void set_epilogue(bool gelu, const OptionalTensor& gate, const OptionalTensor& residual) {
    g.gelu = gelu;
    STD_TORCH_CHECK(gate.has_value() == residual.has_value(), "dtq: a gate comes with a residual");
    if (!gate) return;
    STD_TORCH_CHECK(gate->dim() == 2 && gate->size(1) == g.rows && gate->size(0) > 0 &&
                        g.tokens % gate->size(0) == 0,
                    "dtq: gate ", shape_of(*gate), " for ", g.tokens, " tokens of ", g.rows);
    STD_TORCH_CHECK(residual->dim() == 2 && residual->size(0) == g.tokens &&
                        residual->size(1) == g.rows,
                    "dtq: residual ", shape_of(*residual), " for ", g.tokens, " tokens of ", g.rows);
    const ScalarType type = gate->scalar_type();
    const bool same_type = type == residual->scalar_type() && is_kernel_dtype(type);
    const ScalarType common = same_type ? type : ScalarType::Float;
    g.gate = owned(to_contiguous(to_dtype(*gate, common))).const_data_ptr();
    g.residual = owned(to_contiguous(to_dtype(*residual, common))).const_data_ptr();
    g.tokens_per_gate = g.tokens / gate->size(0);
    g.gate_type = float_type(common);
  }

  Tensor run(ScalarType type) {
    const bool has_columns = g.columns > 0;
    const auto out_type = has_columns && is_kernel_dtype(type) ? type : ScalarType::Float;
    Tensor out = torch::stable::new_empty(x_q_, {g.tokens, g.rows}, out_type);
    if (out.numel() && has_columns) {
      g.steps = g.sections * ceil_div(g.columns / g.sections, kStep);
      g.out = out.mutable_data_ptr();
      g.type = float_type(type);
      const Kernels& kernels = dtq::kernels();
      g.tokens <= kSmallM ? multiply_small_m(g, kernels) : multiply_large_m(g, kernels);
    } else if (out.numel()) {  // K = 0: the bias
      float* to = static_cast<float*>(out.mutable_data_ptr());
      for (int64_t t = 0; t < g.tokens; t++)
        for (int64_t n = 0; n < g.rows; n++) *to++ = g.bias ? g.bias[n] : 0;
    }
    return to_dtype(out, type);
  }

  dtq::Linear g = {};

 private:
  void set_group(int64_t count) {
    g.groups_per_row = count;
    g.group_size = std::max<int64_t>(1, g.columns / count);
    const bool power = (g.group_size & (g.group_size - 1)) == 0;
    g.group_shift = count == 1 ? 62 : g.group_size >= 16 && power ? __builtin_ctzll(g.group_size) : -1;
  }

  const Tensor& owned(Tensor tensor) {
    owned_.push_back(std::move(tensor));
    return owned_.back();
  }


  Tensor x_q_, weight_;
  Floats floats_;
  std::vector<Tensor> owned_;
};

Tensor gelu(const Tensor& x_in) {
  const auto type = x_in.scalar_type();
  const Tensor x = to_contiguous(to_kernel_dtype(x_in));
  Tensor out = torch::stable::empty_like(x);
  const dtq::Float out_type = float_type(x.scalar_type());
  const Kernels& kernels = dtq::kernels();
  parallel_for(0, x.numel(), 16384, [&](int64_t first, int64_t last) {
    kernels.gelu(x.const_data_ptr(), out.mutable_data_ptr(), out_type, first, last);
  });
  return to_dtype(out, type);
}

Tensor w8a8_linear(const Tensor& x_q, const Tensor& row_scale, const Tensor& weight,
                   const Tensor& weight_scale, const OptionalTensor& bias, ScalarType type) {
  Gemm gemm(x_q, row_scale, weight, 8, bias);
  gemm.set_scale(weight_scale);
  return gemm.run(type);
}

template <int bits>
Tensor two_level_linear(const Tensor& x_q, const Tensor& row_scale, const Tensor& weight,
                        const Tensor& weight_scale, const Tensor& weight_scale_2,
                        const OptionalTensor& bias, ScalarType type) {
  Gemm gemm(x_q, row_scale, weight, bits, bias);
  gemm.set_scale(weight_scale);
  gemm.set_codebooks(weight_scale_2, 1, "group bytes");
  return gemm.run(type);
}

Tensor lut4a8_linear(const Tensor& x_q, const Tensor& row_scale, const Tensor& weight,
                     const Tensor& weight_scale, const Tensor& tables, const OptionalTensor& bias,
                     ScalarType type) {
  Gemm gemm(x_q, row_scale, weight, 4, bias);
  gemm.set_scale(weight_scale);
  gemm.set_codebooks(tables, 16, "tables");
  return gemm.run(type);
}

Tensor group_a8_linear(const Tensor& x_q, const Tensor& row_scale, const Tensor& weight,
                       const Tensor& weight_scale, const OptionalTensor& weight_zero_point,
                       int64_t bits, const OptionalTensor& bias, ScalarType type) {
  STD_TORCH_CHECK(bits == 4 || bits == 8, "group_a8_linear: ", bits, " bits; there can be 4 or 8");
  Gemm gemm(x_q, row_scale, weight, static_cast<int>(bits), bias);
  gemm.set_sections(weight_scale, weight_zero_point);
  gemm.g.zero = bits == 4 ? 8 : 0;
  return gemm.run(type);
}

// Whether a kernel does a GEMM with an epilogue. The reference does it if M or K is 0, for other output
// types, and with low-rank branches, which layers do not request on a CPU (branch_joins in
// dtq/kernels/table.py).
bool has_kernel(const Tensor& x_q, ScalarType type, const OptionalTensor& low, const OptionalTensor& up) {
  STD_TORCH_CHECK(low.has_value() == up.has_value(), "dtq linear: a low-rank branch has two factors");
  return is_kernel_dtype(type) && x_q.dim() == 2 && x_q.size(0) > 0 && x_q.size(1) > 0 && !low && !up;
}

Tensor w8a8_epilogue_linear(const Tensor& x_q, const Tensor& row_scale, const Tensor& weight,
                            const Tensor& weight_scale, const OptionalTensor& bias, bool gelu,
                            const OptionalTensor& gate, const OptionalTensor& residual,
                            ScalarType type, const OptionalTensor& low, const OptionalTensor& up) {
  if (!has_kernel(x_q, type, low, up))
    return call("dtq_reference::w8a8_epilogue_linear", x_q, row_scale, weight, weight_scale, bias, gelu,
                gate, residual, type, low, up);
  Gemm gemm(x_q, row_scale, weight, 8, bias);
  gemm.set_scale(weight_scale);
  gemm.set_epilogue(gelu, gate, residual);
  return gemm.run(type);
}

Tensor w4a8_epilogue_linear(const Tensor& x_q, const Tensor& row_scale, const Tensor& weight,
                            const Tensor& weight_scale, const Tensor& weight_scale_2,
                            const OptionalTensor& bias, bool gelu, const OptionalTensor& gate,
                            const OptionalTensor& residual, ScalarType type, const OptionalTensor& low,
                            const OptionalTensor& up) {
  if (!has_kernel(x_q, type, low, up))
    return call("dtq_reference::w4a8_epilogue_linear", x_q, row_scale, weight, weight_scale,
                weight_scale_2, bias, gelu, gate, residual, type, low, up);
  Gemm gemm(x_q, row_scale, weight, 4, bias);
  gemm.set_scale(weight_scale);
  gemm.set_codebooks(weight_scale_2, 1, "group bytes");
  gemm.set_epilogue(gelu, gate, residual);
  return gemm.run(type);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dtq, CPU, m) {
  m.impl("quantize_rows", TORCH_BOX(&quantize_rows));
  m.impl("binned_quantize_rows", TORCH_BOX(&binned_quantize_rows));
  m.impl("norm_quantize_rows", TORCH_BOX(&norm_quantize_rows));
  m.impl("round_rows", TORCH_BOX(&round_rows));
  m.impl("e2m1_quantize_rows", TORCH_BOX(&e2m1_quantize_rows));
  m.impl("transform_rows", TORCH_BOX(&transform_rows));
  m.impl("w8a8_linear", TORCH_BOX(&w8a8_linear));
  m.impl("w4a8_linear", TORCH_BOX(&two_level_linear<4>));
  m.impl("w3a8_linear", TORCH_BOX(&two_level_linear<3>));
  m.impl("lut4a8_linear", TORCH_BOX(&lut4a8_linear));
  m.impl("group_a8_linear", TORCH_BOX(&group_a8_linear));
  m.impl("w8a8_epilogue_linear", TORCH_BOX(&w8a8_epilogue_linear));
  m.impl("w4a8_epilogue_linear", TORCH_BOX(&w4a8_epilogue_linear));
  m.impl("gelu", TORCH_BOX(&gelu));
}

// For Python, by ctypes.
#define EXPORTED extern "C" __attribute__((visibility("default")))
EXPORTED const char* dtq_isa() { return dtq::kernels().name; }
EXPORTED int dtq_use(const char* name) { return dtq::use(name); }
EXPORTED int64_t dtq_peak(int64_t rounds) { return dtq::kernels().peak(rounds); }
