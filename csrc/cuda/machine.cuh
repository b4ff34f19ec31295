// What kernels need of the machine, each under one name: the hardware's instruction under nvcc, the
// same effect thread by thread under the emulator (BLEND_EMULATED). Knows no tensors.
#pragma once

#if defined(BLEND_EMULATED)
#include "../emulator/cuda.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>
#endif

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace blend::cuda {

constexpr unsigned WARP_MASK = 0xffffffffu;

#if defined(BLEND_EMULATED)

// The block's dynamic shared memory.
#define BLEND_SHARED(name) unsigned char* const name = emulator::block->shared()
// A function of its own, called: code that would stand in the way of what runs often.
#define BLEND_APART inline
// The place of the caller, for collectives that are functions of this file.
#define BLEND_SITE , EMULATOR_SITE

using Stream = void*;
using Extent = emulator::Size;

template <typename... P, typename... A>
void launch(void (*kernel)(P...), Extent grid, Extent threads, size_t shared, Stream,
            A&&... arguments) {
  emulator::run_grid(kernel, grid, threads, shared, std::forward<A>(arguments)...);
}

// What went wrong with the launch; null: nothing.
inline const char* launch_error() { return nullptr; }

// Shared memory, in bytes, that a block can have: on the device, and on the architecture that is
// compiled for; 0: on any.
inline size_t most_shared(int) { return emulator::most_shared; }
constexpr size_t COMPILED_SHARED = 0;

#else

#define BLEND_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]
#define BLEND_APART __noinline__
#define BLEND_SITE

using Stream = cudaStream_t;

struct Extent {
  int x = 1, y = 1, z = 1;
  operator dim3() const { return dim3(x, y, z); }
};

template <typename... P, typename... A>
void launch(void (*kernel)(P...), Extent grid, Extent threads, size_t shared, Stream stream,
            A&&... arguments) {
  if (shared > 48 * 1024) {  // beyond it a kernel must ask
    cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                         cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = threads;
  config.dynamicSmemBytes = shared, config.stream = stream;
  cudaLaunchKernelEx(&config, kernel, static_cast<P>(arguments)...);
}

inline const char* launch_error() {
  const cudaError_t code = cudaGetLastError();
  return code == cudaSuccess ? nullptr : cudaGetErrorString(code);
}

inline size_t most_shared(int device) {
  int bytes = 0;
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return bytes;
}

#if !defined(__CUDA_ARCH__)
constexpr size_t COMPILED_SHARED = 0;
#elif __CUDA_ARCH__ == 800 || __CUDA_ARCH__ == 870
constexpr size_t COMPILED_SHARED = 163 << 10;
#elif __CUDA_ARCH__ < 900 || __CUDA_ARCH__ >= 1200
constexpr size_t COMPILED_SHARED = 99 << 10;
#else
constexpr size_t COMPILED_SHARED = 227 << 10;
#endif

#endif

// 16 bytes at once; both ends are aligned to 16.
__device__ __forceinline__ uint4 load16(const void* from) {
#if defined(BLEND_EMULATED)
  emulator::require_aligned(from, 16, "load16");
  uint4 v;
  std::memcpy(&v, from, 16);
  return v;
#else
  return *static_cast<const uint4*>(from);
#endif
}

// Of memory that the kernel reads once and nobody writes meanwhile: past L1, which keeps what is
// used again.
__device__ __forceinline__ uint4 load16_once(const void* from) {
#if defined(BLEND_EMULATED)
  return load16(from);
#else
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from));
  return v;
#endif
}

// As load16_once, 8 bytes.
__device__ __forceinline__ uint2 load8_once(const void* from) {
#if defined(BLEND_EMULATED)
  emulator::require_aligned(from, 8, "load8_once");
  uint2 v;
  std::memcpy(&v, from, 8);
  return v;
#else
  uint2 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v2.u32 {%0, %1}, [%2];"
               : "=r"(v.x), "=r"(v.y)
               : "l"(from));
  return v;
#endif
}

__device__ __forceinline__ void store16(void* to, uint4 v) {
#if defined(BLEND_EMULATED)
  emulator::require_aligned(to, 16, "store16");
  std::memcpy(to, &v, 16);
#else
  *static_cast<uint4*>(to) = v;
#endif
}

// Asynchronous copy of 16 bytes from global into shared memory; zeros where not `there`.
__device__ __forceinline__ void copy16_async(void* to, const void* from, bool there) {
#if defined(BLEND_EMULATED)
  emulator::require_aligned(to, 16, "copy16_async");
  emulator::require_aligned(from, 16, "copy16_async");
  emulator::copy_async({to, from, 16, there ? 16u : 0u});
#else
  const auto at = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(at), "l"(from),
               "r"(there ? 16 : 0)
               : "memory");
#endif
}

// As copy16_async, of 4 or 8 bytes.
template <int BYTES>
__device__ __forceinline__ void copy_async(void* to, const void* from, bool there) {
#if defined(BLEND_EMULATED)
  emulator::require_aligned(to, BYTES, "copy_async");
  emulator::require_aligned(from, BYTES, "copy_async");
  emulator::copy_async({to, from, BYTES, there ? BYTES : 0u});
#else
  const auto at = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(at), "l"(from), "n"(BYTES),
               "r"(there ? BYTES : 0)
               : "memory");
