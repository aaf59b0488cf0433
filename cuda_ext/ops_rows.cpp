// SPDX-License-Identifier: Apache-2.0
// dtq::* on CUDA for rows of activations, few tokens and decoded weights: launch_rows.h.
#include "launch_rows.h"

#include <map>

#include "../common_ext/format_codes.h"
#include "binding.h"

namespace {

using namespace dtq::binding;

// ------------------------------------------------------------------------------ rows of activations

using Pair = std::tuple<Tensor, Tensor>;
using Triple = std::tuple<Tensor, Tensor, Tensor>;

const Maybe kNone;

// pre_scale, order, block and turns of the schemas.
struct Change {
  const Maybe &pre_scale, &order;
  int64_t block, turns;
};

// scale, bin and levels of the schemas.
struct Grid {
  const Maybe &scale, &bin;
  int64_t levels;
};

dtq::Rows rows_of(const Tensor& x, const Change& change) {
  int64_t columns = x.size(1), block = change.block;
  STD_TORCH_CHECK(block >= 1 && (block & (block - 1)) == 0 && columns % block == 0, "dtq: ", columns,
                  " columns are not whole blocks of ", block);
  STD_TORCH_CHECK(change.turns == 1 || change.turns == 2, "dtq: ", change.turns,
                  " turns; there can be 1 or 2");
  if (change.pre_scale) {
    check(*change.pre_scale, "pre_scale", x, ScalarType::BFloat16);
    check_count(*change.pre_scale, "pre_scale", columns);
  }
  if (change.order) {
    check(*change.order, "order", x, ScalarType::Int);
    check_count(*change.order, "order", columns);
  }
  dtq::Rows rows{};
  rows.x = x.data_ptr();
  rows.type = float_of(x.scalar_type());
  rows.rows = x.size(0);
  rows.columns = columns;
  rows.stride = rows.rows > 1 ? x.stride(0) : columns;
  rows.pre_scale = data<uint16_t>(change.pre_scale);
  rows.order = data<int32_t>(change.order);
  rows.block = block;
  rows.turns = int(change.turns);
  rows.levels = 127;
  rows.out_stride = rows.width = columns;
  return rows;
}

void set_grid(dtq::Rows& rows, const Tensor& x, const Grid& grid) {
  STD_TORCH_CHECK(grid.levels >= 1 && grid.levels <= 127, "dtq: levels is ", grid.levels,
                  ", not in 1..127");
  STD_TORCH_CHECK(grid.scale || !grid.bin, "dtq: a bin needs a table of scales");
  if (grid.scale) {
    check(*grid.scale, "scale", x, ScalarType::Float);
    STD_TORCH_CHECK(grid.scale->numel() >= 1, "dtq: the table of scales is empty");
  }
  if (grid.bin) {
    check(*grid.bin, "bin", x, ScalarType::Long);
    check_count(*grid.bin, "bin", 1);
  }
  rows.levels = int(grid.levels);
  rows.fixed = data<float>(grid.scale);
  rows.bin = data<int64_t>(grid.bin);
}

// Codes and scales of the rows, or nothing where there is no kernel for them.
std::optional<Pair> quantized(dtq::Rows& rows, const Tensor& x, dtq::Output output) {
  auto type = output == dtq::kE4m3 ? ScalarType::Float8_e4m3fn : ScalarType::Char;
  Tensor codes = torch::stable::new_empty(x, {x.size(0), x.size(1)}, type);
  Tensor scales = torch::stable::new_empty(x, {x.size(0)}, ScalarType::Float);
  rows.output = output;
  rows.out = codes.data_ptr();
  rows.scale = static_cast<float*>(scales.data_ptr());
  if (!launched(dtq::launch_rows(rows, stream_of(x)), "quantizing rows")) return std::nullopt;
  return Pair{codes, scales};
}

bool has_rows(const Tensor& x) { return has_kernels(x.scalar_type()) && served(x); }

Pair quantize_rows(const Tensor& given, const Maybe& pre_scale, int64_t block, const Maybe& scale,
                   int64_t levels) {
  Tensor x = with_rows(given, "x");
  Guard guard(x);
  if (has_rows(x)) {
    dtq::Rows rows = rows_of(x, {pre_scale, kNone, block, 1});
    set_grid(rows, x, {scale, kNone, levels});
    if (auto done = quantized(rows, x, dtq::kInt8)) return *done;
  }
  return reference<Pair>("dtq_reference::quantize_rows", given, pre_scale, block, scale, levels);
}

// binned_quantize_rows, and gelu_quantize_rows: one argument list.
template <dtq::Before before>
Pair grid_quantize_rows(const Tensor& given, const Maybe& pre_scale, const Maybe& order, int64_t block,
                        int64_t turns, const Maybe& scale, const Maybe& bin, int64_t levels) {
  constexpr const char* kReference = before == dtq::kGelu ? "dtq_reference::gelu_quantize_rows"
                                                          : "dtq_reference::binned_quantize_rows";
  Tensor x = with_rows(given, "x");
  Guard guard(x);
  if (has_rows(x)) {
    dtq::Rows rows = rows_of(x, {pre_scale, order, block, turns});
    set_grid(rows, x, {scale, bin, levels});
    rows.before = before;
    if (auto done = quantized(rows, x, dtq::kInt8)) return *done;
  }
  return reference<Pair>(kReference, given, pre_scale, order, block, turns, scale, bin, levels);
}

void set_modulation(dtq::Rows& rows, const Tensor& x, const Maybe& up, const Maybe& along, double eps) {
  rows.before = dtq::kNorm;
  rows.eps = float(eps);
  rows.rows_per_modulate = std::max<int64_t>(1, x.size(0));
  STD_TORCH_CHECK(up.has_value() == along.has_value(), "dtq: modulation needs both a scale and a shift");
  if (!up) return;
  check(*up, "modulate_scale", x, up->scalar_type());
  check(*along, "modulate_shift", x, up->scalar_type());
  STD_TORCH_CHECK(has_kernels(up->scalar_type()), "dtq: modulate_scale is ", name_of(up->scalar_type()));
  STD_TORCH_CHECK(up->dim() == 2 && up->size(1) == x.size(1) && up->size(0) > 0 &&
                      x.size(0) % up->size(0) == 0 && along->numel() == up->numel(),
                  "dtq: modulate_scale and modulate_shift must be (images, ", x.size(1),
                  "), and the rows, ", x.size(0), ", a multiple of the images");
  rows.modulate_scale = up->data_ptr();
  rows.modulate_shift = along->data_ptr();
  rows.modulate_type = float_of(up->scalar_type());
  rows.modulate_stride = x.size(1);
  rows.rows_per_modulate = std::max<int64_t>(1, x.size(0) / up->size(0));
}

Pair norm_quantize_rows(const Tensor& given, const Maybe& modulate_scale, const Maybe& modulate_shift,
                        double eps, const Maybe& pre_scale, const Maybe& order, int64_t block,
                        int64_t turns, const Maybe& scale, const Maybe& bin, int64_t levels) {
  Tensor x = with_rows(given, "x");
  Guard guard(x);
  if (has_rows(x)) {
    dtq::Rows rows = rows_of(x, {pre_scale, order, block, turns});
    set_grid(rows, x, {scale, bin, levels});
    set_modulation(rows, x, modulate_scale, modulate_shift, eps);
    if (auto done = quantized(rows, x, dtq::kInt8)) return *done;
  }
  return reference<Pair>("dtq_reference::norm_quantize_rows", given, modulate_scale, modulate_shift, eps,
                         pre_scale, order, block, turns, scale, bin, levels);
}

// e4m3_quantize_rows and e2m1_quantize_rows: one argument list.
template <dtq::Output output>
Pair float_quantize_rows(const Tensor& given, const Maybe& pre_scale, const Maybe& order, int64_t block,
                         int64_t turns) {
  constexpr const char* kReference = output == dtq::kE4m3 ? "dtq_reference::e4m3_quantize_rows"
                                                          : "dtq_reference::e2m1_quantize_rows";
  Tensor x = with_rows(given, "x");
  Guard guard(x);
  if (has_rows(x)) {
    dtq::Rows rows = rows_of(x, {pre_scale, order, block, turns});
    if (auto done = quantized(rows, x, output)) return *done;
  }
  return reference<Pair>(kReference, given, pre_scale, order, block, turns);
}

Triple fp4_quantize_rows(const Tensor& given, const Maybe& pre_scale, const Maybe& order, int64_t block,
                         int64_t turns, bool mx) {
  Tensor x = with_rows(given, "x");
  Guard guard(x);
  const int64_t group = mx ? 32 : 16, columns = x.size(1);
  STD_TORCH_CHECK(columns % group == 0, "dtq: ", columns, " columns are not whole groups of ", group);
  if (has_rows(x)) {
    dtq::Rows rows = rows_of(x, {pre_scale, order, block, turns});
    const ScalarType type = mx ? ScalarType::Byte : ScalarType::Float8_e4m3fn;
    Tensor codes = torch::stable::new_empty(x, {x.size(0), columns / 2}, ScalarType::Char);
    Tensor blocks = torch::stable::new_empty(x, {x.size(0), columns / group}, type);
    Tensor scales = torch::stable::new_empty(x, {x.size(0)}, ScalarType::Float);
    rows.output = mx ? dtq::kMxRow : dtq::kNvRow;
    rows.out = codes.data_ptr();
    rows.out_stride = columns / 2;
    rows.block_scale = static_cast<uint8_t*>(blocks.data_ptr());
    rows.scale = static_cast<float*>(scales.data_ptr());
    if (launched(dtq::launch_rows(rows, stream_of(x)), "quantizing rows to FP4"))
      return {codes, blocks, scales};
  }
  return reference<Triple>("dtq_reference::fp4_quantize_rows", given, pre_scale, order, block, turns, mx);
}

Tensor transform_rows(const Tensor& given, const Maybe& pre_scale, const Maybe& order, int64_t block,
                      int64_t turns) {
  Tensor x = with_rows(given, "x");
  Guard guard(x);
  if (has_rows(x)) {
    Tensor y = torch::stable::new_empty(x, {x.size(0), x.size(1)}, ScalarType::Float);
    dtq::Rows rows = rows_of(x, {pre_scale, order, block, turns});
    rows.output = dtq::kFloat;
    rows.out = y.data_ptr();
    if (launched(dtq::launch_rows(rows, stream_of(x)), "transform_rows")) return y;
  }
  return reference<Tensor>("dtq_reference::transform_rows", given, pre_scale, order, block, turns);
}

// kRoundNone for a format that has no kernel.
dtq::Rounding rounding_of(const std::string& format) {
  for (int i = dtq::kRoundNone + 1; i < dtq::kRoundings; i++)
    if (format == dtq::kRoundingFormats[i].name) return static_cast<dtq::Rounding>(i);
  return dtq::kRoundNone;
}

Tensor round_rows(const Tensor& given, const Maybe& pre_scale, const Maybe& order, int64_t block,
                  int64_t turns, const std::string& acts, ScalarType type) {
  Tensor x = with_rows(given, "x");
  Guard guard(x);
  const dtq::Rounding rounding = rounding_of(acts);
  if (has_rows(x) && has_kernels(type) && rounding != dtq::kRoundNone) {
    Tensor y = torch::stable::new_empty(x, {x.size(0), x.size(1)}, type);
    dtq::Rows rows = rows_of(x, {pre_scale, order, block, turns});
    rows.output = dtq::kRounded;
    rows.rounding = rounding;
    rows.out_type = float_of(type);
    rows.out = y.data_ptr();
    if (launched(dtq::launch_rows(rows, stream_of(x)), "round_rows")) return y;
  }
  return reference<Tensor>("dtq_reference::round_rows", given, pre_scale, order, block, turns, acts, type);
}

// ------------------------------------------------------------------------------- weights as stored

// Bytes that a part of a weight must have, whatever type they are seen as.
int64_t bytes_of_part(const dtq::Weight& w, const std::string& name) {
  const bool two_level = w.encoding == dtq::kTwoLevel, words = w.encoding == dtq::kWords;
  const int64_t cells = w.rows * w.groups, scale = w.scale_type == dtq::kScaleFloat32    ? 4
                                                   : w.scale_type == dtq::kScaleBFloat16 ? 2
                                                                                         : 1;
  if (name == "weight")
    return w.rows * (w.encoding == dtq::kTrits ? w.columns / 5
                                            : w.columns / (words ? w.vector : 1) * w.bits / 8);
  if (name == "weight_tail") return w.rows * (w.columns % 5);
  if (name == "weight_scale") return two_level ? w.rows * 4 : cells * scale;
  if (name == "weight_scale_2") return two_level ? cells : 4;
  if (name == "weight_zero_point") return cells;
  return words ? (int64_t(1) << w.bits) * w.vector * 2 : (int64_t(1) << w.bits) * 4;  // weight_lut
}

void check_parts(const dtq::Weight& w, const std::string& format,
                 const std::map<std::string, Tensor>& parts) {
  auto lack = [&](bool needed, const void* part, const char* name) {
    STD_TORCH_CHECK(!needed || part, "dtq: ", format, " lacks ", name);
  };
  const bool constants = std::any_of(w.levels, w.levels + 16, [](float level) { return level != 0; });
  lack(true, w.weight, "weight");
  lack(w.encoding == dtq::kTrits && w.columns % 5, w.tail, "weight_tail");
  lack(w.scale_type != dtq::kNoScale, w.scale, "weight_scale");
  lack(w.scale_type == dtq::kScaleE4m3, w.scale_2, "weight_scale_2");
  lack(w.encoding == dtq::kTwoLevel, w.group_bytes, "weight_scale_2");
  lack(w.encoding == dtq::kTable && !constants, w.table, "weight_lut");
  lack(w.encoding == dtq::kWords, w.words, "weight_lut");
  for (const auto& [name, part] : parts)
    STD_TORCH_CHECK(bytes_of(part) == bytes_of_part(w, name), "dtq: ", format, " of (", w.rows, ", ",
                    w.columns, "): ", name, " has ", bytes_of(part), " bytes, expected ",
                    bytes_of_part(w, name));
}

// Operands of the decoder, by the name of the part.
bool set_weight(dtq::Weight& w, const Tensor& like, const std::string& format,
                const std::vector<std::string>& names, const std::vector<Tensor>& parts, int64_t rows,
                int64_t columns) {
  auto found = dtq::format_codes().find(format);
  if (found == dtq::format_codes().end()) return false;
  const dtq::FormatCode& code = found->second;
  w = dtq::Weight{};
  w.encoding = code.encoding;
  w.bits = code.bits;
  w.rows = rows;
  w.columns = columns;
  w.offset = code.offset;
  w.vector = code.vector;
  w.scale_type = code.scale_type;
  std::copy(code.codebook.begin(), code.codebook.end(), w.levels);
  std::map<std::string, Tensor> known;
  STD_TORCH_CHECK(names.size() == parts.size(), "dtq: ", names.size(), " names for ", parts.size(),
                  " tensors");
  for (size_t i = 0; i < parts.size(); i++) {
    const Tensor& part = parts[i];
    const std::string& name = names[i];
    check(part, name.c_str(), like, part.scalar_type());
    STD_TORCH_CHECK(part.dim() == 2, "dtq: ", name, " has ", part.dim(), " dimensions, expected 2");
    known.insert_or_assign(name, part);
    const void* at = part.data_ptr();
    if (name == "weight") {
      w.weight = static_cast<const uint8_t*>(at);
    } else if (name == "weight_tail") {
      w.tail = static_cast<const uint8_t*>(at);
    } else if (name == "weight_scale") {
      w.scale = at;
      if (w.encoding != dtq::kTwoLevel) w.groups = part.size(1);
    } else if (name == "weight_scale_2" && w.encoding == dtq::kTwoLevel) {
      w.group_bytes = static_cast<const uint8_t*>(at);
      w.groups = part.size(1);
    } else if (name == "weight_scale_2") {
      w.scale_2 = static_cast<const float*>(at);
    } else if (name == "weight_zero_point") {
      w.zero = static_cast<const int8_t*>(at);
    } else if (name == "weight_lut" && w.encoding == dtq::kWords) {
      w.words = static_cast<const uint16_t*>(at);
    } else if (name == "weight_lut") {
      w.table = static_cast<const float*>(at);
    } else {
      STD_TORCH_CHECK(false, "dtq: ", format, " has no part ", name);
    }
  }
  if (w.groups == 0) w.groups = 1;
  check_parts(w, format, known);
  return true;
}

Tensor dequantize(const std::vector<Tensor>& parts, const std::vector<std::string>& names,
                  const std::string& format, int64_t columns, ScalarType type) {
  STD_TORCH_CHECK(!parts.empty(), "dtq: a weight without parts");
  const Tensor& first = parts[0];
  Guard guard(first);
  dtq::Weight weight;
  if (has_kernels(type) && served(first) &&
      set_weight(weight, first, format, names, parts, first.size(0), columns)) {
    Tensor out = torch::stable::new_empty(first, {first.size(0), columns}, type);
    int code = dtq::launch_dequantize(weight, out.data_ptr(), float_of(type), stream_of(first));
    if (launched(code, "dequantize")) return out;
  }
  return reference<Tensor>("dtq_reference::dequantize", parts, names, format, columns, type);
}

// 3-bit codes have no product of their own: they become int8 first, in memory that is given back.
Tensor w3a8_linear(const Tensor& codes, const Tensor& row_scale, const Tensor& weight,
                   const Tensor& weight_scale, const Tensor& groups, const Maybe& bias, ScalarType type) {
  Guard guard(codes);
  check(codes, "codes", codes, ScalarType::Char);
  check(weight, "weight", codes, ScalarType::Char);
  check(groups, "weight_scale_2", codes, ScalarType::Char);
  STD_TORCH_CHECK(codes.dim() == 2 && weight.dim() == 2 && groups.dim() == 2,
                  "dtq: codes, weight and weight_scale_2 must be matrices");
  const int64_t rows = weight.size(0), columns = codes.size(1);
  STD_TORCH_CHECK(8 * weight.size(1) == 3 * columns, "dtq: codes with ", columns,
                  " columns do not fit the weight, which has ", 8 * weight.size(1) / 3);
  STD_TORCH_CHECK(groups.size(0) == rows && groups.size(1) > 0 && columns % groups.size(1) == 0,
                  "dtq: weight_scale_2 must be (", rows, ", groups), and ", columns,
                  " columns whole groups");
  if (has_kernels(type) && served(codes)) {
    dtq::Weight w{};
    w.encoding = dtq::kTwoLevel;
    w.bits = 3;
    w.rows = rows;
    w.columns = columns;
    w.weight = static_cast<const uint8_t*>(weight.data_ptr());
    w.group_bytes = static_cast<const uint8_t*>(groups.data_ptr());
    w.groups = groups.size(1);
    Tensor wide = torch::stable::new_empty(codes, {rows, columns}, ScalarType::Char);
    int code = dtq::launch_expand(w, static_cast<int8_t*>(wide.data_ptr()), stream_of(codes));
    if (launched(code, "expanding 3-bit codes"))
      return call<Tensor>(DTQ_OP("w8a8_linear"), codes, row_scale, wide, weight_scale, bias, type);
  }
  return reference<Tensor>("dtq_reference::w3a8_linear", codes, row_scale, weight, weight_scale, groups,
                           bias, type);
}

Tensor weight_linear(const Tensor& given, const std::vector<Tensor>& parts,
                     const std::vector<std::string>& names, const std::string& format, const Maybe& bias) {
  Tensor x = with_rows(given, "x");
  Guard guard(x);
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

STABLE_TORCH_LIBRARY_IMPL(DTQ_NAMESPACE, DTQ_KEY, m) {
  m.impl("quantize_rows", TORCH_BOX(&quantize_rows));
  m.impl("round_rows", TORCH_BOX(&round_rows));
  m.impl("transform_rows", TORCH_BOX(&transform_rows));
  m.impl("binned_quantize_rows", TORCH_BOX(&grid_quantize_rows<dtq::kAsIs>));
  m.impl("e4m3_quantize_rows", TORCH_BOX(&float_quantize_rows<dtq::kE4m3>));
  m.impl("e2m1_quantize_rows", TORCH_BOX(&float_quantize_rows<dtq::kE2m1>));
  m.impl("fp4_quantize_rows", TORCH_BOX(&fp4_quantize_rows));
  m.impl("gelu_quantize_rows", TORCH_BOX(&grid_quantize_rows<dtq::kGelu>));
  m.impl("norm_quantize_rows", TORCH_BOX(&norm_quantize_rows));
  m.impl("dequantize", TORCH_BOX(&dequantize));
  m.impl("w3a8_linear", TORCH_BOX(&w3a8_linear));
  m.impl("weight_linear", TORCH_BOX(&weight_linear));
}

// The architectures that are in this file.
DTQ_EXPORT const char* dtq_cuda_archs() { return DTQ_ARCHS; }

// Before the first call of an op, from one thread: the loader's.
DTQ_EXPORT void dtq_cuda_format(const char* name, int encoding, int bits, int offset, int vector,
                                int scale_type, const float* codebook, int count) {
  dtq::register_format(name, encoding, bits, offset, vector, scale_type, codebook, count);
}

// Calls that went to the torch reference.
DTQ_EXPORT int64_t dtq_cuda_references() { return references.load(); }

#if defined(DTQ_SIM)
DTQ_EXPORT void dtq_sim_arch(int arch) { emulated() = arch; }
DTQ_EXPORT void dtq_sim_seed(uint64_t seed) { dtq::sim::session().seed = seed; }
#else
// Whether the stream of torch can be had: what a GPU test asks first.
DTQ_EXPORT int dtq_cuda_has_stream() { return find_stream() != nullptr; }
#endif
