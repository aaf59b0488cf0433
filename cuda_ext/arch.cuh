// SPDX-License-Identifier: Apache-2.0
// The instructions that the kernels use, one function each: PTX under nvcc, the emulator of sim/
// elsewhere (-DDTQ_SIM). No other file holds PTX, so the same kernels run on a GPU and on a CPU.
//
// Rules for a kernel: shared memory only through lds, sts and the copies below; every lane of a
// warp executes shfl, ldmatrix and mma; one struct of parameters, `const DTQ_CONSTANT P p`, so that
// `launch` can start it on both.
#pragma once
#include <stdint.h>
#include <string.h>

#include "types.h"

#if defined(DTQ_SIM)
#include "sim/hopper.h"
#include "sim/session.h"

#define DTQ_KERNEL inline
#define DTQ_CONSTANT
#define DTQ_DEV inline
#define DTQ_HD inline
#define DTQ_UNROLL
#define DTQ_ROLLED
#define DTQ_BOUNDS(threads, blocks)
#define DTQ_SHARED(name) unsigned char* name = ::dtq::sim::block().shared
#define DTQ_HAS_WGMMA 1
#define DTQ_HAS_FP4 1

#else
#include <cuda.h>
#include <cuda_runtime.h>

#include <atomic>
#include <mutex>

#define DTQ_KERNEL __global__
#define DTQ_CONSTANT __grid_constant__
#define DTQ_DEV __device__ __forceinline__
#define DTQ_HD __host__ __device__ __forceinline__
#define DTQ_UNROLL _Pragma("unroll")
#define DTQ_ROLLED _Pragma("unroll 1")
#define DTQ_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
// aligned to 1024: the swizzle of bulk copies depends on the address
#define DTQ_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define DTQ_HAS_WGMMA 1  // sm_90a only; compiled for others, a Hopper kernel traps
#endif
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH_FAMILY_SPECIFIC__ == 1200 || \
    defined(__CUDA_ARCH_FEAT_SM120_ALL) || defined(__CUDA_ARCH_FEAT_SM121_ALL)
#define DTQ_HAS_FP4 1  // sm_120f, sm_120a, sm_121a
#endif

