// SPDX-License-Identifier: Apache-2.0
// The instructions of arch.cuh on the emulator.
//
// Asynchronous operations complete at a random time, from the seed: a cp.async at once or at its wait, a
// wgmma group at its commit or at its wait, a bulk copy at any time. Undefined behaviour is an error: a
// misaligned address, a wgmma that reads data of the generic proxy without a fence, an mbarrier that was
// not made visible.
#pragma once
#include <cmath>

#include "block.h"

namespace dtq {

struct alignas(8) U2 {
  uint32_t x, y;
};
struct alignas(16) U4 {
  uint32_t x, y, z, w;
};

inline int tid() { return int(sim::self->index); }
inline int lane() { return tid() & 31; }
inline int warp() { return tid() >> 5; }
inline int block_threads() { return int(sim::block().threads.size()); }
inline int block_x() { return int(sim::block().index.x); }
inline int block_y() { return int(sim::block().index.y); }
inline int block_z() { return int(sim::block().index.z); }
inline int grid_x() { return int(sim::block().grid.x); }
inline int grid_y() { return int(sim::block().grid.y); }
inline int cluster_rank() { return int(sim::block().rank); }

// ---------------------------------------------------------------------------- memory

namespace sim {

inline unsigned offset_of(const void* p, size_t bytes, const char* what) {
  Block& b = block();
  auto* at = static_cast<const unsigned char*>(p);
  if (at < b.shared || at + bytes > b.shared + b.bytes)
    fail(std::string(what) + ": outside shared memory");
  return unsigned(at - b.shared);
}

inline void check_aligned(const void* p, size_t bytes, const char* what) {
  if (reinterpret_cast<uintptr_t>(p) % bytes) fail(std::string(what) + ": misaligned address");
}

// In a kernel that may start before the previous one has ended.
inline void check_dependency(const char* what) {
  if (cluster().dependent && !self->has_waited)
    fail(std::string(what) + ": global memory before the wait for the previous kernel");
}

inline void mark_dirty(unsigned offset, size_t bytes) {
  for (unsigned c = offset / 16; c <= (offset + bytes - 1) / 16; c++) {
    if (block().read_by_stores[c]) fail("shared memory written that a bulk store has yet to read");
    block().dirty[c] = self->index + 1;
    self->dirty.push_back(c);
  }
}

inline void complete(const Copy& c) {
  mark_dirty(unsigned(c.to - block().shared), c.size);
  if (c.valid) std::memcpy(c.to, c.from, c.valid);
  std::memset(c.to + c.valid, 0, c.size - c.valid);
}

inline void copy_async(void* to, const void* from, unsigned valid, unsigned size) {
  check_aligned(to, size, "cp.async to");
  if (valid) check_aligned(from, size, "cp.async from");
  if (valid > size) fail("cp.async: source size");
  offset_of(to, size, "cp.async");
  note_access(to, size);
  check_dependency("cp.async");
  stats().copies++;
  const Copy copy = {static_cast<unsigned char*>(to), from, valid, size};
  if (coin()) complete(copy);
  else self->open.push_back(copy);
}

}  // namespace sim

template <class T>
inline T ldg(const T* p) {
  sim::check_aligned(p, sizeof(T), "ld.global");
  sim::check_dependency("ld.global");
  return *p;
}
inline float ld_global(const float* p) { return ldg(p); }

template <class T>
inline void stg(T* p, T value) {
  sim::check_aligned(p, sizeof(T), "st.global");
  sim::check_dependency("st.global");
  *p = value;
}

inline void stg_if(bool condition, uint32_t* p, uint32_t v) {
  if (condition) stg(p, v);
}
inline void stg_if(bool condition, U4* p, const U4& v) {
  if (condition) stg(p, v);
}
inline U4 ld_global_if(bool condition, const U4* p) { return condition ? ldg(p) : U4{0, 0, 0, 0}; }

template <class T>
inline T lds(const void* p) {
  sim::check_aligned(p, sizeof(T), "ld.shared");
  sim::offset_of(p, sizeof(T), "ld.shared");
  sim::note_access(p, sizeof(T));
  T value;
  std::memcpy(&value, p, sizeof(T));
  return value;
}

template <class T>
inline void sts(void* p, T value) {
  sim::check_aligned(p, sizeof(T), "st.shared");
  sim::mark_dirty(sim::offset_of(p, sizeof(T), "st.shared"), sizeof(T));
  sim::note_access(p, sizeof(T));
  std::memcpy(p, &value, sizeof(T));
}

inline void cp_async16(void* to, const void* from, int valid) {
  sim::copy_async(to, from, unsigned(valid), 16);
}
inline void cp_async4(void* to, const void* from, bool read) {
  sim::copy_async(to, from, read ? 4 : 0, 4);
}

inline void cp_async_commit() {
  sim::self->groups.push_back(std::move(sim::self->open));
  sim::self->open.clear();
}

// Waits until all but the latest `rest` groups of this thread are complete.
template <int rest>
inline void cp_async_wait() {
  auto& groups = sim::self->groups;
  while (int(groups.size()) > rest) {
    for (auto& copy : groups.front()) sim::complete(copy);
    groups.pop_front();
  }
}

// ---------------------------------------------------------------------------- synchronization

inline void sync_threads() { sim::sync(0, unsigned(sim::block().threads.size())); }
inline void sync_named(int id, int threads) { sim::sync(unsigned(id), unsigned(threads)); }
inline void sync_warp() {
  sim::warp_sync("syncwarp", [](sim::Lane&) {}, [](sim::Warp&) {});
}

namespace sim {

template <class T>
inline T shuffle(const char* what, T value, int number, bool exclusive) {
  static_assert(sizeof(T) == 4);
  Lane& lane = warp_sync(
      what,
      [&](Lane& l) {
        std::memcpy(l.in, &value, 4);
        l.number = number;
      },
      [&](Warp& w) {
        for (unsigned i = 0; i < w.size; i++) {
          const int from = exclusive ? int(i) ^ w.lane[i].number : w.lane[i].number;
          w.lane[i].out[0] = w.lane[from & 31].in[0];
        }
      });
  std::memcpy(&value, lane.out, 4);
  return value;
}

}  // namespace sim

// 4-byte values of all 32 lanes.
template <class T>
inline T shfl_xor(T value, int mask) {
  return sim::shuffle("shfl.bfly", value, mask, true);
}
template <class T>
inline T shfl(T value, int from) {
  return sim::shuffle("shfl.idx", value, from, false);
}
inline uint32_t max_of_warp(uint32_t value) {
  for (int lanes = 16; lanes; lanes /= 2) value = std::max(value, shfl_xor(value, lanes));
  return value;
}

// The kernels of a stream run one after the other here, so only the order in this kernel is checked.
inline void wait_for_previous_kernel() { sim::self->has_waited = true; }
inline void let_next_kernel_start() {}

// ---------------------------------------------------------------------------- fragments

namespace sim {

inline void load_matrices(const char* what, uint32_t (&r)[4], const void* p, bool transposed) {
  check_aligned(p, 16, what);
  offset_of(p, 16, what);
  Lane& lane = warp_sync(
      what, [&](Lane& l) { l.address = p; },
      [&](Warp& w) {
        stats().ldmatrix++;
        uintptr_t address[32];
        for (int i = 0; i < 32; i++) address[i] = reinterpret_cast<uintptr_t>(w.lane[i].address);
        count_wavefronts(address, 32, 16, stats());
        for (int q = 0; q < 4; q++)
          for (int i = 0; i < 32; i++) {
            uint16_t half[2];
            for (int e = 0; e < 2; e++) {
              const int row = transposed ? i % 4 * 2 + e : i / 4;
              const int column = transposed ? i / 4 : i % 4 * 2 + e;
              auto* from = static_cast<const char*>(w.lane[8 * q + row].address);
              std::memcpy(&half[e], from + column * 2, 2);
            }
            std::memcpy(&w.lane[i].out[q], half, 4);
          }
      });
  std::memcpy(r, lane.out, 16);
}

inline float bits_to_float(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

inline float half_of(uint32_t pair, int high, bool is_bfloat16) {
  const uint16_t h = uint16_t(pair >> (16 * high));
  if (is_bfloat16) return bits_to_float(uint32_t(h) << 16);
  _Float16 f;
  std::memcpy(&f, &h, 2);
  return float(f);
}

// D (16 x 8) += A (16 x 32) B (32 x 8), int8, int32 sums that wrap around.
inline void multiply_s8(Warp& w) {
  stats().mma++;
  int8_t a[16][32], b[8][32];
  for (int i = 0; i < 32; i++)
    for (int byte = 0; byte < 4; byte++) {
      const int k = i % 4 * 4 + byte;
      for (int q = 0; q < 4; q++)
        a[i / 4 + q % 2 * 8][k + q / 2 * 16] = int8_t(w.lane[i].in[q] >> (8 * byte));
      for (int q = 0; q < 2; q++) b[i / 4][k + q * 16] = int8_t(w.lane[i].in[4 + q] >> (8 * byte));
    }
  for (int i = 0; i < 32; i++)
    for (int q = 0; q < 4; q++) {
      const int8_t *row = a[i / 4 + q / 2 * 8], *column = b[i % 4 * 2 + q % 2];
      int32_t sum = 0;
      for (int k = 0; k < 32; k++) sum += int32_t(row[k]) * column[k];
      w.lane[i].out[q] = w.lane[i].in[6 + q] + uint32_t(sum);
    }
}

// D (16 x 8) += A (16 x 16) B (16 x 8), float sums; the hardware sums in another order.
inline void multiply_half(Warp& w, bool is_bfloat16) {
  stats().mma++;
  float a[16][16], b[8][16];
  for (int i = 0; i < 32; i++)
    for (int e = 0; e < 2; e++) {
      const int k = i % 4 * 2 + e;
      for (int q = 0; q < 4; q++)
        a[i / 4 + q % 2 * 8][k + q / 2 * 8] = half_of(w.lane[i].in[q], e, is_bfloat16);
      for (int q = 0; q < 2; q++) b[i / 4][k + q * 8] = half_of(w.lane[i].in[4 + q], e, is_bfloat16);
    }
  for (int i = 0; i < 32; i++)
    for (int q = 0; q < 4; q++) {
      double sum = bits_to_float(w.lane[i].in[6 + q]);
      for (int k = 0; k < 16; k++)
        sum += double(a[i / 4 + q / 2 * 8][k]) * b[i % 4 * 2 + q % 2][k];
      const float rounded = float(sum);
      std::memcpy(&w.lane[i].out[q], &rounded, 4);
    }
}

inline float e2m1(uint32_t code) {
  constexpr float kSizes[] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6};
  return code & 8 ? -kSizes[code & 7] : kSizes[code & 7];
}

inline float block_scale(uint32_t byte, bool mx) {
  if (mx) return byte == 255 ? NAN : std::ldexp(1.0f, int(byte) - 127);
  const int exponent = int(byte >> 3 & 15), mantissa = int(byte & 7);
  if ((byte & 127) == 127) return NAN;
  return exponent ? std::ldexp(float(8 + mantissa), exponent - 10) : std::ldexp(float(mantissa), -9);
}

// D (16 x 8) += A (16 x 64) B (64 x 8), FP4 with a scale for each block of a row or a column. Exact
// products; the hardware sums in another order.
inline void multiply_fp4(Warp& w, bool mx) {
  stats().mma++;
  double a[16][64], b[8][64];
  const int blocks = mx ? 2 : 4, block = 64 / blocks;
  auto scale = [&](int lane, int operand, int k) {
    return double(block_scale(w.lane[lane].in[10 + operand] >> (k / block * 8) & 255, mx));
  };
  for (int i = 0; i < 32; i++)
    for (int e = 0; e < 8; e++) {
      const int k = i % 4 * 8 + e, g = i / 4;
      for (int q = 0; q < 4; q++) {
        const int row = g + q % 2 * 8, column = k + q / 2 * 32;
        a[row][column] =
            e2m1(w.lane[i].in[q] >> (4 * e) & 15) * scale(g * 4 + q % 2, 0, column);
      }
      for (int q = 0; q < 2; q++)
        b[g][k + q * 32] = e2m1(w.lane[i].in[4 + q] >> (4 * e) & 15) * scale(g * 4, 1, k + q * 32);
    }
  for (int i = 0; i < 32; i++)
    for (int q = 0; q < 4; q++) {
      double sum = bits_to_float(w.lane[i].in[6 + q]);
      for (int k = 0; k < 64; k++) sum += a[i / 4 + q / 2 * 8][k] * b[i % 4 * 2 + q % 2][k];
      const float rounded = float(sum);
      std::memcpy(&w.lane[i].out[q], &rounded, 4);
    }
}

template <class C, class Run>
inline void mma(const char* what, C (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                Run run, uint32_t scales_a = 0, uint32_t scales_b = 0) {
  Lane& lane = warp_sync(
      what,
      [&](Lane& l) {
        std::memcpy(l.in, a, 16);
        l.in[4] = b0;
        l.in[5] = b1;
        std::memcpy(l.in + 6, c, 16);
        l.in[10] = scales_a;
        l.in[11] = scales_b;
      },
      run);
  std::memcpy(c, lane.out, 16);
}

}  // namespace sim

inline void ldmatrix_x4(uint32_t (&r)[4], const void* p) {
  sim::load_matrices("ldmatrix", r, p, false);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* p) {
  sim::load_matrices("ldmatrix.trans", r, p, true);
}
inline void stmatrix_x4_trans(void* p, const uint32_t (&r)[4]) {
  sim::check_aligned(p, 16, "stmatrix");
  sim::mark_dirty(sim::offset_of(p, 16, "stmatrix"), 16);
  sim::note_access(p, 16);
  sim::warp_sync(
      "stmatrix",
      [&](sim::Lane& l) {
        l.address = p;
        std::memcpy(l.in, r, 16);
      },
      [](sim::Warp& w) {
        for (int i = 0; i < 32; i++) {  // the row of lane i is a column of matrix i / 8
          uint16_t row[8];
          for (int k = 0; k < 8; k++)
            row[k] = uint16_t(w.lane[k * 4 + i % 8 / 2].in[i / 8] >> (i % 2 * 16));
          std::memcpy(const_cast<void*>(w.lane[i].address), row, 16);
        }
      });
}
inline uint32_t transpose_8x8(uint32_t v) {
  auto half = [](const sim::Warp& w, int row, int column) {
    return w.lane[row * 4 + column / 2].in[0] >> (column % 2 * 16) & 0xFFFF;
  };
  return sim::warp_sync(
             "movmatrix", [&](sim::Lane& l) { l.in[0] = v; },
             [&](sim::Warp& w) {
               for (int i = 0; i < 32; i++)
                 w.lane[i].out[0] =
                     half(w, i % 4 * 2, i / 4) | half(w, i % 4 * 2 + 1, i / 4) << 16;
             })
      .out[0];
}
inline void mma_s8(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  sim::mma("mma.s8", c, a, b0, b1, [](sim::Warp& w) { sim::multiply_s8(w); });
}
inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  sim::mma("mma.bf16", c, a, b0, b1, [](sim::Warp& w) { sim::multiply_half(w, true); });
}
inline void mma_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  sim::mma("mma.f16", c, a, b0, b1, [](sim::Warp& w) { sim::multiply_half(w, false); });
}

