// SPDX-License-Identifier: Apache-2.0
// Shared by the programs that test kernels: memory, random numbers, a count of failures. Built with
// -DDTQ_SIM they run on the emulator, by nvcc on a GPU.
#pragma once
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../arch.cuh"

// Of a loop of the tests themselves, which would take longer than the kernels.
#if defined(DTQ_SIM)
#define UNCHECKED __attribute__((optimize("O3"), no_sanitize("address", "undefined")))
#else
#define UNCHECKED
#endif

struct Random {
  uint64_t state;
  explicit Random(uint64_t seed) : state(seed * 0x9E3779B97F4A7C15ull + 1) {}
  uint64_t next() {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return state >> 16;
  }
  int between(int low, int high) { return low + int(next() % uint64_t(high - low + 1)); }
  float real(float low, float high) { return low + (high - low) * float(next() % 65536) / 65536.f; }
};

// Exactly the requested size, aligned as by a GPU's allocator.
template <class T>
struct Buffer {
  T* data = nullptr;
  int64_t size;
  explicit Buffer(int64_t n) : size(n) {
    const size_t bytes = size_t(n ? n : 1) * sizeof(T);
#if defined(DTQ_SIM)
    if (posix_memalign(reinterpret_cast<void**>(&data), 256, bytes)) std::abort();
#else
    if (cudaMallocManaged(&data, bytes) != cudaSuccess) std::abort();
#endif
  }
  ~Buffer() {
#if defined(DTQ_SIM)
    std::free(data);
#else
    cudaFree(data);
#endif
  }
  Buffer(const Buffer&) = delete;
  T& operator[](int64_t i) { return data[i]; }
};

// Does nothing on the emulator, where a launch is synchronous.
inline int wait_for_device() {
#if defined(DTQ_SIM)
  return 0;
#else
  return cudaDeviceSynchronize();
#endif
}

// Conversions of the host, written independently of those of the device, which are under test.
inline float float_from(uint32_t bits, dtq::Float type) {
  float f;
  if (type == dtq::kFloat16) {
    const uint32_t exponent = bits >> 10 & 31, sign = (bits & 0x8000) << 16;
    bits = (bits & 0x7fff) << 13;  // the exponent bias of a half is 112 below that of a float
    std::memcpy(&f, &bits, 4);
    f *= 0x1p112f;
    std::memcpy(&bits, &f, 4);
    bits |= sign | (exponent == 31 ? 0x7f800000 : 0);
  } else if (type == dtq::kBFloat16) {
    bits <<= 16;
  }
  std::memcpy(&f, &bits, 4);
  return f;
}

// Finite values, to nearest, ties to even.
inline uint32_t rounded_to(float f, dtq::Float type) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  if (type == dtq::kFloat32) return u;
  if (type == dtq::kBFloat16) return (u + 0x7fff + (u >> 16 & 1)) >> 16;
  const uint32_t sign = u >> 16 & 0x8000;
  u &= 0x7fffffff;
  if (u >= 0x47800000) return sign | 0x7c00;
  if (u < 0x38800000) {  // subnormal: the sum with 2^-1 rounds it
    std::memcpy(&f, &u, 4);
    f += 0.5f;
    std::memcpy(&u, &f, 4);
    return sign | (u - 0x3f000000);
  }
  return sign | (u + 0xfff + (u >> 13 & 1) - 0x38000000) >> 13;
}

inline int failures = 0;

// One line per case; the last line of a test is `done()`. With -DDTQ_FIRST_FAILURE the first failure ends the program.
__attribute__((format(printf, 2, 3))) inline bool check(bool good, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::printf("%s ", good ? "ok  " : "FAIL");
  std::vprintf(format, arguments);
  std::printf("\n");
  std::fflush(stdout);
  va_end(arguments);
  failures += !good;
#if defined(DTQ_FIRST_FAILURE)
  if (failures) std::exit(1);
#endif
  return good;
}

inline int done() {
  std::printf("%d failures\n", failures);
  return failures != 0;
}

struct Seeds {
  int first, end;
};

// The seeds of the command line, "end" or "first:end".
inline Seeds seeds(int argc, char** argv, int otherwise) {
  if (argc < 2) return {0, otherwise};
  const char* colon = std::strchr(argv[1], ':');
  return colon ? Seeds{std::atoi(argv[1]), std::atoi(colon + 1)} : Seeds{0, std::atoi(argv[1])};
}
