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
using dtq::Kernels;
using dtq::kFew;
using dtq::kGroup;
using dtq::kRows;
using dtq::kStep;
using dtq::kTokens;

// Rows to be changed, and the tensors that they lie in.
struct Given {
  Given(const char* op, const Tensor& x_in, const MaybeTensor& pre_scale, const MaybeTensor& order_in,
        int64_t block, int64_t turns) {
    STD_TORCH_CHECK(x_in.dim() == 2, op, ": x must be (M, K), got ", shape_of(x_in));
    const int64_t k = x_in.size(1);
    STD_TORCH_CHECK(block >= 1 && (block & (block - 1)) == 0 && k % block == 0, op, ": ", k,
                    " channels are not whole blocks of ", block);
    STD_TORCH_CHECK(turns == 1 || turns == 2, op, ": turns must be 1 or 2");
    x = direct(x_in);
    if (k > 1 && x.stride(1) != 1) x = torch::stable::contiguous(x);
    if (pre_scale) {
      STD_TORCH_CHECK(pre_scale->numel() == k, op, ": pre_scale must have ", k, " entries");
      pre = side_by_side(as(*pre_scale, ScalarType::Float));
      rows.pre_scale = data<float>(pre);
    }
    if (order_in) {
      STD_TORCH_CHECK(order_in->numel() == k, op, ": order must have ", k, " entries");
      order = side_by_side(as(*order_in, ScalarType::Int));
      rows.order = data<int32_t>(order);
      for (int64_t i = 0; i < k; i++)
        STD_TORCH_CHECK(rows.order[i] >= 0 && rows.order[i] < k, op, ": channel ", rows.order[i],
                        " in an order of ", k);
    }
    rows.x = x.const_data_ptr();
    rows.type = float_type(x.scalar_type());
    rows.stride = x.stride(0);
    rows.columns = k;
    rows.block = block;
    rows.turns = static_cast<int>(turns);
    rows.unit = static_cast<float>(std::pow(static_cast<double>(block), -0.5));
  }

  void run() const {
    const Kernels& kernels = dtq::kernels();
    const int64_t k = rows.columns, grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(k, 1));
    parallel_for(0, x.size(0), grain, [&](int64_t first, int64_t last) {
      static thread_local Scratch scratch;
      kernels.quantize(rows, first, last, scratch.get<float>(2 * rounded_up(k, 16) * 4));
    });
  }

  Tensor x, pre, order;
  dtq::Rows rows = {};
};

using Pair = std::tuple<Tensor, Tensor>;

// Codes and scales; `scale` and its place `at`, or one scale per row.
Pair codes_of(const char* op, Given given, const MaybeTensor& scale, int64_t at, int64_t levels) {
  const int64_t m = given.x.size(0), k = given.x.size(1);
  Tensor fixed;
  if (scale) {
    STD_TORCH_CHECK(at >= 0 && at < scale->numel(), op, ": place ", at, " of ", scale->numel(),
                    " static scales");
    fixed = side_by_side(as(*scale, ScalarType::Float));
    given.rows.fixed = data<float>(fixed) + at;
  }
  Tensor codes = torch::stable::new_empty(given.x, {m, k}, ScalarType::Char);
  Tensor scales = torch::stable::new_empty(given.x, {m}, ScalarType::Float);
  given.rows.levels = static_cast<int>(levels);
  given.rows.codes = static_cast<int8_t*>(codes.mutable_data_ptr());
  given.rows.scale = static_cast<float*>(scales.mutable_data_ptr());
  if (m) given.run();
  return {codes, scales};
}

void check_levels(const char* op, int64_t levels) {
  STD_TORCH_CHECK(levels >= 1 && levels <= 127, op, ": levels must be 1 to 127");
}

