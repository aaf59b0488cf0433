// SPDX-License-Identifier: Apache-2.0
// Compares the GEMM kernels with plain loops, bit for bit. On the emulator buffers are exactly as large as
// the kernel may access, so that address sanitizer detects one byte too many. For a GPU:
//
//   nvcc -std=c++17 -O2 -arch=native -x cu cuda_ext/tests/test_gemm.cpp -o test_gemm && ./test_gemm
//
// with -arch=sm_90a for Hopper.
//
//   test_gemm [SEEDS [ARCH]]   only cases of this architecture
//
// -DDTQ_ONLY=0, 1, 2 or 3 compiles int8, two-level, table or FP4 weights alone.
#include <cmath>
#include <cstring>

#include "../gemm.cu"
#if !defined(DTQ_ONLY) || DTQ_ONLY == 0
#include "../gemm_int8.cu"
#else
int dtq::gemm_int8(const Gemm&, const Plan&, Stream) { return kUnsupported; }
#endif
#if !defined(DTQ_ONLY) || DTQ_ONLY == 1
#include "../gemm_two_level.cu"
#else
int dtq::gemm_two_level(const Gemm&, const Plan&, Stream) { return kUnsupported; }
#endif
#if !defined(DTQ_ONLY) || DTQ_ONLY == 2
#include "../gemm_table.cu"
#else
int dtq::gemm_table(const Gemm&, const Plan&, Stream) { return kUnsupported; }
#endif
#if !defined(DTQ_ONLY) || DTQ_ONLY == 3
#include "../gemm_fp4.cu"
#else
int dtq::gemm_fp4(const Gemm&, const Plan&, Stream) { return kUnsupported; }
#endif
#include "check.h"

using namespace dtq;

struct Case {
  Weights weights;
  int64_t m, n, k, group;
  int arch;
  Float type;
  bool bias;
  int epilogue;  // 1 GELU + 2 gate and residual + 4 low-rank branch + 8 all tokens of one image
  const char* kernel;
  int options = 0;  // with them there are few multiprocessors, so that a block computes several tiles
};

uint32_t bits_at(const void* p, int64_t i, Float type) {
  uint32_t u = 0;
  if (type == kFloat32) std::memcpy(&u, static_cast<const float*>(p) + i, 4);
  else std::memcpy(&u, static_cast<const uint16_t*>(p) + i, 2);
  return u;
}

void fill(void* p, int64_t n, Float type, Random& r, float scale) {
  for (int64_t i = 0; i < n; i++) {
    const float v = r.real(-scale, scale);
    const uint32_t u = rounded_to(v, type);
    if (type == kFloat32) std::memcpy(static_cast<float*>(p) + i, &u, 4);
    else static_cast<uint16_t*>(p)[i] = uint16_t(u);
  }
}

bool fp4(const Case& c) { return c.weights == kNvFp4 || c.weights == kMxFp4; }

// The value of an E2M1 code and the scale of its group.
double fp4_at(const Case& c, const uint8_t* codes, const uint8_t* scales, int64_t row, int64_t k) {
  const double sizes[] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
  const int code = codes[(row * c.k + k) / 2] >> (k % 2 * 4) & 15;
  const int scale = scales[row * (c.k / c.group) + k / c.group], exponent = scale >> 3;
  double by = std::ldexp(1.0, scale - 127);
  if (c.weights == kNvFp4)
    by = exponent ? std::ldexp(8.0 + scale % 8, exponent - 10) : std::ldexp(scale, -9);
  return (code & 8 ? -1 : 1) * sizes[code & 7] * by;
}

// The int8 value of column k of row n, by the definition of the format.
int weight_at(const Case& c, const uint8_t* weight, const uint8_t* groups, const int8_t* codebooks,
              int64_t n, int64_t k) {
  if (c.weights == kInt8) return int8_t(weight[n * c.k + k]);
  const int code = weight[(n * c.k + k) / 2] >> (k % 2 * 4) & 15;
  const int64_t group = n * (c.k / c.group) + k / c.group;
  if (c.weights == kTable) return codebooks[group * 16 + code];
  return (code - (groups[group] & 15)) * ((groups[group] >> 4) + 1);
}

