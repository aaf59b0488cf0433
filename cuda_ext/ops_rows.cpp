// SPDX-License-Identifier: Apache-2.0
// dtq::* on CUDA for rows of activations, few tokens and decoded weights: launch_rows.h.
#include "launch_rows.h"

#include <map>

#include "binding.h"

namespace {

using namespace dtq::binding;

// ------------------------------------------------------------------------------ rows of activations

using Pair = std::tuple<Tensor, Tensor>;

void set_transform(dtq::Rows& rows, const Tensor& x, const Maybe& pre_scale, const Maybe& order,
                   int64_t block, int64_t turns) {
  int64_t columns = x.size(1);
  STD_TORCH_CHECK(block >= 1 && (block & (block - 1)) == 0 && columns % block == 0, "dtq: ", columns,
                  " columns are not whole blocks of ", block);
  STD_TORCH_CHECK(turns == 1 || turns == 2, "dtq: ", turns, " turns; there can be 1 or 2");
  if (pre_scale) {
    check(*pre_scale, "pre_scale", x, ScalarType::BFloat16);
    check_count(*pre_scale, "pre_scale", columns);
  }
  if (order) {
    check(*order, "order", x, ScalarType::Int);
    check_count(*order, "order", columns);
  }
  rows.x = x.data_ptr();
  rows.type = float_of(x.scalar_type());
  rows.rows = x.size(0);
  rows.columns = columns;
  rows.stride = rows.rows > 1 ? x.stride(0) : columns;
  rows.pre_scale = data<uint16_t>(pre_scale);
  rows.order = data<int32_t>(order);
  rows.block = block;
  rows.turns = int(turns);
}

void set_codes(dtq::Rows& rows, const Tensor& x, const Tensor& codes, const Tensor& scale,
               const Maybe& fixed, int64_t levels) {
  STD_TORCH_CHECK(levels >= 1 && levels <= 127, "dtq: levels is ", levels, ", not in 1..127");
  if (fixed) {
    check(*fixed, "scale", x, ScalarType::Float);
    check_count(*fixed, "scale", 1);
  }
  rows.output = dtq::kInt8;
  rows.levels = int(levels);
  rows.fixed = data<float>(fixed);
  rows.out = codes.data_ptr();
  rows.out_stride = codes.size(1);
  rows.scale = static_cast<float*>(scale.data_ptr());
}

// The quantizing ops: they differ in what happens to a row before. None without a kernel for this.
template <class Before>
std::optional<Pair> quantized(const Tensor& x, const Maybe& pre_scale, int64_t block, const Maybe& scale,
                              int64_t levels, Before before) {
  if (!has_kernels(x.scalar_type()) || !served(x)) return std::nullopt;
  Tensor codes = torch::stable::new_empty(x, {x.size(0), x.size(1)}, ScalarType::Char);
  Tensor scales = torch::stable::new_empty(x, {x.size(0)}, ScalarType::Float);
  dtq::Rows rows{};
  set_transform(rows, x, pre_scale, std::nullopt, block, 1);
  set_codes(rows, x, codes, scales, scale, levels);
  before(rows);
  int code = dtq::launch_rows(rows, stream_of(x));
  if (!launched(code, "quantizing rows")) return std::nullopt;
  return Pair{codes, scales};
}

Pair quantize_rows(const Tensor& given, const Maybe& pre_scale, int64_t block, const Maybe& scale,
                   int64_t levels) {
  Tensor x = with_rows(given, "x");
  DeviceGuard guard(x.get_device_index());
  auto done = quantized(x, pre_scale, block, scale, levels, [](dtq::Rows&) {});
  if (done) return *done;
  return reference<Pair>("dtq_reference::quantize_rows", given, pre_scale, block, scale, levels);
}

Pair gelu_quantize_rows(const Tensor& given, const Maybe& pre_scale, int64_t block, const Maybe& scale,
                        int64_t levels) {
  Tensor x = with_rows(given, "x");
  DeviceGuard guard(x.get_device_index());
  auto gelu = [](dtq::Rows& rows) { rows.before = dtq::kGelu; };
  auto done = quantized(x, pre_scale, block, scale, levels, gelu);
  if (done) return *done;
  return reference<Pair>("dtq_reference::gelu_quantize_rows", given, pre_scale, block, scale, levels);
}

void check_modulation(const Tensor& x, const Maybe& up, const Maybe& along) {
  STD_TORCH_CHECK(up.has_value() == along.has_value(), "dtq: modulation needs both a scale and a shift");
  if (!up) return;
  check(*up, "modulate_scale", x, up->scalar_type());
  check(*along, "modulate_shift", x, up->scalar_type());
  STD_TORCH_CHECK(has_kernels(up->scalar_type()), "dtq: modulate_scale is ", name_of(up->scalar_type()));
  STD_TORCH_CHECK(up->dim() == 2 && up->size(1) == x.size(1) && up->size(0) > 0 &&
                      x.size(0) % up->size(0) == 0 && along->numel() == up->numel(),
                  "dtq: modulate_scale and modulate_shift must be (images, ", x.size(1),
                  "), and the rows, ", x.size(0), ", a multiple of the images");
}

Pair norm_quantize_rows(const Tensor& given, const Maybe& modulate_scale, const Maybe& modulate_shift,
                        double eps, const Maybe& pre_scale, int64_t block, const Maybe& scale,
                        int64_t levels) {
  Tensor x = with_rows(given, "x");
  DeviceGuard guard(x.get_device_index());
  check_modulation(x, modulate_scale, modulate_shift);
  auto norm = [&](dtq::Rows& rows) {
    rows.before = dtq::kNorm;
    rows.eps = float(eps);
    rows.rows_per_modulate = std::max<int64_t>(1, x.size(0));
    if (!modulate_scale) return;
    rows.modulate_scale = modulate_scale->data_ptr();
    rows.modulate_shift = modulate_shift->data_ptr();
    rows.modulate_type = float_of(modulate_scale->scalar_type());
    rows.modulate_stride = x.size(1);
    rows.rows_per_modulate = std::max<int64_t>(1, x.size(0) / modulate_scale->size(0));
  };
  auto done = quantized(x, pre_scale, block, scale, levels, norm);
  if (done) return *done;
  return reference<Pair>("dtq_reference::norm_quantize_rows", given, modulate_scale, modulate_shift, eps,
                         pre_scale, block, scale, levels);
}

Tensor transform_rows(const Tensor& given, const Maybe& pre_scale, const Maybe& order, int64_t block,
                      int64_t turns) {
  Tensor x = with_rows(given, "x");
  DeviceGuard guard(x.get_device_index());
  if (has_kernels(x.scalar_type()) && served(x)) {
    Tensor y = torch::stable::new_empty(x, {x.size(0), x.size(1)}, ScalarType::Float);
    dtq::Rows rows{};
    set_transform(rows, x, pre_scale, order, block, turns);
    rows.output = dtq::kFloat;
    rows.levels = 127;
    rows.out = y.data_ptr();
    rows.out_stride = x.size(1);
    int code = dtq::launch_rows(rows, stream_of(x));
    if (launched(code, "transform_rows")) return y;
  }
  return reference<Tensor>("dtq_reference::transform_rows", given, pre_scale, order, block, turns);
}

// ------------------------------------------------------------------------------- weights as stored

// What a format of dtq/formats is to the decoder; dtq/kernels/decode.py tells at load.
struct Spelling {
  int codes, bits, offset, vector, scale_type;
  std::vector<float> levels;
};

std::map<std::string, Spelling>& spellings() {
  static std::map<std::string, Spelling> known;
  return known;
}

// Operands of the decoder, by the name of the part.
bool set_weight(dtq::Weight& w, const Tensor& like, const std::string& format, const std::string& names,
                const std::vector<Tensor>& parts, int64_t rows, int64_t columns) {
  auto found = spellings().find(format);
  if (found == spellings().end()) return false;
  const Spelling& spelling = found->second;
  w = dtq::Weight{};
  w.codes = static_cast<dtq::Codes>(spelling.codes);
  w.bits = spelling.bits;
  w.rows = rows;
  w.columns = columns;
  w.offset = spelling.offset;
  w.vector = spelling.vector;
  w.scale_type = static_cast<dtq::ScaleType>(spelling.scale_type);
  std::copy(spelling.levels.begin(), spelling.levels.end(), w.levels);
  size_t begin = 0;
  for (const Tensor& part : parts) {
    size_t end = std::min(names.find(',', begin), names.size());
    std::string name = names.substr(begin, end - begin);
    begin = end + 1;
    check(part, name.c_str(), like, part.scalar_type());
    const void* at = part.data_ptr();
    if (name == "weight") {
      w.weight = static_cast<const uint8_t*>(at);
    } else if (name == "weight_tail") {
      w.tail = static_cast<const uint8_t*>(at);
    } else if (name == "weight_scale") {
      w.scale = at;
      if (w.codes != dtq::kTwoLevel) w.groups = part.size(1);
    } else if (name == "weight_scale_2" && w.codes == dtq::kTwoLevel) {
      w.group_bytes = static_cast<const uint8_t*>(at);
      w.groups = part.size(1);
    } else if (name == "weight_scale_2") {
      w.scale_2 = static_cast<const float*>(at);
    } else if (name == "weight_zero_point") {
      w.zero = static_cast<const int8_t*>(at);
    } else if (name == "weight_lut" && w.codes == dtq::kWords) {
      w.words = static_cast<const uint16_t*>(at);
    } else if (name == "weight_lut") {
      w.table = static_cast<const float*>(at);
    } else {
      STD_TORCH_CHECK(false, "dtq: ", format, " has no part ", name);
    }
  }
  if (w.groups == 0) w.groups = 1;
  return true;
}

Tensor dequantize(const std::vector<Tensor>& parts, const std::string& names, const std::string& format,
                  int64_t columns, ScalarType type) {
  STD_TORCH_CHECK(!parts.empty(), "dtq: a weight without parts");
  const Tensor& first = parts[0];
  DeviceGuard guard(first.get_device_index());
  dtq::Weight weight;
  if (has_kernels(type) && served(first) &&
      set_weight(weight, first, format, names, parts, first.size(0), columns)) {
    Tensor out = torch::stable::new_empty(first, {first.size(0), columns}, type);
    int code = dtq::launch_dequantize(weight, out.data_ptr(), float_of(type), stream_of(first));
    if (launched(code, "dequantize")) return out;
  }
  return reference<Tensor>("dtq_reference::dequantize", parts, names, format, columns, type);
}

Tensor weight_linear(const Tensor& given, const std::vector<Tensor>& parts, const std::string& names,
                     const std::string& format, const Maybe& bias) {
  Tensor x = with_rows(given, "x");
  DeviceGuard guard(x.get_device_index());
  STD_TORCH_CHECK(!parts.empty(), "dtq: a weight without parts");
  int64_t outputs = parts[0].size(0);
  if (bias) check_count(*bias, "bias", outputs);
  bool few = x.size(0) <= dtq::kFewTokens && has_kernels(x.scalar_type()) && served(x);
  if (few && (!bias || bias->scalar_type() == x.scalar_type())) {
    dtq::Few task{};
    if (set_weight(task.weight, x, format, names, parts, outputs, x.size(1))) {
      if (bias) check(*bias, "bias", x, x.scalar_type());
      Tensor y = torch::stable::new_empty(x, {x.size(0), outputs}, x.scalar_type());
      task.x = x.data_ptr();
      task.type = float_of(x.scalar_type());
      task.tokens = x.size(0);
      task.stride = x.size(0) > 1 ? x.stride(0) : x.size(1);
      task.bias = bias ? bias->data_ptr() : nullptr;
      task.y = y.data_ptr();
      int code = dtq::launch_few(task, stream_of(x));
      if (launched(code, "weight_linear")) return y;
    }
  }
  return reference<Tensor>("dtq_reference::weight_linear", given, parts, names, format, bias);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dtq, CUDA, m) {
  m.impl("quantize_rows", TORCH_BOX(&quantize_rows));
  m.impl("transform_rows", TORCH_BOX(&transform_rows));
  m.impl("gelu_quantize_rows", TORCH_BOX(&gelu_quantize_rows));
  m.impl("norm_quantize_rows", TORCH_BOX(&norm_quantize_rows));
  m.impl("dequantize", TORCH_BOX(&dequantize));
  m.impl("weight_linear", TORCH_BOX(&weight_linear));
}

// The architectures that are in this file.
DTQ_EXPORT const char* dtq_cuda_archs() { return DTQ_ARCHS; }

// Before the first call of an op, from one thread: the loader's.
DTQ_EXPORT void dtq_cuda_format(const char* name, int codes, int bits, int offset, int vector,
                                int scale_type, const float* levels, int count) {
  spellings()[name] = {codes, bits, offset, vector, scale_type, {levels, levels + count}};
}

// Whether the stream of torch can be had: what a GPU test asks first.
DTQ_EXPORT int dtq_cuda_has_stream() { return find_stream() != nullptr; }