Pair quantize_rows(const Tensor& x, const MaybeTensor& pre_scale, int64_t block,
                   const MaybeTensor& scale, int64_t levels) {
  STD_TORCH_CHECK(!scale || scale->numel() == 1, "quantize_rows: one static scale, got ",
                  scale ? scale->numel() : 0);
  constexpr const char* kOp = "quantize_rows";
  check_levels(kOp, levels);
  return codes_of(kOp, Given(kOp, x, pre_scale, std::nullopt, block, 1), scale, 0, levels);
}

Pair binned_quantize_rows(const Tensor& x, const MaybeTensor& pre_scale, const MaybeTensor& order,
                          int64_t block, int64_t turns, const MaybeTensor& scale,
                          const MaybeTensor& bin, int64_t levels) {
  constexpr const char* kOp = "binned_quantize_rows";
  check_levels(kOp, levels);
  STD_TORCH_CHECK(!bin || bin->numel() == 1, kOp, ": one bin, got ", bin ? bin->numel() : 0);
  const int64_t at = bin ? *data<int64_t>(as(*bin, ScalarType::Long)) : 0;
  return codes_of(kOp, Given(kOp, x, pre_scale, order, block, turns), scale, at, levels);
}

Pair e2m1_quantize_rows(const Tensor& x, const MaybeTensor& pre_scale, const MaybeTensor& order,
                        int64_t block, int64_t turns) {
  constexpr const char* kOp = "e2m1_quantize_rows";
  return codes_of(kOp, Given(kOp, x, pre_scale, order, block, turns), std::nullopt, 0, 0);
}

Tensor transform_rows(const Tensor& x_in, const MaybeTensor& pre_scale, const MaybeTensor& order,
                      int64_t block, int64_t turns) {
  Given given("transform_rows", x_in, pre_scale, order, block, turns);
  const int64_t m = given.x.size(0), k = given.x.size(1);
  Tensor out = torch::stable::new_empty(given.x, {m, k}, ScalarType::Float);
  given.rows.out = out.mutable_data_ptr();
  if (m && k) given.run();
  return out;
}

Tensor round_rows(const Tensor& x, const MaybeTensor& pre_scale, const MaybeTensor& order, int64_t block,
                  int64_t turns, const std::string& acts, ScalarType type) {
  Given given("round_rows", x, pre_scale, order, block, turns);
  const int64_t m = given.x.size(0), k = given.x.size(1);
  for (int i = dtq::kRoundNone + 1; i < dtq::kRoundings; i++) {
    const dtq::RoundingFormat& format = dtq::kRoundingFormats[i];
    if (acts != format.name || !written_directly(type)) continue;
    STD_TORCH_CHECK(k % format.group == 0, "round_rows: ", k, " columns are not whole groups of ",
                    format.group, " for ", acts);
    Tensor out = torch::stable::new_empty(given.x, {m, k}, type);
    given.rows.out = out.mutable_data_ptr();
    given.rows.rounding = static_cast<dtq::Rounding>(i);
    given.rows.out_type = float_type(type);
    if (m && k) given.run();
    return out;
  }
  return call("dtq_reference::round_rows", x, pre_scale, order, block, turns, acts, type);
}

// Token blocks that stay in the second-level cache while every panel passes by.
int64_t blocks_at_once(int64_t blocks, int64_t block_bytes) {
  constexpr int64_t kCache = 640 << 10;
  const int64_t most = std::max<int64_t>(2, kCache / block_bytes / kGroup) * kGroup;
  const int64_t parts = (blocks + most - 1) / most;
  return rounded_up((blocks + parts - 1) / parts, kGroup);
}