// The sum of the products of two rows, in this order. Address sanitizer is for the kernels.
template <class T, class Sum>
UNCHECKED Sum dot(const T* a, const T* b, int64_t n, Sum sum) {
  for (int64_t i = 0; i < n; i++) sum += Sum(a[i]) * Sum(b[i]);
  return sum;
}

void run_case(const Case& c, uint64_t seed) {
  Random r(seed * 977 + uint64_t(c.m * 31 + c.n * 7 + c.k));
  const int64_t width = c.weights == kInt8 ? c.k : c.k / 2;
  const int64_t groups_of_row = c.weights == kInt8 ? 0 : c.k / c.group;
  const int size = c.type == kFloat32 ? 4 : 2;
  const bool grouped = c.weights == kTwoLevel || fp4(c);
  Buffer<int8_t> x_q(c.m * (fp4(c) ? width : c.k));
  Buffer<int8_t> codebooks(c.weights == kTable ? c.n * groups_of_row * 16 : 0);
  Buffer<uint8_t> weight(c.n * width), groups(grouped ? c.n * groups_of_row : 0);
  Buffer<uint8_t> x_block_scale(fp4(c) ? c.m * groups_of_row : 0);
  Buffer<float> row_scale(c.m), weight_scale(c.n);
  Buffer<uint8_t> bias(c.n * size), out(c.m * c.n * size), residual(c.m * c.n * size);
  const int64_t gate_tokens = c.epilogue & 8 ? c.m : 5, gates = (c.m + gate_tokens - 1) / gate_tokens, rank = 32;
  Buffer<uint8_t> gate(gates * c.n * size);
  Buffer<uint16_t> down(c.m * rank), up(c.n * rank);
  for (int64_t i = 0; i < x_q.size; i++)
    x_q[i] = fp4(c) ? int8_t(r.next()) : int8_t(r.between(-127, 127));
  for (int64_t i = 0; i < weight.size; i++)
    weight[i] = c.weights == kInt8 ? uint8_t(r.between(-127, 127)) : uint8_t(r.next());
  for (int64_t i = 0; i < codebooks.size; i++) codebooks[i] = int8_t(r.between(-127, 127));
  // near 1: e4m3 from 2^-3 to 2^3, or exponents
  auto block_scale = [&] { return uint8_t(c.weights == kNvFp4 ? r.between(32, 80) : r.between(124, 130)); };
  for (int64_t i = 0; i < x_block_scale.size; i++) x_block_scale[i] = block_scale();
  for (int64_t i = 0; i < groups.size; i++) {
    if (fp4(c)) {
      groups[i] = block_scale();
      continue;
    }
    int zero, scale2;
    do {
      zero = r.between(0, 15), scale2 = r.between(1, 16);
    } while (scale2 * zero > 128 || scale2 * (15 - zero) > 127);
    groups[i] = uint8_t(zero | (scale2 - 1) << 4);
  }
  for (int64_t i = 0; i < c.m; i++) row_scale[i] = r.real(0.001f, 0.1f);
  for (int64_t i = 0; i < c.n; i++) weight_scale[i] = r.real(0.001f, 0.01f);
  fill(bias.data, c.n, c.type, r, 2);
  fill(residual.data, c.m * c.n, c.type, r, 2);
  fill(gate.data, gates * c.n, c.type, r, 1);
  const Float lowrank = seed % 2 ? kFloat16 : kBFloat16;
  fill(down.data, c.m * rank, lowrank, r, 1);
  fill(up.data, c.n * rank, lowrank, r, 1);
  std::memset(out.data, 0xA5, size_t(out.size));

  Gemm g = {};
  g.tokens = c.m, g.rows = c.n, g.columns = c.k;
  g.x_q = x_q.data, g.row_scale = row_scale.data;
  g.weights = c.weights, g.weight = weight.data, g.group = c.group;
  g.groups = groups.data, g.codebooks = c.weights == kTable ? codebooks.data : nullptr;
  g.weight_scale = c.weights == kMxFp4 ? nullptr : weight_scale.data;
  g.x_block_scale = x_block_scale.data;
  g.bias = c.bias ? bias.data : nullptr, g.bias_type = c.type;
  g.out = out.data, g.out_type = c.type;
  g.gelu = c.epilogue & 1;
  if (c.epilogue & 2) g.gate = gate.data, g.gate_tokens = gate_tokens, g.residual = residual.data;
  if (c.epilogue & 4) g.down = down.data, g.up = up.data, g.rank = rank, g.lowrank_type = lowrank;
  g.arch = c.arch, g.sms = c.options & kPersistentBlocks ? 4 : 16, g.options = c.options;
  Buffer<uint8_t> workspace(dtq_gemm_workspace(&g));
  g.workspace = workspace.data, g.workspace_bytes = workspace.size;

#if defined(DTQ_SIM)
  sim::session().seed = seed;
  sim::session().error.clear();
  sim::session().stats = {};
#endif
  const char* kernel = dtq_gemm_kernel(&g);
  int status = dtq_gemm(&g, nullptr);
  if (status == kOk) status = wait_for_device();
  double conflicts = 1;
#if defined(DTQ_SIM)
  conflicts = sim::session().stats.conflicts();
  if (status != kOk) std::printf("  %s\n", sim::session().error.c_str());
#endif
  // the operands as numbers: decoded once, not for each product
  const auto* packed = reinterpret_cast<const uint8_t*>(x_q.data);
  std::vector<int16_t> x(size_t(fp4(c) ? 0 : c.m * c.k)), w(size_t(fp4(c) ? 0 : c.n * c.k));
  std::vector<double> x4(size_t(fp4(c) ? c.m * c.k : 0)), w4(size_t(fp4(c) ? c.n * c.k : 0));
  for (int64_t k = 0; k < c.k; k++)
    if (fp4(c)) {
      for (int64_t m = 0; m < c.m; m++) x4[size_t(m * c.k + k)] = fp4_at(c, packed, x_block_scale.data, m, k);
      for (int64_t n = 0; n < c.n; n++) w4[size_t(n * c.k + k)] = fp4_at(c, weight.data, groups.data, n, k);
    } else {
      for (int64_t m = 0; m < c.m; m++) x[size_t(m * c.k + k)] = x_q[m * c.k + k];
      for (int64_t n = 0; n < c.n; n++)
        w[size_t(n * c.k + k)] = int16_t(weight_at(c, weight.data, groups.data, codebooks.data, n, k));
    }
  int64_t wrong = 0, first = -1;
  for (int64_t m = 0; m < c.m && status == kOk; m++)
    for (int64_t n = 0; n < c.n; n++) {
      float v = fp4(c) ? float(dot(&x4[size_t(m * c.k)], &w4[size_t(n * c.k)], c.k, 0.0))
                       : float(dot(&x[size_t(m * c.k)], &w[size_t(n * c.k)], c.k, int32_t(0)));
      v = v * row_scale[m];
      if (c.weights != kMxFp4) v = v * weight_scale[fp4(c) ? 0 : n];
      if (c.bias) v = v + float_from(bits_at(bias.data, n, c.type), c.type);
      if (c.epilogue & 4) {
        double add = v;
        for (int64_t i = 0; i < rank; i++) {
          const double x = float_from(down[m * rank + i], lowrank);
          add += x * float_from(up[n * rank + i], lowrank);
        }
        v = float(add);
      }
      if (c.epilogue & 1) {
        const double x = v, inner = 0.7978845608028654 * (x + 0.044715 * x * x * x);
        v = float(0.5 * x * (1 + std::tanh(inner)));
      }
      if (c.epilogue & 2)
        v = float_from(bits_at(gate.data, m / gate_tokens * c.n + n, c.type), c.type) * v +
            float_from(bits_at(residual.data, m * c.n + n, c.type), c.type);
      const uint32_t got = bits_at(out.data, m * c.n + n, c.type), want = rounded_to(v, c.type);
      bool same = got == want;
      // the host's tanh and the order of float sums differ: not bit for bit
      if (c.epilogue & 5 || fp4(c)) {
        const float a = float_from(got, c.type);
        const float tolerance = c.type == kFloat32 ? fp4(c) ? 1e-5f : 2e-6f : 0.01f;
        same = std::fabs(a - v) <= tolerance * (std::fabs(v) + 1);
      }
      if (!same && wrong++ == 0) first = m * c.n + n;
    }
  const bool good = status == kOk && !wrong && kernel && std::strstr(kernel, c.kernel) &&
                    conflicts < 1.02;
  const char* names[] = {"int8", "two-level", "table", "nvfp4", "mxfp4"};
  check(good, "%s (%d, %d, %d) group %d sm_%d type %d epilogue %d seed %d: %s, conflicts %.2f, "
        "%d wrong",
        names[c.weights], int(c.m), int(c.n), int(c.k), int(c.group), c.arch, int(c.type), c.epilogue,
        int(seed), kernel ? kernel : "no kernel", conflicts, int(wrong));
  if (wrong) std::printf("  first wrong: row %d, column %d\n", int(first / c.n), int(first % c.n));
  if (status != kOk) std::printf("  status %d\n", status);
}

