// SPDX-License-Identifier: Apache-2.0
// launch_rows: which of the compiled row kernels does the task.
#include "rows.cuh"

namespace dtq {

const char* refusal(int code) {
  switch (code) {
    case kBadBlock: return "the columns are not whole blocks of a power of two";
    case kLongBlock: return "rotation blocks end at 8192 columns";
    case kLongRow: return "two turns of a row that shared memory does not hold";
    case kBadLevels: return "levels must be 1 to 127";
    case kBadWeight: return "bits, groups and columns of the weight do not fit together";
    default: return "no refusal";
  }
}

namespace {

constexpr int64_t kSharedBytes = 99 * 1024;  // what every architecture from sm_80 on gives a block

bool whole(const void* p, int64_t stride, int size) {
  return (uintptr_t)p % 16 == 0 && stride * size % 16 == 0;
}

int bytes_of(Float type) { return type == kFloat32 ? 4 : 2; }

template <int kThreads, int kTiles, Float kType, Before kBefore>
int start(RowPlan& p, Stream stream) {
  const Rows& r = p.r;
  constexpr int64_t kTile = kThreads * kRun, kRows = kThreads < 128 ? 128 / kThreads : 1;
  p.tiles = (r.width + kTile - 1) / kTile;
  int64_t floats = 0;
  if (kThreads > 32) {
    floats = kWords;
    if (r.block > 32 * kRun) floats += kTile;
    if (kBefore == kNorm) floats += (r.columns + kRun - 1) / kRun;
    p.dealt = -1;
    if (r.turns == 2) {
      if ((floats + r.columns) * 4 <= kSharedBytes) {
        p.dealt = (int)floats;
        floats += r.columns;
      } else if (r.output != kFloat) {
        return kLongRow;
      }
    }
  }
  Shape shape;
  shape.grid.x = (unsigned)((r.rows + kRows - 1) / kRows);
  shape.threads = (unsigned)(kThreads * kRows);
  shape.shared = (size_t)floats * 4;
  return launch(rows_kernel<kThreads, kTiles, kType, kBefore>, shape, stream, p);
}

// A warp a row while a warp holds it, else a block that does; the last one computes what it cannot
// hold twice. A block's rotation must fit into its tile.
template <Float kType, Before kBefore>
int start_sized(RowPlan& p, Stream stream) {
  const int64_t width = p.r.width, block = p.r.block;
  if (width <= 3 * 512 && block <= 512 && p.r.turns == 1)
    return start<32, 3, kType, kBefore>(p, stream);
  if (width <= 2 * 2048 && block <= 2048) return start<128, 2, kType, kBefore>(p, stream);
  if (width <= 3 * 4096 && block <= 4096) return start<256, 3, kType, kBefore>(p, stream);
  return start<512, 3, kType, kBefore>(p, stream);
}

template <Float kType>
int start_typed(RowPlan& p, Stream stream) {
  switch (p.r.before) {
    case kAsIs: return start_sized<kType, kAsIs>(p, stream);
    case kGelu: return start_sized<kType, kGelu>(p, stream);
    case kNorm: return start_sized<kType, kNorm>(p, stream);
  }
  return kUnsupported;
}

}  // namespace

int launch_rows(const Rows& r, Stream stream) {
  if (r.block < 1 || (r.block & (r.block - 1)) || r.columns % r.block) return kBadBlock;
  if (r.block > kLongestBlock) return kLongBlock;
  if (r.output == kInt8 && (r.levels < 1 || r.levels > 127)) return kBadLevels;
  if (r.width < r.columns || r.rows >> 33 || (r.turns != 1 && r.turns != 2)) return kUnsupported;
  if (r.rows == 0 || r.width == 0) return kOk;
  RowPlan p = {};
  p.r = r;
  p.unit = (float)__builtin_pow((double)r.block, -0.5);
  p.whole_x = whole(r.x, r.stride, bytes_of(r.type));
  p.whole_modulate = whole(r.modulate_scale, r.modulate_stride, bytes_of(r.modulate_type)) &&
                     whole(r.modulate_shift, 0, 1);
  p.whole_pre = whole(r.pre_scale, 0, 1);
  p.whole_out = whole(r.out, r.out_stride, r.output == kFloat ? 4 : 1);
  switch (r.type) {
    case kFloat32: return start_typed<kFloat32>(p, stream);
    case kBFloat16: return start_typed<kBFloat16>(p, stream);
    case kFloat16: return start_typed<kFloat16>(p, stream);
  }
  return kUnsupported;
}

}  // namespace dtq