namespace dtq {

struct alignas(8) U2 {
  uint32_t x, y;
};
struct alignas(16) U4 {
  uint32_t x, y, z, w;
};
using TensorMap = CUtensorMap;

DTQ_DEV int tid() { return int(threadIdx.x); }
DTQ_DEV int lane() { return int(threadIdx.x & 31); }
DTQ_DEV int warp() { return int(threadIdx.x >> 5); }
DTQ_DEV int block_threads() { return int(blockDim.x); }
DTQ_DEV int block_x() { return int(blockIdx.x); }
DTQ_DEV int block_y() { return int(blockIdx.y); }
DTQ_DEV int block_z() { return int(blockIdx.z); }
DTQ_DEV int grid_x() { return int(gridDim.x); }
DTQ_DEV int grid_y() { return int(gridDim.y); }

// ---------------------------------------------------------------------------- memory

DTQ_DEV uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// Global memory that is not written while the kernel runs.
template <class T>
DTQ_DEV T ldg(const T* p) {
  T value;
  if constexpr (sizeof(T) == 16) {
    const uint4 v = __ldg(reinterpret_cast<const uint4*>(p));
    memcpy(&value, &v, 16);
  } else if constexpr (sizeof(T) == 8) {
    const uint2 v = __ldg(reinterpret_cast<const uint2*>(p));
    memcpy(&value, &v, 8);
  } else if constexpr (sizeof(T) == 4) {
    const unsigned v = __ldg(reinterpret_cast<const unsigned*>(p));
    memcpy(&value, &v, 4);
  } else if constexpr (sizeof(T) == 2) {
    const unsigned short v = __ldg(reinterpret_cast<const unsigned short*>(p));
    memcpy(&value, &v, 2);
  } else {
    static_assert(sizeof(T) == 1, "ldg loads 1, 2, 4, 8 or 16 bytes");
    const unsigned char v = __ldg(reinterpret_cast<const unsigned char*>(p));
    memcpy(&value, &v, 1);
  }
  return value;
}

// Global memory that the kernel before this one on the stream may have written after this one started, see
// wait_for_previous_kernel: neither the compiler nor a cache may take it from before.
DTQ_DEV float ld_global(const float* p) {
  float value;
  asm volatile("ld.global.f32 %0, [%1];" : "=f"(value) : "l"(p) : "memory");
  return value;
}

template <class T>
DTQ_DEV void stg(T* p, T value) {
  *p = value;
}

// 4 or 16 bytes if the condition holds, without a branch: compilers move what computes a value that is
// stored under a condition into that branch, too, where it cannot overlap with anything.
DTQ_DEV void stg_if(bool condition, uint32_t* p, uint32_t v) {
  asm volatile(
      "{\n.reg .pred p;\n"
      "setp.ne.s32 p, %0, 0;\n"
      "@p st.global.b32 [%1], %2;\n}" ::"r"(int(condition)),
      "l"(p), "r"(v)
      : "memory");
}
DTQ_DEV void stg_if(bool condition, U4* p, const U4& v) {
  asm volatile(
      "{\n.reg .pred p;\n"
      "setp.ne.s32 p, %0, 0;\n"
      "@p st.global.v4.b32 [%1], {%2, %3, %4, %5};\n}" ::"r"(int(condition)),
      "l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
      : "memory");
}
// 16 bytes, or zeros; of memory as for ld_global.
DTQ_DEV U4 ld_global_if(bool condition, const U4* p) {
  U4 v;
  asm volatile(
      "{\n.reg .pred p;\n"
      "setp.ne.s32 p, %4, 0;\n"
      "mov.b32 %0, 0;\nmov.b32 %1, 0;\nmov.b32 %2, 0;\nmov.b32 %3, 0;\n"
      "@p ld.global.v4.b32 {%0, %1, %2, %3}, [%5];\n}"
      : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
      : "r"(int(condition)), "l"(p)
      : "memory");
  return v;
}

template <class T>
DTQ_DEV T lds(const void* p) {
  return *reinterpret_cast<const T*>(p);
}

template <class T>
DTQ_DEV void sts(void* p, T value) {
  *reinterpret_cast<T*>(p) = value;
}

// 16 bytes to shared memory, of which `valid` are read and the rest are zeros. Bypasses L1: a tile
// is read once per block.
DTQ_DEV void cp_async16(void* to, const void* from, int valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
               "l"(from), "r"(valid)
               : "memory");
}

// The same with 4 bytes: all are read, or none and they are zeros.
DTQ_DEV void cp_async4(void* to, const void* from, bool read) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)),
               "l"(from), "r"(read ? 4 : 0)
               : "memory");
}

DTQ_DEV void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until all but the latest `rest` groups of this thread are complete.
template <int rest>
DTQ_DEV void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(rest) : "memory");
}

// ---------------------------------------------------------------------------- synchronization

DTQ_DEV void trap() { asm volatile("trap;"); }
DTQ_DEV void sync_threads() { __syncthreads(); }
// `threads` threads, whole warps, at barrier 1 to 15
DTQ_DEV void sync_named(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
DTQ_DEV void sync_warp() { __syncwarp(); }

// 4-byte values of all 32 lanes.
template <class T>
DTQ_DEV T shfl_xor(T value, int mask) {
  static_assert(sizeof(T) == 4, "shfl_xor moves 4 bytes");
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
template <class T>
DTQ_DEV T shfl(T value, int from) {
  static_assert(sizeof(T) == 4, "shfl moves 4 bytes");
  return __shfl_sync(0xffffffffu, value, from);
}
DTQ_DEV uint32_t max_of_warp(uint32_t value) { return __reduce_max_sync(0xffffffffu, value); }

// Programmatic dependent launch: a kernel that is launched with Shape::dependent may start while the kernel
// before it on the stream still runs. After this wait that one has ended, and what it wrote is visible. The
// kernel must not access global memory before.
DTQ_DEV void wait_for_previous_kernel() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Such a kernel may start once every block of this one is here or has ended.
DTQ_DEV void let_next_kernel_start() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---------------------------------------------------------------------------- fragments

// Four 8 x 8 matrices of 16-bit values; lane 8 q + r has the address of row r of matrix q.
DTQ_DEV void ldmatrix_x4(uint32_t (&r)[4], const void* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(p))
               : "memory");
}
DTQ_DEV void ldmatrix_x4_trans(uint32_t (&r)[4], const void* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(p))
               : "memory");
}

