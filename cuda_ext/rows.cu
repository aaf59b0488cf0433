// SPDX-License-Identifier: Apache-2.0
// launch_rows: chooses and launches a row kernel.
#include "rows_register.cuh"
#include "rows_tiled.cuh"

namespace dtq {

const char* refusal(int code) {
  switch (code) {
    case kBadBlock: return "the columns are not whole blocks of a power of two";
    case kLongBlock: return "Hadamard blocks have at most 8192 columns";
    case kLongRow: return "two rotations of a row that does not fit into shared memory";
    case kBadQmax: return "qmax must be 1 to 127";
    case kBadWeight: return "bits, groups and columns of the weight do not fit together";
    case kBadFp4: return "FP4 rows must be whole groups of columns, aligned to 8 bytes";
    case kBadGroup: return "groups must be a multiple of 16 columns, or one per row";
    default: return "no refusal";
  }
}

namespace {

constexpr int64_t kSharedBytes = 99 * 1024;  // a thread block can have it on every architecture from sm_80

int bytes_of(Float type) { return type == kFloat32 ? 4 : 2; }

// Floats of shared memory before the row between two rotations.
template <Prologue kPrologue>
int64_t shared_floats(const Rows& r, int threads) {
  int64_t floats = kWarpWords;
  if (r.hadamard_block > 32 * kVec) floats += threads * kVec;
  if (kPrologue == kNorm) floats += (r.columns + kVec - 1) / kVec;
  return floats;
}

Shape shape_of(const Rows& r, int threads, int64_t floats) {
  Shape shape;
  shape.grid.x = (unsigned)r.rows;
  shape.threads = (unsigned)threads;
  shape.shared = (size_t)floats * 4;
  return shape;
}

template <Prologue kPrologue>
int launch_register(RowPlan& p, int threads, Stream stream) {
  p.tiles = 1;
  const Shape shape = shape_of(p.r, threads, shared_floats<kPrologue>(p.r, threads));
  return launch(rows_register_kernel<kPrologue>, shape, stream, p);
}

template <Prologue kPrologue>
int launch_tiled(RowPlan& p, int threads, Stream stream) {
  const Rows& r = p.r;
  p.tiles = (r.width + threads * kVec - 1) / (threads * kVec);
  int64_t floats = shared_floats<kPrologue>(r, threads);
  p.transposed_offset = -1;
  if (r.num_rotations == 2) {
    if ((floats + r.columns) * 4 <= kSharedBytes) {
      p.transposed_offset = (int)floats;
      floats += r.columns;
    } else if (r.output != kFloat && (r.output != kFakeQuantized || r.out_type != kFloat32)) {
      return kLongRow;
    }
  }
  if (floats * 4 > kSharedBytes) return kLongRow;
  return launch(rows_tiled_kernel<kPrologue>, shape_of(r, threads, floats), stream, p);
}

// Whether all arrays can be read 16 bytes at a time and the row is not too long.
bool fits_registers(const RowPlan& p) {
  const Rows& r = p.r;
  const bool quantized = r.output == kInt8 || r.output == kE2m1 || r.output >= kNvRow;
  return quantized && !r.perm && r.num_rotations == 1 && r.columns % kVec == 0 &&
         r.width % kVec == 0 && r.width <= kRegisterColumns && p.aligned_x && p.aligned_out &&
         (!r.modulate_scale || p.aligned_modulate) && (!r.pre_scale || p.aligned_pre);
}

// Whole warps, one vector per thread. A Hadamard block is always within one tile.
template <Prologue kPrologue>
int launch_kernel(RowPlan& p, Stream stream) {
  const int64_t warps = (p.r.width + 32 * kVec - 1) / (32 * kVec);
  if (fits_registers(p)) return launch_register<kPrologue>(p, (int)warps * 32, stream);
  const bool one_tile = warps * 32 <= kTiledThreads;
  return launch_tiled<kPrologue>(p, one_tile ? (int)warps * 32 : kTiledThreads, stream);
}

}  // namespace

int launch_rows(const Rows& rows, Stream stream) {
  RowPlan p = {};
  p.r = rows;
  Rows& r = p.r;
  if (r.width == 0) r.width = r.columns;
  const int64_t hadamard_block = r.hadamard_block;
  if (hadamard_block < 1 || (hadamard_block & (hadamard_block - 1)) || r.columns % hadamard_block)
    return kBadBlock;
  if (hadamard_block > kLongestBlock) return kLongBlock;
  if (r.output == kInt8 && (r.qmax < 1 || r.qmax > 127)) return kBadQmax;
  if (r.output == kFakeQuantized) {
    if (r.columns % kRoundingFormats[r.rounding].group || r.width != r.columns || r.static_scale)
      return kBadGroup;
  } else if (r.output >= kNvRow) {
    const int64_t group = r.output == kNvRow ? 16 : 32;
    if (r.columns % group || r.width != r.columns || r.static_scale) return kBadFp4;
    if ((uintptr_t)r.out % 8 || r.out_stride % 8) return kBadFp4;
  }
  if (r.width < r.columns || r.rows >> 31 || (r.num_rotations != 1 && r.num_rotations != 2))
    return kUnsupported;
  if (r.rows == 0 || r.width == 0) return kOk;
  p.hadamard_scale = (float)__builtin_pow((double)hadamard_block, -0.5);
  p.aligned_x = vector_aligned(r.x, r.stride, bytes_of(r.type));
  p.aligned_modulate =
      vector_aligned(r.modulate_scale, r.modulate_stride, bytes_of(r.modulate_type)) &&
      vector_aligned(r.modulate_shift, 0, 1);
  p.aligned_pre = vector_aligned(r.pre_scale, 0, 1);
  int size = r.output == kFloat ? 4 : r.output == kFakeQuantized ? bytes_of(r.out_type) : 1;
  if (r.output == kNvRow || r.output == kMxRow) size = 16;  // FP4 rows are aligned
  p.aligned_out = vector_aligned(r.out, r.out_stride, size);
  switch (r.prologue) {
    case kNoPrologue: return launch_kernel<kNoPrologue>(p, stream);
    case kGelu: return launch_kernel<kGelu>(p, stream);
    case kNorm: return launch_kernel<kNorm>(p, stream);
  }
  return kUnsupported;
}

}  // namespace dtq
