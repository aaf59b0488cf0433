// SPDX-License-Identifier: Apache-2.0
// Shared by the bindings: the device and stream of a tensor, checks of operands, calls of the torch
// reference. dtq/kernels/ops.py declares the ops.
//
// Only torch's stable ABI is used, so one file serves every torch from 2.10, with and without CUDA. Invalid
// operands are errors. Valid ones without a kernel are passed to dtq_reference::*, the torch reference of
// the op. Nothing here waits for the GPU, and all memory is allocated through torch.
#pragma once
#if !defined(DTQ_SIM)
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#endif
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "types.h"

#if defined(DTQ_SIM)
#include "sim/session.h"
#define DTQ_NAMESPACE dtq_sim
#define DTQ_OP(name) "dtq_sim::" name
#define DTQ_KEY CPU
#else
#define DTQ_NAMESPACE dtq
#define DTQ_OP(name) "dtq::" name
#define DTQ_KEY CUDA
#endif

// the newer macro keeps the error message; headers of 2.10 and 2.11 lack it
#if defined(STABLE_TORCH_ERROR_CODE_CHECK)
#define DTQ_CHECKED STABLE_TORCH_ERROR_CODE_CHECK
#else
#define DTQ_CHECKED TORCH_ERROR_CODE_CHECK
#endif

#define DTQ_EXPORT extern "C" __attribute__((visibility("default")))

namespace dtq::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int kMinCapability = 80;  // the int8 matrix instructions of Ampere

// ------------------------------------------------------------------------------------- the device

#if defined(DTQ_SIM)
// The emulator in place of a GPU: tensors on the CPU, and a compute capability that the test chooses.
inline int& emulated_arch() {
  static int arch = 90;
  return arch;
}

struct Guard {
  explicit Guard(const Tensor&) {}
};

inline Stream stream_of(const Tensor&) { return nullptr; }
inline int capability(const Tensor&) { return emulated_arch(); }
inline int multiprocessors(const Tensor&) { return 8; }
inline bool on_same_device(const Tensor& t, const Tensor&) { return t.is_cpu(); }
inline bool is_error(int code) { return code == kEmulator; }
inline std::string error_text(int) { return sim::session().error; }
#else

}  // namespace dtq::binding

// only in a torch with CUDA, hence weak: the library also loads without it
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace dtq::binding {

// Makes the device of the input the current one during its lifetime.
struct Guard {
  torch::stable::accelerator::DeviceGuard guard;
  explicit Guard(const Tensor& t) : guard(t.get_device_index()) {}
};

using GetStream = AOTITorchError (*)(int32_t, void**);

inline GetStream find_stream() {
  if (aoti_torch_get_current_cuda_stream) return aoti_torch_get_current_cuda_stream;
  // if libtorch.so does not link libtorch_cuda.so, torch has loaded it nevertheless
  void* library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
  return library ? reinterpret_cast<GetStream>(dlsym(library, "aoti_torch_get_current_cuda_stream"))
                 : nullptr;
}

inline Stream stream_of(const Tensor& x) {
  static const GetStream get = find_stream();
  STD_TORCH_CHECK(get != nullptr, "dtq: this torch has no CUDA streams");
  Stream stream = nullptr;
  DTQ_CHECKED(get(x.get_device_index(), &stream));
  return stream;
}

// A property of a device, queried once per device.
template <class Query>
int cached(const Tensor& t, std::array<std::atomic<int>, 64>& known, Query query) {
  const int device = t.get_device_index();
  STD_TORCH_CHECK(device >= 0 && device < int(known.size()), "dtq: device ", device);
  int value = known[device].load(std::memory_order_relaxed);
  if (value == 0) {
    value = query(device);
    known[device].store(value, std::memory_order_relaxed);
  }
  return value;
}

// An error, such as a driver that is older than the runtime of this library, is one of the call: without
// it every device would seem to be too old, and every op would run the reference.
inline int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&value, which, device);
  STD_TORCH_CHECK(error == cudaSuccess, "dtq: attribute ", int(which), " of device ", device, ": ",
                  cudaGetErrorString(error));
  return value;
}

// The compute capability, 90 for sm_90.
inline int capability(const Tensor& t) {
  static std::array<std::atomic<int>, 64> known{};
  return cached(t, known, [](int device) {
    return 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
           attribute(cudaDevAttrComputeCapabilityMinor, device);
  });
}

