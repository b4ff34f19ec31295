// What every launcher checks of its tensors before a pointer reaches a kernel.
#pragma once

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/optional.h>

#include "elements.cuh"

#if !defined(BLEND_EMULATED)
#include <tvm/ffi/extra/cuda/device_guard.h>
#endif

namespace blend::cuda {

using tvm::ffi::Optional;
using tvm::ffi::TensorView;

inline void expect(bool condition, const char* message) {
  if (!condition) TVM_FFI_THROW(ValueError) << message;
}

inline bool is(const TensorView& t, uint8_t code, uint8_t bits) {
  return t.dtype().code == code && t.dtype().bits == bits && t.dtype().lanes == 1;
}

// Where the kernels of one call run: the device of its first tensor, on that device's current
// stream. Every other tensor must lie there.
class Place {
 public:
#if defined(BLEND_EMULATED)
  explicit Place(const TensorView& t) : device_(t.device()) {
    expect(device_.device_type == kDLCPU, "the emulator takes tensors of the CPU");
  }
  Stream stream() const { return nullptr; }
#else
  explicit Place(const TensorView& t) : device_(checked(t)), guard_(device_.device_id) {}
  Stream stream() const {
    return static_cast<Stream>(TVMFFIEnvGetStream(device_.device_type, device_.device_id));
  }
#endif

  // Dense, of `numel` elements, aligned to 16 bytes.
  template <typename T>
  T* dense(const TensorView& t, int64_t numel, uint8_t code, const char* message) const {
    expect(has(t) && is(t, code, 8 * sizeof(T)) && t.numel() == numel && t.IsContiguous(), message);
    return static_cast<T*>(t.data_ptr());
  }
  const int64_t* indices(const TensorView& t, int64_t n, const char* message) const {
    return dense<const int64_t>(t, n, kDLInt, message);
  }
  // Also aligned to 16 bytes.
  float* floats(const TensorView& t, int64_t numel, const char* message) const {
    float* at = dense<float>(t, numel, kDLFloat, message);
    expect(reinterpret_cast<uintptr_t>(at) % 16 == 0, message);
    return at;
  }

  // [slots, heads, dim]: heads of a slot in a row, each a multiple of 16 bytes, aligned.
  void expect_pool(const TensorView& t, const char* message) const {
    expect(has(t) && t.ndim() == 3, message);
    const int64_t heads = t.size(1), dim = t.size(2), bytes = t.dtype().bits / 8;
    expect(dim < 2 || t.stride(2) == 1, message);
    expect(heads < 2 || t.stride(1) == dim, message);
    expect(dim * bytes % 16 == 0 && t.stride(0) * bytes % 16 == 0, message);
    expect(reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0, message);
  }

  bool has(const TensorView& t) const {
    return t.device().device_type == device_.device_type &&
           t.device().device_id == device_.device_id;
  }

  // Of a block, in bytes.
  size_t most_shared() const { return blend::cuda::most_shared(device_.device_id); }

  void expect_launched() const {
    if (const char* what = launch_error()) TVM_FFI_THROW(RuntimeError) << what;
  }

 private:
  DLDevice device_;
#if !defined(BLEND_EMULATED)
  tvm::ffi::CUDADeviceGuard guard_;
  static DLDevice checked(const TensorView& t) {
    expect(t.device().device_type == kDLCUDA, "the kernels take tensors of a CUDA device");
    return t.device();
  }
#endif
};

inline int64_t slot_bytes(const TensorView& pool) {
  return pool.stride(0) * (pool.dtype().bits / 8);
}

// Calls body(T()) with the element type of a pool.
template <typename Body>
void by_pool_dtype(const TensorView& t, Body&& body) {
  if (is(t, kDLFloat, 32)) {
    body(float());
  } else if (is(t, kDLBfloat, 16)) {
    body(__nv_bfloat16());
  } else if (is(t, kDLFloat, 16)) {
    body(__half());
  } else if (is(t, kDLFloat8_e4m3fn, 8)) {
    body(__nv_fp8_e4m3());
  } else if (is(t, kDLFloat8_e5m2, 8)) {
    body(__nv_fp8_e5m2());
  } else {
    TVM_FFI_THROW(ValueError)
        << "a pool is float32, bfloat16, float16, float8_e4m3fn or float8_e5m2";
  }
}

}  // namespace blend::cuda
