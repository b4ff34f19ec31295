// How far cached KV lies from fresh KV: per token |V - V'|^2 and, where K is given,
// |K - turned K'|^2, over all heads. One warp a token, fp32, summed in a fixed order.
//
// Memory bound: both copies of the n tokens are read once; 4 bytes a token are written.
#pragma once

#include "rotation.cuh"

namespace blend::cuda {

struct Deviation {
  const char *k, *v;           // the pool; k is null where V alone counts
  int64_t k_stride, v_stride;  // bytes from slot to slot
  const int64_t *fresh, *src;  // [n] slots
  const float *cos, *sin;      // [n, rotary_dim / 2]: carry src's K to the fresh K's position
  int heads, dim, v_dim, rotary_dim;
  int64_t n;
  float* out;  // [n]
};

// Adds |x - y|^2 of one 16 bytes, element by element.
template <int N>
__device__ __forceinline__ void add_apart(float& sum, const float (&x)[N], const float (&y)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) sum += (x[i] - y[i]) * (x[i] - y[i]);
}

// 16 bytes of both copies, which need no turn.
template <typename T>
struct Apart {
  uint4 fresh, src;

  __device__ __forceinline__ void load(const char* a, const char* b, int at) {
    fresh = load16_once(a + at * int64_t(sizeof(T))),
    src = load16_once(b + at * int64_t(sizeof(T)));
  }
  __device__ __forceinline__ void add(float& sum) const {
    float x[VECTOR<T>], y[VECTOR<T>];
    as_floats(fresh, x, T()), as_floats(src, y, T());
    add_apart(sum, x, y);
  }
};

// 32 bytes of both copies of K, of which the cached one is turned.
template <typename T, bool HALVES>
struct TurnedApart {
  static constexpr int N = VECTOR<T>;
  Apart<T> first, second;
  float cos[N], sin[N];

  // angle: of the token's first.
  __device__ __forceinline__ void load(const Deviation& p, const char* a, const char* b,
                                       int64_t angle, int head, int part) {
    const Unit<HALVES, N> unit(part, p.rotary_dim / 2);
    first.load(a, b, head * p.dim + unit.first), second.load(a, b, head * p.dim + unit.second);
    read_floats(p.cos + angle + N * part, cos), read_floats(p.sin + angle + N * part, sin);
  }
  __device__ __forceinline__ void add(float& sum) const {
    float x[N], y[N], z[N];
    as_floats(first.src, x, T()), as_floats(second.src, y, T());
    turn<HALVES>(x, y, cos, sin);
    as_floats(first.fresh, z, T()), add_apart(sum, z, x);
    as_floats(second.fresh, z, T()), add_apart(sum, z, y);
  }
};

// A warp takes a token. A lane has UNITS pairs of 16 bytes on their way before it uses the first.
template <typename T, bool HALVES, bool KEYS, int UNITS, int BLOCKS>
__global__ void __launch_bounds__(128, BLOCKS) deviation_kernel(Deviation p) {
  constexpr int N = VECTOR<T>;
  const int64_t i = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (i >= p.n) return;  // the whole warp
  const int64_t fresh = p.fresh[i], src = p.src[i];
  float sum = 0;
  const char *a = p.v + fresh * p.v_stride, *b = p.v + src * p.v_stride;
  const int of_v = p.heads * p.v_dim / N;
  for (int u = threadIdx.x; u < of_v; u += 32 * UNITS) {
    Apart<T> pair[UNITS];
#pragma unroll
    for (int j = 0; j < UNITS; ++j) {
      if (u + 32 * j < of_v) pair[j].load(a, b, N * (u + 32 * j));
    }
#pragma unroll
    for (int j = 0; j < UNITS; ++j) {
      if (u + 32 * j < of_v) pair[j].add(sum);
    }
  }
  if (KEYS) {
    a = p.k + fresh * p.k_stride, b = p.k + src * p.k_stride;
    const int turned = p.rotary_dim / 2 / N, of_head = turned + (p.dim - p.rotary_dim) / N;
    for (int u = threadIdx.x; u < p.heads * of_head; u += 32) {
      const int head = u / of_head, part = u - head * of_head;
      if (part < turned) {
        TurnedApart<T, HALVES> pair;
        pair.load(p, a, b, i * (p.rotary_dim / 2), head, part);
        pair.add(sum);
      } else {
        Apart<T> pair;
        pair.load(a, b, head * p.dim + p.rotary_dim + N * (part - turned));
        pair.add(sum);
      }
    }
  }
#pragma unroll
  for (int by = 16; by > 0; by /= 2) sum += __shfl_xor_sync(WARP_MASK, sum, by);
  if (threadIdx.x == 0) p.out[i] = sum;
}

// UNITS: of a lane; BLOCKS: of a multiprocessor.
template <typename T, bool HALVES, bool KEYS, int UNITS, int BLOCKS>
void deviation_by(const Deviation& p, Stream stream) {
  launch(deviation_kernel<T, HALVES, KEYS, UNITS, BLOCKS>, Extent{static_cast<int>((p.n + 3) / 4)},
         Extent{32, 4}, 0, stream, p);
}

template <typename T>
void deviation(const Deviation& p, bool halves, Stream stream) {
  constexpr int BLOCKS = sizeof(T) == 1 ? 5 : 7;
  if (!p.k) {
    deviation_by<T, true, false, 4, 8>(p, stream);
  } else if (halves) {
    deviation_by<T, true, true, 4, BLOCKS>(p, stream);
  } else {
    deviation_by<T, false, true, 4, BLOCKS>(p, stream);
  }
}

}  // namespace blend::cuda