void multiply_many(dtq::Linear& g, const Kernels& kernels) {
  const int64_t blocks = (g.tokens + kTokens - 1) / kTokens;
  const int64_t block_bytes = g.steps * kStep * kTokens * kernels.code_bytes;
  static thread_local Scratch packed, sums;
  g.packed = packed.get(blocks * block_bytes);
  g.section_sums = sums.get<int32_t>(blocks * g.sections * kTokens * 4);
  parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) { kernels.pack(g, first, last); });
  const int64_t panels = (g.rows + kRows - 1) / kRows, high = blocks_at_once(blocks, block_bytes);
  const int64_t rows_of_tasks = (blocks + high - 1) / high;
  const int64_t threads = torch::stable::get_num_threads();
  // a few tasks a thread, so that one that is held up does not hold up the rest
  const int64_t wanted = threads > 1 ? 4 * threads : 1;
  const int64_t parts = std::clamp<int64_t>(wanted / rows_of_tasks, 1, panels);
  const int64_t wide = (panels + parts - 1) / parts, columns = (panels + wide - 1) / wide;
  parallel_for(0, rows_of_tasks * columns, 1, [&](int64_t first, int64_t last) {
    static thread_local Scratch panel;
    void* scratch = panel.get(dtq::scratch_bytes(kernels, g, high));
    for (int64_t task = first; task < last; task++) {
      const int64_t b = task / columns * high, p = task % columns * wide;
      kernels.multiply(g, b, std::min(b + high, blocks), p, std::min(p + wide, panels), scratch);
    }
  });
}

void multiply_few(dtq::Linear& g, const Kernels& kernels) {
  static thread_local Scratch packed, sums;
  g.packed = packed.get(g.tokens * g.steps * kStep * kernels.code_bytes);
  g.section_sums = sums.get<int32_t>(g.sections * kFew * 4);
  kernels.pack_few(g);
  const int64_t grain = std::max<int64_t>(1, 65536 / (g.columns * kRows));
  parallel_for(0, (g.rows + kRows - 1) / kRows, grain, [&](int64_t first, int64_t last) {
    kernels.multiply_few(g, first * kRows, std::min(last * kRows, g.rows));
  });
}

