// A unit of one head of K: 16 bytes and the 16 that they are turned with. Halves (NeoX): elements
// i.. and half + i..; pairs (GPT-J): 32 bytes in a row, whose pairs have N angles.
#pragma once

#include "elements.cuh"

namespace blend::cuda {

// Products and sums are rounded apart, as torch's are: a contracted one would differ in the last
// bit.
__device__ __forceinline__ void turn_pair(float& a, float& b, float cos, float sin) {
  const float x = a, y = b;
  a = __fsub_rn(__fmul_rn(x, cos), __fmul_rn(y, sin));
  b = __fadd_rn(__fmul_rn(y, cos), __fmul_rn(x, sin));
}

// x and y turned by N angles; HALVES: x[i] pairs with y[i]. Else x, then y hold pairs in a row.
template <bool HALVES, int N>
__device__ __forceinline__ void turn(float (&x)[N], float (&y)[N], const float (&cos)[N],
                                     const float (&sin)[N]) {
  if constexpr (HALVES) {
#pragma unroll
    for (int i = 0; i < N; ++i) turn_pair(x[i], y[i], cos[i], sin[i]);
  } else {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      turn_pair(x[2 * i], x[2 * i + 1], cos[i], sin[i]);
      turn_pair(y[2 * i], y[2 * i + 1], cos[N / 2 + i], sin[N / 2 + i]);
    }
  }
}

// Where unit `part` of a head begins, and its second half, in elements; its angles begin at N *
// part.
template <bool HALVES, int N>
struct Unit {
  int first, second;
  __device__ __forceinline__ Unit(int part, int half)
      : first(HALVES ? N * part : 2 * N * part), second(HALVES ? first + half : first + N) {}
};

}  // namespace blend::cuda
