// SPDX-License-Identifier: Apache-2.0
// Rows of activations: [GELU | LayerNorm and modulate], pre_scale, order, rotation, quantize.
//
// A row stays on chip: it is read once, lies in registers, and is written once. kThreads threads hold a
// row, each of them runs of kRun columns: thread t of tile i holds columns (i * kThreads + t) * kRun
// and on. A row longer than kTiles tiles is not truncated: its further tiles are computed again from
// memory where they are needed a second time.
//
// Order of float32 operations (dtq/kernels/ops.py and fused.py do the same in torch):
//   norm       mean = sum(x) / K; rstd = 1 / sqrt(sum((x - mean)^2) / K + eps);
//              ((x - mean) * rstd) * (1 + modulate_scale) + modulate_shift
//   sum        each run of 16 columns by halves (i with i + 8, then 4, 2, 1); lane l of 32 adds the
//              runs l, l + 32, l + 64 ... one after the other; lanes by halves (16, 8, 4, 2, 1)
//   then       * pre_scale; order; butterflies, smallest distance first; * block^-0.5
//   int8       scale = max|x| / levels, at least 1e-8, 1 for a row without a magnitude above 0 (and
//              for one with a NaN); round(x / scale), ties to even, within +-levels, 0 for NaN
//   e4m3       scale = max|x| / 448; x / scale, 0 where the scale is 0, rounded to e4m3
#pragma once
#include "runs.cuh"

