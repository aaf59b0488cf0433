// SPDX-License-Identifier: Apache-2.0
// Single instructions on given bits, on a GPU or on the emulator, to verify the emulator. Plain entry
// points, called by tests/golden.py, which has the results of the emulator.
#include "../arch.cuh"

namespace dtq {

struct Golden {
  const uint32_t* in;
  uint32_t* out;
};

// One warp: mma m16n8k32 of int8. In: 10 words a lane (4 of A, 2 of B, 4 of C); out: 4.
DTQ_KERNEL void DTQ_BOUNDS(32, 1) golden_mma(const DTQ_CONSTANT Golden p) {
  const uint32_t* in = p.in + lane() * 10;
  uint32_t a[4];
  int32_t c[4];
  for (int i = 0; i < 4; i++) a[i] = ldg(in + i), c[i] = int32_t(ldg(in + 6 + i));
  mma_s8(c, a, ldg(in + 4), ldg(in + 5));
  for (int i = 0; i < 4; i++) stg(p.out + lane() * 4 + i, uint32_t(c[i]));
}

// One warp: ldmatrix, plain and transposed, of 512 bytes whose 16-byte rows are read in reverse order.
// In: 128 words; out: 8 a lane.
DTQ_KERNEL void DTQ_BOUNDS(32, 1) golden_ldmatrix(const DTQ_CONSTANT Golden p) {
  DTQ_SHARED(shared);
  for (int i = 0; i < 4; i++) {
    const int word = lane() * 4 + i;
    sts(shared + word * 4, ldg(p.in + word));
  }
  sync_threads();
  uint32_t plain[4], transposed[4];
  const unsigned char* row = shared + (31 - lane()) * 16;
  ldmatrix_x4(plain, row);
  ldmatrix_x4_trans(transposed, row);
  for (int i = 0; i < 4; i++) {
    stg(p.out + lane() * 8 + i, plain[i]);
    stg(p.out + lane() * 8 + 4 + i, transposed[i]);
  }
}

// One warpgroup: two wgmma m64n64k32 in a row, A from registers, B from 64 rows of 128 bytes in the
// 128-byte swizzle, at columns 32 and 96. In: 8 words a thread of A, then 2048 of B; out: 32 a thread.
DTQ_KERNEL void DTQ_BOUNDS(128, 1) golden_wgmma(const DTQ_CONSTANT Golden p) {
#if defined(DTQ_HAS_WGMMA)
  DTQ_SHARED(shared);
  uint32_t a[2][4];
  int32_t d[32];
  for (int i = 0; i < 4; i++) {
    a[0][i] = ldg(p.in + tid() * 8 + i);
    a[1][i] = ldg(p.in + tid() * 8 + 4 + i);
  }
  for (int i = 0; i < 4; i++) {
    U4 words;
    const uint32_t* from = p.in + 1024 + (i * 128 + tid()) * 4;
    words.x = ldg(from), words.y = ldg(from + 1), words.z = ldg(from + 2), words.w = ldg(from + 3);
    sts(shared + (i * 128 + tid()) * 16, words);
  }
  fence_proxy_async();
  sync_threads();
  const uint64_t b = swizzled_rows(shared);
  wgmma_fence();
  wgmma_s8<64>(d, a[0], b + 2, false);
  wgmma_s8<64>(d, a[1], b + 6, true);
  wgmma_commit();
  wgmma_wait<0>();
  for (int i = 0; i < 32; i++) stg(p.out + tid() * 32 + i, uint32_t(d[i]));
#endif
}

// One warp: mma m16n8k64 of FP4, NVFP4 and then MXFP4. In: 12 words a lane (4 of A, 2 of B, 4 unused, 2
// of scales); out: 8. The sums start from 0, and the scales are made powers of two near 1, so that the
// order of summation does not matter.
DTQ_KERNEL void DTQ_BOUNDS(32, 1) golden_fp4(const DTQ_CONSTANT Golden p) {
#if defined(DTQ_HAS_FP4)
  const uint32_t* in = p.in + lane() * 12;
  uint32_t a[4];
  for (int i = 0; i < 4; i++) a[i] = ldg(in + i);
  const uint32_t x = ldg(in + 10) & 0x03030303, y = ldg(in + 11) & 0x03030303;
  float nv[4] = {}, mx[4] = {};
  mma_fp4<false>(nv, a, ldg(in + 4), ldg(in + 5), x * 8 + 0x30303030, y * 8 + 0x30303030);
  mma_fp4<true>(mx, a, ldg(in + 4), ldg(in + 5), x + 0x7e7e7e7e, y + 0x7e7e7e7e);
  for (int i = 0; i < 4; i++) {
    stg(p.out + lane() * 8 + i, float_bits(nv[i]));
    stg(p.out + lane() * 8 + 4 + i, float_bits(mx[i]));
  }
#endif
}

}  // namespace dtq

using namespace dtq;

// 0 mma, 1 ldmatrix, 2 wgmma, 3 FP4; a cudaError_t or a Status.
extern "C" __attribute__((visibility("default"))) int golden(int which, const void* in, void* out,
                                                             Stream stream) {
  const Golden p = {static_cast<const uint32_t*>(in), static_cast<uint32_t*>(out)};
  if (which == 0) return launch(golden_mma, Shape{{1}, 32}, stream, p);
  if (which == 1) return launch(golden_ldmatrix, Shape{{1}, 32, 512}, stream, p);
  if (which == 3) return launch(golden_fp4, Shape{{1}, 32}, stream, p);
  return launch(golden_wgmma, Shape{{1}, 128, 8192}, stream, p);
}
