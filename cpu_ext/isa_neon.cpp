// SPDX-License-Identifier: Apache-2.0
// Arm with dot products (ARMv8.2): sdot adds four products of signed bytes to each of four sums.
#include <arm_neon.h>

#include "blocks.h"
#include "lanes4.h"
#include "weights.h"

namespace dtq {
namespace {

struct NeonVectors : Lanes4 {
  static void transpose16(const int32_t* in, int64_t stride, int32_t* out) {
    for (int i = 0; i < 16; i += 4)
      for (int j = 0; j < 16; j += 4) {
        const int32_t* at = in + i * stride + j;
        const int32x4x2_t a = vtrnq_s32(vld1q_s32(at), vld1q_s32(at + stride));
        const int32x4x2_t b = vtrnq_s32(vld1q_s32(at + 2 * stride), vld1q_s32(at + 3 * stride));
        int32_t* to = out + j * 16 + i;
        for (int odd = 0; odd < 2; odd++, to += 16) {
          const int64x2_t low = vreinterpretq_s64_s32(a.val[odd]);
          const int64x2_t high = vreinterpretq_s64_s32(b.val[odd]);
          vst1q_s32(to, vreinterpretq_s32_s64(vtrn1q_s64(low, high)));
          vst1q_s32(to + 32, vreinterpretq_s32_s64(vtrn2q_s64(low, high)));
        }
      }
  }

  static V lookup(const float* table, U codes) {
    const U bytes = (codes & 15) * 0x04040404 + 0x03020100;
    const uint8_t* at = (const uint8_t*)table;
    const uint8x16x4_t floats = {{vld1q_u8(at), vld1q_u8(at + 16), vld1q_u8(at + 32), vld1q_u8(at + 48)}};
    return (V)vqtbl4q_u8(floats, (uint8x16_t)bytes);
  }

  static V fma(V a, V b, V c) {
    return (V)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
  }

  // -------------------------------------------------------------------------- weights

  typedef int8_t Activation;
  typedef int8_t Weight;
  static constexpr int kDotWidth = 4, kWeightOffset = 0;

  // Signed bytes only: probabilities are stored less 128.
  static constexpr int kAttentionRows = 4, kQueryVectors = 4, kProbabilityOffset = 128;

  static I dot_scores(I sum, uint32_t key, I query) {
    return (I)vdotq_s32((int32x4_t)sum, vreinterpretq_s8_u32(vdupq_n_u32(key)), (int8x16_t)query);
  }

  static I dot_values(I sum, U probability, uint32_t value) {
    return dot_scores(sum, value, (I)probability);
  }

  static void add_activations(const Activation* x, int32_t* sums) {
    for (int t = 0; t < kBlockTokens; t += 4) {
      int32x4_t sum = vld1q_s32(sums + t);
      for (int q = 0; q < kStep / kDotWidth; q++)
        sum = vdotq_s32(sum, vdupq_n_s8(1), vld1q_s8(x + (q * kBlockTokens + t) * kDotWidth));
      vst1q_s32(sums + t, sum);
    }
  }

  static void unpack8(const int8_t* w, int width, Weight* out) {
    __builtin_memcpy(out, w, width);
    if (width < kStep) __builtin_memset(out + width, 0, kStep - width);
  }

  // 16 codes of 8 bytes.
  static uint8x16_t codes_of_4(const int8_t* w) {
    const uint8x8_t bytes = vld1_u8((const uint8_t*)w);
    const uint8x8x2_t codes = vzip_u8(vand_u8(bytes, vdup_n_u8(15)), vshr_n_u8(bytes, 4));
    return vcombine_u8(codes.val[0], codes.val[1]);
  }

  // 16 codes of 6 bytes: three bytes to each 64-bit lane, then a byte to each code.
  static uint8x16_t codes_of_3(const int8_t* w) {
    uint64_t lane[2] = {};
    __builtin_memcpy(lane, w, 3);
    __builtin_memcpy(lane + 1, w + 3, 3);
    uint64x2_t v = vld1q_u64(lane);
    v = (v | v << 20) & 0x00000fff00000fff;
    v = (v | v << 10) & 0x003f003f003f003f;
    v = (v | v << 5) & 0x0707070707070707;
    return vreinterpretq_u8_u64(v);
  }

  template <int bits>
  static void unpack(const int8_t* w, int width, const Codebooks& codebooks, Weight* out) {
    int8_t line[kStep * bits / 8] = {};
    if (width < kStep) {
      __builtin_memcpy(line, w, width * bits / 8);
      w = line;
    }
    for (int i = 0; i < 4; i++) {
      const int8_t* at = w + 2 * bits * i;
      const uint8x16_t codes = bits == 4 ? codes_of_4(at) : codes_of_3(at);
      vst1q_s8(out + 16 * i, vqtbl1q_s8(vld1q_s8(codebooks.of[i]), codes));
    }
  }
};

struct Neon : StepWeights<NeonVectors> {
  static constexpr int kBlockRows = 4;

