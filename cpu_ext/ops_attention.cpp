// SPDX-License-Identifier: Apache-2.0
// dtq::int8_attention on the CPU: checks, threads, memory. The arithmetic is in attention.h.
#include <algorithm>
#include <string>

#include "dispatch.h"
#include "glue.h"

namespace {

using namespace dtq::glue;
using dtq::Kernels;

// float64 in float32, as the reference; channels next to each other.
Tensor readable(const Tensor& x_in) {
  const Tensor x = to_kernel_dtype(x_in);
  return x.size(3) > 1 && x.stride(3) != 1 ? torch::stable::contiguous(x) : x;
}

dtq::Operand operand(const Tensor& x) {
  return {x.const_data_ptr(), float_type(x.scalar_type()), x.stride(0), x.stride(1), x.stride(2)};
}

void check(const Tensor& q, const Tensor& k, const Tensor& v) {
  const std::string shapes = "q " + shape_of(q) + ", k " + shape_of(k) + ", v " + shape_of(v);
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4,
                  "int8_attention: q, k and v are (batch, heads, tokens, channels): ", shapes);
  STD_TORCH_CHECK(q.size(0) == k.size(0) && k.size(0) == v.size(0) && q.size(3) == k.size(3) &&
                      k.size(1) == v.size(1) && k.size(2) == v.size(2) && k.size(1) > 0 &&
                      q.size(1) % k.size(1) == 0 && k.size(2) > 0,
                  "int8_attention: shapes do not fit: ", shapes);
  STD_TORCH_CHECK(std::max(q.size(3), v.size(3)) <= dtq::kWidestHead, "int8_attention: heads have at most ",
                  dtq::kWidestHead, " channels: ", shapes);
}

// The strides of a mask, 0 where it is broadcast.
void set_mask(dtq::Attention& a, const Tensor& mask) {
  const int64_t scores[] = {a.batch, a.heads, a.queries, a.keys};
  int64_t strides[] = {0, 0, 0, 0};
  bool fits = mask.dim() <= 4;
  for (int64_t i = 1; fits && i <= mask.dim(); i++) {
    const int64_t size = mask.size(mask.dim() - i);
    fits = size == 1 || size == scores[4 - i];
    strides[4 - i] = size == 1 ? 0 : mask.stride(mask.dim() - i);
  }
  STD_TORCH_CHECK(fits, "int8_attention: mask ", shape_of(mask), " for scores [", a.batch, ", ", a.heads,
                  ", ", a.queries, ", ", a.keys, "]");
  a.mask = mask.const_data_ptr();
  a.mask_is_bool = mask.scalar_type() == ScalarType::Bool;
  a.mask_batch = strides[0];
  a.mask_head = strides[1];
  a.mask_query = strides[2];
  a.mask_key = strides[3];
}

Tensor int8_attention(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
                      const OptionalTensor& mask_in, double scale) {
  check(q_in, k_in, v_in);
  const Tensor q = readable(q_in), k = readable(k_in), v = readable(v_in);
  dtq::Attention a = {};
  a.batch = q.size(0);
  a.heads = q.size(1);
  a.key_heads = k.size(1);
  a.queries = q.size(2);
  a.keys = k.size(2);
  a.width = static_cast<int>(q.size(3));
  a.value_width = static_cast<int>(v.size(3));
  a.q = operand(q);
  a.k = operand(k);
  a.v = operand(v);
  a.factor = static_cast<float>(scale * 1.4426950408889634);
  Tensor mask;
  if (mask_in) {
    mask = mask_in->scalar_type() == ScalarType::Bool ? *mask_in : to_dtype(*mask_in, ScalarType::Float);
    set_mask(a, mask);
  }
  Tensor out = torch::stable::new_empty(q, {a.batch, a.queries, a.heads, a.value_width}, q.scalar_type());
  a.out = out.mutable_data_ptr();
  a.out_type = float_type(q.scalar_type());
  if (out.numel()) {
    const Kernels& kernels = dtq::kernels();
    static thread_local Scratch packed;
    a.head_bytes = kernels.head_bytes(a);
    a.packed = packed.get(a.batch * a.key_heads * a.head_bytes);
    parallel_for(0, a.batch * a.key_heads, 1,
                 [&](int64_t first, int64_t last) { kernels.pack_heads(a, first, last); });
    const int64_t blocks = ceil_div(a.queries, kernels.query_block), bytes = kernels.block_bytes(a);
    parallel_for(0, a.batch * a.heads * blocks, 1, [&](int64_t first, int64_t last) {
      static thread_local Scratch scratch;
      kernels.attend(a, first, last, scratch.get(bytes));
    });
  }
  return to_dtype(torch::stable::transpose(out, 1, 2), q_in.scalar_type());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dtq, CPU, m) { m.impl("int8_attention", TORCH_BOX(&int8_attention)); }
