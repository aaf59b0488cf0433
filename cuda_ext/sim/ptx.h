// SPDX-License-Identifier: Apache-2.0
// PTX opcodes as functions of the emulator, for the output of translate.py: `add.s64 a, b, c` is
// `add_s64(a, b, c)`. Registers are unsigned integers that hold bits. A generic or global address is a
// pointer; a shared one is an offset; one of a cluster has the rank of the block above the offset. Only
// opcodes that a test has needed are here: others are errors when the output is compiled.
#pragma once
#include <set>

#include "hopper.h"
#include "session.h"

namespace dtq::ptx {

inline unsigned char* at(uint32_t offset) { return sim::block().shared + offset; }
template <class T = unsigned char>
inline T* pointer(uint64_t address) {
  return reinterpret_cast<T*>(uintptr_t(address));
}
inline float number(uint32_t bits) { return bits_float(bits); }

inline uint64_t sink;  // the register `_`

inline uint64_t address(const void* p) { return uint64_t(uintptr_t(p)); }

template <class T, size_t n>
inline void fill(T (&registers)[n]) {
  std::memset(registers, std::is_same_v<T, bool> ? 1 : 0xA5, sizeof registers);
}
constexpr unsigned kRank = 24;  // bits of an address of a cluster below the rank

// ---------------------------------------------------------------------------- integers, predicates

#define DTQ_PTX1(name, T, A, expression) \
  inline void name(T& d, A a) { d = T(expression); }
#define DTQ_PTX2(name, T, A, expression) \
  inline void name(T& d, A a, A b) { d = T(expression); }
#define DTQ_PTX_ALL(op, expression)      \
  DTQ_PTX2(op##_s16, uint16_t, uint16_t, expression) \
  DTQ_PTX2(op##_u16, uint16_t, uint16_t, expression) \
  DTQ_PTX2(op##_s32, uint32_t, uint32_t, expression) \
  DTQ_PTX2(op##_u32, uint32_t, uint32_t, expression) \
  DTQ_PTX2(op##_s64, uint64_t, uint64_t, expression) \
  DTQ_PTX2(op##_u64, uint64_t, uint64_t, expression)
#define DTQ_PTX_BITS(op, expression)                 \
  DTQ_PTX2(op##_pred, bool, bool, expression)        \
  DTQ_PTX2(op##_b16, uint16_t, uint16_t, expression) \
  DTQ_PTX2(op##_b32, uint32_t, uint32_t, expression) \
  DTQ_PTX2(op##_b64, uint64_t, uint64_t, expression)

DTQ_PTX_ALL(add, a + b)
DTQ_PTX_ALL(sub, a - b)
DTQ_PTX_ALL(mul_lo, a * b)
DTQ_PTX_BITS(and_, a& b)
DTQ_PTX_BITS(or_, a | b)
DTQ_PTX_BITS(xor_, a ^ b)
DTQ_PTX1(not__pred, bool, bool, !a)
DTQ_PTX1(not__b32, uint32_t, uint32_t, ~a)
DTQ_PTX1(not__b64, uint64_t, uint64_t, ~a)
DTQ_PTX1(neg_s32, uint32_t, uint32_t, -a)
DTQ_PTX2(mul_wide_s32, uint64_t, uint32_t, int64_t(int32_t(a)) * int32_t(b))
DTQ_PTX2(mul_wide_u32, uint64_t, uint32_t, uint64_t(a) * b)
DTQ_PTX2(mul_wide_u16, uint32_t, uint16_t, uint32_t(a) * b)
inline void mad_lo_s32(uint32_t& d, uint32_t a, uint32_t b, uint32_t c) { d = a * b + c; }

// a shift by the width or more gives 0, or the sign
inline void shl_b32(uint32_t& d, uint32_t a, uint32_t n) { d = n < 32 ? a << n : 0; }
inline void shl_b64(uint64_t& d, uint64_t a, uint32_t n) { d = n < 64 ? a << n : 0; }
inline void shr_u32(uint32_t& d, uint32_t a, uint32_t n) { d = n < 32 ? a >> n : 0; }
inline void shr_s32(uint32_t& d, uint32_t a, uint32_t n) { d = uint32_t(int32_t(a) >> (n < 32 ? n : 31)); }
inline void shr_u64(uint64_t& d, uint64_t a, uint32_t n) { d = n < 64 ? a >> n : 0; }

#define DTQ_PTX_COMPARE(kind, T)                                       \
  inline void setp_eq_##kind(bool& d, T a, T b) { d = a == b; }        \
  inline void setp_ne_##kind(bool& d, T a, T b) { d = a != b; }        \
  inline void setp_lt_##kind(bool& d, T a, T b) { d = a < b; }         \
  inline void setp_le_##kind(bool& d, T a, T b) { d = a <= b; }        \
  inline void setp_gt_##kind(bool& d, T a, T b) { d = a > b; }         \
  inline void setp_ge_##kind(bool& d, T a, T b) { d = a >= b; }
DTQ_PTX_COMPARE(s16, int16_t)
DTQ_PTX_COMPARE(u16, uint16_t)
DTQ_PTX_COMPARE(b32, uint32_t)
DTQ_PTX_COMPARE(s32, int32_t)
DTQ_PTX_COMPARE(u32, uint32_t)
inline void setp_nan_f32(bool& d, uint32_t a, uint32_t b) {
  d = number(a) != number(a) || number(b) != number(b);
}

inline void selp_b32(uint32_t& d, uint32_t a, uint32_t b, bool p) { d = p ? a : b; }
inline void selp_u32(uint32_t& d, uint32_t a, uint32_t b, bool p) { d = p ? a : b; }
inline void selp_f32(uint32_t& d, uint32_t a, uint32_t b, bool p) { d = p ? a : b; }

DTQ_PTX1(mov_pred, bool, int, a)
DTQ_PTX1(mov_u16, uint16_t, uint16_t, a)
DTQ_PTX1(mov_b16, uint16_t, uint16_t, a)
DTQ_PTX1(mov_u32, uint32_t, uint32_t, a)
DTQ_PTX1(mov_b32, uint32_t, uint32_t, a)
DTQ_PTX1(mov_f32, uint32_t, uint32_t, a)
DTQ_PTX1(mov_u64, uint64_t, uint64_t, a)
DTQ_PTX1(mov_b64, uint64_t, uint64_t, a)
inline void mov_b32(uint32_t& d, uint16_t low, uint16_t high) { d = low | uint32_t(high) << 16; }
inline void mov_b32(uint16_t& low, uint16_t& high, uint32_t a) { low = uint16_t(a), high = uint16_t(a >> 16); }

DTQ_PTX1(cvt_u64_u32, uint64_t, uint32_t, a)
DTQ_PTX1(cvt_s64_s32, uint64_t, uint32_t, int64_t(int32_t(a)))
DTQ_PTX1(cvt_u16_u32, uint16_t, uint32_t, a)
DTQ_PTX1(cvt_u32_u16, uint32_t, uint16_t, a)

inline void prmt_b32(uint32_t& d, uint32_t a, uint32_t b, uint32_t c) { d = byte_perm(a, b, c); }
inline void dp4a_s32_s32(uint32_t& d, uint32_t a, uint32_t b, uint32_t c) {
  d = uint32_t(dp4a(a, b, int32_t(c)));
}

// ---------------------------------------------------------------------------- floats

#define DTQ_PTX_FLOAT(name, expression) \
  inline void name(uint32_t& d, uint32_t a, uint32_t b = 0, uint32_t c = 0) { d = float_bits(expression); }
DTQ_PTX_FLOAT(add_rn_f32, fadd(number(a), number(b)))
DTQ_PTX_FLOAT(sub_rn_f32, fsub(number(a), number(b)))
DTQ_PTX_FLOAT(mul_rn_f32, fmul(number(a), number(b)))
DTQ_PTX_FLOAT(div_rn_f32, fdiv(number(a), number(b)))
DTQ_PTX_FLOAT(fma_rn_f32, ffma(number(a), number(b), number(c)))
DTQ_PTX_FLOAT(sqrt_rn_f32, fsqrt(number(a)))
DTQ_PTX_FLOAT(cvt_rn_f32_s32, int_to_float(int32_t(a)))
DTQ_PTX_FLOAT(cvt_rn_f32_u32, float(a))
DTQ_PTX_FLOAT(cvt_f32_f16, f16_to_float(uint16_t(a)))
DTQ_PTX_FLOAT(rcp_rn_f32, reciprocal(number(a)))
DTQ_PTX_FLOAT(ex2_approx_ftz_f32, exp2_approximate(number(a)))
DTQ_PTX_FLOAT(rcp_approx_ftz_f32, reciprocal_approximate(number(a)))
DTQ_PTX1(abs_f32, uint32_t, uint32_t, a & 0x7fffffff)
inline void max_NaN_f32(uint32_t& d, uint32_t a, uint32_t b) {
  const float x = number(a), y = number(b);
  d = x != x || y != y ? 0x7fffffff : x > y ? a : b;
}
inline void fma_rn_bf16x2(uint32_t& d, uint32_t a, uint32_t b, uint32_t c) { d = fma_bf16x2(a, b, c); }
inline void cvt_rni_s32_f32(uint32_t& d, uint32_t a) { d = uint32_t(round_to_int(number(a))); }
inline void cvt_rn_bf16_f32(uint16_t& d, uint32_t a) { d = float_to_bf16(number(a)); }
inline void cvt_rn_f16_f32(uint16_t& d, uint32_t a) { d = float_to_f16(number(a)); }
// the first operand goes to the high half
inline void cvt_rn_bf16x2_f32(uint32_t& d, uint32_t a, uint32_t b) {
  d = floats_to_bf16x2(number(b), number(a));
}
inline void cvt_rn_f16x2_f32(uint32_t& d, uint32_t a, uint32_t b) {
  d = floats_to_f16x2(number(b), number(a));
}

// ---------------------------------------------------------------------------- memory

inline void cvta_to_global_u64(uint64_t& d, uint64_t a) { d = a; }
inline void cvta_param_u64(uint64_t& d, uint64_t a) { d = a; }

inline void ld_param_u64(uint64_t& d, uint64_t p) { d = *pointer<uint64_t>(p); }
inline void ld_param_v2_u64(uint64_t& d, uint64_t& e, uint64_t p) {
  ld_param_u64(d, p), ld_param_u64(e, p + 8);
}

// a register may be wider than what it loads
template <class T>
inline void ld_global_nc_u8(T& d, uint64_t p) { d = ldg(pointer<uint8_t>(p)); }
template <class T>
inline void ld_global_nc_u16(T& d, uint64_t p) { d = ldg(pointer<uint16_t>(p)); }
inline void ld_global_nc_u32(uint32_t& d, uint64_t p) { d = ldg(pointer<uint32_t>(p)); }
inline void ld_global_nc_v2_u32(uint32_t& d, uint32_t& e, uint64_t p) {
  const U2 v = ldg(pointer<U2>(p));
  d = v.x, e = v.y;
}
inline void ld_global_nc_v4_u32(uint32_t& d, uint32_t& e, uint32_t& f, uint32_t& g, uint64_t p) {
  const U4 v = ldg(pointer<U4>(p));
  d = v.x, e = v.y, f = v.z, g = v.w;
}
inline void st_global_u32(uint64_t p, uint32_t a) { stg(pointer<uint32_t>(p), a); }
inline void st_global_f32(uint64_t p, uint32_t a) { stg(pointer<uint32_t>(p), a); }

inline void ld_global_f32(uint32_t& d, uint64_t p) { d = float_bits(ld_global(pointer<float>(p))); }
inline void ld_global_v4_b32(uint32_t& d, uint32_t& e, uint32_t& f, uint32_t& g, uint64_t p) {
  ld_global_nc_v4_u32(d, e, f, g, p);
}
inline void st_global_b32(uint64_t p, uint32_t a) { stg(pointer<uint32_t>(p), a); }
inline void st_global_v4_b32(uint64_t p, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  stg(pointer<U4>(p), U4{a, b, c, d});
}

template <class T>
inline void ld_shared_u8(T& d, uint32_t p) { d = lds<uint8_t>(at(p)); }
template <class T>
inline void ld_shared_u16(T& d, uint32_t p) { d = lds<uint16_t>(at(p)); }
inline void ld_shared_u32(uint32_t& d, uint32_t p) { d = lds<uint32_t>(at(p)); }
inline void ld_shared_v2_u32(uint32_t& d, uint32_t& e, uint32_t p) {
  const U2 v = lds<U2>(at(p));
  d = v.x, e = v.y;
}
inline void ld_shared_v4_u32(uint32_t& d, uint32_t& e, uint32_t& f, uint32_t& g, uint32_t p) {
  const U4 v = lds<U4>(at(p));
  d = v.x, e = v.y, f = v.z, g = v.w;
}
inline void st_shared_u8(uint32_t p, uint16_t a) { sts(at(p), uint8_t(a)); }
inline void st_shared_u16(uint32_t p, uint16_t a) { sts(at(p), a); }
inline void st_shared_u32(uint32_t p, uint32_t a) { sts(at(p), a); }
inline void st_shared_v2_u32(uint32_t p, uint32_t a, uint32_t b) { sts(at(p), U2{a, b}); }
inline void st_shared_v4_u32(uint32_t p, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  sts(at(p), U4{a, b, c, d});
}

inline void cp_async_cg_shared_global(uint32_t to, uint64_t from, unsigned size, uint32_t valid) {
  if (size != 16) sim::fail("cp.async.cg: copies 16 bytes");
  sim::copy_async(at(to), pointer(from), valid, size);
}
inline void cp_async_ca_shared_global(uint32_t to, uint64_t from, unsigned size, uint32_t valid) {
  sim::copy_async(at(to), pointer(from), valid, size);
}
inline void cp_async_commit_group() { cp_async_commit(); }
inline void cp_async_wait_group(int rest) {
  if (rest > 1) sim::fail("cp.async.wait_group: not translated");
  rest ? cp_async_wait<1>() : cp_async_wait<0>();
}

// ---------------------------------------------------------------------------- warps

inline void bar_sync(uint32_t id) {
  if (id) sim::fail("bar.sync: all threads are at barrier 0");
  sync_threads();
}
inline void bar_sync(uint32_t id, uint32_t threads) { sync_named(int(id), int(threads)); }
inline void bar_warp_sync(uint32_t) { sync_warp(); }

inline void shfl_sync_bfly_b32(uint32_t& d, bool&, uint32_t a, uint32_t mask, uint32_t, uint32_t) {
  d = shfl_xor(a, int(mask));
}
inline void shfl_sync_idx_b32(uint32_t& d, bool&, uint32_t a, uint32_t from, uint32_t, uint32_t) {
  d = shfl(a, int(from));
}

inline void redux_sync_max_u32(uint32_t& d, uint32_t a, uint32_t) { d = max_of_warp(a); }

inline void ldmatrix(uint32_t* const (&d)[4], uint32_t p, bool transposed) {
  uint32_t r[4];
  transposed ? ldmatrix_x4_trans(r, at(p)) : ldmatrix_x4(r, at(p));
  for (int i = 0; i < 4; i++) *d[i] = r[i];
}
inline void ldmatrix_sync_aligned_m8n8_x4_shared_b16(uint32_t& d, uint32_t& e, uint32_t& f, uint32_t& g,
                                                     uint32_t p) {
  ldmatrix({&d, &e, &f, &g}, p, false);
}
inline void ldmatrix_sync_aligned_m8n8_x4_trans_shared_b16(uint32_t& d, uint32_t& e, uint32_t& f, uint32_t& g,
                                                           uint32_t p) {
  ldmatrix({&d, &e, &f, &g}, p, true);
}
inline void stmatrix_sync_aligned_m8n8_x4_trans_shared_b16(uint32_t p, uint32_t a, uint32_t b, uint32_t c,
                                                           uint32_t d) {
  const uint32_t r[4] = {a, b, c, d};
  stmatrix_x4_trans(at(p), r);
}
inline void movmatrix_sync_aligned_m8n8_trans_b16(uint32_t& d, uint32_t a) { d = transpose_8x8(a); }

// d, a, b and c of an mma, in this order, and the function of the emulator.
template <class C, class Run>
inline void mma(uint32_t* const (&d)[4], const uint32_t (&a)[4], const uint32_t (&c)[4], Run run) {
  C sums[4];
  std::memcpy(sums, c, 16);
  run(sums, a);
  for (int i = 0; i < 4; i++) std::memcpy(d[i], &sums[i], 4);
}
#define DTQ_PTX_MMA(name, C, function)                                                            \
  inline void name(uint32_t& d, uint32_t& e, uint32_t& f, uint32_t& g, uint32_t a0, uint32_t a1,  \
                   uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1, uint32_t c0, uint32_t c1,  \
                   uint32_t c2, uint32_t c3) {                                                    \
    mma<C>({&d, &e, &f, &g}, {a0, a1, a2, a3}, {c0, c1, c2, c3},                                  \
           [&](auto& sums, auto& a) { function(sums, a, b0, b1); });                              \
  }
DTQ_PTX_MMA(mma_sync_aligned_m16n8k32_row_col_s32_s8_s8_s32, int32_t, mma_s8)
DTQ_PTX_MMA(mma_sync_aligned_m16n8k16_row_col_f32_bf16_bf16_f32, float, mma_bf16)
DTQ_PTX_MMA(mma_sync_aligned_m16n8k16_row_col_f32_f16_f16_f32, float, mma_f16)
#define DTQ_PTX_FP4(name, mx)                                                                     \
  inline void name(uint32_t& d, uint32_t& e, uint32_t& f, uint32_t& g, uint32_t a0, uint32_t a1,  \
                   uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1, uint32_t c0, uint32_t c1,  \
                   uint32_t c2, uint32_t c3, uint32_t scales_a, int byte_a, int thread_a,         \
                   uint32_t scales_b, int byte_b, int thread_b) {                                 \
    if (byte_a || thread_a || byte_b || thread_b) sim::fail("mma: scales start at byte and lane 0"); \
    mma<float>({&d, &e, &f, &g}, {a0, a1, a2, a3}, {c0, c1, c2, c3},                              \
               [&](auto& sums, auto& a) { mma_fp4<mx>(sums, a, b0, b1, scales_a, scales_b); });   \
  }
DTQ_PTX_FP4(
    mma_sync_aligned_kind_mxf4_block_scale_scale_vec_2X_m16n8k64_row_col_f32_e2m1_e2m1_f32_ue8m0, true)
DTQ_PTX_FP4(
    mma_sync_aligned_kind_mxf4nvf4_block_scale_scale_vec_4X_m16n8k64_row_col_f32_e2m1_e2m1_f32_ue4m3, false)

// ---------------------------------------------------------------------------- sm_90

inline uint64_t* barrier_at(uint32_t p) { return reinterpret_cast<uint64_t*>(at(p)); }
inline void mbarrier_init_shared_cta_b64(uint32_t p, uint32_t count) {
  mbarrier_init(barrier_at(p), int(count));
}
inline void fence_mbarrier_init_release_cluster() { fence_mbarrier_init(); }
inline void mbarrier_arrive_shared_cta_b64(uint64_t&, uint32_t p) { mbarrier_arrive(barrier_at(p)); }
inline void mbarrier_arrive_expect_tx_shared_cta_b64(uint64_t&, uint32_t p, uint32_t bytes) {
  mbarrier_arrive_expect(barrier_at(p), int(bytes));
}
inline void mapa_shared_cluster_u32(uint32_t& d, uint32_t p, uint32_t rank) { d = p | rank << kRank; }
inline void mbarrier_arrive_shared_cluster_b64(uint64_t&, uint32_t p) {
  mbarrier_arrive_at(barrier_at(p & ((1u << kRank) - 1)), int(p >> kRank));
}
// It may give up before the phase is complete.
inline void mbarrier_try_wait_parity_shared_cta_b64(bool& done, uint32_t p, uint32_t parity) {
  done = sim::coin();
  if (done) mbarrier_wait(barrier_at(p), int(parity));
}

inline std::set<sim::Thread*> at_cluster_barrier;
inline void barrier_cluster_arrive_release_aligned() { at_cluster_barrier.insert(sim::self); }
inline void barrier_cluster_wait_acquire_aligned() {
  if (!at_cluster_barrier.erase(sim::self)) sim::fail("barrier.cluster.wait without arrive");
  sync_cluster();
}

// For a warpgroup of 168 registers a thread, as __launch_bounds__(384, 1) gives.
inline void setmaxnreg_inc_sync_aligned_u32(unsigned count) {
  if (count % 8 || count < 168 || count > 256) sim::fail("setmaxnreg.inc: fewer registers");
}
inline void setmaxnreg_dec_sync_aligned_u32(unsigned count) {
  if (count % 8 || count < 24 || count > 168) sim::fail("setmaxnreg.dec: more registers");
}

inline void fence_proxy_async_shared_cta() { fence_proxy_async(); }

inline void griddepcontrol_wait() { wait_for_previous_kernel(); }
inline void griddepcontrol_launch_dependents() { let_next_kernel_start(); }

inline void cp_async_bulk_tensor_2d_global_shared_cta_bulk_group(uint64_t map, uint32_t column,
                                                                 uint32_t row, uint32_t from) {
  store_box(*pointer<TensorMap>(map), at(from), int(column), int(row));
}
inline void cp_async_bulk_commit_group() { bulk_commit(); }
inline void cp_async_bulk_wait_group_read(int rest) {
  if (rest > 1) sim::fail("cp.async.bulk.wait_group: not translated");
  rest ? bulk_wait_read<1>() : bulk_wait_read<0>();
}

inline void cp_async_bulk_tensor_2d_shared_cluster_global_mbarrier_complete_tx_bytes(
    uint32_t to, uint64_t map, uint32_t column, uint32_t row, uint32_t bar) {
  load_box(at(to), *pointer<TensorMap>(map), barrier_at(bar), int(column), int(row));
}
inline void cp_async_bulk_tensor_2d_shared_cluster_global_mbarrier_complete_tx_bytes_multicast_cluster(
    uint32_t to, uint64_t map, uint32_t column, uint32_t row, uint32_t bar, uint16_t mask) {
  load_box(at(to), *pointer<TensorMap>(map), barrier_at(bar), int(column), int(row), mask);
}

inline void wgmma_fence_sync_aligned() { wgmma_fence(); }
inline void wgmma_commit_group_sync_aligned() { wgmma_commit(); }
inline void wgmma_wait_group_sync_aligned(int rest) {
  if (rest > 1) sim::fail("wgmma.wait_group: not translated");
  rest ? wgmma_wait<1>() : wgmma_wait<0>();
}
// `d` are consecutive registers; `a` is four of them that live as long as the kernel, or null.
template <int columns>
inline void wgmma_mma_async(uint32_t* d, const uint32_t* a, uint64_t a_desc, uint64_t b, bool add) {
  sim::issue({reinterpret_cast<int32_t*>(d), a, a_desc, b, columns, add});
}

}  // namespace dtq::ptx
