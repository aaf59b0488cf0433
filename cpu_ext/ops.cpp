// SPDX-License-Identifier: Apache-2.0
// The dtq:: ops on the CPU: checks, threads, memory. The arithmetic is in the other files.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

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

std::tuple<Tensor, Tensor> quantize_rows(const Tensor& x_in, const MaybeTensor& pre_scale,
                                         int64_t block, const MaybeTensor& scale, int64_t levels) {
  TORCH_CHECK(x_in.dim() == 2, "quantize_rows: x must be (M, K), got ", x_in.sizes());
  const int64_t m = x_in.size(0), k = x_in.size(1);
  TORCH_CHECK(block >= 1 && (block & (block - 1)) == 0 && k % block == 0,
              "quantize_rows: ", k, " channels are not whole blocks of ", block);
  TORCH_CHECK(levels >= 1 && levels <= 127, "quantize_rows: levels must be 1 to 127");
  Tensor x = written_directly(x_in.scalar_type()) ? x_in : x_in.to(at::kFloat);
  if (k > 1 && x.stride(1) != 1) x = x.contiguous();
  Tensor pre, fixed;
  if (pre_scale) {
    TORCH_CHECK(pre_scale->numel() == k, "quantize_rows: pre_scale must have ", k, " entries");
    pre = pre_scale->to(at::kFloat).contiguous();
  }
  if (scale) {
    TORCH_CHECK(scale->numel() == 1, "quantize_rows: one static scale, got ", scale->numel());
    fixed = scale->to(at::kFloat);
  }
  Tensor codes = at::empty({m, k}, x.options().dtype(at::kChar));
  Tensor scales = at::empty({m}, x.options().dtype(at::kFloat));
  if (m == 0) return {codes, scales};
  dtq::Rows q = {};
  q.x = x.const_data_ptr();
  q.type = float_type(x.scalar_type());
  q.stride = x.stride(0);
  q.columns = k;
  q.pre_scale = pre_scale ? pre.const_data_ptr<float>() : nullptr;
  q.block = block;
  q.unit = static_cast<float>(std::pow(static_cast<double>(block), -0.5));
  q.fixed = scale ? fixed.const_data_ptr<float>() : nullptr;
  q.levels = static_cast<int>(levels);
  q.codes = codes.mutable_data_ptr<int8_t>();
  q.scale = scales.mutable_data_ptr<float>();
  const Kernels& kernels = dtq::kernels();
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(k, 1));
  at::parallel_for(0, m, grain, [&](int64_t first, int64_t last) {
    static thread_local Scratch row;
    kernels.quantize(q, first, last, row.get<float>(rounded_up(k, 16) * 4));
  });
  return {codes, scales};
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
  at::parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) { kernels.pack(g, first, last); });
  const int64_t panels = (g.rows + kRows - 1) / kRows, high = blocks_at_once(blocks, block_bytes);
  const int64_t rows_of_tasks = (blocks + high - 1) / high;
  // a few tasks a thread, so that one that is held up does not hold up the rest
  const int64_t wanted = at::get_num_threads() > 1 ? 4 * at::get_num_threads() : 1;
  const int64_t parts = std::clamp<int64_t>(wanted / rows_of_tasks, 1, panels);
  const int64_t wide = (panels + parts - 1) / parts, columns = (panels + wide - 1) / wide;
  at::parallel_for(0, rows_of_tasks * columns, 1, [&](int64_t first, int64_t last) {
    static thread_local Scratch panel;
    void* scratch = panel.get(g.steps * kStep * kRows * kernels.panel_bytes);
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
  at::parallel_for(0, (g.rows + kRows - 1) / kRows, grain, [&](int64_t first, int64_t last) {
    kernels.multiply_few(g, first * kRows, std::min(last * kRows, g.rows));
  });
}

// Operands that every product of codes has, checked; they live as long as this does.
class Product {
 public:
  Product(const Tensor& codes, const Tensor& row_scale, const Tensor& weight, bool nibbles,
          const MaybeTensor& bias)
      : codes_(codes.contiguous()), weight_(weight.contiguous()) {
    TORCH_CHECK(codes.dim() == 2 && weight.dim() == 2, "dtq linear: codes and weight are 2-D");
    TORCH_CHECK(codes.scalar_type() == at::kChar && weight.scalar_type() == at::kChar,
                "dtq linear: codes and weight are int8");
    g.tokens = codes.size(0);
    g.columns = codes.size(1);
    g.rows = weight.size(0);
    g.nibbles = nibbles;
    TORCH_CHECK(weight.size(1) * (nibbles ? 2 : 1) == g.columns, "dtq linear: codes ",
                codes.sizes(), " do not fit the weight ", weight.sizes());
    TORCH_CHECK(row_scale.numel() == g.tokens, "dtq linear: one scale per token");
    g.codes = codes_.const_data_ptr<int8_t>();
    g.weight = weight_.const_data_ptr<int8_t>();
    g.row_scale = floats(row_scale);
    if (bias) {
      TORCH_CHECK(bias->numel() == g.rows, "dtq linear: bias must have ", g.rows, " entries");
      g.bias = floats(*bias);
    }
    g.sections = 1;
    set_group(1);
  }

  // One scale for each output channel.
  void set_scale(const Tensor& weight_scale) {
    TORCH_CHECK(weight_scale.numel() == g.rows, "dtq linear: one scale per output channel");
    g.weight_scale = floats(weight_scale);
  }

  // Levels of 4-bit codes: a byte, or 16 of them, for each group of a row.
  void set_levels(const Tensor& parts, int64_t entries, const char* name) {
    TORCH_CHECK(parts.dim() == (entries > 1 ? 3 : 2) && parts.size(0) == g.rows &&
                    parts.size(1) > 0 && g.columns % parts.size(1) == 0 &&
                    parts.element_size() == 1 && (entries == 1 || parts.size(2) == entries),
                "dtq linear: ", name, " ", parts.sizes(), " do not fit the weight");
    const void* at = kept(parts.contiguous()).const_data_ptr();
    if (entries == 1) g.groups = static_cast<const uint8_t*>(at);
    else g.tables = static_cast<const int8_t*>(at);
    set_group(parts.size(1));
  }

  // A float scale for each section of a row, and what its codes are raised by.
  void set_sections(const Tensor& scale, const MaybeTensor& zero) {
    TORCH_CHECK(scale.dim() == 2 && scale.size(0) == g.rows && scale.size(1) > 0 &&
                    g.columns % scale.size(1) == 0,
                "dtq linear: scales ", scale.sizes(), " do not fit the weight");
    g.sections = scale.size(1);
    TORCH_CHECK(!g.nibbles || g.columns / g.sections % 2 == 0, "dtq linear: groups of ",
                g.columns / g.sections, " 4-bit weights do not end on a byte");
    g.section_scale = floats(scale);
    if (!zero) return;
    TORCH_CHECK(zero->sizes() == scale.sizes() && zero->scalar_type() == at::kChar,
                "dtq linear: zero points ", zero->sizes(), " do not fit the scales");
    g.section_zero = kept(zero->contiguous()).const_data_ptr<int8_t>();
  }

  Tensor run(at::ScalarType type) {
    const auto written = written_directly(type) ? type : at::kFloat;
    Tensor out = at::empty({g.tokens, g.rows}, codes_.options().dtype(written));
    if (out.numel() && g.columns) {
      g.steps = g.sections * ((g.columns / g.sections + kStep - 1) / kStep);
      g.out = out.mutable_data_ptr();
      g.type = float_type(type);
      const Kernels& kernels = dtq::kernels();
      g.tokens <= kFew ? multiply_few(g, kernels) : multiply_many(g, kernels);
    } else if (out.numel()) {  // an empty sum
      out.zero_();
      for (int64_t n = 0; g.bias && n < g.rows; n++) out.select(1, n).fill_(g.bias[n]);
    }
    return written == type ? out : out.to(type);
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
    return kept(tensor.to(at::kFloat).contiguous()).const_data_ptr<float>();
  }

  Tensor codes_, weight_;
  std::vector<Tensor> kept_;
};

Tensor gelu(const Tensor& x_in) {
  const auto type = x_in.scalar_type();
  const Tensor x = (written_directly(type) ? x_in : x_in.to(at::kFloat)).contiguous();
  Tensor out = at::empty_like(x);
  const dtq::Float written = float_type(x.scalar_type());
  const Kernels& kernels = dtq::kernels();
  at::parallel_for(0, x.numel(), 16384, [&](int64_t first, int64_t last) {
    kernels.gelu(x.const_data_ptr(), out.mutable_data_ptr(), written, first, last);
  });
  return out.to(type);
}

Tensor w8a8_linear(const Tensor& codes, const Tensor& row_scale, const Tensor& weight,
                   const Tensor& weight_scale, const MaybeTensor& bias, at::ScalarType type) {
  Product product(codes, row_scale, weight, false, bias);
  product.set_scale(weight_scale);
  return product.run(type);
}

Tensor w4a8_linear(const Tensor& codes, const Tensor& row_scale, const Tensor& weight,
                   const Tensor& weight_scale, const Tensor& weight_scale_2,
                   const MaybeTensor& bias, at::ScalarType type) {
  Product product(codes, row_scale, weight, true, bias);
  product.set_scale(weight_scale);
  product.set_levels(weight_scale_2, 1, "group bytes");
  return product.run(type);
}

Tensor lut4a8_linear(const Tensor& codes, const Tensor& row_scale, const Tensor& weight,
                     const Tensor& weight_scale, const Tensor& tables, const MaybeTensor& bias,
                     at::ScalarType type) {
  Product product(codes, row_scale, weight, true, bias);
  product.set_scale(weight_scale);
  product.set_levels(tables, 16, "tables");
  return product.run(type);
}

Tensor group_a8_linear(const Tensor& codes, const Tensor& row_scale, const Tensor& weight,
                       const Tensor& weight_scale, const MaybeTensor& weight_zero_point,
                       int64_t bits, const MaybeTensor& bias, at::ScalarType type) {
  TORCH_CHECK(bits == 4 || bits == 8, "group_a8_linear: ", bits, " bits; there can be 4 or 8");
  Product product(codes, row_scale, weight, bits == 4, bias);
  product.set_sections(weight_scale, weight_zero_point);
  product.g.zero = bits == 4 ? 8 : 0;
  return product.run(type);
}

}  // namespace

TORCH_LIBRARY_IMPL(dtq, CPU, m) {
  m.impl("quantize_rows", quantize_rows);
  m.impl("w8a8_linear", w8a8_linear);
  m.impl("w4a8_linear", w4a8_linear);
  m.impl("lut4a8_linear", lut4a8_linear);
  m.impl("group_a8_linear", group_a8_linear);
  m.impl("gelu", gelu);
}

// For Python, by ctypes.
#define EXPORTED extern "C" __attribute__((visibility("default")))
EXPORTED const char* dtq_isa() { return dtq::kernels().name; }
EXPORTED int dtq_use(const char* name) { return dtq::use(name); }
EXPORTED int64_t dtq_peak(int64_t rounds) { return dtq::kernels().peak(rounds); }
