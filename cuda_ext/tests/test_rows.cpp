// SPDX-License-Identifier: Apache-2.0
// Compares the row and weight kernels with plain loops on the emulator: test_rows [seeds]. For sanitizers
// and mutation testing; tests/kernels/test_cuda_rows.py compares them with torch.
//
// -DDTQ_ONLY=1 compiles rows of activations alone, 2 stored weights alone.
#include <cmath>
#include <cstring>

#include "check.h"
#if !defined(DTQ_ONLY) || DTQ_ONLY == 1
#define DTQ_TEST_ROWS 1
#include "../rows.cu"
#endif
#if !defined(DTQ_ONLY) || DTQ_ONLY == 2
#define DTQ_TEST_WEIGHTS 1
#include "../weights.cu"
#endif

using namespace dtq;

namespace {

template <class T>
using Array = std::vector<T>;

// ---------------------------------------------------------------------------- rows

#if defined(DTQ_TEST_ROWS)

// A row before quantization, by plain loops.
Array<float> plain_row(const Rows& r, int64_t row) {
  const int64_t columns = r.columns;
  const float* x = (const float*)r.x + row * r.stride;
  Array<float> v(x, x + columns);
  if (r.prologue == kNorm) {
    auto neighbours = [](const float* values) {
      float v[32];
      std::copy(values, values + 32, v);
      for (int count = 16; count; count /= 2)
        for (int i = 0; i < count; i++) v[i] = v[2 * i] + v[2 * i + 1];
      return v[0];
    };
    auto sum = [&](auto&& term) {
      float places[32] = {};
      for (int64_t warp = 0; warp * 512 < columns; warp++) {
        float vectors[32] = {};
        for (int j = 0; j < 32; j++) {
          float v[16] = {};
          for (int i = 0; i < 16; i++) {
            const int64_t k = warp * 512 + j * 16 + i;
            if (k < columns) v[i] = term(k);
          }
          for (int half = 8; half; half /= 2)
            for (int i = 0; i < half; i++) v[i] += v[i + half];
          vectors[j] = v[0];
        }
        places[warp % 32] += neighbours(vectors);
      }
      return neighbours(places);
    };
    const float mean = sum([&](int64_t k) { return x[k]; }) / (float)columns;
    const float variance =
        sum([&](int64_t k) { return (x[k] - mean) * (x[k] - mean); }) / (float)columns;
    const float rstd = 1 / std::sqrt(variance + r.eps);
    const int64_t by = row / r.rows_per_modulate * r.modulate_stride;
    for (int64_t k = 0; k < columns; k++) {
      v[k] = (v[k] - mean) * rstd;
      v[k] = v[k] * (1 + ((const float*)r.modulate_scale)[by + k]);
      v[k] = v[k] + ((const float*)r.modulate_shift)[by + k];
    }
  }
  if (r.pre_scale)
    for (int64_t k = 0; k < columns; k++) v[k] *= bf16_to_float(r.pre_scale[k]);
  if (r.perm) {
    const Array<float> from = v;
    for (int64_t k = 0; k < columns; k++) v[k] = from[r.perm[k]];
  }
  for (int rotation = 0; rotation < r.num_rotations; rotation++) {
    if (rotation) {
      const Array<float> from = v;
      const int64_t blocks = columns / r.hadamard_block;
      for (int64_t k = 0; k < columns; k++)
        v[k % r.hadamard_block * blocks + k / r.hadamard_block] = from[k];
    }
    for (int64_t half = 1; half < r.hadamard_block; half *= 2)
      for (int64_t k = 0; k < columns; k++)
        if (!(k & half)) {
          const float a = v[k], b = v[k + half];
          v[k] = a + b;
          v[k + half] = a - b;
        }
    if (r.hadamard_block > 1)
      for (float& value : v) value *= (float)std::pow((double)r.hadamard_block, -0.5);
  }
  return v;
}

void check_rows(uint64_t seed, int64_t rows, int64_t columns, int64_t block, Prologue prologue,
                int num_rotations = 1, bool permuted = false, bool is_static = false, int64_t pad = 0) {
  Random random(seed);
  // exactly the required size, so that address sanitizer detects accesses past the end
  Array<float> x(rows * columns), scale(columns * rows), shift(columns * rows), measured(rows);
  // with all bits of a float, so that a sum depends on its order
  for (auto* a : {&x, &scale, &shift})
    for (float& value : *a) value = random.real(-3, 3) * 0.70710678f;
  Array<uint16_t> pre(columns);
  for (auto& value : pre) value = float_to_bf16(random.real(-1, 1));
  Array<int32_t> perm(columns), sums(rows);
  for (int64_t k = 0; k < columns; k++) perm[k] = (int32_t)k;
  for (int64_t k = columns - 1; k > 0; k--) std::swap(perm[k], perm[random.between(0, (int)k)]);
  const int64_t width = columns + pad, bin = 1;
  Array<int8_t> x_q(rows * width, 55);
  const float table[2] = {9, 0.02f};
  Rows r = {};
  r.x = x.data(), r.rows = rows, r.columns = r.stride = columns;
  r.prologue = prologue, r.eps = 1e-6f;
  r.modulate_scale = scale.data(), r.modulate_shift = shift.data();
  r.modulate_stride = columns, r.rows_per_modulate = 2;
  r.pre_scale = pre.data(), r.perm = permuted ? perm.data() : nullptr;
  r.hadamard_block = block, r.num_rotations = num_rotations, r.qmax = 127;
  r.static_scale = is_static ? table : nullptr, r.bin = is_static ? &bin : nullptr;
  r.out = x_q.data(), r.out_stride = r.width = width, r.scale = measured.data();
  r.sums = sums.data();
  sim::session().seed = seed;
  const int status = launch_rows(r, nullptr);
  int64_t wrong = 0;
  for (int64_t row = 0; row < rows && status == kOk; row++) {
    const Array<float> v = plain_row(r, row);
    float amax = 0;
    for (float value : v) amax = std::max(amax, std::fabs(value));
    const float by = is_static ? table[1] : std::max(amax / 127, 1e-8f);
    int32_t sum = 0;
    wrong += measured[row] != by;
    for (int64_t k = 0; k < width; k++) {
      float want = k < columns ? std::nearbyint(v[k] / by) : 0;
      want = std::min(std::max(want, -127.f), 127.f);
      wrong += x_q[row * width + k] != want;
      sum += (int)want;
    }
    wrong += sums[row] != sum;
  }
  check(status == kOk && !wrong, "rows %lld x %lld block %lld prologue %d rotations %d: %lld wrong, %s",
        (long long)rows, (long long)columns, (long long)block, prologue, num_rotations, (long long)wrong,
        status == kOk ? "" : status == kEmulator ? sim::session().error.c_str() : refusal(status));
}

// x rounded to the values of a list, ties to the even index.
float nearest_of(const Array<float>& sizes, float x) {
  const float size = std::fabs(x);
  size_t best = 0;
  for (size_t i = 1; i < sizes.size(); i++) {
    const double far = std::fabs((double)size - sizes[i]), least = std::fabs((double)size - sizes[best]);
    if (far < least || (far == least && i % 2 == 0)) best = i;
  }
  return x < 0 ? -sizes[best] : sizes[best];
}

Array<float> e4m3_sizes() {
  Array<float> sizes;
  for (uint32_t code = 0; code < 127; code++) sizes.push_back(from_e4m3(code));
  return sizes;
}

float as_bf16(float x) { return bf16_to_float(float_to_bf16(std::max(x, 1e-30f))); }

// The row `v` fake-quantized by plain loops: the values of its FP4 codes, E2M1 values or rounded floats.
Array<float> plain_fake_quantize(const Array<float>& v, const Rows& r) {
  static const Array<float> e2m1 = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6}, e4m3 = e4m3_sizes();
  const int64_t columns = (int64_t)v.size();
  Array<float> out(v.size());
  float amax = 0;
  for (float value : v) amax = std::max(amax, std::fabs(value));
  const bool nv = r.output == kNvRow || (r.output == kFakeQuantized && r.rounding == kRoundNvFp4);
  const bool mx = r.output == kMxRow || (r.output == kFakeQuantized && r.rounding == kRoundMxFp4);
  if (r.output == kE2m1 || (r.output == kFakeQuantized && r.rounding == kRoundFp8Row)) {
    const bool small = r.output == kE2m1;
    const float scale = amax / (small ? 6.f : 448.f);
    for (int64_t k = 0; k < columns; k++)
      out[k] = amax == 0 ? 0 : nearest_of(small ? e2m1 : e4m3, v[k] / scale) * scale;
    return out;
  }
  const int64_t group = nv ? 16 : mx ? 32 : r.rounding == kRoundInt8AsymG128 ? 128 : 64;
  for (int64_t start = 0; start < columns; start += group) {
    float low = 0, high = 0, most = 0;
    for (int64_t k = start; k < start + group; k++) {
      low = std::min(low, v[k]), high = std::max(high, v[k]);
      most = std::max(most, std::fabs(v[k]));
    }
    for (int64_t k = start; k < start + group; k++) {
      if (nv) {
        const float whole = std::max(amax, 1e-30f), wanted = most / whole / (1.f / 2688) / 6;
        const float scale = nearest_of(e4m3, std::max(wanted, 0x1p-9f)) * (1.f / 2688);
        out[k] = nearest_of(e2m1, v[k] / whole / scale) * scale * whole;
      } else if (mx) {
        const float scale = most == 0 ? 1 : std::ldexp(1.f, std::ilogb(most) - 2);
        out[k] = nearest_of(e2m1, v[k] / scale) * scale;
      } else if (r.rounding == kRoundInt4G64) {
        const float scale = as_bf16(most / 7);
        out[k] = std::min(std::max(std::nearbyint(v[k] / scale), -8.f), 7.f) * scale;
      } else {
        const float top = r.rounding == kRoundInt8AsymG128 ? 255 : 15, scale = as_bf16((high - low) / top);
        const float zero = std::min(std::max(std::nearbyint(-low / scale), 0.f), top);
        const float code = std::min(std::max(std::nearbyint(v[k] / scale) + zero, 0.f), top);
        out[k] = (code - zero) * scale;
      }
    }
  }
  return out;
}