// Writes four 8 x 8 matrices, each of a register of every lane as above, transposed: lane 8 q + r has the
// address of the row of shared memory that gets column r of matrix q.
DTQ_DEV void stmatrix_x4_trans(void* p, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                   shared_address(p)),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

// D (16 x 8) += A (16 x 32) B (32 x 8). With g = lane / 4 and t = lane % 4, four bytes a register:
// a[0] row g, k 4t..; a[1] row g + 8; a[2], a[3] the same at k + 16; b0 column g, k 4t..; b1 at
// k + 16; c[0], c[1] row g, columns 2t, 2t + 1; c[2], c[3] row g + 8.
DTQ_DEV void mma_s8(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// An 8 x 8 matrix of 16-bit values, two neighbours of row g in each register, transposed.
DTQ_DEV uint32_t transpose_8x8(uint32_t v) {
  uint32_t r;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(v));
  return r;
}

// D (16 x 8) += A (16 x 16) B (16 x 8): as above with pairs of 16-bit values, k 2t.. and + 8.
DTQ_DEV void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
DTQ_DEV void mma_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#if defined(DTQ_HAS_FP4)
// D (16 x 8) += A (16 x 64) B (64 x 8) of E2M1 codes, eight a register: a[0] row g, k 8t..; a[1] row
// g + 8; a[2], a[3] the same at k + 32; b0 column g, k 8t..; b1 at k + 32. Every 16 columns have an
// e4m3 scale, four to a register; with mx every 32 a power of two, two in the low half. Lanes t = 0
// and 1 of a quad hold those of rows g and g + 8, lane t = 0 those of column g.
template <bool mx>
DTQ_DEV void mma_fp4(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                     uint32_t scales_a, uint32_t scales_b) {
  if constexpr (mx)
    asm volatile(
        "mma.sync.aligned.kind::mxf4.block_scale.scale_vec::2X.m16n8k64.row.col.f32.e2m1.e2m1.f32"
        ".ue8m0 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3}, {%10}, {0, 0}, "
        "{%11}, {0, 0};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(scales_a),
          "r"(scales_b));
  else
    asm volatile(
        "mma.sync.aligned.kind::mxf4nvf4.block_scale.scale_vec::4X.m16n8k64.row.col.f32.e2m1.e2m1"
        ".f32.ue4m3 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3}, {%10}, {0, 0}, "
        "{%11}, {0, 0};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(scales_a),
          "r"(scales_b));
}
#endif

// ---------------------------------------------------------------------------- arithmetic
// Each rounds once and nothing is contracted, as in the torch reference.

// Byte i of the result is byte s_i of (b, a), where s_i is nibble i of the selector; with bit 3 of
// s_i set it is that byte's sign, eight times.
DTQ_DEV uint32_t byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t result;  // not __byte_perm, which masks the sign bits
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(selector));
  return result;
}
DTQ_DEV int32_t dp4a(uint32_t a, uint32_t b, int32_t c) { return __dp4a(int(a), int(b), c); }

DTQ_DEV float fadd(float a, float b) { return __fadd_rn(a, b); }
DTQ_DEV float fsub(float a, float b) { return __fsub_rn(a, b); }
DTQ_DEV float fmul(float a, float b) { return __fmul_rn(a, b); }
DTQ_DEV float fdiv(float a, float b) { return __fdiv_rn(a, b); }
DTQ_DEV float ffma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
DTQ_DEV float fsqrt(float a) { return __fsqrt_rn(a); }
DTQ_DEV float reciprocal(float a) { return __frcp_rn(a); }
// The larger of a and |b|; NaN if one of them is.
DTQ_DEV float max_magnitude(float a, float b) {
  float m;
  asm("{ .reg .f32 size; abs.f32 size, %2; max.NaN.f32 %0, %1, size; }" : "=f"(m) : "f"(a), "f"(b));
  return m;
}
DTQ_DEV float int_to_float(int32_t a) { return __int2float_rn(a); }

// 2^a and 1 / a with a relative error below 2^-22; results and arguments below 2^-126 are zeros.
DTQ_DEV float exp2_approximate(float a) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(a));
  return result;
}
DTQ_DEV float reciprocal_approximate(float a) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(a));
  return result;
}

// To the nearest integer, ties to even; saturates, and NaN is 0.
DTQ_DEV int32_t round_to_int(float f) { return __float2int_rn(f); }