#if defined(DTQ_SIM)  // device functions, called directly
// All valid group bytes x all pairs of neighbouring codes, through the arithmetic on four bytes.
void test_two_level() {
  long wrong = 0, tried = 0;
  for (uint32_t byte = 0; byte < 256; byte++) {
    const int zero = byte & 15, scale2 = int(byte >> 4) + 1;
    if (scale2 * zero > 128 || scale2 * (15 - zero) > 127) continue;
    for (uint32_t pair = 0; pair < 65536; pair++) {
      uint32_t out[2];
      const uint32_t word = pair | (pair ^ 0x5A5A) << 16;
      TwoLevel::expand(word, TwoLevel::decode(byte), out[0], out[1]);
      for (int i = 0; i < 8; i++) {
        const int code = word >> (4 * i) & 15;
        wrong += int8_t(out[i / 4] >> (i % 4 * 8)) != (code - zero) * scale2;
        tried++;
      }
    }
  }
  check(!wrong && tried > 10000000, "two-level arithmetic: %ld of %ld wrong", wrong, tried);
}

// All combinations of four neighbouring codes, through a codebook.
void test_table() {
  Random r(5);
  long wrong = 0;
  for (int round = 0; round < 4; round++) {
    int8_t table[16];
    for (auto& v : table) v = int8_t(r.next());
    U4 t;
    std::memcpy(&t, table, 16);
    for (uint32_t codes = 0; codes < 65536; codes++) {
      uint32_t out[2];
      Table::expand(codes | (codes ^ 0xFFFF) << 16, t, out[0], out[1]);
      for (int i = 0; i < 4; i++) {
        const int code = codes >> (4 * i) & 15;
        wrong += int8_t(out[0] >> (8 * i)) != table[code];
        wrong += int8_t(out[1] >> (8 * i)) != table[15 - code];
      }
    }
  }
  check(!wrong, "table look-up: %ld wrong", wrong);
}