void check_floats(uint64_t seed, int64_t rows, int64_t columns, int64_t block, Output output,
                 Rounding rounding = kRoundInt4G64, bool permuted = false) {
  Random random(seed);
  Array<float> x(rows * columns), scale(rows), rounded(output == kFakeQuantized ? rows * columns : 0);
  for (float& value : x) value = random.real(-3, 3);
  for (int64_t k = 0; k < 64; k++) x[k] = 0;  // a group of zeros
  const float ties[] = {6, 0.25f, 0.75f, -1.25f, 1.75f, -2.5f, 3.5f, 5};  // of E2M1, in a row of its own
  for (int64_t k = 0; k < columns; k++) x[(rows - 1) * columns + k] = ties[k % 8];
  Array<int32_t> perm(columns);
  for (int64_t k = 0; k < columns; k++) perm[k] = (int32_t)(columns - 1 - k);
  const bool fp4 = output == kNvRow || output == kMxRow;
  const int64_t group = output == kNvRow ? 16 : 32;
  Buffer<uint8_t> codes(output == kFakeQuantized ? 0 : rows * columns / (fp4 ? 2 : 1));
  Buffer<uint8_t> blocks(fp4 ? rows * columns / group : 0);
  Rows r = {};
  r.x = x.data(), r.rows = rows, r.columns = r.stride = columns;
  r.perm = permuted ? perm.data() : nullptr, r.hadamard_block = block, r.num_rotations = 1, r.qmax = 127;
  r.output = output, r.rounding = rounding, r.out_type = kFloat32;
  r.out = output == kFakeQuantized ? (void*)rounded.data() : codes.data;
  r.out_stride = fp4 ? columns / 2 : columns, r.block_scale = blocks.data;
  r.scale = output == kFakeQuantized ? nullptr : scale.data();
  sim::session().seed = seed;
  const int status = launch_rows(r, nullptr);
  int64_t wrong = 0;
  const float sizes[] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6};
  for (int64_t row = 0; row < rows && status == kOk; row++) {
    const Array<float> want = plain_fake_quantize(plain_row(r, row), r);
    for (int64_t k = 0; k < columns; k++) {
      const int64_t at = row * columns + k;
      float got;
      if (output == kFakeQuantized) {
        got = rounded[at];
      } else if (output == kE2m1) {
        got = (float)(int8_t)codes[at] * scale[row];
      } else {
        const int code = codes[at / 2] >> (k % 2 * 4) & 15;
        const uint8_t byte = blocks[at / group];
        const float by = output == kNvRow ? from_e4m3(byte) : std::ldexp(1.f, byte - 127);
        got = (code & 8 ? -1 : 1) * sizes[code & 7] * by * scale[row];
      }
      // the scales of NVFP4 are multiplied in another order
      wrong += std::fabs(got - want[k]) > 1e-6f * std::fabs(want[k]);
    }
  }
  check(status == kOk && !wrong, "output %d rounding %d of %lld x %lld block %lld: %lld wrong, %s", output,
        rounding, (long long)rows, (long long)columns, (long long)block, (long long)wrong,
        status == kOk ? "" : status == kEmulator ? sim::session().error.c_str() : refusal(status));
}

