// SPDX-License-Identifier: Apache-2.0
// Row vectors: kVec columns of a row, which one thread reads, holds in registers and writes.
#pragma once
#include "floats.cuh"

namespace dtq {

constexpr int kVec = 16;  // int8: 16 bytes, one store

// Whether the vectors of rows `stride` elements apart start at multiples of 16 bytes.
inline bool vector_aligned(const void* p, int64_t stride, int size) {
  return (uintptr_t)p % 16 == 0 && stride * size % 16 == 0;
}

// ---------------------------------------------------------------------------- reading

// Columns [k, k + kVec) of an array that is 16-byte aligned.
DTQ_DEV void read_aligned_vector(const void* from, Float type, int64_t k, float (&v)[kVec]) {
  if (type == kFloat32) {
    DTQ_UNROLL for (int i = 0; i < 4; i++) {
      const U4 q = ldg((const U4*)((const float*)from + k + i * 4));
      v[i * 4] = bits_float(q.x);
      v[i * 4 + 1] = bits_float(q.y);
      v[i * 4 + 2] = bits_float(q.z);
      v[i * 4 + 3] = bits_float(q.w);
    }
  } else {
    U4 q[2];
    DTQ_UNROLL for (int i = 0; i < 2; i++) q[i] = ldg((const U4*)((const uint16_t*)from + k + i * 8));
    const uint32_t pair[8] = {q[0].x, q[0].y, q[0].z, q[0].w, q[1].x, q[1].y, q[1].z, q[1].w};
    DTQ_UNROLL for (int i = 0; i < kVec; i++)
      v[i] = to_float((uint16_t)(pair[i / 2] >> i % 2 * 16), type);
  }
}

// The same if it may not be aligned; columns past the end are 0.
DTQ_DEV void read_vector(const void* from, Float type, int64_t k, int64_t columns, bool aligned,
                         float (&v)[kVec]) {
  if (aligned && k + kVec <= columns) {
    read_aligned_vector(from, type, k, v);
  } else {
    DTQ_UNROLL for (int i = 0; i < kVec; i++) v[i] = k + i < columns ? load_float(from, k + i, type) : 0;
  }
}

// The same for 16-bit floats, two in a word.
DTQ_DEV void read_pairs(const uint16_t* from, int64_t k, int64_t columns, bool aligned,
                        uint32_t (&v)[kVec / 2]) {
  if (aligned && k + kVec <= columns) {
    DTQ_UNROLL for (int i = 0; i < 2; i++) {
      const U4 q = ldg((const U4*)(from + k + i * 8));
      v[i * 4] = q.x, v[i * 4 + 1] = q.y, v[i * 4 + 2] = q.z, v[i * 4 + 3] = q.w;
    }
  } else {
    DTQ_UNROLL for (int i = 0; i < kVec / 2; i++) v[i] = 0;
    DTQ_UNROLL for (int i = 0; i < kVec; i++)
      if (k + i < columns) v[i / 2] |= (uint32_t)ldg(from + k + i) << i % 2 * 16;
  }
}

// As read_vector, with columns perm[k] instead of k.
DTQ_DEV void gather_vector(const void* from, Float type, const int32_t* perm, int64_t k,
                           int64_t columns, float (&v)[kVec]) {
  DTQ_UNROLL for (int i = 0; i < kVec; i++)
    v[i] = k + i < columns ? load_float(from, ldg(perm + k + i), type) : 0;
}

// Sets columns past the end of the row to 0.
DTQ_DEV void zero_beyond(float (&v)[kVec], int64_t k, int64_t columns) {
  if (k + kVec <= columns) return;
  const int left = k < columns ? (int)(columns - k) : 0;
  DTQ_UNROLL for (int i = 0; i < kVec; i++)
    if (i >= left) v[i] = 0;
}

DTQ_DEV const void* row_of(const void* from, Float type, int64_t row, int64_t stride) {
  return (const unsigned char*)from + row * stride * (type == kFloat32 ? 4 : 2);
}

// ---------------------------------------------------------------------------- writing

DTQ_DEV void write_bytes(unsigned char* row, int64_t k, int64_t width, bool aligned,
                         const uint32_t (&words)[4]) {
  if (aligned && k + kVec <= width) {
    stg((U4*)(row + k), U4{words[0], words[1], words[2], words[3]});
  } else {
    DTQ_UNROLL for (int i = 0; i < kVec; i++)
      if (k + i < width) stg(row + k + i, (unsigned char)(words[i / 4] >> i % 4 * 8));
  }
}

DTQ_DEV void write_floats(float* row, int64_t k, int64_t width, bool aligned,
                          const float (&v)[kVec]) {
  if (aligned && k + kVec <= width) {
    DTQ_UNROLL for (int i = 0; i < 4; i++)
      stg((U4*)(row + k + i * 4), U4{float_bits(v[i * 4]), float_bits(v[i * 4 + 1]),
                                     float_bits(v[i * 4 + 2]), float_bits(v[i * 4 + 3])});
  } else {
    DTQ_UNROLL for (int i = 0; i < kVec; i++)
      if (k + i < width) stg(row + k + i, v[i]);
  }
}

DTQ_DEV void write_halves(uint16_t* row, int64_t k, int64_t width, bool aligned, Float type,
                          const float (&v)[kVec]) {
  if (aligned && k + kVec <= width) {
    DTQ_UNROLL for (int i = 0; i < 2; i++)
      stg((U4*)(row + k + i * 8),
          U4{pair_of(v[i * 8], v[i * 8 + 1], type), pair_of(v[i * 8 + 2], v[i * 8 + 3], type),
             pair_of(v[i * 8 + 4], v[i * 8 + 5], type), pair_of(v[i * 8 + 6], v[i * 8 + 7], type)});
  } else {
    DTQ_UNROLL for (int i = 0; i < kVec; i++)
      if (k + i < width) stg(row + k + i, to_16(v[i], type));
  }
}

}  // namespace dtq
