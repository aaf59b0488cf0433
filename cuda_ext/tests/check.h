// SPDX-License-Identifier: Apache-2.0
// What the tests that run kernels on the emulator share: random numbers, and a count of failures.
#pragma once
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../arch.cuh"

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

inline int failures = 0;

// One line per case; the last line of a test is `done()`.
__attribute__((format(printf, 2, 3))) inline bool check(bool good, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::printf("%s ", good ? "ok  " : "FAIL");
  std::vprintf(format, arguments);
  std::printf("\n");
  std::fflush(stdout);
  va_end(arguments);
  failures += !good;
  return good;
}

inline int done() {
  std::printf("%d failures\n", failures);
  return failures != 0;
}

// Seeds 0 .. n - 1, n from the command line.
inline int seeds(int argc, char** argv, int otherwise) {
  return argc > 1 ? std::atoi(argv[1]) : otherwise;
}