void test_floats(uint64_t seed) {
  for (Output output : {kE2m1, kNvRow, kMxRow}) {
    check_floats(seed, 3, 1152, 64, output);
    check_floats(seed, 2, 640, 1, output, kRoundInt4G64, true);  // tiled
  }
  for (Rounding rounding :
       {kRoundInt4G64, kRoundInt4AsymG64, kRoundInt8AsymG128, kRoundFp8Row, kRoundNvFp4, kRoundMxFp4}) {
    check_floats(seed, 3, 1152, 128, kFakeQuantized, rounding);
    check_floats(seed, 2, 640, 1, kFakeQuantized, rounding, true);
  }
}

// Quotients x / s so close to a half-integer h below 128 that rounding them to float may move them across:
// with 24-bit mantissas X and S, X 2^a = M S + d, where M 2^-a is half a unit in the last place from h and
// d is small. M is odd, so every d has one S. For |d| > 3 the error of `quotient` cannot reach the tie.
void check_quotients() {
  int64_t tried = 0, wrong = 0;
  for (int j = 0; j < 128; j++) {
    const float h = (float)j + 0.5f;
    uint64_t mantissa = 2 * j + 1;
    while (mantissa < 1 << 23) mantissa *= 2;
    for (int side = -1; side <= 1; side += 2)
      for (int a = 24; a <= 25; a++)
        for (int64_t d = -16; d <= 16; d++) {
          const bool below = mantissa == 1 << 23 && side < 0;  // of a power of two: half the spacing
          const uint64_t M = below ? 4 * mantissa - 1 : 2 * mantissa + (uint64_t)side;
          const int bits = a + below;
          uint64_t inverse = 1;  // of M modulo 2^64, by Newton
          for (int i = 0; i < 7; i++) inverse *= 2 - M * inverse;
          const uint64_t S = (uint64_t)-d * inverse & ((uint64_t(1) << bits) - 1);
          const uint64_t X = (M * S + (uint64_t)d) >> bits;
          if (S < 1 << 23 || S >= 1 << 24 || X < 1 << 23 || X >= 1 << 24) continue;
          const float scale = (float)S * 0x1p-30f;
          for (float x = (float)X * 0x1p-40f; x < 256 * scale; x *= 2) {
            if (std::fabs(x / scale - h) > h * 1e-6f) continue;
            tried++;
            wrong += nearest(quotient(x, scale, 1 / scale)) != nearest(x / scale);
          }
        }
  }
  check(!wrong && tried > 1000, "%lld of %lld quotients near a tie", (long long)wrong,
        (long long)tried);
}