DTQ_DEV uint32_t float_bits(float f) { return __float_as_uint(f); }
DTQ_DEV float bits_float(uint32_t u) { return __uint_as_float(u); }

DTQ_DEV uint16_t float_to_bf16(float f) {
  uint16_t h;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
}
DTQ_DEV float bf16_to_float(uint16_t h) { return bits_float(uint32_t(h) << 16); }
DTQ_DEV uint16_t float_to_f16(float f) {
  uint16_t h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
}
// Two of them, the first in the low half.
DTQ_DEV uint32_t floats_to_bf16x2(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
DTQ_DEV uint32_t floats_to_f16x2(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
// a * b + c of pairs of bfloat16, rounded once.
DTQ_DEV uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
DTQ_DEV float f16_to_float(uint16_t h) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
  return f;
}

// ---------------------------------------------------------------------------- sm_90

#if defined(DTQ_HAS_WGMMA)
DTQ_DEV int cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return int(rank);
}

DTQ_DEV void mbarrier_init(uint64_t* bar, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(count)
               : "memory");
}

// After the inits, before asynchronous copies use them; a barrier for the other threads must follow.
DTQ_DEV void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

DTQ_DEV void mbarrier_arrive(uint64_t* bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(bar)) : "memory");
}

DTQ_DEV void mbarrier_arrive_expect(uint64_t* bar, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                   shared_address(bar)),
               "r"(bytes)
               : "memory");
}

// The mbarrier at the same address in another block of the cluster.
DTQ_DEV void mbarrier_arrive_at(uint64_t* bar, int rank) {
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(shared_address(bar)),
      "r"(rank)
      : "memory");
}

// Waits until the phase of this parity is complete.
DTQ_DEV void mbarrier_wait(uint64_t* bar, int parity) {
  uint32_t done;
  do {
    asm volatile(
        "{\n.reg .pred done;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
        "selp.u32 %0, 1, 0, done;\n}"
        : "=r"(done)
        : "r"(shared_address(bar)), "r"(parity)
        : "memory");
  } while (!done);
}

DTQ_DEV void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// A warpgroup releases registers, another one acquires them.
template <int registers>
DTQ_DEV void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}
template <int registers>
DTQ_DEV void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}

DTQ_DEV void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Copies the box at (column byte, row) into shared memory of the blocks in `mask` (0: only this
// one), swizzled; the mbarrier of each of those blocks counts its bytes. Elements outside the tensor
// become zeros.
DTQ_DEV void load_box(void* to, const TensorMap& map, uint64_t* bar, int column, int row,
                      unsigned mask = 0) {
  if (mask)
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(to)),
        "l"(&map), "r"(shared_address(bar)), "r"(column), "r"(row), "h"(uint16_t(mask))
        : "memory");
  else
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%3, %4}], [%2];" ::"r"(shared_address(to)),
        "l"(&map), "r"(shared_address(bar)), "r"(column), "r"(row)
        : "memory");
}

// Copies a box of shared memory, swizzled, to (column byte, row) of the tensor; what is outside it is not
// written. Part of this thread's next group of bulk stores. What other threads wrote to the box must be followed
// by their fence_proxy_async and a barrier.
DTQ_DEV void store_box(const TensorMap& map, const void* from, int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map),
      "r"(shared_address(from)), "r"(column), "r"(row)
      : "memory");
}
DTQ_DEV void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until all but the latest `rest` groups of this thread have read their shared memory, which may then be
// written, and must not end before.
template <int rest>
DTQ_DEV void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(rest) : "memory");
}

// The wgmma descriptor of rows of 128 bytes in the 128-byte swizzle, 1024 bytes per 8 rows.
DTQ_DEV uint64_t swizzled_rows(const void* p) {
  return uint64_t(1) << 62 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 16 |
         (shared_address(p) & 0x3FFFF) >> 4;
}

DTQ_DEV void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DTQ_DEV void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int rest>
DTQ_DEV void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(rest) : "memory");
}

#include "wgmma.inc"
#endif

// ---------------------------------------------------------------------------- host

// The driver's encoder of tensor maps. It is looked up, so that libcuda is not linked, and only once.
inline cudaError_t find_encoder(void** encode) {
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", encode, 12000,
                                                             cudaEnableDefault, &result);
#else
  const cudaError_t error =
      cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", encode, cudaEnableDefault, &result);
