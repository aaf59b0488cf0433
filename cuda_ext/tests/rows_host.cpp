// SPDX-License-Identifier: Apache-2.0
// The row and weight kernels under the emulator, as a library for tests/test_cuda_rows.py: tensors of
// torch are passed by address and the numbers compared with the torch reference.
#include <random>

#include "../rows.cu"
#include "../weights.cu"

using namespace dtq;

extern "C" {

// So that the structs of the test cannot drift from those of launch_rows.h.
size_t size_of_rows() { return sizeof(Rows); }
size_t size_of_weight() { return sizeof(Weight); }
size_t size_of_few() { return sizeof(Few); }

void use_seed(uint64_t seed) { sim::session().seed = seed; }
const char* last_error() { return sim::session().error.c_str(); }
uint64_t launches() { return sim::session().launches; }
const char* why(int code) { return refusal(code); }

int rows(const Rows* r) { return launch_rows(*r, nullptr); }
int dequantize(const Weight* w, void* out, int type) {
  return launch_dequantize(*w, out, (Float)type, nullptr);
}
int few(const Few* f) { return launch_few(*f, nullptr); }

// ---------------------------------------------------------------------------- by themselves

float e4m3_to_float(uint32_t code) { return from_e4m3(code); }
uint32_t float_to_e4m3(float x) { return to_e4m3(x); }

// Pairs for which `quotient` is not the rounded quotient; all kinds of mantissas, also next to a tie.
int64_t wrong_quotients(int64_t count, uint64_t seed) {
  std::mt19937_64 random(seed);
  int64_t wrong = 0;
  for (int64_t i = 0; i < count; i++) {
    const uint64_t r = random();
    const float scale = bits_float((uint32_t)(100 + r % 60) << 23 | (r >> 8 & 0x7fffff));
    float x = bits_float((uint32_t)(r >> 32 & 0x7fffff) | 0x3f800000) * scale *
              (float)(r >> 56 & 127);
    if (i % 2) {  // next to a half-integer number of scales
      x = ((float)(r >> 56 & 127) + 0.5f) * scale;
      x = bits_float(float_bits(x) + (uint32_t)(r >> 40 & 7) - 3);
    }
    wrong += quotient(x, scale, 1.0f / scale) != x / scale;
  }
  return wrong;
}
}
