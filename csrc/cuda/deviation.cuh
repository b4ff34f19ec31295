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

template <typename T>
__device__ __forceinline__ float apart(const char* a, const char* b, int64_t at) {
  constexpr int N = VECTOR<T>;
  float x[N], y[N], sum = 0;
  as_floats(load16_once(a + at * int64_t(sizeof(T))), x, T());
  as_floats(load16_once(b + at * int64_t(sizeof(T))), y, T());
#pragma unroll
  for (int i = 0; i < N; ++i) sum += (x[i] - y[i]) * (x[i] - y[i]);
  return sum;
}

template <typename T, bool HALVES>
__device__ __forceinline__ float turned_apart(const Deviation& p, const char* fresh,
                                              const char* src, int64_t i, int head, int part) {
  constexpr int N = VECTOR<T>;
  const int half = p.rotary_dim / 2;
  const Unit<HALVES, N> unit(part, half);
  const int64_t first = int64_t(head * p.dim + unit.first) * sizeof(T);
  const int64_t second = int64_t(head * p.dim + unit.second) * sizeof(T);
  float x[N], y[N], cos[N], sin[N], a[N], sum = 0;
  as_floats(load16_once(src + first), x, T());
  as_floats(load16_once(src + second), y, T());
  read_floats(p.cos + i * half + N * part, cos);
  read_floats(p.sin + i * half + N * part, sin);
  turn<HALVES>(x, y, cos, sin);
  as_floats(load16_once(fresh + first), a, T());
#pragma unroll
  for (int j = 0; j < N; ++j) sum += (a[j] - x[j]) * (a[j] - x[j]);
  as_floats(load16_once(fresh + second), a, T());
#pragma unroll
  for (int j = 0; j < N; ++j) sum += (a[j] - y[j]) * (a[j] - y[j]);
  return sum;
}

template <typename T, bool HALVES>
__global__ void __launch_bounds__(256, 2) deviation_kernel(Deviation p) {
  constexpr int N = VECTOR<T>;
  const int64_t i = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (i >= p.n) return;  // the whole warp
  const int64_t fresh = p.fresh[i], src = p.src[i];
  float sum = 0;
  for (int u = threadIdx.x; u < p.heads * p.v_dim / N; u += 32) {
    sum += apart<T>(p.v + fresh * p.v_stride, p.v + src * p.v_stride, int64_t(u) * N);
  }
  if (p.k) {
    const char *a = p.k + fresh * p.k_stride, *b = p.k + src * p.k_stride;
    const int turned = p.rotary_dim / 2 / N, of_head = turned + (p.dim - p.rotary_dim) / N;
    for (int u = threadIdx.x; u < p.heads * of_head; u += 32) {
      const int head = u / of_head, part = u % of_head;
      if (part < turned) {
        sum += turned_apart<T, HALVES>(p, a, b, i, head, part);
      } else {
        sum += apart<T>(a, b, head * p.dim + p.rotary_dim + N * (part - turned));
      }
    }
  }
#pragma unroll
  for (int by = 16; by > 0; by /= 2) sum += __shfl_xor_sync(WARP_MASK, sum, by);
  if (threadIdx.x == 0) p.out[i] = sum;
}

template <typename T>
void deviation(const Deviation& p, bool halves, Stream stream) {
  const Extent grid{static_cast<int>((p.n + 7) / 8)}, block{32, 8};
  if (halves) {
    launch(deviation_kernel<T, true>, grid, block, 0, stream, p);
  } else {
    launch(deviation_kernel<T, false>, grid, block, 0, stream, p);
  }
}

}  // namespace blend::cuda