// The GELU of the epilogues for all bfloat16, against double precision. PTX allows ex2 and rcp the errors
// that the emulator makes.
void test_gelu() {
  long wrong = 0;
  double largest = 0;
  for (uint32_t h = 0; h < 65536; h++) {
    const float x = bits_float(h << 16), got = gelu_approximate(x);
    if (std::isnan(x) || std::isinf(x)) {
      const float want = x > 0 ? x : NAN;  // -inf: 0 * inf, as in torch
      wrong += std::isnan(want) ? !std::isnan(got) : got != want;
      continue;
    }
    const double y = x, u = 2 * 0.7978845608028654 * (y + 0.044715 * y * y * y);
    const double exact = y / (1 + std::exp(-u)), error = std::fabs(got - exact);
    if (std::fabs(exact) < 0x1p-120) {
      wrong += error > 0x1p-120;
      continue;
    }
    // of half a step: a bfloat16 has eight bits
    const double part = error / std::ldexp(1.0, std::ilogb(exact) - 8);
    largest = part > largest ? part : largest;
    wrong += part >= 1;
  }
  check(!wrong && largest < 0.02, "approximate GELU: %ld wrong, %.4f of half a step of bfloat16", wrong, largest);
}

#endif

void refusals() {
  Gemm g = {};
  g.tokens = 4, g.rows = 8, g.columns = 64, g.arch = 80, g.sms = 16;
  check(!dtq_gemm_refusal(&g), "int8 is not refused");
  g.tokens = 0;
  check(dtq_gemm(&g, nullptr) == kOk, "no tokens, nothing to do");
  g.tokens = 4, g.weights = kTwoLevel, g.group = 48;
  check(dtq_gemm(&g, nullptr) == kUnsupported, "groups of 48 are refused");
  g.weights = kInt8, g.arch = 75;
  check(dtq_gemm_kernel(&g) == nullptr && dtq_gemm_refusal(&g), "sm_75 is refused");
  g.arch = 80, g.columns = 200000;
  check(dtq_gemm(&g, nullptr) == kUnsupported, "sums that may overflow are refused");
  Gemm fp4 = g;
  fp4.weights = kNvFp4, fp4.group = 16, fp4.columns = 128;
  check(dtq_gemm(&fp4, nullptr) == kUnsupported, "FP4 products are refused before sm_120");
  fp4.arch = 121;
  check(!dtq_gemm_refusal(&fp4), "FP4 products are supported on sm_121");
  fp4.columns = 96;
  check(dtq_gemm(&fp4, nullptr) == kUnsupported, "FP4 products of 96 columns are refused");
  g.columns = 4096;
  check(dtq_gemm_workspace(&g) > 0 && dtq_gemm(&g, nullptr) == kWorkspace, "workspace is needed");
}