// Operands that every product of codes has, checked; they live as long as this does.
class Product {
 public:
  Product(const Tensor& codes, const Tensor& row_scale, const Tensor& weight, int bits,
          const MaybeTensor& bias)
      : codes_(side_by_side(codes)), weight_(side_by_side(weight)) {
    STD_TORCH_CHECK(codes.dim() == 2 && weight.dim() == 2, "dtq linear: codes and weight are 2-D");
    STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Char && weight.scalar_type() == ScalarType::Char,
                "dtq linear: codes and weight are int8");
    g.tokens = codes.size(0);
    g.columns = codes.size(1);
    g.rows = weight.size(0);
    g.bits = bits;
    g.levels = dtq::levels_of_bits(bits);
    STD_TORCH_CHECK(g.columns * bits % 8 == 0 && weight.size(1) == g.columns * bits / 8, "dtq linear: codes ",
                shape_of(codes), " do not fit the weight ", shape_of(weight));
    STD_TORCH_CHECK(row_scale.numel() == g.tokens, "dtq linear: one scale per token");
    g.codes = data<int8_t>(codes_);
    g.weight = data<int8_t>(weight_);
    g.row_scale = floats(row_scale);
    if (bias) {
      STD_TORCH_CHECK(bias->numel() == g.rows, "dtq linear: bias must have ", g.rows, " entries");
      g.bias = floats(*bias);
    }
    g.sections = 1;
    set_group(1);
  }

  // One scale for each output channel.
  void set_scale(const Tensor& weight_scale) {
    STD_TORCH_CHECK(weight_scale.numel() == g.rows, "dtq linear: one scale per output channel");
    g.weight_scale = floats(weight_scale);
  }

  // Levels of 3- or 4-bit codes: a byte, or 16 of them, for each group of a row.
  void set_levels(const Tensor& parts, int64_t entries, const char* name) {
    STD_TORCH_CHECK(parts.dim() == (entries > 1 ? 3 : 2) && parts.size(0) == g.rows &&
                    parts.size(1) > 0 && g.columns % parts.size(1) == 0 &&
                    parts.element_size() == 1 && (entries == 1 || parts.size(2) == entries),
                "dtq linear: ", name, " ", shape_of(parts), " do not fit the weight");
    const void* at = kept(side_by_side(parts)).const_data_ptr();
    if (entries == 1) g.groups = static_cast<const uint8_t*>(at);
    else g.tables = static_cast<const int8_t*>(at);
    set_group(parts.size(1));
  }

  // A float scale for each section of a row, and what its codes are raised by.
  void set_sections(const Tensor& scale, const MaybeTensor& zero) {
    STD_TORCH_CHECK(scale.dim() == 2 && scale.size(0) == g.rows && scale.size(1) > 0 &&
                    g.columns % scale.size(1) == 0,
                "dtq linear: scales ", shape_of(scale), " do not fit the weight");
    g.sections = scale.size(1);
    STD_TORCH_CHECK(g.bits == 8 || g.columns / g.sections % 2 == 0, "dtq linear: groups of ",
                g.columns / g.sections, " 4-bit weights do not end on a byte");
    g.section_scale = floats(scale);
    if (!zero) return;
    STD_TORCH_CHECK(same_shape(*zero, scale) && zero->scalar_type() == ScalarType::Char,
                "dtq linear: zero points ", shape_of(*zero), " do not fit the scales");
    g.section_zero = data<int8_t>(kept(side_by_side(*zero)));
  }

  void set_epilogue(bool gelu, const MaybeTensor& gate, const MaybeTensor& residual) {
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
    const bool alike = type == residual->scalar_type() && written_directly(type);
    const ScalarType given = alike ? type : ScalarType::Float;
    g.gate = kept(side_by_side(as(*gate, given))).const_data_ptr();
    g.residual = kept(side_by_side(as(*residual, given))).const_data_ptr();
    g.gated = g.tokens / gate->size(0);
    g.given = float_type(given);
  }

  Tensor run(ScalarType type) {
    const bool summed = g.columns > 0;
    const auto written = summed && written_directly(type) ? type : ScalarType::Float;
    Tensor out = torch::stable::new_empty(codes_, {g.tokens, g.rows}, written);
    if (out.numel() && summed) {
      g.steps = g.sections * ((g.columns / g.sections + kStep - 1) / kStep);
      g.out = out.mutable_data_ptr();
      g.type = float_type(type);
      const Kernels& kernels = dtq::kernels();
      g.tokens <= kFew ? multiply_few(g, kernels) : multiply_many(g, kernels);
    } else if (out.numel()) {  // an empty sum
      float* to = static_cast<float*>(out.mutable_data_ptr());
      for (int64_t t = 0; t < g.tokens; t++)
        for (int64_t n = 0; n < g.rows; n++) *to++ = g.bias ? g.bias[n] : 0;
    }
    return as(out, type);
  }

  dtq::Linear g = {};

 private:
  void set_group(int64_t count) {
    g.row_groups = count;
    g.group = std::max<int64_t>(1, g.columns / count);
    const bool power = (g.group & (g.group - 1)) == 0;
    g.group_bits = count == 1 ? 62 : g.group >= 16 && power ? __builtin_ctzll(g.group) : -1;
  }

  const Tensor& kept(Tensor tensor) {
    kept_.push_back(std::move(tensor));
    return kept_.back();
  }

  const float* floats(const Tensor& tensor) {
    return data<float>(kept(side_by_side(as(tensor, ScalarType::Float))));
  }

  Tensor codes_, weight_;
  std::vector<Tensor> kept_;
};

Tensor gelu(const Tensor& x_in) {
  const auto type = x_in.scalar_type();
  const Tensor x = side_by_side(direct(x_in));
  Tensor out = torch::stable::empty_like(x);
  const dtq::Float written = float_type(x.scalar_type());
  const Kernels& kernels = dtq::kernels();
  parallel_for(0, x.numel(), 16384, [&](int64_t first, int64_t last) {
    kernels.gelu(x.const_data_ptr(), out.mutable_data_ptr(), written, first, last);
  });
  return as(out, type);
}