  // Four channels of kBlockRows weight rows x 16 tokens.
  template <int lane>
  static void add_four_channels(const Activation* x, const int8x16_t* weight, int32x4_t (*sum)[4]) {
    int8x16_t tokens[4];
    for (int t = 0; t < 4; t++) tokens[t] = vld1q_s8(x + lane * kDotWidth * kBlockTokens + 16 * t);
    for (int r = 0; r < kBlockRows; r++)
      for (int t = 0; t < 4; t++) sum[r][t] = vdotq_laneq_s32(sum[r][t], tokens[t], weight[r], lane);
  }

  // kBlockRows output channels x 16 tokens: 16 sums, 4 of activations and 4 of weights, of 32 registers.
  static void multiply_block(const Weight* weights, const Activation* x_q, int64_t steps, bool more,
                             int32_t* sums, Ahead& ahead) {
    int32x4_t sum[kBlockRows][4];
    for (int r = 0; r < kBlockRows; r++)
      for (int t = 0; t < 4; t++)
        sum[r][t] = more ? vld1q_s32(sums + r * kGroupBlocks * kBlockTokens + 4 * t) : vdupq_n_s32(0);
    for (int64_t s = 0; s < steps; s++) {
      const Weight* w = weights + s * kPanelRows * kStep;
      const Activation* x = x_q + s * kStep * kBlockTokens;
      ahead.fetch();
      for (int k = 0; k < kStep; k += 16, x += 16 * kBlockTokens) {
        int8x16_t weight[kBlockRows];
        for (int r = 0; r < kBlockRows; r++) weight[r] = vld1q_s8(w + r * kStep + k);
        add_four_channels<0>(x, weight, sum);
        add_four_channels<1>(x, weight, sum);
        add_four_channels<2>(x, weight, sum);
        add_four_channels<3>(x, weight, sum);
      }
    }
    for (int r = 0; r < kBlockRows; r++)
      for (int t = 0; t < 4; t++) vst1q_s32(sums + r * kGroupBlocks * kBlockTokens + 4 * t, sum[r][t]);
  }

  // Each step of the weight row is unpacked to memory, then multiplied with every token.
  static void dot_small_m(const Linear& g, int64_t n, int64_t s, int64_t end, int32_t* sums) {
    alignas(64) Weight line[kStep];
    int32x4_t sum[kSmallM];
    for (int t = 0; t < g.tokens; t++) sum[t] = vdupq_n_s32(0);
    for (; s < end; s++) {
      unpack_step(g, n, s, line);
      for (int t = 0; t < g.tokens; t++) {
        const Activation* x = (const Activation*)g.packed + (t * g.steps + s) * kStep;
        for (int k = 0; k < kStep; k += 16)
          sum[t] = vdotq_s32(sum[t], vld1q_s8(line + k), vld1q_s8(x + k));
      }
    }
    for (int t = 0; t < g.tokens; t++) sums[t] = vaddvq_s32(sum[t]);
  }

  static int64_t peak(int64_t rounds) {
    // in assembly: compilers put moves between the intrinsics
#define DTQ_ADD(sum) "sdot v" #sum ".4s, %0.16b, %0.16b\n\t"
    const int8x16_t one = vdupq_n_s8(1);
    for (int64_t r = 0; r < rounds; r++)
      asm volatile(
          DTQ_ADD(16) DTQ_ADD(17) DTQ_ADD(18) DTQ_ADD(19) DTQ_ADD(20) DTQ_ADD(21) DTQ_ADD(22) DTQ_ADD(23)
          DTQ_ADD(24) DTQ_ADD(25) DTQ_ADD(26) DTQ_ADD(27) DTQ_ADD(28) DTQ_ADD(29) DTQ_ADD(30) DTQ_ADD(31)
          ::"w"(one)
          : "v16", "v17", "v18", "v19", "v20", "v21", "v22", "v23",
            "v24", "v25", "v26", "v27", "v28", "v29", "v30", "v31");
#undef DTQ_ADD
    return rounds * 16 * 16 * 2;
  }
};

struct Isa : ByBlocks<Neon> {};

}  // namespace
}  // namespace dtq

#include "attention.h"
#include "decode.h"
#include "gelu.h"
#include "gemm.h"
#include "rows.h"

namespace dtq {
const Kernels neon = {"neon", sizeof(Activation), sizeof(Weight), quantize, pack, multiply,
                      pack_small_m, multiply_small_m, decode, multiply_stored, nullptr, gelu,
                      kQueryBlock, head_bytes, block_bytes, pack_heads, attend, Isa::peak};
}