// On an H200. 4-bit weights need the large tile where int8 weights have less time with the small one.
void plans() {
  Gemm g = {};
  g.tokens = 1024, g.rows = 4480, g.columns = 3072, g.group = 64, g.arch = 90, g.sms = 132;
  check(!std::strcmp(dtq_gemm_kernel(&g), "wgmma 128x128"), "int8: three short waves");
  g.weights = kTwoLevel;
  check(!std::strcmp(dtq_gemm_kernel(&g), "wgmma 256x128"), "two-level: two long waves");
  g.tokens = 4096, g.rows = 4608, g.columns = 1152;
  check(!std::strcmp(dtq_gemm_kernel(&g), "wgmma 256x128"), "two-level: the larger tile");
}

const Case kCases[] = {
    // tails in every direction; K = 1152 is DiT-XL's width
    {kInt8, 1, 96, 128, 0, 80, kBFloat16, true, 0, "16x128"},
    {kInt8, 15, 130, 1152, 0, 80, kFloat32, true, 0, "16x128"},
    {kInt8, 17, 65, 80, 0, 80, kFloat16, false, 0, "64x64"},
    {kInt8, 129, 257, 192, 0, 80, kBFloat16, true, 0, "64x64"},
    {kInt8, 512, 512, 144, 0, 80, kBFloat16, true, 0, "128x128"},
    {kInt8, 33, 7, 77, 0, 80, kFloat32, true, 0, "any alignment"},
    {kInt8, 3, 70, 129, 0, 80, kBFloat16, false, 0, "any alignment"},
    {kTwoLevel, 1, 257, 1152, 128, 80, kBFloat16, true, 0, "16x128"},
    {kTwoLevel, 16, 128, 1152, 64, 80, kFloat16, true, 0, "K in 4"},
    {kTwoLevel, 70, 33, 96, 32, 80, kBFloat16, true, 0, "64x64"},
    {kTwoLevel, 127, 130, 384, 128, 80, kFloat32, false, 0, "64x64"},
    {kTwoLevel, 520, 500, 320, 64, 80, kBFloat16, true, 0, "128x128"},
    {kTable, 5, 40, 256, 256, 80, kFloat32, true, 0, "16x128"},
    {kTable, 65, 66, 160, 32, 80, kBFloat16, true, 0, "64x64"},
    {kTable, 513, 390, 128, 128, 80, kBFloat16, false, 0, "128x128"},
    // Hopper
    {kInt8, 1024, 256, 512, 0, 90, kBFloat16, true, 0, "wgmma"},
    {kInt8, 130, 1026, 1152, 0, 90, kBFloat16, true, 0, "wgmma"},
    {kInt8, 520, 393, 96, 0, 90, kFloat32, false, 0, "wgmma"},
    {kTwoLevel, 257, 512, 1152, 128, 90, kBFloat16, true, 0, "wgmma"},
    {kTwoLevel, 300, 515, 416, 32, 90, kFloat16, true, 0, "wgmma"},
    {kTwoLevel, 513, 514, 64, 64, 90, kFloat32, false, 0, "wgmma"},
    {kTable, 140, 1000, 640, 640, 90, kBFloat16, true, 0, "wgmma"},
    {kTable, 259, 514, 192, 64, 90, kFloat32, true, 0, "wgmma"},
    {kTwoLevel, 260, 513, 128, 64, 90, kBFloat16, true, 7, "wgmma"},
    {kInt8, 260, 514, 160, 0, 90, kFloat32, true, 7, "wgmma"},
    {kTwoLevel, 127, 1025, 192, 64, 90, kBFloat16, true, 0, "wgmma 128x128"},
    {kInt8, 66, 1030, 1152, 0, 90, kFloat16, true, 4, "wgmma 128x128"},
    // more than one step of K in the 256-token tile, with all group sizes
    {kTwoLevel, 513, 514, 1152, 64, 90, kBFloat16, true, 0, "wgmma 256x128"},
    {kTwoLevel, 515, 520, 1184, 32, 90, kBFloat16, true, 0, "wgmma 256x128"},
    {kTwoLevel, 513, 514, 3072, 128, 90, kFloat16, false, 0, "wgmma 256x128"},
    {kTable, 513, 520, 1152, 64, 90, kBFloat16, true, 0, "wgmma 256x128"},
    {kTwoLevel, 515, 514, 1152, 64, 90, kBFloat16, true, 3, "wgmma 256x128"},
    // outputs in 16-byte pieces on Hopper: whole tiles and tails, an image or many in a tile
    {kInt8, 768, 512, 640, 0, 90, kBFloat16, true, 0, "wgmma 256x128"},
    {kInt8, 519, 520, 256, 0, 90, kFloat16, false, 0, "wgmma 256x128"},
    {kInt8, 519, 520, 384, 0, 90, kBFloat16, true, 1, "wgmma 256x128"},
    {kTwoLevel, 519, 520, 192, 64, 90, kBFloat16, true, 2, "wgmma 256x128"},
    {kInt8, 519, 520, 192, 0, 90, kFloat16, false, 10, "wgmma 256x128"},
    {kTwoLevel, 600, 520, 192, 32, 90, kBFloat16, true, 11, "wgmma"},
    {kTwoLevel, 257, 392, 192, 64, 90, kFloat16, true, 3, "wgmma"},
    {kInt8, 100, 1032, 288, 0, 90, kBFloat16, true, 11, "wgmma 128x128"},
    {kInt8, 127, 1032, 160, 0, 90, kBFloat16, true, 0, "wgmma 128x128"},
    // persistent blocks: several tiles of a cluster, in two bands; more steps than stages, and fewer; tails
    {kInt8, 700, 392, 640, 0, 90, kBFloat16, true, 0, "wgmma 256x128, persistent", 1},
    {kInt8, 2300, 264, 96, 0, 90, kFloat16, false, 1, "wgmma 256x128, persistent", 3},
    {kTwoLevel, 520, 392, 192, 32, 90, kFloat16, true, 0, "wgmma 256x128, persistent", 1},
    {kTwoLevel, 700, 392, 704, 64, 90, kBFloat16, true, 1, "wgmma 256x128, persistent", 3},
    {kTable, 600, 264, 320, 64, 90, kBFloat16, true, 0, "wgmma 256x128, persistent", 1},
    // programmatic dependent launch
    {kInt8, 300, 264, 128, 0, 90, kBFloat16, true, 0, "wgmma", 2},
    {kTwoLevel, 300, 264, 128, 64, 90, kFloat16, true, 11, "wgmma", 2},
    // epilogues
    {kInt8, 70, 66, 128, 0, 80, kBFloat16, true, 1, "64x64"},
    {kInt8, 40, 33, 256, 0, 80, kBFloat16, true, 2, "64x64"},
    {kTwoLevel, 140, 72, 128, 64, 80, kBFloat16, true, 4, "summed after"},
    {kTwoLevel, 16, 80, 512, 64, 80, kFloat32, true, 7, "K in"},
    {kTwoLevel, 513, 520, 64, 32, 80, kFloat16, true, 7, "128x128"},
    {kInt8, 513, 518, 96, 0, 80, kBFloat16, true, 2, "mma 128x128"},
    {kTwoLevel, 519, 520, 128, 64, 80, kFloat16, false, 1, "mma 128x128"},
    {kTable, 519, 522, 64, 32, 80, kBFloat16, true, 11, "mma 128x128"},
    {kNvFp4, 520, 514, 128, 16, 120, kBFloat16, true, 3, "fp4 128x128"},
    // FP4
    {kNvFp4, 1, 33, 1152, 16, 120, kFloat32, true, 0, "fp4 64x64"},
    {kNvFp4, 130, 257, 64, 16, 120, kFloat32, false, 0, "fp4 64x64"},
    {kNvFp4, 513, 520, 320, 16, 120, kBFloat16, true, 0, "fp4 128x128"},
    {kNvFp4, 520, 500, 192, 16, 121, kFloat32, true, 7, "fp4 128x128"},
    {kMxFp4, 70, 66, 1152, 32, 120, kFloat32, true, 0, "fp4 64x64"},
    {kMxFp4, 65, 129, 128, 32, 120, kFloat16, true, 7, "fp4 64x64"},
    {kMxFp4, 515, 511, 384, 32, 120, kFloat32, false, 0, "fp4 128x128"},
};

