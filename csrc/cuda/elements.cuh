// What a KV pool holds: 16 bytes of it as fp32 and back. Each value is rounded once, to nearest
// even; fp8 saturates, NaN stays NaN (ops/reference.py: cast).
#pragma once

#include "machine.cuh"

namespace blend::cuda {

// Elements of T in 16 bytes.
template <typename T>
constexpr int VECTOR = 16 / sizeof(T);

__device__ __forceinline__ void as_floats(uint4 v, float (&x)[4], float) {
  x[0] = __uint_as_float(v.x), x[1] = __uint_as_float(v.y);
  x[2] = __uint_as_float(v.z), x[3] = __uint_as_float(v.w);
}

template <typename T>
__device__ __forceinline__ void as_floats(uint4 v, float (&x)[8], T type) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 two = unpack(words[i], type);
    x[2 * i] = two.x, x[2 * i + 1] = two.y;
  }
}

template <__nv_fp8_interpretation_t KIND>
__device__ __forceinline__ void fp8_as_floats(uint4 v, float (&x)[16]) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const auto two = static_cast<__nv_fp8x2_storage_t>(words[i / 2] >> (i % 2 * 16));
    const float2 pair = __half22float2(__half2(__nv_cvt_fp8x2_to_halfraw2(two, KIND)));
    x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
  }
}

__device__ __forceinline__ void as_floats(uint4 v, float (&x)[16], __nv_fp8_e4m3) {
  fp8_as_floats<__NV_E4M3>(v, x);
}

__device__ __forceinline__ void as_floats(uint4 v, float (&x)[16], __nv_fp8_e5m2) {
  fp8_as_floats<__NV_E5M2>(v, x);
}

__device__ __forceinline__ uint4 from_floats(const float (&x)[4], float) {
  uint4 v;
  v.x = __float_as_uint(x[0]), v.y = __float_as_uint(x[1]);
  v.z = __float_as_uint(x[2]), v.w = __float_as_uint(x[3]);
  return v;
}

template <typename T>
__device__ __forceinline__ uint4 from_floats(const float (&x)[8], T type) {
  uint4 v;
  v.x = pack(x[0], x[1], type), v.y = pack(x[2], x[3], type);
  v.z = pack(x[4], x[5], type), v.w = pack(x[6], x[7], type);
  return v;
}

template <__nv_fp8_interpretation_t KIND>
__device__ __forceinline__ uint4 fp8_from_floats(const float (&x)[16]) {
  uint32_t words[4] = {};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    float2 pair;
    pair.x = x[2 * i], pair.y = x[2 * i + 1];
    const uint32_t two = __nv_cvt_float2_to_fp8x2(pair, __NV_SATFINITE, KIND);
    words[i / 2] |= two << (i % 2 * 16);
  }
  uint4 v;
  v.x = words[0], v.y = words[1], v.z = words[2], v.w = words[3];
  return v;
}

__device__ __forceinline__ uint4 from_floats(const float (&x)[16], __nv_fp8_e4m3) {
  return fp8_from_floats<__NV_E4M3>(x);
}

__device__ __forceinline__ uint4 from_floats(const float (&x)[16], __nv_fp8_e5m2) {
  return fp8_from_floats<__NV_E5M2>(x);
}

// N floats from aligned memory.
template <int N>
__device__ __forceinline__ void read_floats(const float* from, float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    const uint4 v = load16(from + i);
    x[i] = __uint_as_float(v.x), x[i + 1] = __uint_as_float(v.y);
    x[i + 2] = __uint_as_float(v.z), x[i + 3] = __uint_as_float(v.w);
  }
}

}  // namespace blend::cuda
