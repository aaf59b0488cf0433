// SPDX-License-Identifier: Apache-2.0
// Portable C++: used on a machine without AVX2, and what the other instruction sets are tested against.
#include "blocks.h"
#include "lanes4.h"
#include "weights.h"

namespace dtq {
namespace {

struct PortableVectors : Lanes4 {
  static void transpose16(const int32_t* in, int64_t stride, int32_t* out) {
    for (int i = 0; i < 16; i++)
      for (int j = 0; j < 16; j++) out[j * 16 + i] = in[i * stride + j];
  }

  static V lookup(const float* table, U codes) {
    V v;
    for (int i = 0; i < kLanes; i++) v[i] = table[codes[i] & 15];
    return v;
  }

  static V fma(V a, V b, V c) { return a * b + c; }

  typedef int16_t Activation;
  typedef int16_t Weight;
  static constexpr int kDotWidth = 2, kWeightOffset = 0;

  static constexpr int kAttentionRows = 4, kQueryVectors = 4, kProbabilityOffset = 0;

  static I dot_scores(I sum, uint32_t key, I query) {
    return sum + ((query << 16) >> 16) * (int16_t)key + (query >> 16) * ((int32_t)key >> 16);
  }

  static I dot_values(I sum, U probability, uint32_t value) {
    return dot_scores(sum, value, (I)probability);
  }

  static void add_activations(const Activation* x, int32_t* sums) {
    for (int i = 0; i < kStep * kBlockTokens; i++) sums[i / kDotWidth % kBlockTokens] += x[i];
  }

  static void unpack8(const int8_t* w, int width, Weight* out) {
    for (int i = 0; i < kStep; i++) out[i] = i < width ? w[i] : 0;
  }

  template <int bits>
  static void unpack(const int8_t* w, int width, const Codebooks& codebooks, Weight* out) {
    for (int i = 0; i < kStep; i++) out[i] = i < width ? codebooks.of[i / 16][code_at(w, bits, i)] : 0;
  }
};

struct Portable : StepWeights<PortableVectors> {
  static constexpr int kBlockRows = 1;

  static void multiply_block(const Weight* weights, const Activation* x_q, int64_t steps, bool more,
                             int32_t* sums, Ahead& ahead) {
    int32_t sum[kBlockTokens] = {};
    for (int64_t s = 0; s < steps; s++) {
      const Weight* w = weights + s * kPanelRows * kStep;
      const Activation* x = x_q + s * kStep * kBlockTokens;
      ahead.fetch();
      for (int q = 0; q < kStep; q += 2, x += 2 * kBlockTokens)
        for (int t = 0; t < kBlockTokens; t++) sum[t] += w[q] * x[2 * t] + w[q + 1] * x[2 * t + 1];
    }
    for (int t = 0; t < kBlockTokens; t++) sums[t] = more ? sums[t] + sum[t] : sum[t];
  }

  static void dot_small_m(const Linear& g, int64_t n, int64_t s, int64_t end, int32_t* sums) {
    Weight line[kStep];
    for (int t = 0; t < g.tokens; t++) sums[t] = 0;
    for (; s < end; s++) {
      unpack_step(g, n, s, line);
      for (int t = 0; t < g.tokens; t++) {
        const Activation* x = (const Activation*)g.packed + (t * g.steps + s) * kStep;
        for (int i = 0; i < kStep; i++) sums[t] += line[i] * x[i];
      }
    }
  }

  static int64_t peak(int64_t) { return 0; }  // depends on the compiler
};

struct Isa : ByBlocks<Portable> {};

}  // namespace
}  // namespace dtq

#include "attention.h"
#include "decode.h"
#include "gelu.h"
#include "gemm.h"
#include "rows.h"

namespace dtq {
const Kernels portable = {"ref", sizeof(Activation), sizeof(Weight), quantize, pack, multiply,
                          pack_small_m, multiply_small_m, decode, multiply_stored, nullptr, gelu,
                      kQueryBlock, head_bytes, block_bytes, pack_heads, attend, Isa::peak};
}