template <bool mx>
inline void mma_fp4(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                    uint32_t scales_a, uint32_t scales_b) {
  sim::mma(mx ? "mma.mxf4" : "mma.nvf4", c, a, b0, b1,
           [](sim::Warp& w) { sim::multiply_fp4(w, mx); }, scales_a, scales_b);
}

// ---------------------------------------------------------------------------- arithmetic

inline uint32_t byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = (uint64_t(b) << 32) | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; i++) {
    const uint32_t s = (selector >> (4 * i)) & 15;
    uint8_t byte = uint8_t(bytes >> (8 * (s & 7)));
    if (s & 8) byte = byte & 0x80 ? 0xFF : 0;
    result |= uint32_t(byte) << (8 * i);
  }
  return result;
}

inline int32_t dp4a(uint32_t a, uint32_t b, int32_t c) {
  for (int i = 0; i < 32; i += 8) c += int32_t(int8_t(a >> i)) * int8_t(b >> i);
  return c;
}

inline float fadd(float a, float b) { return a + b; }
inline float fsub(float a, float b) { return a - b; }
inline float fmul(float a, float b) { return a * b; }
inline float fdiv(float a, float b) { return a / b; }
inline float ffma(float a, float b, float c) { return std::fma(a, b, c); }
inline float fsqrt(float a) { return std::sqrt(a); }
inline float reciprocal(float a) { return 1 / a; }
inline float max_magnitude(float a, float b) {
  if (a != a || b != b) return sim::bits_to_float(0x7fffffff);  // the NaN of the hardware
  return std::fabs(b) > a ? std::fabs(b) : a;
}
inline float int_to_float(int32_t a) { return float(a); }

