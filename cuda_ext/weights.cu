// SPDX-License-Identifier: Apache-2.0
// launch_dequantize, launch_expand and launch_small_m: choose the compiled decoder of a stored weight.
#include "small_m_integers.cuh"

namespace dtq {

namespace {

// Bytes of a row vector in the checkpoint; those of 3 and 6 bits are read as 16-bit words.
int vector_alignment(const Weight& w) {
  const int bytes = w.encoding == kWords ? kVec / w.vector * w.bits / 8 : kVec * w.bits / 8;
  return bytes == 6 ? 2 : bytes == 12 ? 4 : bytes;
}

// kOk, or the reason why the weight is not supported.
int plan(const Weight& w, WeightPlan& p) {
  p.w = w;
  p.group = (int)w.columns;
  p.shift = 31;
  if (w.rows < 0 || w.columns < 0 || w.groups < 0) return kBadWeight;
  if (w.rows >> 31 || w.columns >> 31 || w.rows * w.groups >> 31) return kUnsupported;
  if (w.encoding == kTrits) {
    p.row_bytes = w.columns / 5;
    if (w.columns % 5 && !w.tail) return kBadWeight;
  } else {
    const int vector = w.encoding == kWords ? w.vector : 1;
    if (vector < 1 || w.columns % vector || w.columns / vector * w.bits % 8) return kBadWeight;
    p.row_bytes = w.columns / vector * w.bits / 8;
  }
  if (w.encoding != kWords) {
    if (w.groups < 1 || w.columns % w.groups) return kBadWeight;
    p.group = (int)(w.columns / w.groups);
    if (w.groups > 1) {
      if (p.group % kVec) return kBadGroup;
      p.shift = p.group & (p.group - 1) ? -1 : __builtin_ctz((unsigned)p.group);
    }
    if (w.scale_type == kNoScale && w.encoding != kTwoLevel) return kBadWeight;
  }
  const int alignment = w.encoding == kTrits ? 1 : vector_alignment(w);
  p.aligned =
      w.encoding != kTrits && (uintptr_t)w.weight % alignment == 0 && p.row_bytes % alignment == 0;
  return kOk;
}

// Launches the kernel that `kernel_for` returns for the number of tokens, kSmallMTokens at a time.
template <class KernelFor>
int launch_tokens(SmallMPlan& p, Stream stream, KernelFor kernel_for) {
  Shape shape;
  shape.grid.x = (unsigned)ceil_div(p.weight.w.rows, kRowsTile);
  shape.threads = kWarps * 32;
  shape.shared = (16 + kWarps * kSmallMTokens * kRowsTile) * 4;
  for (p.first = 0; p.first < p.f.tokens; p.first += kSmallMTokens) {
    const int status = launch(kernel_for(p.f.tokens - p.first), shape, stream, p);
    if (status != kOk) return status;
  }
  return kOk;
}

template <class Codes>
int launch_integers(SmallMPlan& p, Stream stream) {
  return launch_tokens(p, stream, [](int64_t tokens) {
    return tokens > 8 ? small_m_integers_kernel<Codes, 2> : small_m_integers_kernel<Codes, 1>;
  });
}

template <bool kHasZero>
int launch_affine(SmallMPlan& p, Stream stream) {
  const bool halves = p.weight.w.scale_type == kScaleBFloat16;
  if (p.weight.w.bits == 4)
    return halves ? launch_integers<Int4Bf16<kHasZero>>(p, stream)
                  : launch_integers<Int4Float<kHasZero>>(p, stream);
  return halves ? launch_integers<Int8Codes<kHasZero, kScaleBFloat16>>(p, stream)
                : launch_integers<Int8Codes<kHasZero, kScaleFloat32>>(p, stream);
}

int launch_integers(SmallMPlan& p, Stream stream) {
  if (p.weight.w.encoding == kTwoLevel) return launch_integers<Int4TwoLevel>(p, stream);
  return p.weight.w.zero ? launch_affine<true>(p, stream) : launch_affine<false>(p, stream);
}

template <Encoding kEncoding, int kBits>
struct Decoder {
  static int dequantize(const DecodePlan& p, Stream stream) {
    Shape shape;
    const int64_t blocks =
        (p.weight.w.rows * p.vectors + kDecodeThreads - 1) / kDecodeThreads;
    if (blocks >> 31) return kUnsupported;
    shape.grid.x = (unsigned)blocks;
    shape.threads = kDecodeThreads;
    shape.shared = kEncoding == kTable ? 64 : 0;
    return launch(decode_kernel<kEncoding, kBits>, shape, stream, p);
  }

