// Products of four warps at once, B straight from shared memory: wgmma, Hopper's own. Under the
// emulator the same effect, warp by warp; on other machines nobody calls it.
#pragma once

#include "machine.cuh"

namespace blend::cuda {

// Is this code for a machine that multiplies for four warps at once, B straight from shared memory
// (Hopper's wgmma)? PTX that Hopper's driver translates is not.
#if defined(BLEND_EMULATED) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define BLEND_WIDE 1
#else
#define BLEND_WIDE 0
#endif

// Does the current device?
inline bool multiplies_wide() {
#if defined(BLEND_EMULATED)
  return emulator::settings.wide;
#else
  int device = 0, major = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         major == 9;
#endif
}

// What this thread has written to shared memory, for multiply_wide of others behind a barrier.
__device__ __forceinline__ void show_wide() {
#if BLEND_WIDE && !defined(BLEND_EMULATED)
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Around multiply_wide: its registers are as they are meant to be before begin_wide, and again
// behind end_wide.
__device__ __forceinline__ void begin_wide() {
#if BLEND_WIDE && !defined(BLEND_EMULATED)
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void end_wide() {
#if BLEND_WIDE && !defined(BLEND_EMULATED)
  asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
#endif
}

// The compiler is not to move what it does with these across.
template <int N>
__device__ __forceinline__ void hold(float (&d)[N][4]) {
#if !defined(BLEND_EMULATED)
#pragma unroll
  for (int i = 0; i < N; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) asm volatile("" : "+f"(d[i][j])::"memory");
  }
#endif
}

// wgmma.m64n64k16 of a warpgroup, of each of its warps: d [16, 64] += a [16, 16] b [16, 64], as
// eight multiplies side by side lie. b: a block of rows of 64 elements in shared memory, in pieces
// of 16 bytes that are turned by the row as place<64> has them, its beginning a multiple of 1 KiB.
// Its rows are b's columns, from the element on at which b points; TURNED: b's rows, from that row
// on.
template <typename T, bool TURNED>
__device__ __forceinline__ void multiply_wide(float (&d)[8][4], const uint32_t (&a)[4],
                                              const T* b BLEND_SITE) {
#if defined(BLEND_EMULATED)
  struct Given {
    uint32_t a[4];
  } const mine{{a[0], a[1], a[2], a[3]}};
  const emulator::Cells& cells =
      emulator::block->exchange("multiply_wide", site, WARP_MASK, &mine, sizeof mine);
  const int lane = emulator::self->lane, g = lane / 4, t = lane % 4;
  const unsigned char* const shared = emulator::block->shared();
  const size_t begin = reinterpret_cast<const unsigned char*>(b) - shared;
  const auto at = [&](int k, int n) {
    const size_t flat = begin + (TURNED ? k * 128 + n * 2 : n * 128 + k * 2);
    T x;
    std::memcpy(&x, shared + (flat ^ (flat >> 7 & 7) << 4), sizeof x);
    uint16_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return unpack(bits, T()).x;
  };
  float left[2][16];
  for (int q = 0; q < 4; ++q) {
    const Given row = cells.of<Given>(4 * g + q);
    for (int part = 0; part < 4; ++part) {
      const float2 x = unpack(row.a[part], T());
      float* to = left[part % 2] + part / 2 * 8 + 2 * q;
      to[0] = x.x, to[1] = x.y;
    }
  }
  for (int i = 0; i < 8; ++i) {
    for (int c = 0; c < 4; ++c) {
      float sum = 0;
      for (int k = 0; k < 16; ++k) sum += left[c / 2][k] * at(k, 8 * i + 2 * t + c % 2);
      d[i][c] += sum;
    }
  }
#elif BLEND_WIDE
  // Rows of 128 bytes, turned; eight of them are 1 KiB.
  const uint64_t tile = uint64_t{1} << 62 | uint64_t{64} << 32 | uint64_t{1} << 16 |
                        (static_cast<unsigned>(__cvta_generic_to_shared(b)) & 0x3ffff) >> 4;
#define BLEND_WGMMA(type)                                                                         \
  asm volatile(                                                                                   \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                                 \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "   \
      "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, "  \
      "%36, 1, 1, 1, %37;"                                                                        \
      : BLEND_FOUR(0), BLEND_FOUR(1), BLEND_FOUR(2), BLEND_FOUR(3), BLEND_FOUR(4), BLEND_FOUR(5), \
        BLEND_FOUR(6), BLEND_FOUR(7)                                                              \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(tile), "n"(TURNED ? 1 : 0)                \
      : "memory")
#define BLEND_FOUR(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
  if constexpr (std::is_same_v<T, __half>) {
    BLEND_WGMMA("f16");
  } else {
    BLEND_WGMMA("bf16");
  }
#undef BLEND_FOUR
#undef BLEND_WGMMA
#endif
}

}  // namespace blend::cuda
