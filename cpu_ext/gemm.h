// SPDX-License-Identifier: Apache-2.0
// int8 GEMM: packing of activations, products of token blocks and panels of weights, epilogue. Needs
// `struct Isa`, see isa.h.
#pragma once
#include "ahead.h"
#include "gelu.h"
#include "weights.h"

namespace dtq {
namespace {

constexpr int kWeightOffset = Isa::kWeightOffset;
constexpr int64_t kBlockStep = kStep * kBlockTokens;  // activations of a token block in a step

// ---------------------------------------------------------------------------- packing

// Layout of packed: [token block][step][kStep / kDotWidth][kBlockTokens][kDotWidth], so that tokens lie in
// lanes. section_sums are the sums of x_q, by which the offset of unsigned weights and the zero points are
// subtracted again: w * x = (w + 128) * x - 128 * x.
void pack(const Linear& g, int64_t first, int64_t last) {
  alignas(64) Activation rows[kBlockTokens][kStep];
  for (int64_t b = first; b < last; b++) {
    int32_t* sums = g.section_sums + b * g.sections * kBlockTokens;
    memset(sums, 0, g.sections * kBlockTokens * 4);
    const int8_t* x_q = g.x_q + b * kBlockTokens * g.columns;
    const bool full = g.tokens - b * kBlockTokens >= kBlockTokens && g.columns % 4 == 0;
    Activation* out = (Activation*)g.packed + b * g.steps * kBlockStep;
    const int64_t steps = g.steps / g.sections;
    for (int64_t s = 0, left = steps; s < g.steps; s++, out += kBlockStep) {
      const Span span = span_of(g, s);
      if (sizeof(Activation) == 1 && full && span.width == kStep) {  // no copy
        Isa::transpose16((const int32_t*)(x_q + span.at), g.columns / 4, (int32_t*)out);
      } else {
        memset(rows, 0, sizeof rows);
        for (int t = 0; t < kBlockTokens && b * kBlockTokens + t < g.tokens; t++)
          for (int i = 0; i < span.width; i++) rows[t][i] = x_q[t * g.columns + span.at + i];
        for (int part = 0; part < (int)sizeof(Activation); part++)
          Isa::transpose16((const int32_t*)rows + part * 16, sizeof(Activation) * 16,
                           (int32_t*)out + part * 256);
      }
      Isa::add_activations(out, sums);
      if (--left == 0) left = steps, sums += kBlockTokens;
    }
  }
}

// Layout of packed: [token][steps * kStep]; if the instruction set `splits`, the even channels of every two
// steps come before the odd ones.
void pack_small_m(const Linear& g) {
  const int64_t steps = g.steps / g.sections;
  memset(g.packed, 0, g.tokens * g.steps * kStep * sizeof(Activation));
  for (int64_t t = 0; t < g.tokens; t++)
    for (int64_t c = 0; c < g.sections; c++) {
      const int64_t width = g.columns / g.sections;
      const int8_t* x_q = g.x_q + t * g.columns + c * width;
      Activation* out = (Activation*)g.packed + (t * g.steps + c * steps) * kStep;
      int32_t sum = 0;
      for (int64_t k = 0; k < width; k++) {
        out[k] = x_q[k];
        sum += x_q[k];
      }
      g.section_sums[c * kSmallM + t] = sum;
      for (int64_t s = 0; Isa::splits(g) && s + 1 < steps; s += 2, out += 2 * kStep) {
        Activation two[2 * kStep];
        memcpy(two, out, sizeof two);
        for (int i = 0; i < kStep; i++) {
          out[i] = two[2 * i];
          out[kStep + i] = two[2 * i + 1];
        }
      }
    }
}

// ---------------------------------------------------------------------------- epilogue

// GELU, gate and residual on up to 16 channels of a token.
inline void apply_epilogue(const Linear& g, int64_t token, int64_t n, int count, float* y) {
  for (int i = 0; g.gelu && i < count; i += kLanes) store(y + i, gelu_of(load(y + i)));
  for (int i = 0; g.residual && i < count; i += kLanes) {
    const V gate = part_as_float(g.gate, token / g.tokens_per_gate * g.rows + n + i, count - i, g.gate_type);
    const V residual = part_as_float(g.residual, token * g.rows + n + i, count - i, g.gate_type);
    store(y + i, gate * load(y + i) + residual);
  }
}

// ---------------------------------------------------------------------------- GEMM

// What was added to the weights of a section: its zero point, and kWeightOffset.
inline int section_offset(const Linear& g, int64_t n, int64_t section) {
  return kWeightOffset + (g.section_zero ? g.section_zero[n * g.sections + section] : g.zero);
}

// Adds the int32 sums of a section, times its scale, to the totals of the sections before it.
inline void add_section(const Linear& g, int64_t n, int64_t rows, int64_t block, int count,
                        int64_t section, const int32_t* sums, float* totals) {
  for (int64_t i = 0; i < rows; i++) {
    const V scale = splat(g.section_scale[(n + i) * g.sections + section]);
    const int offset = section_offset(g, n + i, section);
    for (int c = 0; c < count; c++) {
      const int32_t* x_sums = g.section_sums + ((block + c) * g.sections + section) * kBlockTokens;
      for (int t = 0; t < kBlockTokens; t += kLanes) {
        const int64_t at = (i * kGroupBlocks + c) * kBlockTokens + t;
        I sum, x_sum;
        memcpy(&sum, sums + at, sizeof sum);
        memcpy(&x_sum, x_sums + t, sizeof x_sum);
        const V y = __builtin_convertvector(sum - x_sum * offset, V) * scale;
        store(totals + at, section ? load(totals + at) + y : y);
      }
    }
  }
}

// A panel of output channels x one token block: float(sum) * row_scale * weight_scale + bias in this order, or
// total * row_scale + bias if there are sections; GELU, then gate and residual; one rounding to the output
// type. Everything of `g` is read once, so that a `whole` block has no branch on what is the same for a launch.
// Channels go to lanes first. A line of outputs is written at once.
template <Float type, bool whole>
void store_block(const Linear& g, int64_t n, int64_t token, const int32_t* sums, const float* totals) {
  constexpr int kVectors = kPanelRows / kLanes, kHalf = 16 * kGroupBlocks * kBlockTokens;
  typedef typename Storage<type == kFloat32>::T T;
  const bool sections = g.section_scale, gelu = g.gelu;
  const int rows = whole || g.rows - n > kPanelRows ? kPanelRows : (int)(g.rows - n);
  const int tokens = whole || g.tokens - token > kBlockTokens ? kBlockTokens : (int)(g.tokens - token);
  const int vectors = whole ? kVectors : (rows + kLanes - 1) / kLanes;
  const auto channels = [&](const void* from, int64_t at, int i, Float kind) {
    return part_as_float(from, at + i * kLanes, whole ? kLanes : rows - i * kLanes, kind);
  };
  // [16 channels][token][channel]: sums, or totals as floats; then the values
  alignas(64) int32_t by_token[kPanelRows / 16][kBlockTokens][16];
  const int32_t* from = sections ? (const int32_t*)totals : sums;
  for (int i = 0; i < kPanelRows / 16; i++)
    Isa::transpose16(from + i * kHalf, kGroupBlocks * kBlockTokens, by_token[i][0]);
  const auto values = [&](int t, int i) { return (float*)by_token[i * kLanes / 16][t] + i * kLanes % 16; };

  const float* row_scale = g.row_scale + token;
  const int32_t* x_sums = g.section_sums + token;
  for (int i = 0; i < vectors; i++) {
    const V weight_scale = sections ? (V){} : channels(g.weight_scale, n, i, kFloat32);
    const V bias = g.bias ? channels(g.bias, n, i, kFloat32) : splat(-0.0f);  // y + -0 is y, also for y = -0
    if (sections) {
      for (int t = 0; t < tokens; t++) store(values(t, i), load(values(t, i)) * splat(row_scale[t]) + bias);
    } else {
      for (int t = 0; t < tokens; t++) {
        const I sum = (I)load(values(t, i)) - ((I){} + x_sums[t]) * kWeightOffset;
        const V scaled = __builtin_convertvector(sum, V) * splat(row_scale[t]);
        store(values(t, i), scaled * weight_scale + bias);
      }
    }
  }
  if (gelu)
    for (int i = 0; i < kPanelRows * kBlockTokens; i += kGeluAtOnce * kLanes)
      gelu_in_place((float*)by_token + i);

  V gate[kVectors];
  const int64_t stride = g.rows;
  const void *gates = g.gate, *residual = g.residual;
  const Float gate_type = g.gate_type;
  int64_t image = residual ? token / g.tokens_per_gate : 0, begins = residual ? 0 : kBlockTokens;
  T* out = (T*)g.out + token * stride + n;
  for (int t = 0; t < tokens; t++, out += stride) {
    if (t == begins) {
      for (int i = 0; i < vectors; i++) gate[i] = channels(gates, image * stride + n, i, gate_type);
      begins = ++image * g.tokens_per_gate - token;
    }
#pragma GCC unroll 8
    for (int i = 0; i < vectors; i++) {
      V y = load(values(t, i));
      if (residual) y = gate[i] * y + channels(residual, (token + t) * stride + n, i, gate_type);
      if (whole || rows - i * kLanes >= kLanes) {
        store_vector<type>(out + i * kLanes, y);
      } else {
        T end[kLanes];
        store_vector<type>(end, y);
        memcpy(out + i * kLanes, end, (rows - i * kLanes) * sizeof(T));
      }
    }
  }
}

template <Float type>
void store_group_as(const Linear& g, int64_t n, int64_t rows, int64_t block, int count, const int32_t* sums,
                    const float* totals) {
  for (int c = 0; c < count; c++) {
    const int64_t token = (block + c) * kBlockTokens;
    const int first = c * kBlockTokens;
    const bool whole = rows == kPanelRows && g.tokens - token >= kBlockTokens;
    (whole ? store_block<type, true> : store_block<type, false>)(g, n, token, sums + first, totals + first);
  }
}

inline void store_group(const Linear& g, int64_t n, int64_t rows, int64_t block, int count,
                        const int32_t* sums, const float* totals) {
  const auto store = g.type == kFloat32    ? store_group_as<kFloat32>
                     : g.type == kBFloat16 ? store_group_as<kBFloat16>
                                           : store_group_as<kFloat16>;
  store(g, n, rows, block, count, sums, totals);
}

// Unpacks panel p to [step][kPanelRows][kStep]; returns how many output channels it has.
inline int64_t unpack_panel(const Linear& g, int64_t p, Weight* weights) {
  const int64_t n = p * kPanelRows, rows = g.rows - n < kPanelRows ? g.rows - n : kPanelRows;
  for (int64_t i = 0; i < rows; i++)
    for (int64_t s = 0; s < g.steps; s++)
      Isa::unpack_step(g, n + i, s, weights + (s * kPanelRows + i) * kStep);
  return rows;
}

// While panel p is multiplied, the weights of the next one are fetched, if it is not the `last`.
inline Ahead ahead_of_panel(const Linear& g, int64_t p, bool last) {
  const int64_t n = (p + !last) * kPanelRows, rows = g.rows - n < kPanelRows ? g.rows - n : kPanelRows;
  const char *at = (const char*)weights_at(g, n, 0), *end = at + (g.columns * rows * g.bits >> 3);
  Ahead ahead = {};
  ahead.weights = {at, last ? at : end - 64, 64};
  return ahead;
}

// And the lines of the outputs and of the residual that `count` token blocks x the panel at n will need.
inline void set_outputs(Ahead& ahead, const Linear& g, int64_t n, int64_t block, int64_t count) {
  const int64_t first = block * kBlockTokens, end = first + count * kBlockTokens;
  const int64_t last = (end < g.tokens ? end : g.tokens) - 1;
  const auto lines = [&](const void* tensor, Float type) {
    const int64_t size = type == kFloat32 ? 4 : 2;
    const char* at = (const char*)tensor + n * size;
    return Lines{at + first * g.rows * size, at + last * g.rows * size, g.rows * size};
  };
  ahead.out = lines(g.out, g.type);
  ahead.residual = g.residual ? lines(g.residual, g.gate_type) : ahead.out;
}

void multiply(const Linear& g, int64_t block, int64_t block_end, int64_t panel, int64_t panel_end,
              void* scratch) {
  alignas(64) int32_t sums[kPanelRows * kGroupBlocks * kBlockTokens];
  alignas(64) float totals[kPanelRows * kGroupBlocks * kBlockTokens];
  Weight* weights = (Weight*)scratch;
  const int64_t steps = g.steps / g.sections, next = g.steps * kBlockStep;
  for (int64_t p = panel; p < panel_end; p++) {
    const int64_t n = p * kPanelRows, rows = unpack_panel(g, p, weights);
    Ahead ahead = ahead_of_panel(g, p, p + 1 == panel_end);
    int64_t at = block, groups = (block_end - block + Isa::kMaxBlocks - 1) / Isa::kMaxBlocks;
    for (; groups; groups--) {
      // groups of about equal size: a single block makes poor use of the registers
      const int count = (int)((block_end - at + groups - 1) / groups);
      const Activation* x = (const Activation*)g.packed + at * next;
      set_outputs(ahead, g, n, at, count);
      for (int64_t section = 0; section < g.sections; section++) {
        const int64_t end = (section + 1) * steps;
        for (int64_t step = section * steps, some; step < end; step += some) {
          some = end - step < Isa::kMaxSteps ? end - step : Isa::kMaxSteps;
          Isa::multiply_group(weights + step * kPanelRows * kStep, x + step * kBlockStep, some, next,
                              count, step > section * steps, sums, ahead);
        }
        if (g.section_scale) add_section(g, n, rows, at, count, section, sums, totals);
      }
      store_group(g, n, rows, at, count, sums, totals);
      at += count;
    }
  }
}

void multiply_small_m(const Linear& g, int64_t first, int64_t last) {
  alignas(64) float line[kSmallM][16];
  for (int64_t n = first; n < last; n += 16) {
    const int rows = (int)(last - n < 16 ? last - n : 16);
    for (int i = 0; i < rows; i++) {
      int32_t sums[kSmallM];
      float y[kSmallM];
      const int64_t steps = g.steps / g.sections;
      for (int64_t section = 0; section < g.sections; section++) {
        const int32_t* x_sums = g.section_sums + section * kSmallM;
        Isa::dot_small_m(g, n + i, section * steps, (section + 1) * steps, sums);
        if (!g.section_scale) {
          for (int t = 0; t < g.tokens; t++)
            y[t] = (float)(sums[t] - x_sums[t] * kWeightOffset) * g.row_scale[t] * g.weight_scale[n + i];
          break;
        }
        const float scale = g.section_scale[(n + i) * g.sections + section];
        const int offset = section_offset(g, n + i, section);
        for (int t = 0; t < g.tokens; t++) {
          const float part = (float)(sums[t] - x_sums[t] * offset) * scale;
          y[t] = section ? y[t] + part : part;
        }
      }
      for (int t = 0; t < g.tokens; t++) {
        if (g.section_scale) y[t] = y[t] * g.row_scale[t];
        line[t][i] = g.bias ? y[t] + g.bias[n + i] : y[t];
      }
    }
    for (int t = 0; t < g.tokens; t++) {
      apply_epilogue(g, t, n, rows, line[t]);
      store_floats(g.out, t * g.rows + n, line[t], rows, g.type);
    }
  }
}

}  // namespace
}  // namespace dtq