// If the device is a slice of a GPU, those of the slice.
inline int multiprocessors(const Tensor& t) {
  static std::array<std::atomic<int>, 64> known{};
  return cached(t, known, [](int device) { return attribute(cudaDevAttrMultiProcessorCount, device); });
}

inline bool on_same_device(const Tensor& t, const Tensor& like) {
  return t.is_cuda() && t.get_device_index() == like.get_device_index();
}

inline bool is_error(int code) { return code > 0; }
inline const char* error_text(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
#endif

inline bool is_supported(const Tensor& x) { return capability(x) >= kMinCapability; }

// ------------------------------------------------------------------------------------- the operands

inline const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Double: return "float64";
    case ScalarType::Char: return "int8";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Float8_e4m3fn: return "float8_e4m3fn";
    default: return "another type";
  }
}

inline bool is_kernel_dtype(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half;
}

inline dtq::Float float_type(ScalarType type) {
  return type == ScalarType::Float      ? dtq::kFloat32
         : type == ScalarType::BFloat16 ? dtq::kBFloat16
                                        : dtq::kFloat16;
}

// Checks the device, the type, and that the tensor is contiguous.
inline void check(const Tensor& t, const char* name, const Tensor& like, ScalarType type) {
  STD_TORCH_CHECK(on_same_device(t, like), "dtq: ", name, " is not on the device of the input, cuda:",
                  like.get_device_index());
  STD_TORCH_CHECK(t.scalar_type() == type, "dtq: ", name, " is ", name_of(t.scalar_type()),
                  ", expected ", name_of(type));
  STD_TORCH_CHECK(t.is_contiguous(), "dtq: ", name, " is not contiguous");
}

// Checks that a tensor that the kernels read `bytes` at a time starts at a multiple of them: a view may not.
inline void check_alignment(const Tensor& t, const char* name, int bytes) {
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(t.data_ptr()) % bytes == 0, "dtq: ", name,
                  " starts at an address that is no multiple of ", bytes, " bytes; clone the view");
}

inline void check_count(const Tensor& t, const char* name, int64_t count) {
  STD_TORCH_CHECK(t.numel() == count, "dtq: ", name, " has ", t.numel(), " elements, expected ", count);
}

inline int64_t bytes_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Double:
    case ScalarType::Long: return t.numel() * 8;
    case ScalarType::Float:
    case ScalarType::Int: return t.numel() * 4;
    case ScalarType::BFloat16:
    case ScalarType::Half:
    case ScalarType::Short: return t.numel() * 2;
    default: return t.numel();
  }
}

template <class T>
const T* data(const OptionalTensor& t) {
  return t ? static_cast<const T*>(t->data_ptr()) : nullptr;
}

// Rows may have any stride, as in a slice of columns; the channels of a row must be contiguous.
inline Tensor row_contiguous(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() == 2, "dtq: ", name, " has ", x.dim(), " dimensions, expected 2");
  return x.stride(1) == 1 || x.size(1) == 1 || x.numel() == 0 ? x : torch::stable::contiguous(x);
}

// Whether a launch succeeded. It returns 0, a cudaError_t, or a negative number if no kernel supports this.
inline bool launched(int code, const char* what) {
  STD_TORCH_CHECK(!is_error(code), "dtq: ", what, ": ", error_text(code));
  return code == 0;
}

// Of Options, for all kernels that are launched from now on.
inline std::atomic<int> options{kDefaultOptions};

// Number of calls of the torch reference so far, for tests and measurements.
inline std::atomic<int64_t> reference_calls{0};

// Calls an op; arguments in the order of its schema.
template <class Result, class... Arguments>
Result call(const char* name, const Arguments&... arguments) {
  constexpr size_t count = sizeof...(Arguments);
  std::array<StableIValue, count> stack{torch::stable::detail::from(arguments)...};
  DTQ_CHECKED(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  auto result = [&](size_t i) { return torch::stable::detail::to<Tensor>(stack[i]); };
  if constexpr (std::is_same_v<Result, Tensor>) return result(0);
  else if constexpr (std::tuple_size_v<Result> == 2) return {result(0), result(1)};
  else return {result(0), result(1), result(2)};
}

// Calls the torch reference of an op.
template <class Result, class... Arguments>
Result call_reference(const char* name, const Arguments&... arguments) {
  reference_calls++;
  return call<Result>(name, arguments...);
}

}  // namespace dtq::binding
