// SPDX-License-Identifier: Apache-2.0
// `launch` of arch.cuh for the emulator, and its state between launches.
#pragma once
#include "../types.h"
#include "block.h"

namespace dtq {

using Grid = sim::Dim;
using sim::Shape;

namespace sim {

struct Session {
  uint64_t seed = 0;  // of the next launches
  Stats stats;        // summed over launches
  std::string error;  // of the last launch that failed
  uint64_t launches = 0;
};

inline Session& session() {
  static Session s;
  return s;
}

}  // namespace sim

template <class P>
int launch(void (*kernel)(P), const Shape& s, Stream, const P& p) {
  auto& session = sim::session();
  session.launches++;
  const sim::Outcome out = sim::launch(s, session.seed, [&] { kernel(p); });
  session.stats += out.stats;
  if (out.error.empty()) return kOk;
  session.error = out.error;
  return kEmulator;
}

}  // namespace dtq