namespace dtq {

// What the host works out from Rows.
struct RowPlan {
  Rows r;
  float unit;                                     // block^-0.5
  bool whole_x, whole_modulate, whole_pre, whole_out;  // 16-byte access is allowed
  int64_t tiles;
  int dealt;  // floats before the row in shared memory between two turns; -1: it is in `out`
};

// ---------------------------------------------------------------------------- rotation

// One step inside a thread: (a + b, a - b) of columns `half` apart.
template <int half>
DTQ_DEV void step_in_thread(float (&v)[kRun]) {
  DTQ_UNROLL for (int i = 0; i < kRun; i++)
    if (!(i & half)) {
      const float a = v[i], b = v[i + half];
      v[i] = a + b;
      v[i + half] = a - b;
    }
}

// One step between lanes: the partner's values, plus ours in the lower half, minus ours in the upper.
DTQ_DEV void step_in_warp(float (&v)[kRun], int distance) {
  const float sign = lane() & distance ? -1.0f : 1.0f;
  DTQ_UNROLL for (int i = 0; i < kRun; i++)
    v[i] = shfl_xor(v[i], distance) + fmul(sign, v[i]);  // exact product
}

// One step between warps; values lie thread by thread, so that neighbours use different banks.
template <int kThreads>
DTQ_DEV void step_in_block(float (&v)[kRun], int thread, int distance, float* exchange) {
  sync_threads();
  DTQ_UNROLL for (int i = 0; i < kRun; i++) sts(exchange + i * kThreads + thread, v[i]);
  sync_threads();
  const float sign = thread & distance ? -1.0f : 1.0f;
  DTQ_UNROLL for (int i = 0; i < kRun; i++)
    v[i] = lds<float>(exchange + i * kThreads + (thread ^ distance)) + fmul(sign, v[i]);
}

template <int kThreads>
DTQ_DEV void rotate(float (&v)[kRun], int thread, int64_t block, float unit, float* exchange) {
  if (block == 1) return;
  step_in_thread<1>(v);
  if (block > 2) step_in_thread<2>(v);
  if (block > 4) step_in_thread<4>(v);
  if (block > 8) step_in_thread<8>(v);
  for (int lanes = 1; lanes < 32 && lanes * kRun < block; lanes *= 2)
    step_in_warp(v, lanes);
  if (kThreads > 32)
    for (int threads = 32; threads * kRun < block; threads *= 2)
      step_in_block<kThreads>(v, thread, threads, exchange);
  DTQ_UNROLL for (int i = 0; i < kRun; i++) v[i] = fmul(v[i], unit);
}

// ---------------------------------------------------------------------------- over a row

DTQ_DEV float sum_of_run(const float (&v)[kRun]) {
  float s[8];
  DTQ_UNROLL for (int i = 0; i < 8; i++) s[i] = v[i] + v[i + 8];
  DTQ_UNROLL for (int half = 4; half; half /= 2)
    DTQ_UNROLL for (int i = 0; i < half; i++) s[i] = s[i] + s[i + half];
  return s[0];
}

DTQ_DEV float sum_of_lanes(float x) {
  for (int lanes = 16; lanes; lanes /= 2) x = x + shfl_xor(x, lanes);
  return x;
}

// The sums of all runs of a row lie in `runs`; every warp adds them up for itself.
DTQ_DEV float sum_of_runs(const float* runs, int64_t count) {
  float x = 0;
  for (int64_t j = lane(); j < count; j += 32) x = x + lds<float>(runs + j);
  return sum_of_lanes(x);
}

DTQ_DEV uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

// Of all threads of a row; `words` holds one a warp.
template <int kThreads>
DTQ_DEV uint32_t largest(uint32_t x, int thread, uint32_t* words) {
  for (int lanes = 16; lanes; lanes /= 2) x = larger(x, shfl_xor(x, lanes));
  if (kThreads == 32) return x;
  sync_threads();
  if (thread % 32 == 0) sts(words + thread / 32, x);
  sync_threads();
  for (int i = 0; i < kThreads / 32; i++) x = larger(x, lds<uint32_t>(words + i));
  return x;
}

template <int kThreads>
DTQ_DEV int32_t total(int32_t x, int thread, uint32_t* words) {
  for (int lanes = 16; lanes; lanes /= 2) x += shfl_xor(x, lanes);
  if (kThreads == 32) return x;
  sync_threads();
  if (thread % 32 == 0) sts(words + thread / 32, (uint32_t)x);
  sync_threads();
  x = 0;
  for (int i = 0; i < kThreads / 32; i++) x += lds<int32_t>(words + i);
  return x;
}

// ---------------------------------------------------------------------------- quantizing

// RN(x / scale) from inverse = RN(1 / scale): the first refinement gives a neighbour of the quotient,
// the second the rounded quotient (Markstein 1990, theorem for a correctly rounded reciprocal).
// For scales and quotients far from the ends of the float range.
DTQ_DEV float quotient(float x, float scale, float inverse) {
  float q = fmul(x, inverse);
  q = ffma(ffma(-q, scale, x), inverse, q);
  return ffma(ffma(-q, scale, x), inverse, q);
}

// The integer next to q, |q| < 2^22, ties to even, in the low bits.
DTQ_DEV uint32_t nearest(float q) { return float_bits(q + 12582912.0f); }

// How the numbers of a row become codes.
struct Quantizer {
  float scale, inverse, levels;
  bool refined;  // x / scale by `quotient`, and it is within the levels
};

DTQ_DEV Quantizer quantizer(uint32_t peak, int levels, const float* fixed, const int64_t* bin) {
  Quantizer q;
  q.levels = (float)levels;
  if (fixed) {
    q.scale = fixed[bin ? *bin : 0];
    q.refined = false;
  } else {
    q.scale = 1;
    if (bits_float(peak) > 0) {
      q.scale = fdiv(bits_float(peak), q.levels);
      q.scale = q.scale < 1e-8f ? 1e-8f : q.scale;
    }
    q.refined = peak < 0x7f800000;
  }
  q.inverse = fdiv(1, q.scale);
  return q;
}

DTQ_DEV uint32_t code_of(const Quantizer& q, float x) {
  if (q.refined) return nearest(quotient(x, q.scale, q.inverse)) & 0xff;
  float v = fdiv(x, q.scale);
  v = v > q.levels ? q.levels : v;
  v = v < -q.levels ? -q.levels : v;
  return v == v ? nearest(v) & 0xff : 0;
}

// ---------------------------------------------------------------------------- the kernel

// Shared memory of rows_kernel: [exchange][sums of runs][row between turns]; one row of 32 threads
// has none. kWords is what `largest` and `total` use.
constexpr int kWords = 32;

template <int kThreads, int kTiles, Float kType, Before kBefore>
DTQ_KERNEL void DTQ_BOUNDS(kThreads < 128 ? 128 : kThreads, 1) rows_kernel(const DTQ_CONSTANT RowPlan p) {
  DTQ_SHARED(shared);
  constexpr int kRows = kThreads < 128 ? 128 / kThreads : 1;  // of a thread block
  const Rows& r = p.r;
  const int thread = tid() % kThreads;
  const int64_t row = (int64_t)block_x() * kRows + tid() / kThreads;
  if (row >= r.rows) return;  // a whole warp; rows of more threads are a block of their own
  uint32_t* words = (uint32_t*)shared;
  float* exchange = (float*)shared + kWords;
  float* runs = exchange + (r.block > 32 * kRun ? kThreads * kRun : 0);
  float* dealt = p.dealt < 0 ? (float*)r.out + row * r.out_stride : (float*)shared + p.dealt;
  auto deal = [&](int64_t k, float value) {
    if (p.dealt < 0) dealt[k] = value;
    else sts(dealt + k, value);
  };
  const void* x = row_of(r.x, kType, row, r.stride);

  float held[kTiles][kRun];
  auto column = [&](int64_t tile) { return (tile * kThreads + thread) * kRun; };
  auto each_tile = [&](auto&& body) {
    DTQ_UNROLL for (int i = 0; i < kTiles; i++)
      if (i < p.tiles) body((int64_t)i, held[i], true);
    for (int64_t i = kTiles; i < p.tiles; i++) {
      float v[kRun];
      body(i, v, false);
    }
  };
  auto clear_beyond = [&](int64_t k, float (&v)[kRun]) {
    if (k + kRun > r.columns)
      DTQ_UNROLL for (int i = 0; i < kRun; i++)
        if (k + i >= r.columns) v[i] = 0;
  };

  float mean = 0, rstd = 1;
  if (kBefore == kNorm) {
    const int64_t count = (r.columns + kRun - 1) / kRun;
    float own = 0;
    auto add_run = [&](int64_t tile, const float (&v)[kRun]) {
      const float s = sum_of_run(v);
      if (kThreads == 32) own = own + s;
      else if (column(tile) < r.columns) sts(runs + column(tile) / kRun, s);
    };
    auto sum_up = [&] {
      if (kThreads == 32) return sum_of_lanes(own);
      sync_threads();
      const float s = sum_of_runs(runs, count);
      sync_threads();
      return s;
    };
    each_tile([&](int64_t tile, float (&v)[kRun], bool) {
      read_run(x, kType, column(tile), r.columns, p.whole_x, v);
      add_run(tile, v);
    });
    mean = fdiv(sum_up(), (float)r.columns);
    own = 0;
    each_tile([&](int64_t tile, float (&v)[kRun], bool kept) {
      if (!kept) read_run(x, kType, column(tile), r.columns, p.whole_x, v);
      float square[kRun];
      DTQ_UNROLL for (int i = 0; i < kRun; i++) square[i] = fmul(v[i] - mean, v[i] - mean);
      clear_beyond(column(tile), square);
      add_run(tile, square);
    });
    rstd = fdiv(1, fsqrt(fdiv(sum_up(), (float)r.columns) + r.eps));
  }

  // A run as it enters the rotation.
  auto changed = [&](int64_t tile, float (&v)[kRun], bool kept) {
    const int64_t k = column(tile);
    float other[kRun];
    auto along = [&](const void* from, Float type, bool whole, float (&into)[kRun]) {
      if (r.order) gather_run(from, type, r.order, k, r.columns, into);
      else read_run(from, type, k, r.columns, whole, into);
    };
    if (kBefore != kNorm || !kept || r.order) along(x, kType, p.whole_x, v);
    if (kBefore == kGelu) DTQ_UNROLL for (int i = 0; i < kRun; i++) v[i] = gelu(v[i]);
    if (kBefore == kNorm) {
      DTQ_UNROLL for (int i = 0; i < kRun; i++) v[i] = fmul(v[i] - mean, rstd);
      if (r.modulate_scale) {
        const int64_t by = row / r.rows_per_modulate;
        along(row_of(r.modulate_scale, r.modulate_type, by, r.modulate_stride), r.modulate_type,
              p.whole_modulate, other);
        DTQ_UNROLL for (int i = 0; i < kRun; i++) v[i] = fmul(v[i], 1.0f + other[i]);
        along(row_of(r.modulate_shift, r.modulate_type, by, r.modulate_stride), r.modulate_type,
              p.whole_modulate, other);
        DTQ_UNROLL for (int i = 0; i < kRun; i++) v[i] = v[i] + other[i];
      }
      clear_beyond(k, v);
    }
    if (r.pre_scale) {
      along(r.pre_scale, kBFloat16, p.whole_pre, other);
      DTQ_UNROLL for (int i = 0; i < kRun; i++) v[i] = fmul(v[i], other[i]);
    }
    rotate<kThreads>(v, thread, r.block, p.unit, exchange);
  };
  // A run of the second turn: the blocks have been dealt out.
  auto turned = [&](int64_t tile, float (&v)[kRun]) {
    DTQ_UNROLL for (int i = 0; i < kRun; i++) {
      const int64_t k = column(tile) + i;
      v[i] = k >= r.columns ? 0 : p.dealt < 0 ? dealt[k] : lds<float>(dealt + k);
    }
    rotate<kThreads>(v, thread, r.block, p.unit, exchange);
  };

  if (r.turns == 2) {
    const int64_t blocks = r.columns / r.block;
    each_tile([&](int64_t tile, float (&v)[kRun], bool kept) {
      changed(tile, v, kept);
      DTQ_UNROLL for (int i = 0; i < kRun; i++) {
        const int64_t k = column(tile) + i;
        if (k < r.columns) deal(k % r.block * blocks + k / r.block, v[i]);
      }
    });
    sync_threads();
  }

  uint32_t peak = 0;  // the bits of magnitudes order as the magnitudes do, and NaN is above all
  each_tile([&](int64_t tile, float (&v)[kRun], bool kept) {
    if (r.turns == 2) turned(tile, v);
    else changed(tile, v, kept);
    DTQ_UNROLL for (int i = 0; i < kRun; i++) peak = larger(peak, float_bits(v[i]) & 0x7fffffff);
  });
  auto again = [&](int64_t tile, float (&v)[kRun], bool kept) {
    if (kept) return;
    if (r.turns == 2) turned(tile, v);
    else changed(tile, v, false);
  };

  if (r.output == kFloat) {
    float* out = (float*)r.out + row * r.out_stride;
    each_tile([&](int64_t tile, float (&v)[kRun], bool kept) {
      again(tile, v, kept);
      write_floats(out, column(tile), r.width, p.whole_out, v);
    });
    return;
  }

  if (!r.fixed) peak = largest<kThreads>(peak, thread, words);
  unsigned char* out = (unsigned char*)r.out + row * r.out_stride;
  if (r.output == kE4m3) {
    float scale = r.fixed ? r.fixed[r.bin ? *r.bin : 0] : fdiv(bits_float(peak), 448);
    if (thread == 0) r.scale[row] = scale;
    const float divisor = scale == 0 ? bits_float(0x7f800000) : scale;
    each_tile([&](int64_t tile, float (&v)[kRun], bool kept) {
      again(tile, v, kept);
      uint32_t packed[4] = {};
      DTQ_UNROLL for (int i = 0; i < kRun; i++)
        if (column(tile) + i < r.columns)
          packed[i / 4] |= to_e4m3(fdiv(v[i], divisor)) << i % 4 * 8;
      write_bytes(out, column(tile), r.width, p.whole_out, packed);
    });
    return;
  }

  const Quantizer q = quantizer(peak, r.levels, r.fixed, r.bin);
  if (thread == 0) r.scale[row] = q.scale;
  int32_t sum = 0;
  each_tile([&](int64_t tile, float (&v)[kRun], bool kept) {
    again(tile, v, kept);
    uint32_t packed[4] = {};
    DTQ_UNROLL for (int i = 0; i < kRun; i++) {
      const uint32_t code = column(tile) + i < r.columns ? code_of(q, v[i]) : 0;
      packed[i / 4] |= code << i % 4 * 8;
      sum += (int8_t)code;
    }
    write_bytes(out, column(tile), r.width, p.whole_out, packed);
  });
  if (r.sums) {
    sum = total<kThreads>(sum, thread, words);
    if (thread == 0) r.sums[row] = sum;
  }
}

}  // namespace dtq
