// SPDX-License-Identifier: Apache-2.0
// launch_rows: chooses and launches a row kernel.
#include <algorithm>

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
int64_t shared_floats(const Rows& r, int threads) {
  return kWarpWords + (r.hadamard_block > 32 * kVec ? threads * kVec : 0);
}

Shape shape_of(const Rows& r, int threads, int64_t floats) {
  Shape shape;
  shape.grid.x = (unsigned)r.rows;
  shape.threads = (unsigned)threads;
  shape.shared = (size_t)floats * 4;
  return shape;
}

// Whole warps.
template <class K>
int launch_kind(const RowPlan& p, Stream stream) {
  const int threads = int(ceil_div(p.r.width, 32 * K::kColumns)) * 32;
  return launch(rows_register_kernel<K>, shape_of(p.r, threads, shared_floats(p.r, threads)), stream, p);
}

template <Prologue kPrologue, Float kType>
int launch_typed(const RowPlan& p, Stream stream) {
  const Rows& r = p.r;
  if constexpr (kPrologue == kNorm) {
    if (!r.modulate_scale) return launch_kind<RowKind<kNorm, kPlain, kType, kInt8>>(p, stream);
    if (r.modulate_type == kType)
      return launch_kind<RowKind<kNorm, kSameType, kType, kInt8>>(p, stream);
    return launch_kind<RowKind<kNorm, kFloatVectors, kType, kInt8>>(p, stream);
  } else if constexpr (kPrologue == kGelu) {
    return launch_kind<RowKind<kGelu, kPlain, kType, kInt8>>(p, stream);
  } else {
    switch (r.output) {
      case kInt8: return launch_kind<RowKind<kNoPrologue, kPlain, kType, kInt8>>(p, stream);
      case kFloat: return launch_kind<RowKind<kNoPrologue, kPlain, kType, kFloat>>(p, stream);
      case kE2m1: return launch_kind<RowKind<kNoPrologue, kPlain, kType, kE2m1>>(p, stream);
      case kNvRow: return launch_kind<RowKind<kNoPrologue, kPlain, kType, kNvRow>>(p, stream);
      case kMxRow: return launch_kind<RowKind<kNoPrologue, kPlain, kType, kMxRow>>(p, stream);
      case kFakeQuantized:
        return launch_kind<RowKind<kNoPrologue, kPlain, kType, kFakeQuantized>>(p, stream);
      case kE4m3: break;
    }
    return kUnsupported;
  }
}

template <Prologue kPrologue>
int launch_register(const RowPlan& p, Stream stream) {
  switch (p.r.type) {
    case kFloat32: return launch_typed<kPrologue, kFloat32>(p, stream);
    case kBFloat16: return launch_typed<kPrologue, kBFloat16>(p, stream);
    case kFloat16: return launch_typed<kPrologue, kFloat16>(p, stream);
  }
  return kUnsupported;
}

template <Prologue kPrologue>
int launch_tiled(RowPlan& p, int threads, Stream stream) {
  const Rows& r = p.r;
  p.tiles = (r.width + threads * kVec - 1) / (threads * kVec);
  int64_t floats = shared_floats(r, threads);
  if (kPrologue == kNorm) floats += p.tiles * (threads / 32);  // sums of warps
  p.transposed_offset = -1;
  if (r.num_rotations == 2) {
    if ((floats + r.columns) * 4 <= kSharedBytes) {
      p.transposed_offset = (int)floats;
      floats += r.columns;
    } else if ((r.output != kFloat && r.output != kFakeQuantized) || r.out_type != kFloat32) {
      return kLongRow;
    }
  }
  if (floats * 4 > kSharedBytes) return kLongRow;
  return launch(rows_tiled_kernel<kPrologue>, shape_of(r, threads, floats), stream, p);
}

// Whether all arrays can be read 16 bytes at a time, the row is not too long, and there is a kernel for the
// types and the output.
bool fits_registers(const RowPlan& p) {
  const Rows& r = p.r;
  const bool output = r.prologue == kNoPrologue ? r.output != kE4m3 : r.output == kInt8;
  const bool vectors = !r.modulate_scale || r.modulate_type == r.type || r.modulate_type == kFloat32;
  const int64_t longest = std::max({r.stride * bytes_of(r.type), r.out_stride * 4,
                                    r.modulate_stride * bytes_of(r.modulate_type)});
  const int columns = r.output == kInt8 ? 2 * kVec : kVec;  // of a thread
  return output && vectors && longest < int64_t(1) << 32 && !r.perm && r.num_rotations == 1 &&
         r.columns % columns == 0 && r.width % columns == 0 && r.width <= kRegisterColumns && p.aligned_x &&
         p.aligned_out && (!r.modulate_scale || p.aligned_modulate) && (!r.pre_scale || p.aligned_pre);
}

// The number of the host that kernels divide by; see modulate_row.
void set_divisors(RowPlan& p) {
  const Rows& r = p.r;
  const uint64_t tokens = (uint64_t)std::clamp<int64_t>(r.rows_per_modulate, 1, INT32_MAX);
  while (uint64_t(1) << p.modulate_shift < tokens) p.modulate_shift++;
  p.modulate_multiplier = uint32_t((uint64_t(1) << (31 + p.modulate_shift)) / tokens + 1);
  p.inverse_qmax = 1.0f / (float)std::max(r.qmax, 1);
  p.inverse_columns = 1.0f / (float)r.columns;
  p.x_pitch = uint32_t(r.stride * bytes_of(r.type));
  p.modulate_pitch = uint32_t(r.modulate_stride * bytes_of(r.modulate_type));
  p.out_pitch = uint32_t(r.out_stride);
}

// A Hadamard block is always within one tile.
template <Prologue kPrologue>
int launch_kernel(RowPlan& p, Stream stream) {
  set_divisors(p);
  if (fits_registers(p)) return launch_register<kPrologue>(p, stream);
  const int64_t warps = ceil_div(p.r.width, 32 * kVec);
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
  int size = r.output == kFloat || r.output == kFakeQuantized ? bytes_of(r.out_type) : 1;
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
