// SPDX-License-Identifier: Apache-2.0
// dtq::dequantize and dtq::weight_linear on the CPU: stored weights of any format.
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

// The parts of a weight by name, and the decoder's view of them.
class Weight {
 public:
  Weight(const dtq::FormatCode& code, const std::string& format, const std::vector<std::string>& names,
         const std::vector<Tensor>& parts, int64_t columns)
      : format_(format) {
    w.encoding = code.encoding;
    w.bits = code.bits;
    w.columns = columns;
    w.offset = code.offset;
    w.vector = code.vector;
    w.scale_type = code.scale_type;
    std::copy(code.codebook.begin(), code.codebook.end(), w.levels);
    STD_TORCH_CHECK(names.size() == parts.size(), "dtq: ", names.size(), " names for ", parts.size(),
                    " tensors");
    for (size_t i = 0; i < parts.size(); i++) {
      STD_TORCH_CHECK(parts[i].dim() == 2, "dtq: ", names[i], " has ", parts[i].dim(),
                      " dimensions, expected 2");
      parts_.insert_or_assign(names[i], side_by_side(parts[i]));
    }
    w.rows = parts_.count("weight") ? parts_.at("weight").size(0) : 0;
    w.row_bytes = w.encoding == dtq::kTrits   ? columns / 5
                  : w.encoding == dtq::kWords ? columns / w.vector * w.bits / 8
                                           : columns * w.bits / 8;
    const bool two_level = w.encoding == dtq::kTwoLevel;
    const char* grouped = two_level ? "weight_scale_2" : "weight_scale";
    w.groups = std::max<int64_t>(1, parts_.count(grouped) ? parts_.at(grouped).size(1) : 1);
    const int64_t cells = w.rows * w.groups;
    const int64_t scale = w.scale_type == dtq::kScaleFloat32    ? 4
                          : w.scale_type == dtq::kScaleBFloat16 ? 2
                                                                : 1;
    const int64_t entries = int64_t{1} << w.bits;
    w.weight = take<uint8_t>("weight", w.rows * w.row_bytes);
    w.end = w.weight + w.rows * w.row_bytes;
    if (w.encoding == dtq::kTrits && columns % 5)
      w.tail = take<uint8_t>("weight_tail", w.rows * (columns % 5));
    if (w.scale_type != dtq::kNoScale)
      w.scale = take<void>("weight_scale", (two_level ? w.rows : cells) * scale);
    if (w.scale_type == dtq::kScaleE4m3) w.scale_2 = take<float>("weight_scale_2", 4);
    if (two_level) w.group_bytes = take<uint8_t>("weight_scale_2", cells);
    if (parts_.count("weight_zero_point")) w.zero = take<int8_t>("weight_zero_point", cells);
    if (w.encoding == dtq::kWords) w.words = take<uint16_t>("weight_lut", entries * w.vector * 2);
    if (w.encoding == dtq::kTable && code.codebook.empty()) {
      const float* table = take<float>("weight_lut", entries * 4);
      std::copy(table, table + entries, w.levels);
    }
    w.finite = std::all_of(w.levels, w.levels + 16, [](float x) { return x - x == 0; });
    for (const auto& [name, part] : parts_)
      STD_TORCH_CHECK(used_.count(name), "dtq: ", format_, " has no part ", name);
  }

  // Groups that the decoder takes: whole runs of 16 columns.
  bool fits() const {
    return w.groups == 1 || (w.columns % w.groups == 0 && w.columns / w.groups % 16 == 0);
  }

  dtq::Stored w = {};

 private:
  template <typename T>
  const T* take(const std::string& name, int64_t bytes) {
    const auto found = parts_.find(name);
    STD_TORCH_CHECK(found != parts_.end(), "dtq: ", format_, " lacks ", name);
    const Tensor& part = found->second;
    STD_TORCH_CHECK(bytes_of(part) == bytes, "dtq: ", format_, " of (", w.rows,
                ", ", w.columns, "): ", name, " has ", bytes_of(part), " bytes, expected ", bytes);
    used_[name] = true;
    return static_cast<const T*>(part.const_data_ptr());
  }

  const std::string& format_;
  std::map<std::string, Tensor> parts_;
  std::map<std::string, bool> used_;
};

// Output channels of a task: a few tasks a thread, whole groups of kTogether.
int64_t grain_of(int64_t columns) {
  return rounded_up(std::max<int64_t>(1, 65536 / std::max<int64_t>(columns, 1)), dtq::kTogether);
}