  static int small_m(SmallMPlan& p, Stream stream) {
    return launch_tokens(p, stream, [&](int64_t) {
      return p.f.type == kBFloat16 ? small_m_kernel<kEncoding, kBits, kBFloat16>
                                   : small_m_kernel<kEncoding, kBits, kFloat16>;
    });
  }
};

// Calls `run` with the Decoder of a weight, for every encoding and number of bits of a format.
template <class Run>
int with_decoder(const Weight& w, Run run) {
  switch (w.encoding * 16 + w.bits) {
    case kAffine * 16 + 2: return run(Decoder<kAffine, 2>());
    case kAffine * 16 + 3: return run(Decoder<kAffine, 3>());
    case kAffine * 16 + 4: return run(Decoder<kAffine, 4>());
    case kAffine * 16 + 8: return run(Decoder<kAffine, 8>());
    case kTable * 16 + 3: return run(Decoder<kTable, 3>());
    case kTable * 16 + 4: return run(Decoder<kTable, 4>());
    case kFloat8 * 16 + 8: return run(Decoder<kFloat8, 8>());
    case kWords * 16 + 6: return w.vector == 2 ? run(Decoder<kWords, 6>()) : kBadWeight;
    case kWords * 16 + 8: return w.vector == 4 ? run(Decoder<kWords, 8>()) : kBadWeight;
    case kTrits * 16 + 2: return run(Decoder<kTrits, 2>());
    case kTwoLevel * 16 + 3: return run(Decoder<kTwoLevel, 3>());
    case kTwoLevel * 16 + 4: return run(Decoder<kTwoLevel, 4>());
    default: return kBadWeight;
  }
}

int decode(const Weight& w, DecodePlan& p, int size, Stream stream) {
  const int status = plan(w, p.weight);
  if (status != kOk) return status;
  p.vectors = (w.columns + kVec - 1) / kVec;
  p.aligned_out = vector_aligned(p.out, w.columns, size);
  return with_decoder(w, [&](auto decoder) {
    if (w.rows == 0 || w.columns == 0) return (int)kOk;
    return decoder.dequantize(p, stream);
  });
}

}  // namespace

int launch_dequantize(const Weight& w, void* out, Float type, Stream stream) {
  DecodePlan p = {};
  p.out = out;
  p.type = type;
  return decode(w, p, type == kFloat32 ? 4 : 2, stream);
}

int launch_expand(const Weight& w, int8_t* out, Stream stream) {
  if (w.encoding != kTwoLevel || w.scale_type != kNoScale) return kBadWeight;
  DecodePlan p = {};
  p.out = out;
  p.int8 = true;
  return decode(w, p, 1, stream);
}

int launch_small_m(const SmallM& f, Stream stream) {
  SmallMPlan p = {};
  const int status = plan(f.weight, p.weight);
  if (status != kOk) return status;
  if (f.type == kFloat32) return kUnsupported;
  p.f = f;
  p.aligned_x = vector_aligned(f.x, f.stride, 2);
  return with_decoder(f.weight, [&](auto decoder) {
    if (f.weight.rows == 0) return (int)kOk;
    if (fits_integers(p)) return launch_integers(p, stream);
    return decoder.small_m(p, stream);
  });
}

}  // namespace dtq
