// SPDX-License-Identifier: Apache-2.0
// All kernels for one kind of weight, and the launch of a plan. Each kind is a file of its own, so that
// they compile in parallel.
#pragma once
#include "gemm_mma.cuh"
#include "gemm_plan.h"
#include "gemm_persistent.cuh"

namespace dtq {

template <class Source>
constexpr int kDeepStages = Source::kBits == 8 ? 5 : 6;  // for the tiles that are bound by memory

template <class Source>
using Tile128 = MmaTile<Source, 128, 128, 64, 32, Source::kBits == 8 ? 3 : 4, true>;
template <class Source>
using Tile64 = MmaTile<Source, 64, 64, 32, 32, kDeepStages<Source>, true>;
template <class Source>
using Tile16 = MmaTile<Source, 16, 128, 16, 32, kDeepStages<Source>, true>;
template <class Source>
using Wgmma256 = WgmmaTile<Source, 256, Source::kBits == 8 ? 4 : 5, 2>;
template <class Source>
using Wgmma128 = WgmmaTile<Source, 128, Source::kBits == 8 ? 6 : 8, 2>;
template <class Source>
using Persistent = PersistentTile<Source, 256, 4, Source::kBits == 8 ? 64 : 128>;
using TileOdd = MmaTile<Int8, 64, 64, 32, 32, 3, false>;

template <class T, bool has_epilogue>
int run_mma(const GemmArgs& p, int64_t tiles, Stream stream) {
  const Shape shape = {{unsigned(tiles * p.splits)}, unsigned(T::kThreads), size_t(T::kShared)};
  return launch(gemm_mma<T, has_epilogue>, shape, stream, p);
}

template <class Source>
int run(const Gemm& g, const Plan& plan, Stream stream) {
  const auto* groups = g.weights == kTable ? reinterpret_cast<const uint8_t*>(g.codebooks) : g.groups;
  int shift = 0;
  while (g.group > int64_t(1) << shift) shift++;  // one group per row: any power from K on
  const int count = g.weights == kInt8 ? 0 : int(g.columns / g.group);
  const GemmArgs p = {g, {groups, count, shift}, plan.splits, plan.steps_per_split, plan.partial};
  const int64_t tiles = tiles_of(g, plan.tile);
  int status = kUnsupported;
  if (plan.tile == kMma128)
    status = has_epilogue(g) ? run_mma<Tile128<Source>, true>(p, tiles, stream)
                           : run_mma<Tile128<Source>, false>(p, tiles, stream);
  if (plan.tile == kMma64) status = run_mma<Tile64<Source>, false>(p, tiles, stream);
  if (plan.tile == kMma16) status = run_mma<Tile16<Source>, false>(p, tiles, stream);
  if (plan.tile == kWgmma256) status = run_wgmma<Wgmma256<Source>>(p, stream);
  if (plan.tile == kWgmma128) status = run_wgmma<Wgmma128<Source>>(p, stream);
  if (plan.tile == kPersistent) status = run_persistent<Persistent<Source>>(p, stream);
  if constexpr (Source::kBits == 8)
    if (plan.tile == kMmaOdd) status = run_mma<TileOdd, false>(p, tiles, stream);
  if (status != kOk || !plan.partial) return status;
  constexpr int kThreads = 256;
  const Shape shape = {{unsigned(ceil_div(g.tokens * g.rows, kThreads))}, kThreads};
  return launch(sum_splits<kThreads>, shape, stream, p);
}

}  // namespace dtq
