// SPDX-License-Identifier: Apache-2.0
// One small kernel for each instruction of arch.cuh, on given bits. They run on a GPU; on the emulator, whose
// results tests/golden.py has; and on a CPU as translated PTX (-DDTQ_TRANSLATED=file, see
// sim/translate.py), which executes the text of each asm statement.
//
// Where a GPU may differ without being wrong, a kernel avoids it: float sums are of small integers, in
// which their order does not matter, and a NaN of arithmetic is replaced by one NaN.
#include "../arch.cuh"
#if defined(DTQ_TRANSLATED)
#include "../sim/ptx.h"
#endif

namespace dtq {

// Every member has the same offset in PTX and on the emulator, whose maps are smaller.
struct Golden {
  const uint32_t* in;
  uint32_t* out;
  alignas(128) TensorMap map;
};

constexpr int kMapRows = 96, kMapBytes = 160;  // of the tensor that bulk copies read: all of `in`

#if !defined(DTQ_TRANSLATED)

DTQ_DEV uint32_t word(const Golden& p, int i) { return ldg(p.in + i); }
DTQ_DEV void put(const Golden& p, int i, uint32_t value) { stg(p.out + i, value); }
DTQ_DEV uint32_t one_nan(float f) { return f != f ? 0x7fffffff : float_bits(f); }

// Floats of every exponent for a warp: 32 a lane, i < 32. A quarter each has random mantissas, those of ties
// when rounded to bfloat16, of ties when rounded to float16, and zeros (which gives infinity, too).
DTQ_DEV float special(uint32_t random, int i) {
  const uint32_t exponent = uint32_t(lane() * 8 + i / 4) << 23, sign = random & 0x80000000;
  const uint32_t ties = i % 4 == 1 ? (random & 0x7f0000) | 0x8000 : (random & 0x7fe000) | 0x1000;
  const uint32_t mantissa = i % 4 == 0 ? random & 0x7fffff : i % 4 == 3 ? 0 : ties;
  return bits_float(sign | exponent | mantissa);
}

// ---------------------------------------------------------------------------- memory

// Loads and stores of every size, through shared memory to another lane. In: 32 words a lane; out: 10.
DTQ_KERNEL void DTQ_BOUNDS(32, 1) golden_memory(const DTQ_CONSTANT Golden p) {
  DTQ_SHARED(shared);
  unsigned char* to = shared + lane() * 16;
  const uint32_t* in = p.in + lane() * 32;
  const U4 four = ldg(reinterpret_cast<const U4*>(in));
  const U2 two = ldg(reinterpret_cast<const U2*>(in + 4));
  const uint16_t half = ldg(reinterpret_cast<const uint16_t*>(in + 6) + 1);
  const uint8_t byte = ldg(reinterpret_cast<const uint8_t*>(in + 7) + 3);
  sts(to, four);
  sts(shared + 512 + lane() * 8, two);
  sts(shared + 768 + lane() * 4, ldg(in + 8));
  sts(shared + 896 + lane() * 2, half);
  sts(shared + 960 + lane(), byte);
  sync_threads();
  const int other = 31 - lane();
  const U4 a = lds<U4>(shared + other * 16);
  const U2 b = lds<U2>(shared + 512 + other * 8);
  const uint32_t found[10] = {a.x, a.y, a.z, a.w, b.x, b.y, lds<uint32_t>(shared + 768 + other * 4),
                              lds<uint16_t>(shared + 896 + other * 2), lds<uint8_t>(shared + 960 + other),
                              uint32_t(tid() + warp() + block_threads() + block_x() + block_y() + block_z() +
                                       grid_x() * 3 + grid_y() * 5)};
  DTQ_UNROLL for (int i = 0; i < 10; i++) put(p, lane() * 10 + i, found[i]);
}

// 16 bytes a lane under two conditions, 4 under one, and 4 under none. In: 4 words a lane, then 3 of the conditions.
DTQ_KERNEL void DTQ_BOUNDS(32, 1) golden_conditions(const DTQ_CONSTANT Golden p) {
  const U4 v = ld_global_if(word(p, 128 + lane()) & 1, reinterpret_cast<const U4*>(p.in) + lane());
  stg_if(word(p, 160 + lane()) & 1, reinterpret_cast<U4*>(p.out) + lane(), v);
  stg_if(word(p, 192 + lane()) & 1, p.out + 128 + lane(), word(p, lane()));
  put(p, 160 + lane(), float_bits(ld_global(reinterpret_cast<const float*>(p.in) + (31 - lane()))));
}

// Copies of 16 bytes of which 0 to 16 are read, and of 4, in two groups. In: 512 words; out: 288.
DTQ_KERNEL void DTQ_BOUNDS(32, 1) golden_cp_async(const DTQ_CONSTANT Golden p) {
  DTQ_SHARED(shared);
  cp_async16(shared + lane() * 16, p.in + lane() * 4, lane() % 17);
  cp_async_commit();
  cp_async16(shared + 512 + lane() * 16, p.in + 128 + lane() * 4, 16);
  cp_async4(shared + 1024 + lane() * 4, p.in + 256 + lane(), lane() % 3 != 0);
  cp_async_commit();
  cp_async_wait<1>();
  sync_threads();
  auto show = [&](int i) { put(p, i * 32 + lane(), lds<uint32_t>(shared + (i * 32 + 31 - lane()) * 4)); };
  DTQ_UNROLL for (int i = 0; i < 4; i++) show(i);
  cp_async_wait<0>();
  sync_threads();
  DTQ_UNROLL for (int i = 4; i < 9; i++) show(i);
}

// ---------------------------------------------------------------------------- synchronization

// Four warps: each pair exchanges words at a barrier of its own, the first pair twice.
DTQ_KERNEL void DTQ_BOUNDS(128, 1) golden_named_barriers(const DTQ_CONSTANT Golden p) {
  DTQ_SHARED(shared);
  const int pair = warp() / 2, other = tid() ^ 32;
  sts(shared + tid() * 4, word(p, tid()));
  sync_named(1 + pair, 64);
  uint32_t found = lds<uint32_t>(shared + other * 4);
  if (pair == 0) {
    sync_named(1, 64);
    sts(shared + tid() * 4, found + 1);
    sync_named(1, 64);
    found = lds<uint32_t>(shared + other * 4);
  }
  sync_warp();
  put(p, tid(), found);
}

DTQ_KERNEL void DTQ_BOUNDS(32, 1) golden_shuffle(const DTQ_CONSTANT Golden p) {
  const uint32_t value = word(p, lane());
  DTQ_UNROLL for (int i = 0; i < 5; i++) put(p, lane() * 6 + i, shfl_xor(value, 1 << i));
  put(p, lane() * 6 + 5, shfl(value, int(word(p, 32 + lane()) & 31)) ^ max_of_warp(value));
}

// ---------------------------------------------------------------------------- fragments

// In: 10 words a lane (4 of A, 2 of B, 4 of C); out: 4.
DTQ_KERNEL void DTQ_BOUNDS(32, 1) golden_mma_s8(const DTQ_CONSTANT Golden p) {
  const uint32_t* in = p.in + lane() * 10;
  uint32_t a[4];
  int32_t c[4];
  DTQ_UNROLL for (int i = 0; i < 4; i++) a[i] = ldg(in + i), c[i] = int32_t(ldg(in + 6 + i));
  mma_s8(c, a, ldg(in + 4), ldg(in + 5));
  DTQ_UNROLL for (int i = 0; i < 4; i++) put(p, lane() * 4 + i, uint32_t(c[i]));
}

// The same with integers of five bits as floats. Out: 4 words a lane for bfloat16, then 4 for float16.
DTQ_KERNEL void DTQ_BOUNDS(32, 1) golden_mma_halves(const DTQ_CONSTANT Golden p) {
  const uint32_t* in = p.in + lane() * 10;
  uint32_t bf16[6], f16[6];
  float c[2][4];
  DTQ_UNROLL for (int i = 0; i < 6; i++) {
    const uint32_t u = ldg(in + i);
    const float low = int_to_float(int32_t(u & 31) - 16), high = int_to_float(int32_t(u >> 5 & 31) - 16);
    bf16[i] = floats_to_bf16x2(low, high), f16[i] = floats_to_f16x2(low, high);
  }
  DTQ_UNROLL for (int i = 0; i < 4; i++) c[0][i] = c[1][i] = int_to_float(int32_t(ldg(in + 6 + i) & 0xffff));
  const uint32_t a[4] = {bf16[0], bf16[1], bf16[2], bf16[3]}, b[4] = {f16[0], f16[1], f16[2], f16[3]};
  mma_bf16(c[0], a, bf16[4], bf16[5]);
  mma_f16(c[1], b, f16[4], f16[5]);
  DTQ_UNROLL for (int i = 0; i < 8; i++) put(p, lane() * 8 + i, float_bits(c[i / 4][i % 4]));
}

// ldmatrix, plain and transposed, of 512 bytes whose 16-byte rows are read in reverse order; movmatrix of a
// word. In: 128 words; out: 9 a lane.
DTQ_KERNEL void DTQ_BOUNDS(32, 1) golden_matrices(const DTQ_CONSTANT Golden p) {
  DTQ_SHARED(shared);
  DTQ_UNROLL for (int i = 0; i < 4; i++) sts(shared + (lane() * 4 + i) * 4, word(p, lane() * 4 + i));
  sync_threads();
  uint32_t plain[4], transposed[4];
  const unsigned char* row = shared + (31 - lane()) * 16;
  ldmatrix_x4(plain, row);
  ldmatrix_x4_trans(transposed, row);
  DTQ_UNROLL for (int i = 0; i < 4; i++) {
    put(p, lane() * 9 + i, plain[i]);
    put(p, lane() * 9 + 4 + i, transposed[i]);
  }
  put(p, lane() * 9 + 8, transpose_8x8(word(p, lane())));
}

// stmatrix, transposed, to 512 bytes whose 16-byte rows are written in reverse order. In: 4 words a lane.
DTQ_KERNEL void DTQ_BOUNDS(32, 1) golden_stmatrix(const DTQ_CONSTANT Golden p) {
#if defined(DTQ_HAS_WGMMA)
  DTQ_SHARED(shared);
  uint32_t r[4];
  DTQ_UNROLL for (int i = 0; i < 4; i++) r[i] = word(p, lane() * 4 + i);
  stmatrix_x4_trans(shared + (31 - lane()) * 16, r);
  sync_threads();
  DTQ_UNROLL for (int i = 0; i < 4; i++) put(p, lane() * 4 + i, lds<uint32_t>(shared + (lane() * 4 + i) * 4));
#endif
}

// NVFP4 and then MXFP4. In: 12 words a lane (4 of A, 2 of B, 4 of the sums, 2 of scales); out: 8. The sums start
// from bytes, and the scales are made powers of two near 1, so that the order of summation does not matter.
DTQ_KERNEL void DTQ_BOUNDS(32, 1) golden_mma_fp4(const DTQ_CONSTANT Golden p) {
#if defined(DTQ_HAS_FP4)
  const uint32_t* in = p.in + lane() * 12;
  uint32_t a[4];
  DTQ_UNROLL for (int i = 0; i < 4; i++) a[i] = ldg(in + i);
  const uint32_t x = ldg(in + 10) & 0x03030303, y = ldg(in + 11) & 0x03030303;
  float nv[4], mx[4];
  DTQ_UNROLL for (int i = 0; i < 4; i++) nv[i] = mx[i] = int_to_float(int32_t(ldg(in + 6 + i) & 0xff));
  mma_fp4<false>(nv, a, ldg(in + 4), ldg(in + 5), x * 8 + 0x30303030, y * 8 + 0x30303030);
  mma_fp4<true>(mx, a, ldg(in + 4), ldg(in + 5), x + 0x7e7e7e7e, y + 0x7e7e7e7e);
  DTQ_UNROLL for (int i = 0; i < 4; i++) {
    put(p, lane() * 8 + i, float_bits(nv[i]));
    put(p, lane() * 8 + 4 + i, float_bits(mx[i]));
  }
#endif
}

// ---------------------------------------------------------------------------- arithmetic

// In: 4 words a lane; out: 3.
DTQ_KERNEL void DTQ_BOUNDS(32, 1) golden_integers(const DTQ_CONSTANT Golden p) {
  const uint32_t a = word(p, lane() * 4), b = word(p, lane() * 4 + 1), c = word(p, lane() * 4 + 2);
  put(p, lane() * 3, byte_perm(a, b, c & 0xffff));  // with sign bits
  put(p, lane() * 3 + 1, byte_perm(a, b, 0x0145));
  put(p, lane() * 3 + 2, uint32_t(dp4a(a, b, int32_t(c))));
}

// In: 32 words a lane; out: 192.
DTQ_KERNEL void DTQ_BOUNDS(32, 1) golden_conversions(const DTQ_CONSTANT Golden p) {
  DTQ_ROLLED for (int i = 0; i < 32; i++) {
    const uint32_t random = word(p, lane() * 32 + i);
    const float f = special(random, i), other = special(random * 5, 31 - i);
    const int at = (lane() * 32 + i) * 6;
    put(p, at, float_to_bf16(f) | uint32_t(float_to_f16(f)) << 16);
    put(p, at + 1, floats_to_bf16x2(f, other));
    put(p, at + 2, floats_to_f16x2(f, other));
    put(p, at + 3, uint32_t(round_to_int(f)));
    put(p, at + 4, one_nan(f16_to_float(uint16_t(random))));
    put(p, at + 5, float_bits(bf16_to_float(uint16_t(random))) ^ float_bits(int_to_float(int32_t(random))));
  }
}

// Of each half; a NaN is replaced by one NaN.
DTQ_DEV uint32_t one_nan_bf16x2(uint32_t pair) {
  const uint32_t low = (pair & 0x7fff) > 0x7f80 ? 0x7fff : pair & 0xffff;
  const uint32_t high = (pair >> 16 & 0x7fff) > 0x7f80 ? 0x7fff : pair >> 16;
  return low | high << 16;
}

// Results without their last 12 bits, of arguments whose results are not near a step of what is left: halves
// from -160 to 160, and 2^k and 3 * 2^k; but none whose result is at the end of the range. Out: 21 words a lane.
DTQ_KERNEL void DTQ_BOUNDS(32, 1) golden_approximations(const DTQ_CONSTANT Golden p) {
  auto rounded = [](float f) { return (one_nan(f) + 0x800) >> 12; };
  DTQ_ROLLED for (int i = 0; i < 20; i++) {
    const int k = lane() * 20 + i;  // 0 to 639
    const bool end = k == 2 * (160 - 126) || k == 2 * (160 + 128) || (k & 255) == 253;
    const float half = end ? 1.0f : fmul(int_to_float(k - 320), 0.5f);
    const float power = end ? 1.0f : bits_float(uint32_t(k & 255) << 23 | uint32_t(k & 256) << 14 | uint32_t(k) << 31);
    put(p, k, rounded(exp2_approximate(half)) << 1 ^ rounded(reciprocal_approximate(power)) << 11);
  }
  const float end = bits_float(lane() == 0 ? 0x7f800000u : lane() == 1 ? 0xff800000u : lane() == 2 ? 0x7fc00000u : 0u);
  put(p, 640 + lane(), rounded(exp2_approximate(end)) ^ rounded(reciprocal_approximate(end)) << 11);
}

// In: 32 words a lane; out: 288.
DTQ_KERNEL void DTQ_BOUNDS(32, 1) golden_floats(const DTQ_CONSTANT Golden p) {
  DTQ_ROLLED for (int i = 0; i < 32; i++) {
    const uint32_t random = word(p, lane() * 32 + i);
    const float a = special(random, i), near = bits_float(float_bits(a) ^ (random & 0x3fffff));
    const float b = i % 2 ? near : special(random * 5, 31 - i), c = special(random * 7, i ^ 5);
    const int at = (lane() * 32 + i) * 9;
    put(p, at, one_nan(fadd(a, b)));
    put(p, at + 1, one_nan(fsub(a, b)));
    put(p, at + 2, one_nan(fmul(a, c)));
    put(p, at + 3, one_nan(fdiv(a, b)));
    put(p, at + 4, one_nan(ffma(a, c, b)));
    put(p, at + 5, one_nan(fsqrt(a)));
    put(p, at + 6, one_nan(reciprocal(a)));
    put(p, at + 7, one_nan(max_magnitude(bits_float(float_bits(a) & 0x7fffffff), b)));
    put(p, at + 8, one_nan_bf16x2(fma_bf16x2(float_bits(a), float_bits(c), float_bits(b))));
  }
}

// ---------------------------------------------------------------------------- sm_90

// Two products: A from registers, then from shared memory. In: 4 words a thread of A, 2048 words of A and
// n * 32 of B, rows of 128 bytes in the 128-byte swizzle, of which columns 32.. and 96.. are used. Out: n / 2
// words a thread.
template <int n>
DTQ_DEV void wgmma_of(const Golden& p) {
#if defined(DTQ_HAS_WGMMA)
  DTQ_SHARED(shared);
  uint32_t a[4];
  int32_t d[n / 2];
  DTQ_UNROLL for (int i = 0; i < 4; i++) a[i] = word(p, tid() * 4 + i);
  DTQ_ROLLED for (int i = tid(); i < (64 + n) * 8; i += 128)
    sts(shared + i * 16, ldg(reinterpret_cast<const U4*>(p.in + 512) + i));
  fence_proxy_async();
  sync_threads();
  const uint64_t stored = swizzled_rows(shared), b = swizzled_rows(shared + 8192);
  wgmma_fence();
  wgmma_s8<n>(d, a, b + 2, false);
  wgmma_s8<n>(d, stored + 2, b + 6, true);
  wgmma_commit();
  wgmma_wait<0>();
  DTQ_UNROLL for (int i = 0; i < n / 2; i++) put(p, tid() * (n / 2) + i, uint32_t(d[i]));
#endif
}

DTQ_KERNEL void DTQ_BOUNDS(128, 1) golden_wgmma_64(const DTQ_CONSTANT Golden p) {
  wgmma_of<64>(p);
}
DTQ_KERNEL void DTQ_BOUNDS(128, 1) golden_wgmma_128(const DTQ_CONSTANT Golden p) {
  wgmma_of<128>(p);
}
DTQ_KERNEL void DTQ_BOUNDS(128, 1) golden_wgmma_256(const DTQ_CONSTANT Golden p) {
  wgmma_of<256>(p);
}

// Two products in two groups; the sums of the first are stored while the second may run. In and out as with 64.
DTQ_KERNEL void DTQ_BOUNDS(128, 1) golden_wgmma_groups(const DTQ_CONSTANT Golden p) {
#if defined(DTQ_HAS_WGMMA)
  DTQ_SHARED(shared);
  int32_t first[32], second[32];
  DTQ_ROLLED for (int i = tid(); i < 128 * 8; i += 128)
    sts(shared + i * 16, ldg(reinterpret_cast<const U4*>(p.in) + i));
  fence_proxy_async();
  sync_threads();
  const uint64_t a = swizzled_rows(shared), b = swizzled_rows(shared + 8192);
  wgmma_fence();
  wgmma_s8<64>(first, a, b + 2, false);
  wgmma_commit();
  wgmma_fence();
  wgmma_s8<64>(second, a + 4, b, false);
  wgmma_commit();
  wgmma_wait<1>();
  DTQ_UNROLL for (int i = 0; i < 32; i++) put(p, tid() * 32 + i, uint32_t(first[i]));
  wgmma_wait<0>();
  DTQ_UNROLL for (int i = 0; i < 32; i++) put(p, 4096 + tid() * 32 + i, uint32_t(second[i]));
#endif
}

// Four warps arrive at an mbarrier, in two phases; a lane of each warp writes before it arrives.
DTQ_KERNEL void DTQ_BOUNDS(128, 1) golden_mbarrier(const DTQ_CONSTANT Golden p) {
#if defined(DTQ_HAS_WGMMA)
  DTQ_SHARED(shared);
  auto* bar = reinterpret_cast<uint64_t*>(shared);
  if (tid() == 0) mbarrier_init(bar, 4), fence_mbarrier_init();
  sync_threads();
  uint32_t sum = 0;
  DTQ_ROLLED for (int phase = 0; phase < 2; phase++) {
    if (lane() == 0) {
      sts(shared + 16 + (phase * 4 + warp()) * 4, word(p, phase * 4 + warp()));
      mbarrier_arrive(bar);
    }
    mbarrier_wait(bar, phase);
    sync_warp();  // no lane may complete the next phase before all have seen this one
    DTQ_UNROLL for (int i = 0; i < 4; i++) sum = sum * 3 + lds<uint32_t>(shared + 16 + (phase * 4 + i) * 4);
  }
  put(p, tid(), sum);
#endif
}

// Three boxes of 32 rows of the tensor `in`, kMapRows x kMapBytes bytes: inside it, over its last row, over its
// last column. Out: the words as they are in shared memory.
template <int box_bytes>
DTQ_DEV void boxes_of(const Golden& p) {
#if defined(DTQ_HAS_WGMMA)
  DTQ_SHARED(shared);
  constexpr int kBox = 32 * box_bytes;
  auto* bar = reinterpret_cast<uint64_t*>(shared + 3 * kBox + 64);  // an address that no other operand is
  if (tid() == 0) {
    mbarrier_init(bar, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect(bar, 3 * kBox);
    load_box(shared, p.map, bar, 16, 8);
    load_box(shared + kBox, p.map, bar, 0, kMapRows - 5);
    load_box(shared + 2 * kBox, p.map, bar, kMapBytes - 48, 3);
  }
  sync_threads();
  mbarrier_wait(bar, 0);
  DTQ_ROLLED for (int i = tid(); i < 3 * kBox / 4; i += 128) put(p, i, lds<uint32_t>(shared + i * 4));
#endif
}
DTQ_KERNEL void DTQ_BOUNDS(128, 1) golden_boxes_128(const DTQ_CONSTANT Golden p) { boxes_of<128>(p); }
DTQ_KERNEL void DTQ_BOUNDS(128, 1) golden_boxes_64(const DTQ_CONSTANT Golden p) { boxes_of<64>(p); }

// Two blocks of a cluster: each copies a box for both; then each block arrives at an mbarrier of the other.
DTQ_KERNEL void DTQ_BOUNDS(128, 1) golden_cluster(const DTQ_CONSTANT Golden p) {
#if defined(DTQ_HAS_WGMMA)
  DTQ_SHARED(shared);
  constexpr int kBox = 32 * 128;
  auto* full = reinterpret_cast<uint64_t*>(shared + 2 * kBox + 64);
  uint64_t* released = full + 1;
  const int rank = cluster_rank();
  if (tid() == 0) mbarrier_init(full, 1), mbarrier_init(released, 4), fence_mbarrier_init();
  sync_cluster();
  if (tid() == 0) {
    mbarrier_arrive_expect(full, 2 * kBox);
    load_box(shared + rank * kBox, p.map, full, 32 * rank, 40 * rank, 3);
  }
  mbarrier_wait(full, 0);
  if (lane() == 0) mbarrier_arrive_at(released, rank ^ 1);
  mbarrier_wait(released, 0);
  DTQ_ROLLED for (int i = tid(); i < 2 * kBox / 4; i += 128)
    put(p, rank * 2 * kBox / 4 + i, lds<uint32_t>(shared + i * 4) + uint32_t(rank));
  sync_cluster();
#endif
}

// Boxes of 32 rows are stored to the tensor `out`, kMapRows x kMapBytes bytes: inside it, then over its last row and
// over its last column from the same shared memory, as soon as that has been read. In: the words of two boxes.
DTQ_KERNEL void DTQ_BOUNDS(128, 1) golden_box_stores(const DTQ_CONSTANT Golden p) {
#if defined(DTQ_HAS_WGMMA)
  DTQ_SHARED(shared);
  constexpr int kWords = 32 * 128 / 4;
  auto fill_boxes = [&](int count, uint32_t add) {
    DTQ_ROLLED for (int i = tid(); i < count * kWords; i += 128) sts(shared + i * 4, word(p, i) + add);
    fence_proxy_async();
    sync_threads();
  };
  unsigned char* const second = shared + kWords * 4;
  fill_boxes(2, 0);
  if (tid() == 0) {
    store_box(p.map, shared, 16, 8);
    bulk_commit();
    store_box(p.map, second, 0, kMapRows - 5);
    bulk_commit();
    bulk_wait_read<1>();
  }
  sync_threads();
  fill_boxes(1, 1);
  if (tid() == 0) {
    store_box(p.map, shared, kMapBytes - 16, 48);
    bulk_commit();
    bulk_wait_read<0>();
  }
#endif
}

// The first kernel lets the next one start before it writes. In and out: a word a thread, of blocks of 64.
DTQ_KERNEL void DTQ_BOUNDS(64, 1) golden_previous(const DTQ_CONSTANT Golden p) {
  let_next_kernel_start();
  uint32_t value = word(p, block_x() * 64 + tid());
  DTQ_ROLLED for (int i = 0; i < 1000; i++) value = value * 3 + 1;
  put(p, block_x() * 64 + tid(), value);
}
DTQ_KERNEL void DTQ_BOUNDS(64, 1) golden_dependent(const DTQ_CONSTANT Golden p) {
  wait_for_previous_kernel();
  const int i = block_x() * 64 + tid();
  put(p, i, float_bits(ld_global(reinterpret_cast<const float*>(p.out) + i)) + 5);
}

// Of three warpgroups the first gives registers to the others. In and out: a word a thread.
DTQ_KERNEL void DTQ_BOUNDS(384, 1) golden_registers(const DTQ_CONSTANT Golden p) {
#if defined(DTQ_HAS_WGMMA)
  const uint32_t value = word(p, tid());
  if (tid() < 128) {
    fewer_registers<40>();
    put(p, tid(), value + 1);
  } else {
    more_registers<232>();
    put(p, tid(), value * 3);
  }
#endif
}

#else
#include DTQ_TRANSLATED
#endif

// A kernel, and what it is started with. `major`: the compute capability that has the instructions; 0: all.
struct Entry {
  const char* name;
  void (*kernel)(Golden);
  int major, words_in, words_out;  // of `in` and of `out`
  Shape shape;
  int box_bytes;  // of the tensor map
  bool is_of_out = false;             // the tensor of the map; else `in`
  void (*previous)(Golden) = nullptr;  // is started first, with as many blocks
};

constexpr int kMapWords = kMapRows * kMapBytes / 4;

// Grid, threads, bytes of shared memory, blocks of a cluster.
const Entry kEntries[] = {
    {"memory", golden_memory, 0, 1024, 320, {{1}, 32, 1024}, 0},
    {"conditions", golden_conditions, 0, 224, 192, {{1}, 32}, 0},
    {"cp_async", golden_cp_async, 0, 512, 288, {{1}, 32, 1152}, 0},
    {"named_barriers", golden_named_barriers, 0, 128, 128, {{1}, 128, 512}, 0},
    {"shuffle", golden_shuffle, 0, 64, 192, {{1}, 32}, 0},
    {"mma_s8", golden_mma_s8, 0, 320, 128, {{1}, 32}, 0},
    {"mma_halves", golden_mma_halves, 0, 320, 256, {{1}, 32}, 0},
    {"matrices", golden_matrices, 0, 128, 288, {{1}, 32, 512}, 0},
    {"mma_fp4", golden_mma_fp4, 12, 384, 256, {{1}, 32}, 0},
    {"integers", golden_integers, 0, 128, 96, {{1}, 32}, 0},
    {"conversions", golden_conversions, 0, 1024, 6144, {{1}, 32}, 0},
    {"floats", golden_floats, 0, 1024, 9216, {{1}, 32}, 0},
    {"approximations", golden_approximations, 0, 1, 672, {{1}, 32}, 0},
    {"stmatrix", golden_stmatrix, 9, 128, 128, {{1}, 32, 512}, 0},
    {"wgmma_64", golden_wgmma_64, 9, 512 + 4096, 4096, {{1}, 128, 16384}, 0},
    {"wgmma_128", golden_wgmma_128, 9, 512 + 6144, 8192, {{1}, 128, 24576}, 0},
    {"wgmma_256", golden_wgmma_256, 9, 512 + 10240, 16384, {{1}, 128, 40960}, 0},
    {"wgmma_groups", golden_wgmma_groups, 9, 4096, 8192, {{1}, 128, 16384}, 0},
    {"mbarrier", golden_mbarrier, 9, 8, 128, {{1}, 128, 64}, 0},
    {"boxes_128", golden_boxes_128, 9, kMapWords, 3072, {{1}, 128, 12288 + 80}, 128},
    {"boxes_64", golden_boxes_64, 9, kMapWords, 1536, {{1}, 128, 6144 + 80}, 64},
    {"cluster", golden_cluster, 9, kMapWords, 4096, {{2}, 128, 8192 + 80, 2}, 128},
    {"box_stores", golden_box_stores, 9, 2048, kMapWords, {{1}, 128, 8192}, 128, true},
    {"dependent", golden_dependent, 9, 8192, 8192, {{128}, 64, 0, 1, true}, 0, false, golden_previous},
    {"registers", golden_registers, 9, 384, 384, {{1}, 384}, 0},
};

}  // namespace dtq

using namespace dtq;

#define GOLDEN_EXPORT extern "C" __attribute__((visibility("default")))

GOLDEN_EXPORT int golden_count() { return int(sizeof kEntries / sizeof *kEntries); }
GOLDEN_EXPORT const char* golden_name(int i) { return kEntries[i].name; }
// 0: major, 1: words of `in`, 2: of `out`
GOLDEN_EXPORT int golden_size(int i, int which) {
  return which == 0 ? kEntries[i].major : which == 1 ? kEntries[i].words_in : kEntries[i].words_out;
}

// Starts a kernel; a cudaError_t or a Status.
inline int run(const Entry& e, const void* in, void* out, Stream stream) {
  Golden p = {static_cast<const uint32_t*>(in), static_cast<uint32_t*>(out), {}};
  if (e.box_bytes) {
    const int status = encode_rows(&p.map, e.is_of_out ? out : in, kMapRows, kMapBytes, 32, e.box_bytes);
    if (status != kOk) return status;
  }
  if (e.previous) {
    const int status = launch(e.previous, {e.shape.grid, e.shape.threads}, stream, p);
    if (status != kOk) return status;
  }
  return launch(e.kernel, e.shape, stream, p);
}

GOLDEN_EXPORT int golden(int i, const void* in, void* out, Stream stream) {
  return run(kEntries[i], in, out, stream);
}

#if defined(DTQ_SIM)
GOLDEN_EXPORT void golden_seed(uint64_t seed) { sim::session().seed = seed; }
GOLDEN_EXPORT const char* golden_error() { return sim::session().error.c_str(); }
#endif
#if defined(DTQ_TRANSLATED)  // the asm statements that were executed; null after the last
GOLDEN_EXPORT const char* golden_statement(int i) { return kStatements[i]; }
GOLDEN_EXPORT int golden_executed(int i) { return executed[i]; }
#endif