// divide_by_integer and modulate_row give what a division gives.
void check_divisions(uint64_t seed) {
  Random random(seed);
  int64_t wrong = 0;
  for (int n = 1; n <= 16384; n++)
    for (int i = 0; i < 40; i++) {
      // quotients with as few bits as a tie has, next to them and anywhere
      const float near = (float)n * ((float)random.between(1 << 23, 1 << 24) * 0x1p-20f);
      const float x = i % 2 ? std::nextafter(near, i % 4 == 1 ? 0.0f : 1e30f) : random.real(-1e6f, 1e6f);
      wrong += divide_by_integer(x, (float)n, 1 / (float)n) != x / (float)n;
    }
  for (float x : {INFINITY, -INFINITY, 0.0f, 3e38f, 1e-30f})
    for (int n : {1, 3, 127, 3072}) wrong += divide_by_integer(x, (float)n, 1 / (float)n) != x / (float)n;
  wrong += !std::isnan(divide_by_integer(NAN, 3, 1.0f / 3));
  for (int i = 0; i < 100000; i++) {
    const int shift = random.between(0, 30);
    RowPlan p = {};
    p.r.rows_per_modulate = i < 4 ? i + 1 : random.between(1 << shift, (int)((2u << shift) - 1));
    p.r.columns = 1;
    set_divisors(p);
    for (uint32_t row : {0u, (uint32_t)random.between(0, INT32_MAX - 1), (uint32_t)INT32_MAX,
                         uint32_t(p.r.rows_per_modulate), uint32_t(p.r.rows_per_modulate - 1),
                         uint32_t(INT32_MAX / p.r.rows_per_modulate * p.r.rows_per_modulate)})
      wrong += modulate_row(p, row) != row / p.r.rows_per_modulate;
  }
  check(!wrong, "%lld wrong quotients of integers", (long long)wrong);
}

