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
    case kBadFp4: return "FP4 rows are whole groups of columns, at multiples of 8 bytes";
    case kBadGroup: return "groups must be a multiple of 16 columns, or a row";
    default: return "no refusal";
  }
}

namespace {

constexpr int64_t kSharedBytes = 99 * 1024;  // what every architecture from sm_80 on gives a block

int bytes_of(Float type) { return type == kFloat32 ? 4 : 2; }

// Floats of shared memory before the row between two turns.
template <Before kBefore>
int64_t shared_floats(const Rows& r, int threads) {
  int64_t floats = kWarpWords;
  if (r.block > 32 * kRun) floats += threads * kRun;
  if (kBefore == kNorm) floats += (r.columns + kRun - 1) / kRun;
  return floats;
}

Shape shape_of(const Rows& r, int threads, int64_t floats) {
  Shape shape;
  shape.grid.x = (unsigned)r.rows;
  shape.threads = (unsigned)threads;
  shape.shared = (size_t)floats * 4;
  return shape;
}

template <Before kBefore>
int start_held(RowPlan& p, int threads, Stream stream) {
  p.tiles = 1;
  const Shape shape = shape_of(p.r, threads, shared_floats<kBefore>(p.r, threads));
  return launch(held_rows_kernel<kBefore>, shape, stream, p);
}

template <Before kBefore>
int start_streamed(RowPlan& p, int threads, Stream stream) {
  const Rows& r = p.r;
  p.tiles = (r.width + threads * kRun - 1) / (threads * kRun);
  int64_t floats = shared_floats<kBefore>(r, threads);
  p.dealt = -1;
  if (r.turns == 2) {
    if ((floats + r.columns) * 4 <= kSharedBytes) {
      p.dealt = (int)floats;
      floats += r.columns;
    } else if (r.output != kFloat && (r.output != kRounded || r.out_type != kFloat32)) {
      return kLongRow;
    }
  }
  if (floats * 4 > kSharedBytes) return kLongRow;
  return launch(streamed_rows_kernel<kBefore>, shape_of(r, threads, floats), stream, p);
}

// Whether every array can be read 16 bytes at a time and a row is not too long.
bool can_hold(const RowPlan& p) {
  const Rows& r = p.r;
  const bool coded = r.output == kInt8 || r.output == kE2m1 || r.output >= kNvRow;
  return coded && !r.order && r.turns == 1 && r.columns % kRun == 0 &&
         r.width % kRun == 0 && r.width <= kHeld && p.whole_x && p.whole_out &&
         (!r.modulate_scale || p.whole_modulate) && (!r.pre_scale || p.whole_pre);
}

// Whole warps, a run a thread. The blocks of a rotation are within a tile: a row is whole blocks.
template <Before kBefore>
int start(RowPlan& p, Stream stream) {
  const int64_t warps = (p.r.width + 32 * kRun - 1) / (32 * kRun);
  if (can_hold(p)) return start_held<kBefore>(p, (int)warps * 32, stream);
  const bool one = warps * 32 <= kStreamedThreads;
  return start_streamed<kBefore>(p, one ? (int)warps * 32 : kStreamedThreads, stream);
}

}  // namespace

int launch_rows(const Rows& rows, Stream stream) {
  RowPlan p = {};
  p.r = rows;
  Rows& r = p.r;
  if (r.width == 0) r.width = r.columns;
  if (r.block < 1 || (r.block & (r.block - 1)) || r.columns % r.block) return kBadBlock;
  if (r.block > kLongestBlock) return kLongBlock;
  if (r.output == kInt8 && (r.levels < 1 || r.levels > 127)) return kBadLevels;
  if (r.output == kRounded) {
    if (r.columns % kRoundingFormats[r.rounding].group || r.width != r.columns || r.fixed) return kBadGroup;
  } else if (r.output >= kNvRow) {
    const int64_t block = r.output == kNvRow ? 16 : 32;
    if (r.columns % block || r.width != r.columns || r.fixed) return kBadFp4;
    if ((uintptr_t)r.out % 8 || r.out_stride % 8) return kBadFp4;
  }
  if (r.width < r.columns || r.rows >> 31 || (r.turns != 1 && r.turns != 2)) return kUnsupported;
  if (r.rows == 0 || r.width == 0) return kOk;
  p.unit = (float)__builtin_pow((double)r.block, -0.5);
  p.whole_x = reads_whole(r.x, r.stride, bytes_of(r.type));
  p.whole_modulate = reads_whole(r.modulate_scale, r.modulate_stride, bytes_of(r.modulate_type)) &&
                     reads_whole(r.modulate_shift, 0, 1);
  p.whole_pre = reads_whole(r.pre_scale, 0, 1);
  int size = r.output == kFloat ? 4 : r.output == kRounded ? bytes_of(r.out_type) : 1;
  if (r.output == kNvRow || r.output == kMxRow) size = 16;  // FP4 rows are aligned
  p.whole_out = reads_whole(r.out, r.out_stride, size);
  switch (r.before) {
    case kAsIs: return start<kAsIs>(p, stream);
    case kGelu: return start<kGelu>(p, stream);
    case kNorm: return start<kNorm>(p, stream);
  }
  return kUnsupported;
}

}  // namespace dtq
