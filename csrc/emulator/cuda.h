// CUDA's language and built-ins for g++: a kernel's source compiles as it is, and each thread runs
// as a fiber (block.h). NVIDIA's own headers for bf16, fp16 and fp8 serve the host, too. What is
// not here, the kernels do not use.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <vector_types.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <utility>

#include "block.h"

#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __launch_bounds__
#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

#define threadIdx (*emulator::self)
#define blockIdx (emulator::block->id)
#define blockDim (emulator::block->threads)
#define gridDim (emulator::block->blocks)

// The place of the caller: default arguments are evaluated there.
#define EMULATOR_SITE emulator::Site site = {__builtin_FILE(), __builtin_LINE()}

namespace emulator {

inline size_t most_shared = 99 << 10;  // a block of sm_86, sm_89 or sm_120; others have more

template <typename... P, typename... A>
void run_grid(void (*kernel)(P...), Size grid, Size threads, size_t shared, A&&... arguments) {
  if (threads.count() < 1 || threads.count() > 1024 || threads.count() % WARP) {
    throw std::runtime_error("CUDA emulator: a block has whole warps, at most 32");
  }
  if (grid.count() < 1 || grid.x < 0 || grid.y > 65535 || grid.z > 65535) {
    throw std::runtime_error("CUDA emulator: the grid is empty or too large");
  }
  if (shared > most_shared) {
    throw std::runtime_error("CUDA emulator: more shared memory than a block can have");
  }
  using Call = std::pair<void (*)(P...), std::tuple<P...>>;
  Call call(kernel, std::tuple<P...>(std::forward<A>(arguments)...));
  const auto run = [](void* at) {
    const auto& [function, values] = *static_cast<Call*>(at);
    std::apply(function, values);
  };
  Block one(threads, grid, shared, run, &call);
  const long n = grid.count();
  ++counts.launches;
  for (long i = 0; i < n; ++i) {
    const long b = settings.order == 1 ? n - 1 - i : i;
    one.run({int(b % grid.x), int(b / grid.x % grid.y), int(b / (long(grid.x) * grid.y))});
  }
}

inline void require_aligned(const void* at, size_t bytes, const char* what) {
  if (reinterpret_cast<uintptr_t>(at) % bytes)
    block->fault(std::string(what) + ": misaligned address");
}

inline void arrive(const Copy& c) {
  std::memcpy(c.to, c.from, c.filled);
  std::memset(static_cast<char*>(c.to) + c.filled, 0, c.bytes - c.filled);
}

inline void copy_async(Copy c) {
  if (settings.early_copies) {
    arrive(c);
    c.filled = c.bytes = 0;
  }
  self->open.push_back(c);
}

inline void copy_commit() {
  self->groups.push_back(std::move(self->open));
  self->open.clear();
}

inline void copy_wait(size_t left) {
  auto& groups = self->groups;
  while (groups.size() > left) {
    for (const Copy& c : groups.front()) arrive(c);
    groups.erase(groups.begin());
  }
}

// Lane `from` of the caller's part of the warp, as the shuffles below name it.
template <typename T>
T shuffle(const char* what, Site site, unsigned mask, T value, int from, bool inside) {
  const Cells& cells = block->exchange(what, site, mask, &value, sizeof value);
  if (!inside) return value;
  if (!(mask >> from & 1)) block->fault(std::string(what) + " reads a lane outside its mask");
  return cells.of<T>(from);
}

}  // namespace emulator

inline void __syncthreads(EMULATOR_SITE) { emulator::block->wait_for_block(site); }

inline void __syncwarp(unsigned mask = ~0u, EMULATOR_SITE) {
  emulator::block->exchange("__syncwarp", site, mask, "", 1);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, EMULATOR_SITE) {
  const int base = emulator::self->lane / width * width;
  return emulator::shuffle("__shfl_sync", site, mask, value, base + lane % width, true);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int by, int width = 32, EMULATOR_SITE) {
  const int me = emulator::self->lane, from = me ^ by;
  return emulator::shuffle("__shfl_xor_sync", site, mask, value, from, from / width <= me / width);
}

inline unsigned __ballot_sync(unsigned mask, int yes, EMULATOR_SITE) {
  const auto& cells = emulator::block->exchange("__ballot_sync", site, mask, &yes, sizeof yes);
  unsigned out = 0;
  for (int i = 0; i < emulator::WARP; ++i) {
    if ((mask >> i & 1) && cells.of<int>(i)) out |= 1u << i;
  }
  return out;
}

inline unsigned __reduce_add_sync(unsigned mask, unsigned value, EMULATOR_SITE) {
  const auto& cells =
      emulator::block->exchange("__reduce_add_sync", site, mask, &value, sizeof value);
  unsigned out = 0;
  for (int i = 0; i < emulator::WARP; ++i) {
    if (mask >> i & 1) out += cells.of<unsigned>(i);
  }
  return out;
}

using std::max;
using std::min;

inline int __popc(unsigned x) { return __builtin_popcount(x); }

inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// Operations that are never contracted into one rounding; g++ is called with -ffp-contract=off.
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