// Errors as large as those that PTX allows, of a sign that depends on the argument.
namespace sim {
inline float flush(float a) { return std::fabs(a) < 0x1p-126f ? std::copysign(0.0f, a) : a; }
inline float inexact(double exact, float argument, double error) {
  uint32_t hash;
  std::memcpy(&hash, &argument, 4);
  hash *= 2654435761u;
  return flush(float(exact * (1 + (hash >> 31 ? error : -error))));
}
}  // namespace sim
inline float exp2_approximate(float a) {
  return sim::inexact(std::exp2(double(sim::flush(a))), a, 0x1p-22);
}
inline float reciprocal_approximate(float a) {
  return sim::inexact(1 / double(sim::flush(a)), a, 0x1p-23);
}

// To the nearest integer, ties to even; saturates, and NaN is 0.
inline int32_t round_to_int(float f) {
  if (f != f) return 0;
  if (f >= 2147483648.0f) return INT32_MAX;
  if (f <= -2147483648.0f) return INT32_MIN;
  return int32_t(std::nearbyint(f));
}

inline uint32_t float_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}
inline float bits_float(uint32_t u) { return sim::bits_to_float(u); }

inline uint16_t float_to_bf16(float f) {
  const uint32_t u = float_bits(f);
  if ((u & 0x7fffffff) > 0x7f800000) return 0x7fff;  // the NaN of the hardware
  return uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
inline float bf16_to_float(uint16_t h) { return bits_float(uint32_t(h) << 16); }

inline uint16_t float_to_f16(float f) {
  if (f != f) return 0x7fff;
  const _Float16 h = _Float16(f);
  uint16_t u;
  std::memcpy(&u, &h, 2);
  return u;
}
inline uint32_t floats_to_bf16x2(float low, float high) {
  return float_to_bf16(low) | uint32_t(float_to_bf16(high)) << 16;
}
inline uint32_t floats_to_f16x2(float low, float high) {
  return float_to_f16(low) | uint32_t(float_to_f16(high)) << 16;
}

namespace sim {

// a * b + c of bfloat16, rounded once. The double is exact but for its last bit, which is set if a remainder
// is lost (round to odd); so is the float.
inline uint16_t fma_bf16(uint16_t a, uint16_t b, uint16_t c) {
  const double product = double(bf16_to_float(a)) * bf16_to_float(b), addend = bf16_to_float(c);
  double sum = product + addend;
  const double rest = std::fabs(product) > std::fabs(addend) ? addend - (sum - product)
                                                             : product - (sum - addend);
  uint64_t bits;
  std::memcpy(&bits, &sum, 8);
  if (std::isfinite(sum) && rest != 0 && !(bits & 1)) {
    bits += (rest > 0) == (sum > 0) ? 1 : -1;
    std::memcpy(&sum, &bits, 8);
  }
  float f = float(sum);
  if (std::isfinite(f) && double(f) != sum) {
    uint32_t word = float_bits(f);
    if (std::fabs(double(f)) > std::fabs(sum)) word--;  // towards zero
    f = bits_to_float(word | 1);
  }
  return float_to_bf16(f);
}

}  // namespace sim

inline uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
  return sim::fma_bf16(uint16_t(a), uint16_t(b), uint16_t(c)) |
         uint32_t(sim::fma_bf16(uint16_t(a >> 16), uint16_t(b >> 16), uint16_t(c >> 16))) << 16;
}
inline float f16_to_float(uint16_t u) { return sim::half_of(u, 0, false); }

}  // namespace dtq
