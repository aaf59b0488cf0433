// SPDX-License-Identifier: Apache-2.0
// Which instruction sets this machine has, and which one is used.
#include "dispatch.h"

#include <string.h>

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif
#ifdef __x86_64__
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace dtq {

alignas(64) int8_t codebook_of_byte[2][256][16];
uint8_t trits_of[256][8];
float e4m3_of[256];

namespace {

#ifdef __x86_64__
struct Registers {
  unsigned a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(unsigned leaf, unsigned sub) {
  Registers r;
  if (!__get_cpuid_count(leaf, sub, &r.a, &r.b, &r.c, &r.d)) return {};
  return r;
}

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

bool has_avxvnni() { return has_avx2() && (cpuid(7, 1).a >> 4 & 1); }

bool has_vnni() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}

bool has_amx() {
  const unsigned d = cpuid(7, 0).d;
  if (!has_vnni() || !(d >> 24 & 1) || !(d >> 25 & 1)) return false;  // tiles, int8
#ifdef __linux__
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low >> 17 & 3) != 3) return false;
  // a process must request tile data once; threads and forks inherit the permission
  constexpr long kRequest = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}
#endif

#ifdef __aarch64__
bool has_dot_products() {
#ifdef __linux__
  constexpr unsigned long kDotProducts = 1 << 20;  // HWCAP_ASIMDDP
  return getauxval(AT_HWCAP) & kDotProducts;
#else
  return false;
#endif
}
#endif

struct Candidate {
  const Kernels* kernels;
  bool (*present)();
};

bool always() { return true; }

// from the most portable to the fastest
const Candidate kCandidates[] = {
    {&portable, always},
#ifdef __x86_64__
    {&avx2, has_avx2},
    {&avxvnni, has_avxvnni},
    {&vnni, has_vnni},
    {&amx, has_amx},
#endif
#ifdef __aarch64__
    {&neon, has_dot_products},
#endif
};

void fill_tables() {
  for (int byte = 0; byte < 256; byte++) {
    for (int bits = 3; bits <= 4; bits++)
      for (int code = 0; code < 1 << bits; code++) {
        const int zero = byte & ((1 << bits) - 1), scale2 = (byte >> bits) + 1;
        codebook_of_byte[bits - 3][byte][code] = (int8_t)((code - zero) * scale2);
      }
    const int exponent = byte >> 3 & 15, mantissa = byte & 7;
    const float size = exponent ? __builtin_ldexpf(8 + mantissa, exponent - 10)
                                : __builtin_ldexpf(mantissa, -9);
    e4m3_of[byte] = (byte & 127) == 127 ? __builtin_nanf("") : byte & 128 ? -size : size;
    for (int i = 0, rest = byte; i < 5; i++, rest /= 3) trits_of[byte][i] = rest % 3;
  }
}

const Kernels* chosen = nullptr;

}  // namespace

bool has_bfloat16() {
#ifdef __x86_64__
  static const bool found = has_vnni() && (cpuid(7, 1).a >> 5 & 1);
  return found;
#else
  return false;
#endif
}

const Kernels& kernels() {
  if (!chosen) use(nullptr);
  return *chosen;
}

bool use(const char* name) {
#ifdef __x86_64__
  __builtin_cpu_init();
#endif
  fill_tables();
  const Kernels* best = nullptr;
  bool found = name == nullptr;
  for (const Candidate& c : kCandidates) {
    const bool named = name && !strcmp(name, c.kernels->name);
    if (c.present()) best = c.kernels;
    if (named) {
      found = best == c.kernels;
      break;
    }
  }
  chosen = best;
  return found;
}

}  // namespace dtq
