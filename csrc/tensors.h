// What every launcher checks once more on this side of the boundary, and dispatch by dtype.
#pragma once

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/function.h>

#include "simd.h"

namespace blend {

using tvm::ffi::TensorView;

inline void expect(bool condition, const char* message) {
  if (!condition) TVM_FFI_THROW(ValueError) << message;
}

inline bool is(const TensorView& t, uint8_t code, uint8_t bits) {
  return t.dtype().code == code && t.dtype().bits == bits && t.dtype().lanes == 1;
}

// int64 [n] on the CPU, dense.
inline const int64_t* indices(const TensorView& t, int64_t n, const char* message) {
  expect(t.device().device_type == kDLCPU && is(t, kDLInt, 64) && t.ndim() == 1 && t.size(0) == n &&
             (n < 2 || t.stride(0) == 1),
         message);
  return static_cast<const int64_t*>(t.data_ptr());
}

// uint8 [n] on the CPU, dense.
inline const uint8_t* flags(const TensorView& t, int64_t n, const char* message) {
  expect(t.device().device_type == kDLCPU && is(t, kDLUInt, 8) && t.ndim() == 1 && t.size(0) == n &&
             (n < 2 || t.stride(0) == 1),
         message);
  return static_cast<const uint8_t*>(t.data_ptr());
}

// int32 [n] on the CPU, dense: a group's number, or -1.
inline const int32_t* groups_of(const TensorView& t, int64_t n, int64_t groups,
                                const char* message) {
  expect(t.device().device_type == kDLCPU && is(t, kDLInt, 32) && t.ndim() == 1 && t.size(0) == n &&
             (n < 2 || t.stride(0) == 1),
         message);
  const int32_t* group = static_cast<const int32_t*>(t.data_ptr());
  bool inside = true;
  for (int64_t i = 0; i < n; ++i) inside &= group[i] >= -1 && group[i] < groups;
  expect(inside, message);
  return group;
}

// float32 [n] or [n, m] on the CPU, dense.
inline float* floats(const TensorView& t, int64_t numel, const char* message) {
  expect(t.device().device_type == kDLCPU && is(t, kDLFloat, 32) && t.numel() == numel, message);
  return static_cast<float*>(t.data_ptr());
}

// [n, heads, dim] on the CPU, dense in its last dimension; strides in elements.
struct Cache {
  void* data;
  int64_t tokens, heads, dim, token_stride, head_stride;

  explicit Cache(const TensorView& t, const char* message) : Cache(t, 0, message) {
    data = t.data_ptr();
  }

  // Layer `layer` of [layers, n, heads, dim].
  template <typename T>
  Cache(const TensorView& t, int64_t layer, T, const char* message) : Cache(t, 1, message) {
    expect(layer >= 0 && layer < t.size(0), message);
    data = static_cast<typename T::type*>(t.data_ptr()) + layer * t.stride(0);
  }

  template <typename T>
  typename T::type* at(int64_t token, int64_t head) const {
    return static_cast<typename T::type*>(data) + token * token_stride + head * head_stride;
  }

 private:
  // `first`: the dimension of the tokens; heads and dim follow it and end the tensor.
  Cache(const TensorView& t, int first, const char* message)
      : data(nullptr), tokens(0), heads(0), dim(0), token_stride(0), head_stride(0) {
    expect(t.device().device_type == kDLCPU && t.ndim() == first + 3, message);
    tokens = t.size(first), heads = t.size(first + 1), dim = t.size(first + 2);
    expect(t.numel() == 0 || dim == 1 || t.stride(first + 2) == 1, message);
    token_stride = t.stride(first), head_stride = t.stride(first + 1);
  }
};

inline void expect_inside(const int64_t* slots, int64_t n, int64_t limit, const char* message) {
  bool inside = true;
  for (int64_t i = 0; i < n; ++i) inside &= slots[i] >= 0 && slots[i] < limit;
  expect(inside, message);
}

// Calls body(T{}) with the element type of `t`, which holds rows.
template <typename Body>
void by_dtype(const TensorView& t, Body&& body) {
  if (is(t, kDLFloat, 32)) {
    body(F32{});
  } else if (is(t, kDLBfloat, 16)) {
    body(BF16{});
  } else if (is(t, kDLFloat, 16)) {
    body(F16{});
  } else {
    TVM_FFI_THROW(ValueError) << "the dtype must be float32, bfloat16 or float16";
  }
}

// The same of `t` that is a pool, or holds what a pool does: fp8 too.
template <typename Body>
void by_pool_dtype(const TensorView& t, Body&& body) {
  if (is(t, kDLFloat8_e4m3fn, 8)) {
    body(E4M3{});
  } else if (is(t, kDLFloat8_e5m2, 8)) {
    body(E5M2{});
  } else {
    by_dtype(t, body);
  }
}

}  // namespace blend
