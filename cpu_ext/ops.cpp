// SPDX-License-Identifier: Apache-2.0
// The dtq:: ops on the CPU: checks, threads, memory. The arithmetic is in the other files.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>

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
  static thread_local Scratch packed, shift;
  g.packed = packed.get(blocks * block_bytes);
  g.shift = shift.get<int32_t>(blocks * kTokens * 4);
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
  static thread_local Scratch packed;
  int32_t shift[kFew];
  g.packed = packed.get(g.tokens * g.steps * kStep * kernels.code_bytes);
  g.shift = shift;
  kernels.pack_few(g);
  const int64_t grain = std::max<int64_t>(1, 65536 / (g.columns * kRows));
  at::parallel_for(0, (g.rows + kRows - 1) / kRows, grain, [&](int64_t first, int64_t last) {
    kernels.multiply_few(g, first * kRows, std::min(last * kRows, g.rows));
  });
}

Tensor multiply(const Tensor& codes_in, const Tensor& row_scale_in, const Tensor& weight_in,
                const Tensor& weight_scale_in, const Tensor& groups_in, const MaybeTensor& bias_in,
                at::ScalarType type) {
  const bool packed = groups_in.defined();
  TORCH_CHECK(codes_in.dim() == 2 && weight_in.dim() == 2, "dtq linear: codes and weight are 2-D");
  const Tensor codes = codes_in.contiguous(), weight = weight_in.contiguous();
  const int64_t m = codes.size(0), k = codes.size(1), n = weight.size(0);
  TORCH_CHECK(codes.scalar_type() == at::kChar && weight.scalar_type() == at::kChar,
              "dtq linear: codes and weight are int8");
  TORCH_CHECK(weight.size(1) * (packed ? 2 : 1) == k, "dtq linear: codes ", codes.sizes(),
              " do not fit the weight ", weight.sizes());
  TORCH_CHECK(row_scale_in.numel() == m && weight_scale_in.numel() == n,
              "dtq linear: one scale per token and per output channel");
  const Tensor row_scale = row_scale_in.to(at::kFloat).contiguous();
  const Tensor weight_scale = weight_scale_in.to(at::kFloat).contiguous();
  Tensor groups, bias;
  dtq::Linear g = {};
  if (packed) {
    groups = groups_in.contiguous();
    TORCH_CHECK(groups.dim() == 2 && groups.size(0) == n && groups.size(1) > 0 &&
                    k % groups.size(1) == 0 && groups.element_size() == 1,
                "dtq linear: group bytes ", groups.sizes(), " do not fit the weight");
    g.groups = static_cast<const uint8_t*>(groups.const_data_ptr());
    g.group = k / groups.size(1);
    g.group_bits = g.group >= 16 && (g.group & (g.group - 1)) == 0 ? __builtin_ctzll(g.group) : -1;
  }
  if (bias_in) {
    TORCH_CHECK(bias_in->numel() == n, "dtq linear: bias must have ", n, " entries");
    bias = bias_in->to(at::kFloat).contiguous();
    g.bias = bias.const_data_ptr<float>();
  }
  Tensor out = at::empty({m, n}, codes.options().dtype(written_directly(type) ? type : at::kFloat));
  if (m && n && k) {
    g.tokens = m;
    g.rows = n;
    g.columns = k;
    g.steps = (k + kStep - 1) / kStep;
    g.codes = codes.const_data_ptr<int8_t>();
    g.row_scale = row_scale.const_data_ptr<float>();
    g.weight = weight.const_data_ptr<int8_t>();
    g.weight_scale = weight_scale.const_data_ptr<float>();
    g.out = out.mutable_data_ptr();
    g.type = float_type(type);
    const Kernels& kernels = dtq::kernels();
    m <= kFew ? multiply_few(g, kernels) : multiply_many(g, kernels);
  } else if (m && n) {  // an empty sum
    out.zero_();
    if (bias_in) out.add_(bias);
  }
  return written_directly(type) ? out : out.to(type);
}

Tensor w8a8_linear(const Tensor& codes, const Tensor& row_scale, const Tensor& weight,
                   const Tensor& weight_scale, const MaybeTensor& bias, at::ScalarType type) {
  return multiply(codes, row_scale, weight, weight_scale, Tensor(), bias, type);
}

Tensor w4a8_linear(const Tensor& codes, const Tensor& row_scale, const Tensor& weight,
                   const Tensor& weight_scale, const Tensor& weight_scale_2,
                   const MaybeTensor& bias, at::ScalarType type) {
  return multiply(codes, row_scale, weight, weight_scale, weight_scale_2, bias, type);
}

}  // namespace

TORCH_LIBRARY_IMPL(dtq, CPU, m) {
  m.impl("quantize_rows", quantize_rows);
  m.impl("w8a8_linear", w8a8_linear);
  m.impl("w4a8_linear", w4a8_linear);
}

// For Python, by ctypes.
#define EXPORTED extern "C" __attribute__((visibility("default")))
EXPORTED const char* dtq_isa() { return dtq::kernels().name; }
EXPORTED int dtq_use(const char* name) { return dtq::use(name); }