Tensor w8a8_linear(const Tensor& codes, const Tensor& row_scale, const Tensor& weight,
                   const Tensor& weight_scale, const MaybeTensor& bias, ScalarType type) {
  Product product(codes, row_scale, weight, 8, bias);
  product.set_scale(weight_scale);
  return product.run(type);
}

template <int bits>
Tensor two_level_linear(const Tensor& codes, const Tensor& row_scale, const Tensor& weight,
                        const Tensor& weight_scale, const Tensor& weight_scale_2,
                        const MaybeTensor& bias, ScalarType type) {
  Product product(codes, row_scale, weight, bits, bias);
  product.set_scale(weight_scale);
  product.set_levels(weight_scale_2, 1, "group bytes");
  return product.run(type);
}

Tensor lut4a8_linear(const Tensor& codes, const Tensor& row_scale, const Tensor& weight,
                     const Tensor& weight_scale, const Tensor& tables, const MaybeTensor& bias,
                     ScalarType type) {
  Product product(codes, row_scale, weight, 4, bias);
  product.set_scale(weight_scale);
  product.set_levels(tables, 16, "tables");
  return product.run(type);
}

Tensor group_a8_linear(const Tensor& codes, const Tensor& row_scale, const Tensor& weight,
                       const Tensor& weight_scale, const MaybeTensor& weight_zero_point,
                       int64_t bits, const MaybeTensor& bias, ScalarType type) {
  STD_TORCH_CHECK(bits == 4 || bits == 8, "group_a8_linear: ", bits, " bits; there can be 4 or 8");
  Product product(codes, row_scale, weight, static_cast<int>(bits), bias);
  product.set_sections(weight_scale, weight_zero_point);
  product.g.zero = bits == 4 ? 8 : 0;
  return product.run(type);
}

// Products of nothing, types that are not written directly, and low-rank branches are left to the
// reference; layers do not ask for the last on a CPU (branch_joins in dtq/kernels/table.py).
bool completes(const Tensor& codes, ScalarType type, const MaybeTensor& low, const MaybeTensor& up) {
  STD_TORCH_CHECK(low.has_value() == up.has_value(), "dtq linear: a low-rank branch has two factors");
  return written_directly(type) && codes.dim() == 2 && codes.size(0) > 0 && codes.size(1) > 0 &&
         !low && !up;
}

Tensor w8a8_epilogue_linear(const Tensor& codes, const Tensor& row_scale, const Tensor& weight,
                            const Tensor& weight_scale, const MaybeTensor& bias, bool gelu,
                            const MaybeTensor& gate, const MaybeTensor& residual,
                            ScalarType type, const MaybeTensor& low, const MaybeTensor& up) {
  if (!completes(codes, type, low, up))
    return call("dtq_reference::w8a8_epilogue_linear", codes, row_scale, weight, weight_scale, bias,
                gelu, gate, residual, type, low, up);
  Product product(codes, row_scale, weight, 8, bias);
  product.set_scale(weight_scale);
  product.set_epilogue(gelu, gate, residual);
  return product.run(type);
}

Tensor w4a8_epilogue_linear(const Tensor& codes, const Tensor& row_scale, const Tensor& weight,
                            const Tensor& weight_scale, const Tensor& weight_scale_2,
                            const MaybeTensor& bias, bool gelu, const MaybeTensor& gate,
                            const MaybeTensor& residual, ScalarType type, const MaybeTensor& low,
                            const MaybeTensor& up) {
  if (!completes(codes, type, low, up))
    return call("dtq_reference::w4a8_epilogue_linear", codes, row_scale, weight, weight_scale,
                weight_scale_2, bias, gelu, gate, residual, type, low, up);
  Product product(codes, row_scale, weight, 4, bias);
  product.set_scale(weight_scale);
  product.set_levels(weight_scale_2, 1, "group bytes");
  product.set_epilogue(gelu, gate, residual);
  return product.run(type);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dtq, CPU, m) {
  m.impl("quantize_rows", TORCH_BOX(&quantize_rows));
  m.impl("binned_quantize_rows", TORCH_BOX(&binned_quantize_rows));
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
