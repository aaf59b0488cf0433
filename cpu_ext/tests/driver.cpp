// SPDX-License-Identifier: Apache-2.0
// Tests the kernels without torch: each instruction set that this machine supports against plain loops. For
// tests/kernels/test_cpu_driver.py, which also runs it on emulated CPUs that support fewer.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <random>
#include <vector>

#include "../dispatch.h"

namespace {

std::mt19937 generator(1);

template <typename T>
std::vector<T> random_values(int64_t count, int low, int high) {
  std::vector<T> values(count);
  for (T& x : values) x = (T)(low + (int)(generator() % (unsigned)(high - low + 1)));
  return values;
}

// Memory aligned to 64 bytes.
struct Aligned {
  std::vector<char> memory;
  void* get(int64_t bytes) {
    memory.assign(bytes + 64, 0);
    return (void*)(((uintptr_t)memory.data() + 63) / 64 * 64);
  }
};

// Runs the GEMM as ops.cpp does; `out` and `type` must be set.
void run(const dtq::Kernels& kernels, dtq::Linear g) {
  Aligned packed, sums, panel;
  const int64_t blocks = (g.tokens + dtq::kBlockTokens - 1) / dtq::kBlockTokens;
  const int64_t tokens = blocks * dtq::kBlockTokens + dtq::kSmallM;
  g.packed = packed.get(tokens * g.steps * dtq::kStep * kernels.x_bytes);
  g.section_sums = (int32_t*)sums.get(tokens * g.sections * 4);
  if (g.tokens <= dtq::kSmallM) {
    kernels.pack_small_m(g);
    kernels.multiply_small_m(g, 0, g.rows);
  } else {
    kernels.pack(g, 0, blocks);
    void* scratch = panel.get(dtq::scratch_bytes(kernels, g, blocks));
    kernels.multiply(g, 0, blocks, 0, (g.rows + dtq::kPanelRows - 1) / dtq::kPanelRows, scratch);
  }
}

struct Case {
  int64_t m, n, k, group;  // group 0: int8 weights
  int bits = 4;            // of others
};

// float(sum) * row_scale * weight_scale + bias, sums by plain loops.
std::vector<float> expected(const dtq::Linear& g, const Case& c) {
  std::vector<float> out(c.m * c.n);
  for (int64_t t = 0; t < c.m; t++)
    for (int64_t n = 0; n < c.n; n++) {
      int32_t sum = 0;
      for (int64_t k = 0; k < c.k; k++) {
        int weight;
        if (c.group) {
          const uint8_t byte = g.group_bytes[n * g.groups_per_row + k / c.group];
          int code = 0;
          for (int i = 0; i < c.bits; i++) {
            const int64_t bit = (n * c.k + k) * c.bits + i;
            code |= ((uint8_t)g.weight[bit / 8] >> bit % 8 & 1) << i;
          }
          weight = (int8_t)((code - (byte & ((1 << c.bits) - 1))) * ((byte >> c.bits) + 1));
        } else {
          weight = g.weight[n * c.k + k];
        }
        sum += weight * g.x_q[t * c.k + k];
      }
      const volatile float first = (float)sum * g.row_scale[t];  // rounded on its own
      const volatile float second = first * g.weight_scale[n];
      out[t * c.n + n] = second + g.bias[n];
    }
  return out;
}

bool product(const dtq::Kernels& kernels, const Case& c) {
  const auto x_q = random_values<int8_t>(c.m * c.k, -128, 127);
  const auto weight = random_values<int8_t>(c.n * c.k * (c.group ? c.bits : 8) / 8, -128, 127);
  const auto groups = random_values<uint8_t>(c.group ? c.n * (c.k / c.group) : 1, 0, 255);
  const auto row_scale = random_values<float>(c.m, 1, 9), weight_scale = random_values<float>(c.n, 1, 9);
  const auto bias = random_values<float>(c.n, -9, 9);
  std::vector<float> out(c.m * c.n);
  dtq::Linear g = {};
  g.tokens = c.m, g.rows = c.n, g.columns = c.k;
  g.steps = (c.k + dtq::kStep - 1) / dtq::kStep;
  g.x_q = x_q.data(), g.weight = weight.data();
  g.row_scale = row_scale.data(), g.weight_scale = weight_scale.data(), g.bias = bias.data();
  g.sections = 1;
  g.groups_per_row = 1, g.group_size = c.k, g.group_shift = 62;
  g.bits = c.group ? c.bits : 8;
  g.byte_codebooks = dtq::byte_codebooks(g.bits);
  if (c.group) {
    g.group_bytes = groups.data();
    g.groups_per_row = c.k / c.group, g.group_size = c.group;
    g.group_shift = c.group < 16 ? -1 : __builtin_ctzll(c.group);
  }
  g.out = out.data();
  g.type = dtq::kFloat32;
  run(kernels, g);
  return out == expected(g, c);
}

bool rows(const dtq::Kernels& kernels) {
  const int64_t m = 3, k = 200;
  const auto x = random_values<float>(m * k, -1000, 1000);
  std::vector<int8_t> x_q(m * k);
  std::vector<float> scale(m), row(2 * dtq::padded_row(k));
  dtq::Rows q = {};
  q.x = x.data(), q.type = dtq::kFloat32, q.stride = q.columns = k;
  q.hadamard_block = 1, q.num_rotations = 1, q.hadamard_scale = 1, q.qmax = 127;
  q.x_q = x_q.data(), q.scale = scale.data();
  kernels.quantize(q, 0, m, row.data());
  for (int64_t t = 0; t < m; t++) {
    float amax = 0;
    for (int64_t i = 0; i < k; i++) amax = fmaxf(amax, fabsf(x[t * k + i]));
    if (scale[t] != amax / 127) return false;
    for (int64_t i = 0; i < k; i++)
      if (x_q[t * k + i] != (int)nearbyintf(x[t * k + i] / scale[t])) return false;
  }
  return true;
}

bool decoded(const dtq::Kernels& kernels) {
  const int64_t n = 5, k = 96;
  const auto weight = random_values<int8_t>(n * k / 2, -128, 127);
  const auto scale = random_values<float>(n, 1, 9);
  std::vector<float> out(n * k), scratch(dtq::kDecodeScratch);
  dtq::Decode d = {};
  d.weight.encoding = dtq::kAffine, d.weight.bits = 4, d.weight.offset = 8;
  d.weight.rows = n, d.weight.columns = k, d.weight.row_bytes = k / 2, d.weight.groups = 1;
  d.weight.weight = (const uint8_t*)weight.data(), d.weight.end = d.weight.weight + n * k / 2;
  d.weight.scale_type = dtq::kScaleFloat32, d.weight.scale = scale.data(), d.weight.finite = true;
  d.type = dtq::kFloat32, d.out = out.data();
  kernels.decode(d, 0, n, scratch.data());
  for (int64_t i = 0; i < n * k; i++) {
    const int code = (uint8_t)weight[i / 2] >> (i & 1) * 4 & 15;
    if (out[i] != (float)(code - 8) * scale[i / k]) return false;
  }
  return true;
}

// Decoding and GELU in every type, rows rotated twice, fake quantization: the bits of the portable code.
bool matches_portable(const dtq::Kernels& kernels) {
  const int64_t n = 6, k = 176;
  const auto weight = random_values<int8_t>(n * k / 2, -128, 127);
  const auto scale = random_values<float>(n, 1, 9), x = random_values<float>(n * k, -400, 400);
  bool same = true;
  for (dtq::Float type : {dtq::kFloat32, dtq::kBFloat16, dtq::kFloat16}) {
    std::vector<float> decoded[2], activated[2], scratch(dtq::kDecodeScratch);
    for (int i = 0; i < 2; i++) {
      const dtq::Kernels& by = i ? kernels : dtq::portable;
      decoded[i].assign(n * k, 0), activated[i].assign(n * k, 0);
      dtq::Decode d = {};
      d.weight.encoding = dtq::kTable, d.weight.bits = 4;
      d.weight.rows = n, d.weight.columns = k, d.weight.row_bytes = k / 2, d.weight.groups = 1;
      d.weight.weight = (const uint8_t*)weight.data(), d.weight.end = d.weight.weight + n * k / 2;
      d.weight.scale_type = dtq::kScaleFloat32, d.weight.scale = scale.data();
      for (int i = 0; i < 16; i++) d.weight.codebook[i] = (i - 7) / 3.0f;
      d.weight.finite = true;
      d.type = type, d.out = decoded[i].data();
      by.decode(d, 0, n, scratch.data());
      std::vector<float> scaled(x);
      for (float& value : scaled) value /= 37;
      by.gelu(scaled.data(), activated[i].data(), type, 0, type == dtq::kFloat32 ? n * k : 2 * n * k);
    }
    same = same && !memcmp(decoded[0].data(), decoded[1].data(), n * k * 4) &&
           !memcmp(activated[0].data(), activated[1].data(), n * k * 4);
  }
  std::vector<int32_t> perm(k);
  for (int64_t i = 0; i < k; i++) perm[i] = (int32_t)((i * 7 + 3) % k);
  for (int64_t block : {1, 2, 8, 16}) {
    std::vector<float> rotated[2], rows(2 * dtq::padded_row(k));
    for (bool norm : {false, true}) {
      for (int i = 0; i < 2; i++) {
        rotated[i].assign(n * k, 0);
        dtq::Rows q = {};
        q.x = x.data(), q.type = dtq::kFloat32, q.stride = q.columns = k;
        q.norm = norm, q.eps = 1e-6f, q.rows_per_modulate = n;
        if (norm) q.modulate_scale = x.data(), q.modulate_shift = x.data() + k;
        q.perm = perm.data(), q.hadamard_block = block, q.num_rotations = 2, q.hadamard_scale = 0.3f;
        q.out = rotated[i].data();
        (i ? kernels : dtq::portable).quantize(q, 0, n, rows.data());
      }
      same = same && rotated[0] == rotated[1];
    }
    for (auto rounding :
         {dtq::kRoundInt4G64, dtq::kRoundInt4AsymG64, dtq::kRoundInt8AsymG128, dtq::kRoundFp8Row,
          dtq::kRoundNvFp4, dtq::kRoundMxFp4}) {
      std::vector<uint16_t> halves[2];
      for (int i = 0; i < 2; i++) {
        halves[i].assign(n * k, 0);
        dtq::Rows q = {};
        q.x = x.data(), q.type = dtq::kFloat32, q.stride = q.columns = k / 128 * 128;
        q.hadamard_block = block, q.num_rotations = 1, q.hadamard_scale = 0.3f;
        q.out = halves[i].data(), q.rounding = rounding, q.out_type = dtq::kBFloat16;
        (i ? kernels : dtq::portable).quantize(q, 0, n, rows.data());
      }
      same = same && halves[0] == halves[1];
    }
    std::vector<int8_t> x_q[2];
    std::vector<float> scale(n);
    for (int i = 0; i < 2; i++) {
      x_q[i].assign(n * k, 0);
      dtq::Rows q = {};
      q.x = x.data(), q.type = dtq::kFloat32, q.stride = q.columns = k;
      q.hadamard_block = block, q.num_rotations = 1, q.hadamard_scale = 0.3f;  // qmax 0: E2M1
      q.x_q = x_q[i].data(), q.scale = scale.data();
      (i ? kernels : dtq::portable).quantize(q, 0, n, rows.data());
      for (int8_t code : x_q[i]) {
        const int size = code < 0 ? -code : code;
        same = same && size <= 12 && (size < 5 || size == 6 || size == 8 || size == 12);
      }
    }
    same = same && x_q[0] == x_q[1];
  }
  return same;
}

float from_bfloat16(uint16_t bits) {
  const uint32_t wide = (uint32_t)bits << 16;
  float value;
  memcpy(&value, &wide, 4);
  return value;
}

// Products with bfloat16 tokens: close to those of the decoded weights.
bool bfloat16_products(const dtq::Kernels& kernels) {
  for (int bits : {4, 8})
    for (int64_t k : {64, 176, 416}) {
      const int64_t m = 5, n = 6, stride = (k + 31) / 32 * 32;
      const auto weight = random_values<int8_t>(n * k * bits / 8, -128, 127);
      const auto scale = random_values<float>(n, 1, 9);
      std::vector<uint16_t> x(m * stride), w(n * k), out(m * n);
      for (int64_t i = 0; i < m * stride; i++)  // values from 1 to 4 of either sign
        if (i % stride < k) x[i] = (uint16_t)(0x3f80 + generator() % 256 + generator() % 2 * 0x8000);
      std::vector<float> scratch(dtq::kDecodeScratch);
      dtq::Decode d = {};
      d.weight.encoding = bits == 8 ? dtq::kAffine : dtq::kTable, d.weight.bits = bits;
      d.weight.rows = n, d.weight.columns = k, d.weight.row_bytes = k * bits / 8, d.weight.groups = 1;
      d.weight.weight = (const uint8_t*)weight.data(), d.weight.end = d.weight.weight + weight.size();
      d.weight.scale_type = dtq::kScaleFloat32, d.weight.scale = scale.data();
      for (int i = 0; i < 16; i++) d.weight.codebook[i] = (i - 7) / 3.0f;
      d.weight.finite = true;
      d.type = dtq::kBFloat16, d.out = w.data();
      dtq::portable.decode(d, 0, n, scratch.data());
      d.out = out.data(), d.x = x.data(), d.tokens = m, d.x_stride = stride;
      kernels.multiply_bfloat16(d, 0, n, scratch.data());
      for (int64_t t = 0; t < m; t++)
        for (int64_t i = 0; i < n; i++) {
          double want = 0, size = 0;
          for (int64_t j = 0; j < k; j++) {
            const double one = (double)from_bfloat16(x[t * stride + j]) * from_bfloat16(w[i * k + j]);
            want += one, size += fabs(one);
          }
          if (fabs(from_bfloat16(out[t * n + i]) - want) > fabs(want) / 128 + size * 1e-5) return false;
        }
    }
  return true;
}

// Random shapes, formats and epilogues: bit-identical to the portable code.
bool random_problems(const dtq::Kernels& kernels, int problems) {
  for (int problem = 0; problem < problems; problem++) {
    const auto pick = [](int low, int high) { return low + (int)(generator() % (high - low + 1)); };
    dtq::Linear g = {};
    g.tokens = pick(0, 3) ? pick(1, 70) : pick(1, 8), g.rows = pick(1, 70);
    g.bits = pick(0, 1) ? 4 : pick(0, 1) ? 8 : 3;
    g.byte_codebooks = dtq::byte_codebooks(g.bits);
    const int kind = g.bits == 3 ? 0 : pick(0, 2);  // group bytes or none, codebooks, sections
    const int groups = pick(1, 5), group = 8 * pick(1, kind == 2 ? 20 : 60);
    g.columns = groups * group;
    g.sections = kind == 2 ? groups : 1;
    g.steps = g.sections * ((g.columns / g.sections + dtq::kStep - 1) / dtq::kStep);
    g.groups_per_row = 1, g.group_size = g.columns, g.group_shift = 62;

    const auto x_q = random_values<int8_t>(g.tokens * g.columns, -128, 127);
    const auto weight = random_values<int8_t>(g.rows * g.columns * g.bits / 8, -128, 127);
    const auto bytes = random_values<uint8_t>(g.rows * groups, 0, 255);
    const auto codebooks = random_values<int8_t>(g.rows * groups * 16, -128, 127);
    const auto zeros = random_values<int8_t>(g.rows * groups, -8, 7);
    const auto row_scale = random_values<float>(g.tokens, 1, 9);
    const auto scale = random_values<float>(g.rows * groups, 1, 9);
    const auto bias = random_values<float>(g.rows, -999, 999);
    g.x_q = x_q.data(), g.weight = weight.data(), g.row_scale = row_scale.data();
    g.weight_scale = scale.data();
    if (kind == 2) {
      g.section_scale = scale.data();
      if (pick(0, 1)) g.section_zero = zeros.data();
      else if (g.bits == 4) g.zero = 8;
    } else if (kind == 1 && g.bits == 4) {
      g.codebooks = codebooks.data();
    } else if (g.bits != 8) {
      g.group_bytes = bytes.data();
    }
    if (g.codebooks || g.group_bytes) {
      g.groups_per_row = groups, g.group_size = group;
      g.group_shift = group < 16 || (group & (group - 1)) ? -1 : __builtin_ctzll(group);
    }
    if (pick(0, 3)) g.bias = bias.data();
    const auto gate = random_values<float>(g.rows, -3, 3);
    const auto residual = random_values<float>(g.tokens * g.rows, -99, 99);
    g.gate_type = dtq::kFloat32, g.tokens_per_gate = g.tokens;
    if (pick(0, 2) == 0) g.gate = gate.data(), g.residual = residual.data();
    g.gelu = pick(0, 2) == 0;
    g.type = (dtq::Float)pick(0, 2);

    std::vector<float> got(g.tokens * g.rows), want(got);
    g.out = want.data();
    run(dtq::portable, g);
    g.out = got.data();
    run(kernels, g);
    if (memcmp(got.data(), want.data(), got.size() * 4)) {
      printf("# %s: problem %d, %ld x %ld x %ld, %d bits, kind %d, type %d\n", kernels.name, problem,
             (long)g.tokens, (long)g.rows, (long)g.columns, g.bits, kind, g.type);
      return false;
    }
  }
  return true;
}

std::vector<float> attended(const dtq::Kernels& kernels, dtq::Attention a, int64_t parts) {
  Aligned packed, scratch;
  std::vector<float> out(a.batch * a.queries * a.heads * a.value_width);
  a.head_bytes = kernels.head_bytes(a);
  a.packed = packed.get(a.batch * a.key_heads * a.head_bytes);
  a.out = out.data(), a.out_type = dtq::kFloat32;
  kernels.pack_heads(a, 0, a.batch * a.key_heads);
  const int64_t blocks = a.batch * a.heads * ((a.queries + kernels.query_block - 1) / kernels.query_block);
  void* memory = scratch.get(kernels.block_bytes(a));
  for (int64_t part = 0; part < parts; part++)
    kernels.attend(a, blocks * part / parts, blocks * (part + 1) / parts, memory);
  return out;
}

// Softmax attention in double.
std::vector<double> exact_attention(const dtq::Attention& a) {
  const float *q = (const float*)a.q.data, *k = (const float*)a.k.data, *v = (const float*)a.v.data;
  std::vector<double> out;
  for (int64_t b = 0; b < a.batch; b++)
    for (int64_t t = 0; t < a.queries; t++)
      for (int64_t h = 0; h < a.heads; h++) {
        const int64_t of = h / (a.heads / a.key_heads);
        std::vector<double> sum(a.value_width, 0);
        double weight = 0;
        for (int64_t s = 0; s < a.keys; s++) {
          double score = 0;
          for (int c = 0; c < a.width; c++)
            score += (double)q[b * a.q.batch + h * a.q.head + t * a.q.token + c] *
                     k[b * a.k.batch + of * a.k.head + s * a.k.token + c];
          score *= a.factor;
          if (a.mask) {
            const int64_t at = b * a.mask_batch + h * a.mask_head + t * a.mask_query + s * a.mask_key;
            if (!((const uint8_t*)a.mask)[at]) continue;
          }
          const double p = exp2(score);
          weight += p;
          for (int c = 0; c < a.value_width; c++)
            sum[c] += p * v[b * a.v.batch + of * a.v.head + s * a.v.token + c];
        }
        for (double x : sum) out.push_back(weight > 0 ? x / weight : 0);
      }
  return out;
}

// Random shapes and masks: bit-identical to the portable code, in parts too, and close to attention in double.
bool attention(const dtq::Kernels& kernels, int problems) {
  for (int problem = 0; problem < problems; problem++) {
    const auto pick = [](int low, int high) { return low + (int)(generator() % (high - low + 1)); };
    dtq::Attention a = {};
    a.batch = pick(1, 2), a.key_heads = pick(1, 2), a.heads = a.key_heads * pick(1, 2);
    a.queries = pick(1, 70), a.keys = pick(1, 150);
    a.width = pick(1, 140), a.value_width = pick(0, 1) ? a.width : pick(1, 140);
    const auto operand = [](const std::vector<float>& x, int64_t heads, int64_t tokens, int64_t width) {
      return dtq::Operand{x.data(), dtq::kFloat32, heads * tokens * width, width, heads * width};
    };
    auto q = random_values<float>(a.batch * a.heads * a.queries * a.width, -999, 999);
    auto k = random_values<float>(a.batch * a.key_heads * a.keys * a.width, -999, 999);
    auto v = random_values<float>(a.batch * a.key_heads * a.keys * a.value_width, -999, 999);
    for (auto* values : {&q, &k, &v})
      for (float& x : *values) x = x / 500 + 1;
    a.q = operand(q, a.heads, a.queries, a.width);
    a.k = operand(k, a.key_heads, a.keys, a.width);
    a.v = operand(v, a.key_heads, a.keys, a.value_width);
    a.factor = 1.44f / sqrtf(a.width);
    auto mask = random_values<uint8_t>(a.queries * a.keys, 0, 1);
    if (pick(0, 2) == 0) {
      a.mask = mask.data(), a.mask_is_bool = true;
      a.mask_query = pick(0, 1) ? a.keys : 0, a.mask_key = 1;
    }
    const auto want = attended(dtq::portable, a, 1), got = attended(kernels, a, pick(1, 3));
    const auto exact = exact_attention(a);
    double error = 0, size = 0;
    for (size_t i = 0; i < got.size(); i++)
      error += (got[i] - exact[i]) * (got[i] - exact[i]), size += exact[i] * exact[i];
    if (memcmp(got.data(), want.data(), got.size() * 4) || !(error <= size * 3e-4)) {
      printf("# %s: attention %d, %ld x %ld, %d and %d channels, error %g of %g\n", kernels.name, problem,
             (long)a.queries, (long)a.keys, a.width, a.value_width, error, size);
      return false;
    }
  }
  return true;
}

}  // namespace