#endif
}

// Closes the thread's group of copies.
__device__ __forceinline__ void copy_commit() {
#if defined(BLEND_EMULATED)
  emulator::copy_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// All but the thread's last LEFT groups have arrived. Other threads' copies: a barrier behind it.
template <int LEFT>
__device__ __forceinline__ void copy_wait() {
#if defined(BLEND_EMULATED)
  emulator::copy_wait(LEFT);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
#endif
}

// ldmatrix: four 8x8 matrices of 16-bit elements in shared memory. Lane l names row l % 8 of matrix
// l / 8, and gets elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4 of each.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row BLEND_SITE) {
#if defined(BLEND_EMULATED)
  emulator::require_aligned(row, 16, "load_matrices");
  const emulator::Cells& cells =
      emulator::block->exchange("load_matrices", site, WARP_MASK, &row, sizeof row);
  const int lane = emulator::self->lane;
  for (int m = 0; m < 4; ++m) {
    const auto* from = cells.of<const unsigned char*>(8 * m + lane / 4);
    std::memcpy(&r[m], from + 4 * (lane % 4), 4);
  }
#else
  const auto at = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at)
               : "memory");
#endif
}

// As load_matrices, of their transposes: the lane gets elements l / 4 of rows 2 (l % 4) and
// 2 (l % 4) + 1.
__device__ __forceinline__ void load_matrices_turned(uint32_t (&r)[4], const void* row BLEND_SITE) {
#if defined(BLEND_EMULATED)
  emulator::require_aligned(row, 16, "load_matrices_turned");
  const emulator::Cells& cells =
      emulator::block->exchange("load_matrices_turned", site, WARP_MASK, &row, sizeof row);
  const int lane = emulator::self->lane;
  for (int m = 0; m < 4; ++m) {
    for (int half = 0; half < 2; ++half) {
      const auto* from = cells.of<const unsigned char*>(8 * m + 2 * (lane % 4) + half);
      std::memcpy(reinterpret_cast<unsigned char*>(&r[m]) + 2 * half, from + 2 * (lane / 4), 2);
    }
  }
#else
  const auto at = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at)
               : "memory");
#endif
}

__device__ __forceinline__ float2 unpack(uint32_t two, __nv_bfloat16) {
  float2 out;
  out.x = __uint_as_float(two << 16), out.y = __uint_as_float(two & 0xffff0000u);
  return out;
}

__device__ __forceinline__ float2 unpack(uint32_t two, __half) {
  __half2 pair;
  memcpy(&pair, &two, sizeof pair);
  return __half22float2(pair);
}

__device__ __forceinline__ uint32_t pack(float a, float b, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
  uint32_t out;
  memcpy(&out, &pair, sizeof out);
  return out;
}

__device__ __forceinline__ uint32_t pack(float a, float b, __half) {
  const __half2 pair = __floats2half2_rn(a, b);
  uint32_t out;
  memcpy(&out, &pair, sizeof out);
  return out;
}

// mma.m16n8k16 of one warp: d [16, 8] += a [16, 16] b [16, 8], T in and fp32 out. Lane 4 g + t
// holds of a rows g and g + 8 (parts 0 and 1, columns 2 t and 2 t + 1; parts 2 and 3: 8 columns
// on), of b column g (rows 2 t, 2 t + 1; b1: 8 rows on), of d rows g (0, 1) and g + 8 (2, 3),
// columns 2 t and 2 t + 1.
template <typename T>
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1 BLEND_SITE) {
#if defined(BLEND_EMULATED)
  struct Given {
    uint32_t a[4], b[2];
  } const mine{{a[0], a[1], a[2], a[3]}, {b0, b1}};
  const emulator::Cells& cells =
      emulator::block->exchange("multiply", site, WARP_MASK, &mine, sizeof mine);
  const int lane = emulator::self->lane, g = lane / 4, t = lane % 4;
  float left[2][16], right[2][16];  // rows g and g + 8; columns 2 t and 2 t + 1
  for (int q = 0; q < 4; ++q) {
    const Given row = cells.of<Given>(4 * g + q);
    for (int part = 0; part < 4; ++part) {
      const float2 x = unpack(row.a[part], T());
      float* to = left[part % 2] + part / 2 * 8 + 2 * q;
      to[0] = x.x, to[1] = x.y;
    }
    for (int c = 0; c < 2; ++c) {
      const Given column = cells.of<Given>(4 * (2 * t + c) + q);
      for (int part = 0; part < 2; ++part) {
        const float2 x = unpack(column.b[part], T());
        float* to = right[c] + part * 8 + 2 * q;
        to[0] = x.x, to[1] = x.y;
      }
    }
  }
  for (int i = 0; i < 4; ++i) {
    float sum = 0;
    for (int k = 0; k < 16; ++k) sum += left[i / 2][k] * right[i % 2][k];
    d[i] += sum;
  }
#else
  if constexpr (std::is_same_v<T, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
#endif
}

// 2^x to about two units in the last place; -inf gives 0.
__device__ __forceinline__ float power2(float x) {
#if defined(BLEND_EMULATED)
  return std::exp2(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

}  // namespace blend::cuda