template <class Run>
void over_rows(dtq::Decode& d, Run run) {
  const int64_t tasks = (d.weight.rows + dtq::kTogether - 1) / dtq::kTogether;
  parallel_for(0, tasks, grain_of(d.weight.columns) / dtq::kTogether,
                   [&](int64_t first, int64_t last) {
                     static thread_local Scratch scratch;
                     run(d, first * dtq::kTogether,
                         std::min(last * dtq::kTogether, d.weight.rows),
                         scratch.get<float>(dtq::kScratch * sizeof(float)));
                   });
}

// A copy of contiguous rows, each `line` elements with zeros at its end; it lasts to the next call.
const void* filled_up(const Tensor& x, int64_t line) {
  static thread_local Scratch copy;
  const int64_t size = x.element_size(), bytes = x.size(1) * size;
  char* to = copy.get(x.size(0) * line * size);
  for (int64_t t = 0; t < x.size(0); t++) {
    std::copy_n(data<char>(x) + t * bytes, bytes, to + t * line * size);
    std::fill(to + t * line * size + bytes, to + (t + 1) * line * size, 0);
  }
  return to;
}

Tensor dequantize(const std::vector<Tensor>& parts, const std::vector<std::string>& names,
                  const std::string& format, int64_t columns, ScalarType type) {
  STD_TORCH_CHECK(!parts.empty(), "dtq: a weight without parts");
  const auto found = dtq::format_codes().find(format);
  if (found != dtq::format_codes().end() && written_directly(type)) {
    const Weight weight(found->second, format, names, parts, columns);
    if (weight.fits()) {
      Tensor out = torch::stable::new_empty(parts[0], {weight.w.rows, columns}, type);
      dtq::Decode d = {weight.w, float_type(type), out.mutable_data_ptr()};
      if (out.numel()) over_rows(d, dtq::kernels().decode);
      return out;
    }
  }
  return call("dtq_reference::dequantize", parts, names, format, columns, type);
}

Tensor weight_linear(const Tensor& x_in, const std::vector<Tensor>& parts,
                     const std::vector<std::string>& names, const std::string& format,
                     const MaybeTensor& bias_in) {
  STD_TORCH_CHECK(x_in.dim() == 2, "weight_linear: x must be (M, K), got ", shape_of(x_in));
  STD_TORCH_CHECK(!parts.empty(), "dtq: a weight without parts");
  const int64_t tokens = x_in.size(0), columns = x_in.size(1);
  const auto type = x_in.scalar_type();
  MaybeTensor bias;
  if (bias_in) bias = as(*bias_in, type);
  const auto found = dtq::format_codes().find(format);
  if (found != dtq::format_codes().end() && tokens <= dtq::kFewFloats && written_directly(type)) {
    const Weight weight(found->second, format, names, parts, columns);
    if (weight.fits()) {
      const int64_t rows = weight.w.rows;
      Tensor out = torch::stable::new_empty(x_in, {tokens, rows}, type);
      if (!out.numel()) return out;
      Tensor wide_bias;
      if (bias) {
        STD_TORCH_CHECK(bias->numel() == rows, "dtq linear: bias must have ", rows, " entries");
        wide_bias = side_by_side(as(*bias, ScalarType::Float));
      }
      const dtq::Kernels& kernels = dtq::kernels();
      const bool halves = type == ScalarType::BFloat16 && kernels.multiply_bfloat && dtq::has_bfloat16();
      const Tensor x = side_by_side(halves ? x_in : as(x_in, ScalarType::Float));
      dtq::Decode d = {weight.w, float_type(type), out.mutable_data_ptr()};
      d.tokens = tokens;
      d.line = rounded_up(columns, 32);
      d.x = filled_up(x, d.line);
      d.bias = bias ? data<float>(wide_bias) : nullptr;
      over_rows(d, halves ? kernels.multiply_bfloat : kernels.multiply_stored);
      return out;
    }
  }
  return call("aten::linear", x_in, dequantize(parts, names, format, columns, type), bias);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dtq, CPU, m) {
  m.impl("dequantize", TORCH_BOX(&dequantize));
  m.impl("weight_linear", TORCH_BOX(&weight_linear));
}

// For Python, by ctypes, before the first call of an op.
extern "C" __attribute__((visibility("default"))) void dtq_cpu_format(
    const char* name, int encoding, int bits, int offset, int vector, int scale_type,
    const float* codebook, int count) {
  dtq::register_format(name, encoding, bits, offset, vector, scale_type, codebook, count);
}