// The argument: the number of random problems for each instruction set.
int main(int argc, char** argv) {
  const int problems = argc > 1 ? atoi(argv[1]) : 300;
  dtq::use(nullptr);
  printf("best %s\n", dtq::kernels().name);
  printf("bfloat16 %s\n", dtq::has_bfloat16() ? "present" : "absent");
  int failed = 0;
  for (const char* name : {"ref", "avx2", "avxvnni", "vnni", "amx", "neon"}) {
    if (!dtq::use(name)) {
      printf("%s absent\n", name);
      continue;
    }
    const dtq::Kernels& kernels = dtq::kernels();
    bool right = !strcmp(kernels.name, name) && rows(kernels) && decoded(kernels) &&
                 matches_portable(kernels);
    for (const Case& c : {Case{1, 33, 64, 0}, Case{5, 16, 37, 0}, Case{20, 40, 700, 0},
                          Case{1, 33, 192, 64}, Case{8, 5, 320, 64}, Case{50, 40, 640, 32},
                          Case{1, 33, 192, 64, 3}, Case{8, 5, 328, 8, 3}, Case{50, 40, 640, 32, 3}})
      right = right && product(kernels, c);
    if (kernels.multiply_bfloat16 && dtq::has_bfloat16()) right = right && bfloat16_products(kernels);
    right = right && random_problems(kernels, problems) && attention(kernels, problems);
    printf("%s %s\n", name, right ? "right" : "WRONG");
    failed |= !right;
  }
  return failed;
}