// Under address sanitizer, large products are sums of six steps of 128 columns, more than there are stages, and
// the same tail: more steps access memory as these do.
Case shorter(Case c) {
#if defined(__SANITIZE_ADDRESS__)
  if (c.arch == 90 && c.m * c.n > 512 * 512 && c.k > 896) c.k = 768 + c.k % 128;
#endif
  return c;
}

int main(int argc, char** argv) {
  refusals();
  plans();
  bool hopper = true, blackwell = true;
#if defined(DTQ_SIM)
  test_two_level();
  test_table();
  test_gelu();
#else
  cudaDeviceProp device;
  if (cudaGetDeviceProperties(&device, 0) != cudaSuccess) return check(false, "a GPU"), done();
  hopper = device.major == 9, blackwell = device.major == 12;
#endif
  int ran = 0;
  const Seeds wanted = seeds(argc, argv, 2);
  for (int seed = wanted.first; seed < wanted.end; seed++)
    for (const Case& c : kCases) {
#if defined(DTQ_ONLY)
      if ((fp4(c) ? 3 : int(c.weights)) != DTQ_ONLY) continue;
#endif
      if (argc > 2 && std::atoi(argv[2]) != c.arch) continue;
      if ((c.arch == 90 && !hopper) || (c.arch >= 120 && !blackwell)) continue;
      run_case(shorter(c), uint64_t(seed));
      ran++;
    }
  check(ran > 0, "%d cases", ran);
  return done();
}

#if defined(DTQ_SIM)  // for callers in Python, when this is built as a library
extern "C" {
void dtq_sim_seed(uint64_t seed) { sim::session().seed = seed; }
const char* dtq_sim_error() { return sim::session().error.c_str(); }
}
#endif
