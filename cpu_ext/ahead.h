// SPDX-License-Identifier: Apache-2.0
// Memory that is needed soon, fetched while the products run: they leave the load units idle half of the time,
// and wait for nothing but registers and the first-level cache.
#pragma once
#include <stdint.h>

namespace dtq {
namespace {

// Addresses `stride` bytes apart, up to `last`.
struct Lines {
  const char *at, *last;
  int64_t stride;

  // The present address; then the next one, or the last one again.
  const char* next() {
    const char* now = at;
    at += at < last ? stride : 0;
    return now;
  }
};

struct Ahead {
  Lines weights, out, residual;

  // One line of each, called for each step of a block of sums.
  void fetch() {
    __builtin_prefetch(weights.next());
    __builtin_prefetch(out.next(), 1);
    __builtin_prefetch(residual.next());
  }
};

}  // namespace
}  // namespace dtq