#endif
  if (error == cudaSuccess && result != cudaDriverEntryPointSuccess) *encode = nullptr;
  return error;
}

// A tensor map of contiguous rows of `row_bytes` bytes, in boxes of box_rows x 64 or 128 bytes; the
// swizzle is as wide as the box.
inline int encode_rows(TensorMap* map, const void* base, int64_t rows, int64_t row_bytes,
                       int box_rows, int box_bytes) {
  if (reinterpret_cast<uintptr_t>(base) % 16 || row_bytes % 16) return kUnsupported;
  static std::atomic<void*> known{nullptr};
  void* encode = known.load(std::memory_order_relaxed);
  if (!encode) {
    const cudaError_t error = find_encoder(&encode);
    if (error != cudaSuccess) return error;
    if (!encode) return kUnsupported;
    known.store(encode, std::memory_order_relaxed);
  }
  const cuuint64_t size[2] = {cuuint64_t(row_bytes), cuuint64_t(rows)};
  const cuuint64_t pitch[1] = {cuuint64_t(row_bytes)};
  const cuuint32_t box[2] = {cuuint32_t(box_bytes), cuuint32_t(box_rows)}, step[2] = {1, 1};
  const CUresult done = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(encode)(
      map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<void*>(base), size, pitch, box, step,
      CU_TENSOR_MAP_INTERLEAVE_NONE,
      box_bytes == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return done == CUDA_SUCCESS ? kOk : kUnsupported;
}

// Allows a kernel this much shared memory on the current device, if it was not allowed as much before. May
// be called while a graph is captured.
inline cudaError_t allow_shared(const void* kernel, size_t bytes) {
  struct Allowed {
    const void* kernel;
    int device;
    std::atomic<size_t> bytes;
  };
  static Allowed known[256];  // filled from the front; when it is full, others are allowed at every call
  static std::atomic<int> count{0};
  static std::mutex changing;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  auto find = [&]() -> Allowed* {
    for (int i = 0; i < count.load(std::memory_order_acquire); i++)
      if (known[i].kernel == kernel && known[i].device == device) return &known[i];
    return nullptr;
  };
  Allowed* entry = find();
  if (entry && entry->bytes.load(std::memory_order_acquire) >= bytes) return cudaSuccess;
  const std::lock_guard<std::mutex> lock(changing);
  entry = find();
  if (entry && entry->bytes.load(std::memory_order_relaxed) >= bytes) return cudaSuccess;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
  if (error != cudaSuccess) return error;
  const int end = count.load(std::memory_order_relaxed);
  if (!entry && end < int(sizeof known / sizeof *known)) {
    entry = &known[end];
    entry->kernel = kernel;
    entry->device = device;
    count.store(end + 1, std::memory_order_release);
  }
  if (entry) entry->bytes.store(bytes, std::memory_order_release);
  return cudaSuccess;
}

struct Grid {
  unsigned x = 1, y = 1, z = 1;
};

struct Shape {
  Grid grid;
  unsigned threads = 32;
  size_t shared = 0;     // bytes
  unsigned cluster = 1;  // blocks along x
  bool dependent = false;  // may start before the kernel before it has ended: wait_for_previous_kernel
};

// Starts the kernel on the stream. Returns a cudaError_t.
template <class P>
int launch(void (*kernel)(P), const Shape& s, Stream stream, const P& p) {
  if (s.shared > 48 * 1024) {
    const cudaError_t error = allow_shared((const void*)kernel, s.shared);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = {s.grid.x, s.grid.y, s.grid.z};
  config.blockDim = {s.threads, 1, 1};
  config.dynamicSmemBytes = s.shared;
  config.stream = cudaStream_t(stream);
  cudaLaunchAttribute attributes[2] = {};
  config.attrs = attributes;
  if (s.cluster > 1) {
    cudaLaunchAttribute& a = attributes[config.numAttrs++];
    a.id = cudaLaunchAttributeClusterDimension;
    a.val.clusterDim = {s.cluster, 1, 1};
  }
  if (s.dependent) {
    cudaLaunchAttribute& a = attributes[config.numAttrs++];
    a.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    a.val.programmaticStreamSerializationAllowed = 1;
  }
  P copy = p;
  void* arguments[] = {&copy};
  return cudaLaunchKernelExC(&config, (const void*)kernel, arguments);
}

}  // namespace dtq
#endif