void test_rows(uint64_t seed) {
  check_quotients();
  check_divisions(seed);
  test_floats(seed);
  check_rows(seed, 3, 1152, 128, kNoPrologue);
  check_rows(seed, 2, 96, 1, kNoPrologue, 1, false, false, 16);
  check_rows(seed, 2, 3072, 1024, kNoPrologue);
  check_rows(seed, 1, 4096, 4096, kNoPrologue);
  check_rows(seed, 3, 1152, 64, kNorm);
  check_rows(seed, 2, 4608, 512, kNorm, 1, false, true);
  // tiled
  check_rows(seed, 2, 37, 1, kNoPrologue, 1, false, false, 11);
  check_rows(seed, 2, 1160, 8, kNorm, 1, true);
  check_rows(seed, 1, 16384 + 1024, 1024, kNoPrologue);
  check_rows(seed, 2, 768, 16, kNoPrologue, 2, true);
  check_rows(seed, 1, 9216, 1024, kNorm, 2);
}
#endif

// ---------------------------------------------------------------------------- weights

#if defined(DTQ_TEST_WEIGHTS)

struct StoredWeight {
  Array<uint8_t> bytes, tail, groups;
  Array<float> scale, codebook;
  Array<uint16_t> short_scale;
  Array<float> values;  // (N, K)
  Weight w = {};
};

// Some encodings, written bit by bit.
StoredWeight random_weight(Random& random, Encoding encoding, int bits, int64_t rows,
                           int64_t columns, int64_t groups, bool bfloat16_scale) {
  StoredWeight s;
  Weight& w = s.w;
  w.encoding = encoding, w.bits = bits, w.rows = rows, w.columns = columns, w.groups = groups;
  w.scale_type = kScaleFloat32;
  const int64_t each = columns / groups, scales = encoding == kTwoLevel ? 1 : groups;
  for (int64_t i = 0; i < rows * scales; i++) s.scale.push_back(random.real(0.01f, 0.02f));
  for (float& scale : s.scale) s.short_scale.push_back(float_to_bf16(scale));
  for (size_t i = 0; i < s.scale.size() && bfloat16_scale; i++) s.scale[i] = bf16_to_float(s.short_scale[i]);
  for (int i = 0; i < 1 << bits && encoding == kTable; i++) s.codebook.push_back(random.real(-1, 1));
  // such as a checkpoint may have: int8 whatever the code
  for (int64_t i = 0; i < rows * groups && encoding == kTwoLevel; i++) {
    const int top = (1 << bits) - 1, scale2 = random.between(1, 16);
    const int zero = random.between(std::max(0, top - 127 / scale2), std::min(top, 128 / scale2));
    s.groups.push_back(uint8_t((scale2 - 1) << bits | zero));
  }
  const int64_t row_bytes = encoding == kTrits ? columns / 5 : columns * bits / 8;
  s.bytes.assign(rows * row_bytes, 0);
  w.offset = encoding == kAffine ? 1 << (bits - 1) : 0;
  for (int64_t n = 0; n < rows; n++)
    for (int64_t k = 0; k < columns; k++) {
      uint8_t* row = s.bytes.data() + n * row_bytes;
      const int code = random.between(0, encoding == kTrits ? 2 : (1 << bits) - 1);
      float value = (float)(code - w.offset);
      if (encoding == kTrits) {
        int digit = 1;
        for (int64_t i = 0; i < k % 5; i++) digit *= 3;
        if (k < columns / 5 * 5) row[k / 5] = (uint8_t)(row[k / 5] + code * digit);
        else s.tail.push_back((uint8_t)code);
        value = (float)(code - 1);
      } else {
        for (int b = 0; b < bits; b++)
          row[(k * bits + b) / 8] |= (uint8_t)((code >> b & 1) << (k * bits + b) % 8);
      }
      if (encoding == kTable) value = s.codebook[code];
      if (encoding == kTwoLevel) {
        const int byte = s.groups[n * groups + k / each];
        value = (float)(int8_t)((code - (byte & ((1 << bits) - 1))) * ((byte >> bits) + 1));
      }
      s.values.push_back(value * s.scale[n * scales + (encoding == kTwoLevel ? 0 : k / each)]);
    }
  if (encoding == kAffine && bits == 8) {  // signed bytes
    for (uint8_t& byte : s.bytes) byte ^= 0x80;
    w.offset = 0;
  }
  w.weight = s.bytes.data(), w.tail = s.tail.data(), w.group_bytes = s.groups.data();
  w.codebook = s.codebook.data(), w.scale = s.scale.data();
  if (bfloat16_scale) w.scale = s.short_scale.data(), w.scale_type = kScaleBFloat16;
  return s;
}

