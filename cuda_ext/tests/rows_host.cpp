// SPDX-License-Identifier: Apache-2.0
// The row and weight kernels on the emulator, as a library for tests/kernels/test_cuda_rows.py, which passes
// tensors by address and compares the results with the torch reference.
#include "../rows.cu"
#include "../weights.cu"

using namespace dtq;

extern "C" {

// To verify that the structs of the test match those of launch_rows.h.
size_t size_of_rows() { return sizeof(Rows); }
size_t size_of_weight() { return sizeof(Weight); }
size_t size_of_small_m() { return sizeof(SmallM); }

void use_seed(uint64_t seed) { sim::session().seed = seed; }
const char* last_error() { return sim::session().error.c_str(); }
uint64_t launches() { return sim::session().launches; }
const char* why(int code) { return refusal(code); }

int rows(const Rows* r) { return launch_rows(*r, nullptr); }
int dequantize(const Weight* w, void* out, int type) {
  return launch_dequantize(*w, out, (Float)type, nullptr);
}
int small_m(const SmallM* f) { return launch_small_m(*f, nullptr); }

// ---------------------------------------------------------------------------- single functions

float e4m3_to_float(uint32_t code) { return from_e4m3(code); }
uint32_t float_to_e4m3(float x) { return to_e4m3(x); }
}
