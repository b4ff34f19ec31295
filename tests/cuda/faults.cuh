// Small kernels that are right, and the same with one fault each: for the emulator (faults.cpp)
// and, on a GPU, for compute-sanitizer (tests/gpu/selftest.cu).
#pragma once

#include "cuda/machine.cuh"

namespace {

using namespace blend::cuda;

enum Fault {
  NONE,
  WAITS_FOR_OTHER_COPIES,
  NO_BARRIER_BEFORE_USE,
  NO_BARRIER_BEHIND_USE,
  MISALIGNED,
  COPIES_IN_FLIGHT,
  COPIES_NEVER_COMMITTED,
  SHUFFLE_OF_HALF_A_WARP,
  SHUFFLES_AT_TWO_PLACES,
  SHUFFLE_FROM_OUTSIDE_ITS_MASK,
  BARRIERS_AT_TWO_PLACES,
  ENDS_BEFORE_A_BARRIER,
  SHARED_MEMORY_NOT_SET,
  FAULTS
};

// 64 threads bring x [steps, 256] through two stages; each adds what a thread of the other warp
// brought. out [64].
template <int FAULT>
__global__ void pipeline(const float* x, float* out, int steps) {
  BLEND_SHARED(raw);
  auto* stages = reinterpret_cast<float*>(raw);
  const int me = threadIdx.x, other = (me + 32) % 64;
  const auto commit = [] {
    if (FAULT != COPIES_NEVER_COMMITTED) copy_commit();
  };
  const auto bring = [&](int step) {
    copy16_async(stages + step % 2 * 256 + 4 * me, x + 256 * step + 4 * me, true);
    commit();
  };
  bring(0);
  float sum = 0;
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps) {
      bring(step + 1);
    } else {
      commit();
    }
    copy_wait<FAULT == WAITS_FOR_OTHER_COPIES ? 2 : 1>();
    if (FAULT != NO_BARRIER_BEFORE_USE) __syncthreads();
    const float* from = stages + step % 2 * 256 + 4 * other;
    const uint4 v = load16(from + (FAULT == MISALIGNED && step == 1));
    sum +=
        __uint_as_float(v.x) + __uint_as_float(v.y) + __uint_as_float(v.z) + __uint_as_float(v.w);
    if (FAULT != NO_BARRIER_BEHIND_USE) __syncthreads();
  }
  copy_wait<0>();
  if (FAULT == COPIES_IN_FLIGHT) bring(0);
  out[me] = sum;
}

// out[i] = the sum of x over i's warp. x, out [64].
template <int FAULT>
__global__ void warp_sum(const float* x, float* out) {
  BLEND_SHARED(raw);
  auto* sums = reinterpret_cast<float*>(raw);
  const int me = threadIdx.x, lane = me % 32;
  float sum = x[me];
  for (int by = 16; by > 0; by /= 2) {
    if (FAULT == SHUFFLE_OF_HALF_A_WARP && by == 2) {
      if (lane < 16) sum += __shfl_xor_sync(WARP_MASK, sum, by);
    } else if (FAULT == SHUFFLES_AT_TWO_PLACES && lane < 16) {
      sum += __shfl_xor_sync(WARP_MASK, sum, by);
    } else if (FAULT == SHUFFLE_FROM_OUTSIDE_ITS_MASK && by == 16) {
      sum += __shfl_xor_sync(lane < 16 ? 0xffffu : 0xffff0000u, sum, by);
    } else {
      sum += __shfl_xor_sync(WARP_MASK, sum, by);
    }
  }
  if (FAULT == ENDS_BEFORE_A_BARRIER && me == 40) return;
  if (lane == 0 && (FAULT != SHARED_MEMORY_NOT_SET || me == 0)) sums[me / 32] = sum;
  if (FAULT == BARRIERS_AT_TWO_PLACES && me < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[me] = sums[me / 32];
}

// One warp: out [16, 8] = a [16, 16] b [8, 16]^T through shared memory.
template <typename T>
__global__ void product(const T* a, const T* b, float* out) {
  BLEND_SHARED(raw);
  T *left = reinterpret_cast<T*>(raw), *right = left + 256;
  const int lane = threadIdx.x;
  for (int i = lane; i < 32; i += 32) {
    store16(left + 8 * i, load16(a + 8 * i));
    if (i < 16) store16(right + 8 * i, load16(b + 8 * i));
  }
  __syncthreads();
  uint32_t x[4], y[4];
  load_matrices(x, left + lane % 16 * 16 + lane / 16 * 8);
  load_matrices(y, right + lane % 8 * 16 + lane / 8 % 2 * 8);
  float d[4] = {};
  multiply<T>(d, x, y[0], y[1]);
  for (int i = 0; i < 4; ++i) out[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
}

}  // namespace
