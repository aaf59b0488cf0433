// SPDX-License-Identifier: Apache-2.0
// launch_rows: which of the compiled row kernels does the task.
#include "rows_held.cuh"
#include "rows_streamed.cuh"

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

int bytes_of(Float type) { return type == kFloat32 ? 4 : 2; }

// Floats of shared memory before the row between two turns.
template <int kThreads, Before kBefore>
int64_t shared_floats(const Rows& r) {
  int64_t floats = kWarpWords;
  if (r.block > 32 * kRun) floats += kThreads * kRun;
  if (kBefore == kNorm) floats += (r.columns + kRun - 1) / kRun;
  return floats;
}

template <int kThreads, int kTiles, Before kBefore>
int start_held(RowPlan& p, Stream stream) {
  constexpr int64_t kTile = kThreads * kRun, kRows = DTQ_BLOCK_OF(kThreads) / kThreads;
  p.tiles = (p.r.width + kTile - 1) / kTile;
  Shape shape;
  shape.grid.x = (unsigned)((p.r.rows + kRows - 1) / kRows);
  shape.threads = (unsigned)(kThreads * kRows);
  shape.shared = kThreads == 32 ? 0 : (size_t)shared_floats<kThreads, kBefore>(p.r) * 4;
  return launch(held_rows_kernel<kThreads, kTiles, kBefore>, shape, stream, p);
}

template <int kThreads, Before kBefore>
int start_streamed(RowPlan& p, Stream stream) {
  const Rows& r = p.r;
  constexpr int64_t kTile = kThreads * kRun;
  p.tiles = (r.width + kTile - 1) / kTile;
  int64_t floats = shared_floats<kThreads, kBefore>(r);
  p.dealt = -1;
  if (r.turns == 2) {
    if ((floats + r.columns) * 4 <= kSharedBytes) {
      p.dealt = (int)floats;
      floats += r.columns;
    } else if (r.output != kFloat) {
      return kLongRow;
    }
  }
  if (floats * 4 > kSharedBytes) return kLongRow;
  Shape shape;
  shape.grid.x = (unsigned)r.rows;
  shape.threads = kThreads;
  shape.shared = (size_t)floats * 4;
  return launch(streamed_rows_kernel<kThreads, kBefore>, shape, stream, p);
}

// Registers hold a row of whole runs if every array can be read 16 bytes at a time.
bool can_hold(const RowPlan& p) {
  const Rows& r = p.r;
  return r.output == kInt8 && !r.order && r.turns == 1 && r.columns % kRun == 0 &&
         r.width % kRun == 0 && r.width <= 3 * 512 * kRun && p.whole_x && p.whole_out &&
         (!r.modulate_scale || p.whole_modulate) && (!r.pre_scale || p.whole_pre);
}

// A warp holds a row of up to 1536 columns, blocks of threads longer ones. The blocks of a rotation
// must fit into a tile.
template <Before kBefore>
int start(RowPlan& p, Stream stream) {
  const int64_t width = p.r.width, block = p.r.block;
  if (can_hold(p)) {
    if (width <= 3 * 32 * kRun && block <= 32 * kRun) return start_held<32, 3, kBefore>(p, stream);
    if (width <= 2 * 128 * kRun && block <= 128 * kRun)
      return start_held<128, 2, kBefore>(p, stream);
    if (width <= 3 * 256 * kRun && block <= 256 * kRun)
      return start_held<256, 3, kBefore>(p, stream);
    return start_held<512, 3, kBefore>(p, stream);
  }
  if (width <= 2 * 128 * kRun && block <= 128 * kRun) return start_streamed<128, kBefore>(p, stream);
  return start_streamed<512, kBefore>(p, stream);
}

}  // namespace

int launch_rows(const Rows& r, Stream stream) {
  if (r.block < 1 || (r.block & (r.block - 1)) || r.columns % r.block) return kBadBlock;
  if (r.block > kLongestBlock) return kLongBlock;
  if (r.output == kInt8 && (r.levels < 1 || r.levels > 127)) return kBadLevels;
  if (r.width < r.columns || r.rows >> 31 || (r.turns != 1 && r.turns != 2)) return kUnsupported;
  if (r.rows == 0 || r.width == 0) return kOk;
  RowPlan p = {};
  p.r = r;
  p.unit = (float)__builtin_pow((double)r.block, -0.5);
  p.whole_x = reads_whole(r.x, r.stride, bytes_of(r.type));
  p.whole_modulate = reads_whole(r.modulate_scale, r.modulate_stride, bytes_of(r.modulate_type)) &&
                     reads_whole(r.modulate_shift, 0, 1);
  p.whole_pre = reads_whole(r.pre_scale, 0, 1);
  p.whole_out = reads_whole(r.out, r.out_stride, r.output == kFloat ? 4 : 1);
  switch (r.before) {
    case kAsIs: return start<kAsIs>(p, stream);
    case kGelu: return start<kGelu>(p, stream);
    case kNorm: return start<kNorm>(p, stream);
  }
  return kUnsupported;
}

}  // namespace dtq
