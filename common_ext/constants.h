// SPDX-License-Identifier: Apache-2.0
// Constants of float32 arithmetic whose result is defined bit for bit by the torch reference
// (dtq/kernels/ops_quantize.py, dtq/formats), for the CPU and the CUDA library alike.
#pragma once

namespace dtq {

// 1.5 * 2^23: x + kRoundToInt - kRoundToInt is x rounded to an integer, ties to even, |x| < 2^22.
// The low byte of the sum is the int8.
constexpr float kRoundToInt = 12582912.0f;

// Small float types: largest value, smallest normal value, and the spacing of values as a multiple
// of the power of two below them.
constexpr float kE2m1Max = 6, kE2m1MinNormal = 1, kE2m1Step = 0.5f;
constexpr float kE4m3Max = 448, kE4m3MinNormal = 0x1p-6f, kE4m3Step = 0.125f;
constexpr float kE4m3Min = 0x1p-9f;  // smallest positive

constexpr float kMinInt8Scale = 1e-8f;    // of a token
constexpr float kMinGroupScale = 1e-30f;  // of a group of integers, and the smallest amax of an NVFP4 token

// NVFP4: the scale of a token with amax 1. The largest block scale, kE4m3Max, then stands for kE2m1Max.
constexpr float kNvFp4TokenScale = 1.0f / 2688;

// GELU in its tanh form: x / (1 + 2^t), t = (kGeluCubic * x^2 + kGeluLinear) * x, which is -2 / ln(2) * sqrt(2 / pi) *
// (x + 0.044715 * x^3). Smaller x are taken as kGeluLowest, smaller t as kGeluLeastExponent. 2^t = 2^n * p(t - n), n =
// round(t); p is the polynomial of degree 5 whose largest relative error for |t - n| <= 1/2, 1e-7, is the least among
// those with p(0) = 1.
constexpr float kGeluLinear = -2.302208185195923f, kGeluCubic = -0.10294324159622192f;
constexpr float kGeluLowest = -10, kGeluLeastExponent = -126;
constexpr float kPower1 = 0.6931470036506653f, kPower2 = 0.24022242426872253f;
constexpr float kPower3 = 0.05550733581185341f, kPower4 = 0.009671512991189957f;
constexpr float kPower5 = 0.001326472731307149f;

// e^t = 2^n * p(r), n = round(t * kLog2E), r = (t - n * kLn2High) - n * kLn2Low. kLn2High is short, so that
// its product is exact. p is the Taylor polynomial of degree 6; kExp1Over<i> is the coefficient 1/i.
constexpr float kExpMin = -87, kExpMax = 89;  // t is clamped to these
constexpr float kLog2E = 1.44269504f;
constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
constexpr float kExp1Over720 = 1.0f / 720, kExp1Over120 = 1.0f / 120, kExp1Over24 = 1.0f / 24;
constexpr float kExp1Over6 = 1.0f / 6;

// int8 attention (dtq/kernels/ops_attention.py): probabilities are 255 * 2^x, a polynomial of degree 3 in
// the fraction of x. Scores have base 2.
constexpr float kInt8Max = 127, kSmallestAmax = 1e-30f;
constexpr float kNoScore = -2e30f, kLowestBias = -1e30f, kLeastExponent = -100;
constexpr float kLn2 = 0.693147182464599609375f;
constexpr float kProbability3 = (float)(255 * 0.055008981), kProbability2 = (float)(255 * 0.24221112);
constexpr float kProbability1 = (float)(255 * 0.69328294), kProbability0 = 255;

}  // namespace dtq
