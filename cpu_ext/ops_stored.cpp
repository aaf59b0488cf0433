// SPDX-License-Identifier: Apache-2.0
// dtq::dequantize, dtq::weight_linear and dtq::float_linear on the CPU: stored weights of any format, and float ones.
#include <algorithm>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "../common_ext/format_codes.h"
#include "dispatch.h"
#include "glue.h"

namespace {

using namespace dtq::glue;

// The tensors of a stored weight by name, checked, and the decoder's view of them.
class Weight {
 public:
  Weight(const dtq::FormatCode& code, const std::string& format, const std::vector<std::string>& names,
         const std::vector<Tensor>& tensors, int64_t columns)
      : format_(format) {
    w.encoding = code.encoding;
    w.bits = code.bits;
    w.columns = columns;
    w.offset = code.offset;
    w.vector = code.vector;
    w.scale_type = code.scale_type;
    std::copy(code.codebook.begin(), code.codebook.end(), w.codebook);
    STD_TORCH_CHECK(names.size() == tensors.size(), "dtq: ", names.size(), " names for ",
                    tensors.size(), " tensors");
    for (size_t i = 0; i < tensors.size(); i++) {
      STD_TORCH_CHECK(tensors[i].dim() == 2, "dtq: ", names[i], " has ", tensors[i].dim(),
                      " dimensions, expected 2");
      tensors_.insert_or_assign(names[i], to_contiguous(tensors[i]));
    }
    w.rows = tensors_.count("weight") ? tensors_.at("weight").size(0) : 0;
    w.row_bytes = w.encoding == dtq::kTrits   ? columns / 5
                  : w.encoding == dtq::kWords ? columns / w.vector * w.bits / 8
                                              : columns * w.bits / 8;
    const bool two_level = w.encoding == dtq::kTwoLevel;
    const char* per_group = two_level ? "weight_scale_2" : "weight_scale";
    w.groups = std::max<int64_t>(1, tensors_.count(per_group) ? tensors_.at(per_group).size(1) : 1);
    const int64_t groups = w.rows * w.groups, entries = int64_t{1} << w.bits;
    const int64_t scale_bytes = w.scale_type == dtq::kScaleFloat32    ? 4
                                : w.scale_type == dtq::kScaleBFloat16 ? 2
                                                                      : 1;
    w.weight = take<uint8_t>("weight", w.rows * w.row_bytes);
    w.end = w.weight + w.rows * w.row_bytes;
    if (w.encoding == dtq::kTrits && columns % 5)
      w.tail = take<uint8_t>("weight_tail", w.rows * (columns % 5));
    if (w.scale_type != dtq::kNoScale)
      w.scale = take<void>("weight_scale", (two_level ? w.rows : groups) * scale_bytes);
    if (w.scale_type == dtq::kScaleE4m3) w.scale_2 = take<float>("weight_scale_2", 4);
    if (two_level) w.group_bytes = take<uint8_t>("weight_scale_2", groups);
    if (tensors_.count("weight_zero_point")) w.zero = take<int8_t>("weight_zero_point", groups);
    if (w.encoding == dtq::kWords) w.words = take<uint16_t>("weight_lut", entries * w.vector * 2);
    if (w.encoding == dtq::kTable && code.codebook.empty()) {
      const float* codebook = take<float>("weight_lut", entries * 4);
      std::copy(codebook, codebook + entries, w.codebook);
    }
    w.finite = std::all_of(w.codebook, w.codebook + 16, [](float x) { return x - x == 0; });
    for (const auto& [name, tensor] : tensors_)
      STD_TORCH_CHECK(used_.count(name), "dtq: ", format_, " has no tensor ", name);
  }

  // Whether the decoder supports the groups: multiples of 16 columns.
  bool supported() const {
    return w.groups == 1 || (w.columns % w.groups == 0 && w.columns / w.groups % 16 == 0);
  }

  dtq::StoredWeight w = {};

 private:
  template <typename T>
  const T* take(const std::string& name, int64_t bytes) {
    const auto entry = tensors_.find(name);
    STD_TORCH_CHECK(entry != tensors_.end(), "dtq: ", format_, " lacks ", name);
    const Tensor& tensor = entry->second;
    STD_TORCH_CHECK(bytes_of(tensor) == bytes, "dtq: ", format_, " of (", w.rows, ", ", w.columns,
                    "): ", name, " has ", bytes_of(tensor), " bytes, expected ", bytes);
    used_[name] = true;
    return static_cast<const T*>(tensor.const_data_ptr());
  }

