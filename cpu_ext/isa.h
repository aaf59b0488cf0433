// SPDX-License-Identifier: Apache-2.0
// What an instruction set provides to the kernels in norm.h, rows.h, gelu.h, gemm.h and decode.h.
//
// Each isa_*.cpp is one instruction set, compiled for it alone. It defines `struct Isa`, whose static
// members are listed here, includes those headers, and fills a `Kernels` with their functions:
//
//   kLanes                   floats in a vector
//   V, I, U                  vectors of float, int32_t and uint32_t, by the vector extension of GCC
//   swap_lanes<h>(v)         lanes i and i ^ h exchanged, h = 1, 2, 4, ... below kLanes
//   store_low_bytes(v, out), store_low_halves(v, out)   the low 8 or 16 bits of each lane
//   load_bytes(p), load_signed_bytes(p)   kLanes bytes, each extended to 32 bits
//   load_halves(p)           kLanes 16-bit values, likewise
//   load_part(p, count)      `count` floats, or 16-bit values extended to 32 bits; the other lanes are zero
//   lookup(table, codes)     table[code & 15] of 16 floats
//   at_least(v, limit), at_most(v, limit)   the larger, the smaller of both; v if v is NaN
//   fma(a, b, c)             a * b + c, rounded once if the machine can
//   transpose16(in, stride, out)   16 x 16 block of 32-bit values; stride of `in` in values, `out` is dense
//
//   Activation, Weight       types of a packed activation, and of a weight in a panel
//   kDotWidth                neighbouring channels that one instruction multiplies and sums to a lane
//   kWeightOffset            added to a weight to make it unsigned: 128, or 0
//   add_activations(x, sums) adds one step of a packed token block to the sums of its tokens
//   unpack_step(g, n, s, out)   step s of output channel n as kStep weights: see StepWeights in weights.h
//   kMaxBlocks               token blocks that multiply_group takes, at most kGroupBlocks
//   kMaxSteps                steps that multiply_group takes
//   multiply_group(weights, x, steps, next, count, more, sums, ahead)
//                            `steps` steps of a panel x `count` token blocks, which lie `next` activations
//                            apart; adds to the sums if `more`, else overwrites them; calls ahead.fetch()
//                            for each step of a block of sums
//   dot_small_m(g, n, s, end, sums)   steps [s, end) of output channel n x up to kSmallM tokens
//   splits(g)                whether dot_small_m wants the activations of two steps deinterleaved, even
//                            channels first
//   peak(rounds)             see Kernels
//
//   kAttentionRows, kQueryVectors   rows, and vectors of queries, whose sums fit into the registers; the rows
//                            divide 16
//   kProbabilityOffset       subtracted from a probability to make it signed: 128, or 0
//   dot_scores(sum, key, query)   adds the products of the kDotWidth values of a 32-bit word with those of
//                            each lane; the word is a Weight's, the lanes are an Activation's
//   dot_values(sum, probability, value)   the same; the lanes are probabilities, the word is signed
//
// All of it is in an anonymous namespace: see kernels.h.
#pragma once
#include <stddef.h>
#include <string.h>

#include "kernels.h"

namespace dtq {
namespace {

constexpr int kLanes = Isa::kLanes;
using V = Isa::V;
using I = Isa::I;
using U = Isa::U;
using Activation = Isa::Activation;
using Weight = Isa::Weight;

}  // namespace
}  // namespace dtq
