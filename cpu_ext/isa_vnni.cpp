// SPDX-License-Identifier: Apache-2.0
// AVX512-VNNI: vpdpbusd adds four products of unsigned weights and signed activations to each of 16 sums.
#include "ahead.h"
#include "avx512.h"

namespace dtq {
namespace {

struct Isa : Avx512 {
  static constexpr int kMaxBlocks = kGroupBlocks;
  static constexpr int64_t kMaxSteps = 8;  // as in blocks.h

  // `rows` output channels x `count` token blocks, sums in registers: 8 x 3 = 24 of the 32.
  template <int rows, int count>
  static void multiply_block(const Weight* weights, const Activation* x_q, int64_t steps, int64_t next,
                             bool more, int32_t* sums, Ahead& ahead) {
    __m512i sum[rows][count];
    for (int r = 0; r < rows; r++)
      for (int c = 0; c < count; c++)
        sum[r][c] = more ? _mm512_load_si512(sums + (r * kGroupBlocks + c) * kBlockTokens)
                         : _mm512_setzero_si512();
    for (int64_t s = 0; s < steps; s++) {
      const Weight* w = weights + s * kPanelRows * kStep;
      const Activation* x = x_q + s * kStep * kBlockTokens;
      ahead.fetch();
      for (int q = 0; q < kStep / 4; q++, x += 64) {
        __m512i tokens[count];
        for (int c = 0; c < count; c++) tokens[c] = _mm512_load_si512(x + c * next);
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) {
          const __m512i weight = _mm512_set1_epi32(*(const int32_t*)(w + r * kStep + q * 4));
          for (int c = 0; c < count; c++)
            sum[r][c] = _mm512_dpbusd_epi32(sum[r][c], weight, tokens[c]);
        }
      }
    }
    for (int r = 0; r < rows; r++)
      for (int c = 0; c < count; c++)
        _mm512_store_si512(sums + (r * kGroupBlocks + c) * kBlockTokens, sum[r][c]);
  }

  template <int rows, int count>
  static void multiply_rows(const Weight* weights, const Activation* x, int64_t steps, int64_t next,
                            bool more, int32_t* sums, Ahead& ahead) {
    for (int n = 0; n < kPanelRows; n += rows)
      multiply_block<rows, count>(weights + n * kStep, x, steps, next, more,
                                  sums + n * kGroupBlocks * kBlockTokens, ahead);
  }

  static void multiply_group(const Weight* weights, const Activation* x, int64_t steps, int64_t next,
                             int count, bool more, int32_t* sums, Ahead& ahead) {
    if (count == 3) multiply_rows<8, 3>(weights, x, steps, next, more, sums, ahead);
    else if (count == 2) multiply_rows<8, 2>(weights, x, steps, next, more, sums, ahead);
    else multiply_rows<16, 1>(weights, x, steps, next, more, sums, ahead);
  }

  static int64_t peak(int64_t rounds) {
    // in assembly: compilers put moves between the intrinsics
#define DTQ_ADD(sum) "vpdpbusd %0, %0, %%zmm" #sum "\n\t"
    const __m512i one = _mm512_set1_epi8(1);
    for (int64_t r = 0; r < rounds; r++)
      asm volatile(
          DTQ_ADD(8) DTQ_ADD(9) DTQ_ADD(10) DTQ_ADD(11) DTQ_ADD(12) DTQ_ADD(13) DTQ_ADD(14) DTQ_ADD(15)
          DTQ_ADD(16) DTQ_ADD(17) DTQ_ADD(18) DTQ_ADD(19) DTQ_ADD(20) DTQ_ADD(21) DTQ_ADD(22) DTQ_ADD(23)
          DTQ_ADD(24) DTQ_ADD(25) DTQ_ADD(26) DTQ_ADD(27) DTQ_ADD(28) DTQ_ADD(29) DTQ_ADD(30) DTQ_ADD(31)
          ::"v"(one)
          : "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15",
            "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23",
            "xmm24", "xmm25", "xmm26", "xmm27", "xmm28", "xmm29", "xmm30", "xmm31");
#undef DTQ_ADD
    return rounds * 24 * 64 * 2;
  }
};

}  // namespace
}  // namespace dtq

#include "attention.h"
#include "decode.h"
#include "decode_bf16.h"
#include "gelu.h"
#include "gemm.h"
#include "rows.h"

namespace dtq {
const Kernels vnni = {"vnni", sizeof(Activation), sizeof(Weight), quantize, pack, multiply,
                      pack_small_m, multiply_small_m, decode, multiply_stored, multiply_bfloat16, gelu,
                      kQueryBlock, head_bytes, block_bytes, pack_heads, attend, Isa::peak};
}