  const std::string& format_;
  std::map<std::string, Tensor> tensors_;
  std::map<std::string, bool> used_;
};

// Output channels of a task, a multiple of kRowsAtOnce.
int64_t grain_of(int64_t columns) {
  return round_up(std::max<int64_t>(1, 65536 / std::max<int64_t>(columns, 1)), dtq::kRowsAtOnce);
}

template <class Run>
void parallel_rows(dtq::Decode& d, Run run) {
  const int64_t tasks = ceil_div(d.weight.rows, dtq::kRowsAtOnce);
  const int64_t grain = grain_of(d.weight.columns) / dtq::kRowsAtOnce;
  parallel_for(0, tasks, grain, [&](int64_t first, int64_t last) {
    static thread_local Scratch scratch;
    run(d, first * dtq::kRowsAtOnce, std::min(last * dtq::kRowsAtOnce, d.weight.rows),
        scratch.get<float>(dtq::kDecodeScratch * sizeof(float)));
  });
}

// A copy of contiguous rows, padded with zeros to `stride` elements; valid until the next call.
const void* padded(const Tensor& x, int64_t stride) {
  static thread_local Scratch copy;
  const int64_t size = x.element_size(), bytes = x.size(1) * size;
  char* to = copy.get(x.size(0) * stride * size);
  for (int64_t t = 0; t < x.size(0); t++) {
    std::copy_n(data<char>(x) + t * bytes, bytes, to + t * stride * size);
    std::fill(to + t * stride * size + bytes, to + (t + 1) * stride * size, 0);
  }
  return to;
}

Tensor dequantize(const std::vector<Tensor>& tensors, const std::vector<std::string>& names,
                  const std::string& format, int64_t columns, ScalarType type) {
  STD_TORCH_CHECK(!tensors.empty(), "dtq: a weight without tensors");
  const auto code = dtq::format_codes().find(format);
  if (code != dtq::format_codes().end() && is_kernel_dtype(type)) {
    const Weight weight(code->second, format, names, tensors, columns);
    if (weight.supported()) {
      Tensor out = torch::stable::new_empty(tensors[0], {weight.w.rows, columns}, type);
      dtq::Decode d = {weight.w, float_type(type), out.mutable_data_ptr()};
      if (out.numel()) parallel_rows(d, dtq::kernels().decode);
      return out;
    }
  }
  return call("dtq_reference::dequantize", tensors, names, format, columns, type);
}

// A weight that the kernels read, times at most kSmallMFloat tokens.
Tensor multiply_few(const Tensor& x_in, const dtq::StoredWeight& weight, const OptionalTensor& bias) {
  const int64_t tokens = x_in.size(0), rows = weight.rows;
  const auto type = x_in.scalar_type();
  Tensor out = torch::stable::new_empty(x_in, {tokens, rows}, type);
  if (!out.numel()) return out;
  Floats floats;
  const dtq::Kernels& kernels = dtq::kernels();
  const bool in_bfloat16 =
      type == ScalarType::BFloat16 && kernels.multiply_bfloat16 && dtq::has_bfloat16();
  const Tensor x = to_contiguous(in_bfloat16 ? x_in : to_dtype(x_in, ScalarType::Float));
  dtq::Decode d = {weight, float_type(type), out.mutable_data_ptr()};
  d.tokens = tokens;
  d.x_stride = round_up(weight.columns, 32);
  d.x = padded(x, d.x_stride);
  if (bias) {
    STD_TORCH_CHECK(bias->numel() == rows, "dtq linear: bias must have ", rows, " entries");
    d.bias = floats.of(to_dtype(*bias, type));
  }
  parallel_rows(d, in_bfloat16 ? kernels.multiply_bfloat16 : kernels.multiply_stored);
  return out;
}

bool has_few(const Tensor& x) { return x.size(0) <= dtq::kSmallMFloat && is_kernel_dtype(x.scalar_type()); }

Tensor weight_linear(const Tensor& x, const std::vector<Tensor>& tensors,
                     const std::vector<std::string>& names, const std::string& format,
                     const OptionalTensor& bias) {
  STD_TORCH_CHECK(x.dim() == 2, "weight_linear: x must be (M, K), got ", shape_of(x));
  STD_TORCH_CHECK(!tensors.empty(), "dtq: a weight without tensors");
  const int64_t columns = x.size(1);
  const auto type = x.scalar_type();
  const auto code = dtq::format_codes().find(format);
  if (code != dtq::format_codes().end() && has_few(x)) {
    const Weight weight(code->second, format, names, tensors, columns);
    if (weight.supported()) return multiply_few(x, weight.w, bias);
  }
  OptionalTensor typed;
  if (bias) typed = to_dtype(*bias, type);
  return call("aten::linear", x, dequantize(tensors, names, format, columns, type), typed);
}

Tensor float_linear(const Tensor& x, const Tensor& weight_in, const OptionalTensor& bias) {
  STD_TORCH_CHECK(x.dim() == 2 && weight_in.dim() == 2 && x.size(1) == weight_in.size(1),
                  "float_linear: x ", shape_of(x), " does not fit the weight ", shape_of(weight_in));
  if (!has_few(x) || weight_in.scalar_type() != x.scalar_type() || !x.size(1))
    return call("dtq_reference::float_linear", x, weight_in, bias);
  const Tensor weight = to_contiguous(weight_in);
  dtq::StoredWeight w = {};
  w.encoding = dtq::kFloats;
  w.rows = weight.size(0);
  w.columns = weight.size(1);
  w.row_bytes = w.columns * static_cast<int64_t>(weight.element_size());
  w.weight = data<uint8_t>(weight);
  w.end = w.weight + w.rows * w.row_bytes;
  w.groups = 1;
  return multiply_few(x, w, bias);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dtq, CPU, m) {
  m.impl("dequantize", TORCH_BOX(&dequantize));
  m.impl("weight_linear", TORCH_BOX(&weight_linear));
  m.impl("float_linear", TORCH_BOX(&float_linear));
}

// For Python, by ctypes, before the first call of an op.
extern "C" __attribute__((visibility("default"))) void dtq_cpu_format(
    const char* name, int encoding, int bits, int offset, int vector, int scale_type,
    const float* codebook, int count) {
  dtq::register_format(name, encoding, bits, offset, vector, scale_type, codebook, count);
}
