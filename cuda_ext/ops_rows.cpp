// SPDX-License-Identifier: Apache-2.0
// dtq::* on CUDA: rows of activations, decoded weights and GEMM for few tokens, by launch_rows.h.
#include "launch_rows.h"

#include <map>

#include "../common_ext/format_codes.h"
#include "binding.h"

namespace {

using namespace dtq::binding;

// ------------------------------------------------------------------------------ rows of activations

using Pair = std::tuple<Tensor, Tensor>;
using Triple = std::tuple<Tensor, Tensor, Tensor>;

const OptionalTensor kNoTensor;

// pre_scale, perm, hadamard_block and num_rotations of the schemas.
struct InputTransform {
  const OptionalTensor &pre_scale, &perm;
  int64_t hadamard_block, num_rotations;
};

// scale, bin and qmax of the schemas.
struct Int8Params {
  const OptionalTensor &scale, &bin;
  int64_t qmax;
};

dtq::Rows row_operands(const Tensor& x, const InputTransform& transform) {
  const int64_t columns = x.size(1), block = transform.hadamard_block;
  STD_TORCH_CHECK(block >= 1 && (block & (block - 1)) == 0 && columns % block == 0, "dtq: ", columns,
                  " columns are not whole blocks of ", block);
  STD_TORCH_CHECK(transform.num_rotations == 1 || transform.num_rotations == 2,
                  "dtq: num_rotations is ", transform.num_rotations, ", must be 1 or 2");
  if (transform.pre_scale) {
    check(*transform.pre_scale, "pre_scale", x, ScalarType::BFloat16);
    check_count(*transform.pre_scale, "pre_scale", columns);
  }
  if (transform.perm) {
    check(*transform.perm, "perm", x, ScalarType::Int);
    check_count(*transform.perm, "perm", columns);
  }
  dtq::Rows rows{};
  rows.x = x.data_ptr();
  rows.type = float_type(x.scalar_type());
  rows.rows = x.size(0);
  rows.columns = columns;
  rows.stride = rows.rows > 1 ? x.stride(0) : columns;
  rows.pre_scale = data<uint16_t>(transform.pre_scale);
  rows.perm = data<int32_t>(transform.perm);
  rows.hadamard_block = block;
  rows.num_rotations = int(transform.num_rotations);
  rows.qmax = 127;
  rows.next_may_start = options.load(std::memory_order_relaxed) & dtq::kDependentLaunch;
  rows.out_stride = rows.width = columns;
  return rows;
}

void set_int8(dtq::Rows& rows, const Tensor& x, const Int8Params& params) {
  STD_TORCH_CHECK(params.qmax >= 1 && params.qmax <= 127, "dtq: qmax is ", params.qmax,
                  ", not in 1..127");
  STD_TORCH_CHECK(params.scale || !params.bin, "dtq: a bin needs a table of scales");
  if (params.scale) {
    check(*params.scale, "scale", x, ScalarType::Float);
    STD_TORCH_CHECK(params.scale->numel() >= 1, "dtq: the table of scales is empty");
  }
  if (params.bin) {
    check(*params.bin, "bin", x, ScalarType::Long);
    check_count(*params.bin, "bin", 1);
  }
  rows.qmax = int(params.qmax);
  rows.static_scale = data<float>(params.scale);
  rows.bin = data<int64_t>(params.bin);
}

// x_q and the per-token scales, or nothing if no kernel supports it.
std::optional<Pair> quantized(dtq::Rows& rows, const Tensor& x, dtq::Output output) {
  auto type = output == dtq::kE4m3 ? ScalarType::Float8_e4m3fn : ScalarType::Char;
  Tensor x_q = torch::stable::new_empty(x, {x.size(0), x.size(1)}, type);
  Tensor scales = torch::stable::new_empty(x, {x.size(0)}, ScalarType::Float);
  rows.output = output;
  rows.out = x_q.data_ptr();
  rows.scale = static_cast<float*>(scales.data_ptr());
  if (!launched(dtq::launch_rows(rows, stream_of(x)), "quantizing rows")) return std::nullopt;
  return Pair{x_q, scales};
}

bool has_row_kernel(const Tensor& x) { return is_kernel_dtype(x.scalar_type()) && is_supported(x); }

Pair quantize_rows(const Tensor& x_in, const OptionalTensor& pre_scale, int64_t hadamard_block,
                   const OptionalTensor& scale, int64_t qmax) {
  Tensor x = row_contiguous(x_in, "x");
  Guard guard(x);
  if (has_row_kernel(x)) {
    dtq::Rows rows = row_operands(x, {pre_scale, kNoTensor, hadamard_block, 1});
    set_int8(rows, x, {scale, kNoTensor, qmax});
    if (auto out = quantized(rows, x, dtq::kInt8)) return *out;
  }
  return call_reference<Pair>("dtq_reference::quantize_rows", x_in, pre_scale, hadamard_block, scale,
                              qmax);
}

// binned_quantize_rows and gelu_quantize_rows, which have the same arguments.
template <dtq::Prologue prologue>
Pair binned_quantize_rows(const Tensor& x_in, const OptionalTensor& pre_scale, const OptionalTensor& perm,
                          int64_t hadamard_block, int64_t num_rotations, const OptionalTensor& scale,
                          const OptionalTensor& bin, int64_t qmax) {
  constexpr const char* kReference = prologue == dtq::kGelu ? "dtq_reference::gelu_quantize_rows"
                                                            : "dtq_reference::binned_quantize_rows";
  Tensor x = row_contiguous(x_in, "x");
  Guard guard(x);
  if (has_row_kernel(x)) {
    dtq::Rows rows = row_operands(x, {pre_scale, perm, hadamard_block, num_rotations});
    set_int8(rows, x, {scale, bin, qmax});
    rows.prologue = prologue;
    if (auto out = quantized(rows, x, dtq::kInt8)) return *out;
  }
  return call_reference<Pair>(kReference, x_in, pre_scale, perm, hadamard_block, num_rotations, scale,
                              bin, qmax);
}

void set_norm(dtq::Rows& rows, const Tensor& x, const OptionalTensor& scale, const OptionalTensor& shift,
              double eps) {
  rows.prologue = dtq::kNorm;
  rows.eps = float(eps);
  rows.rows_per_modulate = std::max<int64_t>(1, x.size(0));
  STD_TORCH_CHECK(scale.has_value() == shift.has_value(),
                  "dtq: modulation needs both a scale and a shift");
  if (!scale) return;
  const ScalarType type = scale->scalar_type();
  check(*scale, "modulate_scale", x, type);
  check(*shift, "modulate_shift", x, type);
  STD_TORCH_CHECK(is_kernel_dtype(type), "dtq: modulate_scale is ", name_of(type));
  STD_TORCH_CHECK(scale->dim() == 2 && scale->size(1) == x.size(1) && scale->size(0) > 0 &&
                      x.size(0) % scale->size(0) == 0 && shift->numel() == scale->numel(),
                  "dtq: modulate_scale and modulate_shift must be (images, ", x.size(1),
                  "), and the rows, ", x.size(0), ", a multiple of the images");
  rows.modulate_scale = scale->data_ptr();
  rows.modulate_shift = shift->data_ptr();
  rows.modulate_type = float_type(type);
  rows.modulate_stride = x.size(1);
  rows.rows_per_modulate = std::max<int64_t>(1, x.size(0) / scale->size(0));
}

Pair norm_quantize_rows(const Tensor& x_in, const OptionalTensor& modulate_scale,
                        const OptionalTensor& modulate_shift, double eps, const OptionalTensor& pre_scale,
                        const OptionalTensor& perm, int64_t hadamard_block, int64_t num_rotations,
                        const OptionalTensor& scale, const OptionalTensor& bin, int64_t qmax) {
  Tensor x = row_contiguous(x_in, "x");
  Guard guard(x);
  if (has_row_kernel(x)) {
    dtq::Rows rows = row_operands(x, {pre_scale, perm, hadamard_block, num_rotations});
    set_int8(rows, x, {scale, bin, qmax});
    set_norm(rows, x, modulate_scale, modulate_shift, eps);
    if (auto out = quantized(rows, x, dtq::kInt8)) return *out;
  }
  return call_reference<Pair>("dtq_reference::norm_quantize_rows", x_in, modulate_scale, modulate_shift,
                              eps, pre_scale, perm, hadamard_block, num_rotations, scale, bin, qmax);
}

// e4m3_quantize_rows and e2m1_quantize_rows, which have the same arguments.
template <dtq::Output output>
Pair float_quantize_rows(const Tensor& x_in, const OptionalTensor& pre_scale, const OptionalTensor& perm,
                         int64_t hadamard_block, int64_t num_rotations) {
  constexpr const char* kReference = output == dtq::kE4m3 ? "dtq_reference::e4m3_quantize_rows"
                                                          : "dtq_reference::e2m1_quantize_rows";
  Tensor x = row_contiguous(x_in, "x");
  Guard guard(x);
  if (has_row_kernel(x)) {
    dtq::Rows rows = row_operands(x, {pre_scale, perm, hadamard_block, num_rotations});
    if (auto out = quantized(rows, x, output)) return *out;
  }
  return call_reference<Pair>(kReference, x_in, pre_scale, perm, hadamard_block, num_rotations);
}

Triple fp4_quantize_rows(const Tensor& x_in, const OptionalTensor& pre_scale, const OptionalTensor& perm,
                         int64_t hadamard_block, int64_t num_rotations, bool mx) {
  Tensor x = row_contiguous(x_in, "x");
  Guard guard(x);
  const int64_t group = mx ? 32 : 16, columns = x.size(1);
  STD_TORCH_CHECK(columns % group == 0, "dtq: ", columns, " columns are not whole groups of ", group);
  if (has_row_kernel(x)) {
    dtq::Rows rows = row_operands(x, {pre_scale, perm, hadamard_block, num_rotations});
    const ScalarType type = mx ? ScalarType::Byte : ScalarType::Float8_e4m3fn;
    Tensor x_q = torch::stable::new_empty(x, {x.size(0), columns / 2}, ScalarType::Char);
    Tensor block_scale = torch::stable::new_empty(x, {x.size(0), columns / group}, type);
    Tensor scales = torch::stable::new_empty(x, {x.size(0)}, ScalarType::Float);
    rows.output = mx ? dtq::kMxRow : dtq::kNvRow;
    rows.out = x_q.data_ptr();
    rows.out_stride = columns / 2;
    rows.block_scale = static_cast<uint8_t*>(block_scale.data_ptr());
    rows.scale = static_cast<float*>(scales.data_ptr());
    if (launched(dtq::launch_rows(rows, stream_of(x)), "quantizing rows to FP4"))
      return {x_q, block_scale, scales};
  }
  return call_reference<Triple>("dtq_reference::fp4_quantize_rows", x_in, pre_scale, perm, hadamard_block,
                                num_rotations, mx);
}

Tensor transform_rows(const Tensor& x_in, const OptionalTensor& pre_scale, const OptionalTensor& perm,
                      int64_t hadamard_block, int64_t num_rotations) {
  Tensor x = row_contiguous(x_in, "x");
  Guard guard(x);
  if (has_row_kernel(x)) {
    Tensor y = torch::stable::new_empty(x, {x.size(0), x.size(1)}, ScalarType::Float);
    dtq::Rows rows = row_operands(x, {pre_scale, perm, hadamard_block, num_rotations});
    rows.output = dtq::kFloat;
    rows.out = y.data_ptr();
    if (launched(dtq::launch_rows(rows, stream_of(x)), "transform_rows")) return y;
  }
  return call_reference<Tensor>("dtq_reference::transform_rows", x_in, pre_scale, perm, hadamard_block,
                                num_rotations);
}

// kRoundNone for a format that has no kernel.
dtq::Rounding rounding_of(const std::string& format) {
  for (int i = dtq::kRoundNone + 1; i < dtq::kRoundings; i++)
    if (format == dtq::kRoundingFormats[i].name) return static_cast<dtq::Rounding>(i);
  return dtq::kRoundNone;
}

Tensor round_rows(const Tensor& x_in, const OptionalTensor& pre_scale, const OptionalTensor& perm,
                  int64_t hadamard_block, int64_t num_rotations, const std::string& activation_format,
                  ScalarType type) {
  Tensor x = row_contiguous(x_in, "x");
  Guard guard(x);
  const dtq::Rounding rounding = rounding_of(activation_format);
  const bool only_transformed = activation_format == "none";
  if (has_row_kernel(x) && is_kernel_dtype(type) && (only_transformed || rounding != dtq::kRoundNone)) {
    Tensor y = torch::stable::new_empty(x, {x.size(0), x.size(1)}, type);
    dtq::Rows rows = row_operands(x, {pre_scale, perm, hadamard_block, num_rotations});
    rows.output = only_transformed ? dtq::kFloat : dtq::kFakeQuantized;
    rows.rounding = rounding;
    rows.out_type = float_type(type);
    rows.out = y.data_ptr();
    if (launched(dtq::launch_rows(rows, stream_of(x)), "round_rows")) return y;
  }
  return call_reference<Tensor>("dtq_reference::round_rows", x_in, pre_scale, perm, hadamard_block,
                                num_rotations, activation_format, type);
}

// ------------------------------------------------------------------------------- stored weights

// The size of a tensor of a weight, whatever its dtype.
int64_t expected_bytes(const dtq::Weight& w, const std::string& name) {
  const bool two_level = w.encoding == dtq::kTwoLevel, words = w.encoding == dtq::kWords;
  const int64_t groups = w.rows * w.groups;
  const int64_t scale_bytes = w.scale_type == dtq::kScaleFloat32    ? 4
                              : w.scale_type == dtq::kScaleBFloat16 ? 2
                                                                    : 1;
  if (name == "weight")
    return w.rows * (w.encoding == dtq::kTrits ? w.columns / 5
                                               : w.columns / (words ? w.vector : 1) * w.bits / 8);
  if (name == "weight_tail") return w.rows * (w.columns % 5);
  if (name == "weight_scale") return two_level ? w.rows * 4 : groups * scale_bytes;
  if (name == "weight_scale_2") return two_level ? groups : 4;
  if (name == "weight_zero_point") return groups;
  return words ? (int64_t(1) << w.bits) * w.vector * 2 : (int64_t(1) << w.bits) * 4;  // weight_lut
}

void check_tensors(const dtq::Weight& w, const std::string& format,
                   const std::map<std::string, Tensor>& tensors) {
  auto require = [&](bool needed, const void* pointer, const char* name) {
    STD_TORCH_CHECK(!needed || pointer, "dtq: ", format, " lacks ", name);
  };
  const bool has_format_codebook =
      std::any_of(w.format_codebook, w.format_codebook + 16, [](float value) { return value != 0; });
  require(true, w.weight, "weight");
  require(w.encoding == dtq::kTrits && w.columns % 5, w.tail, "weight_tail");
  require(w.scale_type != dtq::kNoScale, w.scale, "weight_scale");
  require(w.scale_type == dtq::kScaleE4m3, w.scale_2, "weight_scale_2");
  require(w.encoding == dtq::kTwoLevel, w.group_bytes, "weight_scale_2");
  require(w.encoding == dtq::kTable && !has_format_codebook, w.codebook, "weight_lut");
  require(w.encoding == dtq::kWords, w.words, "weight_lut");
  for (const auto& [name, tensor] : tensors)
    STD_TORCH_CHECK(bytes_of(tensor) == expected_bytes(w, name), "dtq: ", format, " of (", w.rows, ", ",
                    w.columns, "): ", name, " has ", bytes_of(tensor), " bytes, expected ",
                    expected_bytes(w, name));
}

// The checked operands of the decoder; false if it does not know the format.
bool set_weight(dtq::Weight& w, const Tensor& like, const std::string& format,
                const std::vector<std::string>& names, const std::vector<Tensor>& tensors, int64_t rows,
                int64_t columns) {
  auto entry = dtq::format_codes().find(format);
  if (entry == dtq::format_codes().end()) return false;
  const dtq::FormatCode& code = entry->second;
  w = dtq::Weight{};
  w.encoding = code.encoding;
  w.bits = code.bits;
  w.rows = rows;
  w.columns = columns;
  w.offset = code.offset;
  w.vector = code.vector;
  w.scale_type = code.scale_type;
  std::copy(code.codebook.begin(), code.codebook.end(), w.format_codebook);
  std::map<std::string, Tensor> by_name;
  STD_TORCH_CHECK(names.size() == tensors.size(), "dtq: ", names.size(), " names for ", tensors.size(),
                  " tensors");
  for (size_t i = 0; i < tensors.size(); i++) {
    const Tensor& tensor = tensors[i];
    const std::string& name = names[i];
    check(tensor, name.c_str(), like, tensor.scalar_type());
    STD_TORCH_CHECK(tensor.dim() == 2, "dtq: ", name, " has ", tensor.dim(), " dimensions, expected 2");
    by_name.insert_or_assign(name, tensor);
    const void* at = tensor.data_ptr();
    if (name == "weight") {
      w.weight = static_cast<const uint8_t*>(at);
    } else if (name == "weight_tail") {
      w.tail = static_cast<const uint8_t*>(at);
    } else if (name == "weight_scale") {
      w.scale = at;
      if (w.encoding != dtq::kTwoLevel) w.groups = tensor.size(1);
    } else if (name == "weight_scale_2" && w.encoding == dtq::kTwoLevel) {
      w.group_bytes = static_cast<const uint8_t*>(at);
      w.groups = tensor.size(1);
    } else if (name == "weight_scale_2") {
      w.scale_2 = static_cast<const float*>(at);
    } else if (name == "weight_zero_point") {
      w.zero = static_cast<const int8_t*>(at);
    } else if (name == "weight_lut" && w.encoding == dtq::kWords) {
      check_alignment(tensor, "weight_lut", 2 * code.vector);  // the values of a code at once
      w.words = static_cast<const uint16_t*>(at);
    } else if (name == "weight_lut") {
      w.codebook = static_cast<const float*>(at);
    } else {
      STD_TORCH_CHECK(false, "dtq: ", format, " has no tensor ", name);
    }
  }
  if (w.groups == 0) w.groups = 1;
  check_tensors(w, format, by_name);
  return true;
}

Tensor dequantize(const std::vector<Tensor>& tensors, const std::vector<std::string>& names,
                  const std::string& format, int64_t columns, ScalarType type) {
  STD_TORCH_CHECK(!tensors.empty(), "dtq: a weight without tensors");
  const Tensor& first = tensors[0];
  Guard guard(first);
  dtq::Weight weight;
  if (is_kernel_dtype(type) && is_supported(first) &&
      set_weight(weight, first, format, names, tensors, first.size(0), columns)) {
    Tensor out = torch::stable::new_empty(first, {first.size(0), columns}, type);
    int code = dtq::launch_dequantize(weight, out.data_ptr(), float_type(type), stream_of(first));
    if (launched(code, "dequantize")) return out;
  }
  return call_reference<Tensor>("dtq_reference::dequantize", tensors, names, format, columns, type);
}

// 3-bit weights have no GEMM of their own: they are expanded to int8 in temporary memory.
Tensor w3a8_linear(const Tensor& x_q, const Tensor& row_scale, const Tensor& weight,
                   const Tensor& weight_scale, const Tensor& weight_scale_2, const OptionalTensor& bias,
                   ScalarType type) {
  Guard guard(x_q);
  check(x_q, "x_q", x_q, ScalarType::Char);
  check(weight, "weight", x_q, ScalarType::Char);
  check(weight_scale_2, "weight_scale_2", x_q, ScalarType::Char);
  STD_TORCH_CHECK(x_q.dim() == 2 && weight.dim() == 2 && weight_scale_2.dim() == 2,
                  "dtq: x_q, weight and weight_scale_2 must be matrices");
  const int64_t rows = weight.size(0), columns = x_q.size(1), groups = weight_scale_2.size(1);
  STD_TORCH_CHECK(8 * weight.size(1) == 3 * columns, "dtq: x_q with ", columns,
                  " columns does not fit the weight, which has ", 8 * weight.size(1) / 3);
  STD_TORCH_CHECK(weight_scale_2.size(0) == rows && groups > 0 && columns % groups == 0,
                  "dtq: weight_scale_2 must be (", rows, ", groups), and ", columns,
                  " columns whole groups");
  if (is_kernel_dtype(type) && is_supported(x_q)) {
    dtq::Weight w{};
    w.encoding = dtq::kTwoLevel;
    w.bits = 3;
    w.rows = rows;
    w.columns = columns;
    w.weight = static_cast<const uint8_t*>(weight.data_ptr());
    w.group_bytes = static_cast<const uint8_t*>(weight_scale_2.data_ptr());
    w.groups = groups;
    Tensor expanded = torch::stable::new_empty(x_q, {rows, columns}, ScalarType::Char);
    int code = dtq::launch_expand(w, static_cast<int8_t*>(expanded.data_ptr()), stream_of(x_q));
    if (launched(code, "expanding 3-bit weights"))
      return call<Tensor>(DTQ_OP("w8a8_linear"), x_q, row_scale, expanded, weight_scale, bias, type);
  }
  return call_reference<Tensor>("dtq_reference::w3a8_linear", x_q, row_scale, weight, weight_scale,
                                weight_scale_2, bias, type);
}

Tensor weight_linear(const Tensor& x_in, const std::vector<Tensor>& tensors,
                     const std::vector<std::string>& names, const std::string& format,
                     const OptionalTensor& bias) {
  Tensor x = row_contiguous(x_in, "x");
  Guard guard(x);
  STD_TORCH_CHECK(!tensors.empty(), "dtq: a weight without tensors");
  int64_t outputs = tensors[0].size(0);
  if (bias) check_count(*bias, "bias", outputs);
  const ScalarType type = x.scalar_type();
  bool small_m = x.size(0) <= dtq::kSmallMTokens && is_kernel_dtype(type) && is_supported(x);
  if (small_m && (!bias || bias->scalar_type() == type)) {
    dtq::SmallM problem{};
    if (set_weight(problem.weight, x, format, names, tensors, outputs, x.size(1))) {
      if (bias) check(*bias, "bias", x, type);
      Tensor y = torch::stable::new_empty(x, {x.size(0), outputs}, type);
      problem.x = x.data_ptr();
      problem.type = float_type(type);
      problem.tokens = x.size(0);
      problem.stride = x.size(0) > 1 ? x.stride(0) : x.size(1);
      problem.bias = bias ? bias->data_ptr() : nullptr;
      problem.y = y.data_ptr();
      int code = dtq::launch_small_m(problem, stream_of(x));
      if (launched(code, "weight_linear")) return y;
    }
  }
  return call_reference<Tensor>("dtq_reference::weight_linear", x_in, tensors, names, format, bias);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(DTQ_NAMESPACE, DTQ_KEY, m) {
  m.impl("quantize_rows", TORCH_BOX(&quantize_rows));
  m.impl("round_rows", TORCH_BOX(&round_rows));
  m.impl("transform_rows", TORCH_BOX(&transform_rows));
  m.impl("binned_quantize_rows", TORCH_BOX(&binned_quantize_rows<dtq::kNoPrologue>));
  m.impl("e4m3_quantize_rows", TORCH_BOX(&float_quantize_rows<dtq::kE4m3>));
  m.impl("e2m1_quantize_rows", TORCH_BOX(&float_quantize_rows<dtq::kE2m1>));
  m.impl("fp4_quantize_rows", TORCH_BOX(&fp4_quantize_rows));
  m.impl("gelu_quantize_rows", TORCH_BOX(&binned_quantize_rows<dtq::kGelu>));
  m.impl("norm_quantize_rows", TORCH_BOX(&norm_quantize_rows));
  m.impl("dequantize", TORCH_BOX(&dequantize));
  m.impl("w3a8_linear", TORCH_BOX(&w3a8_linear));
  m.impl("weight_linear", TORCH_BOX(&weight_linear));
}

// The architectures that this file was compiled for.
DTQ_EXPORT const char* dtq_cuda_archs() { return DTQ_ARCHS; }

#if !defined(DTQ_SIM)
#define DTQ_TEXT_OF(number) #number
#define DTQ_TEXT(number) DTQ_TEXT_OF(number)
// The CUDA runtime that is linked into the library. dtq/kernels/compile/cuda.py looks for this text in the
// file, before it loads the library, and compares it with what the driver supports.
DTQ_EXPORT const char* dtq_cuda_runtime() { return "dtq cudart " DTQ_TEXT(CUDART_VERSION); }
#endif

// Before the first call of an op, from one thread: the one that loads the library.
DTQ_EXPORT void dtq_cuda_format(const char* name, int encoding, int bits, int offset, int vector,
                                int scale_type, const float* codebook, int count) {
  dtq::register_format(name, encoding, bits, offset, vector, scale_type, codebook, count);
}

// Number of calls of the torch reference.
DTQ_EXPORT int64_t dtq_cuda_references() { return reference_calls.load(); }

#if defined(DTQ_SIM)
DTQ_EXPORT void dtq_sim_arch(int arch) { emulated_arch() = arch; }
DTQ_EXPORT void dtq_sim_seed(uint64_t seed) { dtq::sim::session().seed = seed; }
#else
// Whether torch's current stream is available; GPU tests check it first.
DTQ_EXPORT int dtq_cuda_has_stream() { return find_stream() != nullptr; }
#endif
