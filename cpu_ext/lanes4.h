// SPDX-License-Identifier: Apache-2.0
// Vectors of four, in the vector extension of the compiler: for any machine.
#pragma once
#include <string.h>

#include "kernels.h"
#include "lanes.h"

namespace dtq {
namespace {

struct Lanes4 : Lanes<4> {
  template <int h>
  static V swap_lanes(V v) {
    return V{v[0 ^ h], v[1 ^ h], v[2 ^ h], v[3 ^ h]};
  }

  static void store_low_bytes(U v, int8_t* out) {
    for (int i = 0; i < kLanes; i++) out[i] = (int8_t)v[i];
  }

  static void store_low_halves(U v, uint16_t* out) {
    for (int i = 0; i < kLanes; i++) out[i] = (uint16_t)v[i];
  }

  static V load_part(const float* p, int count) {
    V v = {};
    for (int i = 0; i < count; i++) v[i] = p[i];
    return v;
  }

  static U load_part(const uint16_t* p, int count) {
    U v = {};
    for (int i = 0; i < count; i++) v[i] = p[i];
    return v;
  }

  static V at_least(V v, V limit) { return v < limit ? limit : v; }
  static V at_most(V v, V limit) { return v > limit ? limit : v; }

  static U load_bytes(const uint8_t* p) { return U{p[0], p[1], p[2], p[3]}; }

  static U load_halves(const void* p) {
    uint16_t h[4];
    memcpy(h, p, sizeof h);
    return U{h[0], h[1], h[2], h[3]};
  }

  static I load_signed_bytes(const uint8_t* p) {
    return I{(int8_t)p[0], (int8_t)p[1], (int8_t)p[2], (int8_t)p[3]};
  }
};

}  // namespace
}  // namespace dtq