void check_weight(uint64_t seed, Encoding encoding, int bits, int64_t rows, int64_t columns,
                  int64_t groups, int64_t tokens, bool bfloat16_scale = false) {
  Random random(seed + bits);
  StoredWeight s = random_weight(random, encoding, bits, rows, columns, groups, bfloat16_scale);
  sim::session().seed = seed;
  Array<float> decoded(rows * columns);
  const int status = launch_dequantize(s.w, decoded.data(), kFloat32, nullptr);
  check(status == kOk && decoded == s.values, "encoding %d bits %d: %s", encoding, bits,
        sim::session().error.c_str());

  Array<uint16_t> x(tokens * columns), bias(rows), y(tokens * rows);
  for (auto* a : {&x, &bias})
    for (auto& value : *a) value = float_to_bf16(random.real(-1, 1));
  SmallM f = {};
  f.weight = s.w, f.x = x.data(), f.type = kBFloat16, f.tokens = tokens, f.stride = columns;
  f.bias = bias.data(), f.y = y.data();
  const int done = launch_small_m(f, nullptr);
  double worst = 0;
  for (int64_t m = 0; m < tokens; m++)
    for (int64_t n = 0; n < rows; n++) {
      double sum = bf16_to_float(bias[n]), size = 1e-3;
      for (int64_t k = 0; k < columns; k++) {
        const double term = (double)bf16_to_float(x[m * columns + k]) *
                            bf16_to_float(float_to_bf16(s.values[n * columns + k]));
        sum += term;
        size += std::fabs(term);
      }
      const double error = std::fabs(bf16_to_float(y[m * rows + n]) - sum);
      worst = std::max(worst, error / (std::fabs(sum) / 256 + size / 4096 / 256));
    }
  check(done == kOk && worst <= 1, "small M: encoding %d bits %d, %lld tokens: %.2f of the bound, %s",
        encoding, bits, (long long)tokens, worst, sim::session().error.c_str());
}

void test_weights(uint64_t seed) {
  check_weight(seed, kAffine, 4, 19, 1152, 18, 3);
  check_weight(seed, kAffine, 2, 5, 128, 2, 9);
  check_weight(seed, kAffine, 3, 3, 40, 1, 1);
  check_weight(seed, kTable, 4, 17, 320, 5, 16);
  check_weight(seed, kTrits, 2, 6, 163, 1, 2);
  check_weight(seed, kTwoLevel, 4, 33, 128, 2, 17);
  check_weight(seed, kTwoLevel, 4, 18, 320, 5, 9);
  check_weight(seed, kAffine, 4, 19, 3200, 50, 16, true);  // rounds of prefetched steps
  check_weight(seed, kAffine, 4, 3, 384, 3, 8, true);
  check_weight(seed, kAffine, 8, 20, 1600, 1, 9);
  check_weight(seed, kAffine, 8, 3, 384, 3, 2, true);
}
#endif

}  // namespace

int main(int count, char** arguments) {
  const int seeds = count > 1 ? std::atoi(arguments[1]) : 1;
  for (int seed = 1; seed <= seeds; seed++) {
#if defined(DTQ_TEST_ROWS)
    test_rows((uint64_t)seed);
#endif
#if defined(DTQ_TEST_WEIGHTS)
    test_weights((uint64_t)seed);
#endif
  }
  return done();
}
