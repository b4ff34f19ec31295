// What a document's recomputed tokens differ by, in the mean, from their cached KV: K of both
// turned to position 0, V as it is. A block takes a document and eight units of a token (16 bytes,
// or two that are turned together); its rows walk the document's tokens, and their sums are added
// in a fixed order: no atomics.
//
// Memory bound: both copies of the tokens are read once, and their angles once a head.
#pragma once

#include "rotation.cuh"

namespace blend::cuda {

constexpr int DELTA_UNITS = 8, DELTA_ROWS = 32;  // of a block: 128 bytes in a row, tokens at a time

// Where the KV of one layer's tokens lies.
struct Kept {
  const char *k, *v;           // [slots, heads, dim]
  int64_t k_stride, v_stride;  // bytes from slot to slot
};

// One copy of the tokens. slots: [n]; angles: [n, rotary_dim / 2] each, which turn K to position 0.
struct Copy {
  Kept kept;
  const int64_t* slots;
  const float *cos, *sin;
};

struct Deltas {
  Copy fresh, old;
  Kept beside;            // token i there where old.slots[i] < 0
  const int64_t* bounds;  // [documents + 1]: a document's tokens are bounds[d] .. bounds[d + 1]
  const float* scale;     // [documents]: what multiplies the sum of its deltas
  float *k, *v;           // [documents, heads, dim], [documents, heads, v_dim]
  int heads, dim, v_dim, rotary_dim;
};

template <typename T, bool HALVES>
__device__ __forceinline__ void read_turned(const char* head, const Unit<HALVES, VECTOR<T>>& unit,
                                            const float* cos, const float* sin,
                                            float (&x)[VECTOR<T>], float (&y)[VECTOR<T>]) {
  constexpr int N = VECTOR<T>;
  float c[N], s[N];
  as_floats(load16_once(head + int64_t(unit.first) * sizeof(T)), x, T());
  as_floats(load16_once(head + int64_t(unit.second) * sizeof(T)), y, T());
  read_floats(cos, c);
  read_floats(sin, s);
  turn<HALVES>(x, y, c, s);
}

template <typename T, bool HALVES>
__global__ void __launch_bounds__(DELTA_UNITS* DELTA_ROWS, 2) deltas_kernel(Deltas p) {
  constexpr int N = VECTOR<T>, WIDTH = DELTA_UNITS * 2 * N;
  BLEND_SHARED(raw);
  float* const sums = reinterpret_cast<float*>(raw);  // [DELTA_ROWS, WIDTH]
  const int half = p.rotary_dim / 2, turned = half / N, of_head = turned + (p.dim - 2 * half) / N;
  const int of_k = p.heads * of_head, of_all = of_k + p.heads * p.v_dim / N;
  const int unit = blockIdx.x * DELTA_UNITS + threadIdx.x;
  const bool key = unit < of_k, pair = key && unit % of_head < turned;
  const int head = key ? unit / of_head : 0, part = key ? unit % of_head : 0;
  // In elements of a token's K or V.
  const int at = !key ? N * (unit - of_k) : head * p.dim + (pair ? 0 : N * (part + turned));
  const Unit<HALVES, N> both(part, half);

  float x[N] = {}, y[N] = {};
  if (unit < of_all) {
    const int64_t end = p.bounds[blockIdx.y + 1];
#pragma unroll 2
    for (int64_t i = p.bounds[blockIdx.y] + threadIdx.y; i < end; i += DELTA_ROWS) {
      const int64_t old_slot = p.old.slots[i];
      const Kept& cached = old_slot < 0 ? p.beside : p.old.kept;
      const int64_t from = old_slot < 0 ? i : old_slot, slot = p.fresh.slots[i];
      const Kept& now = p.fresh.kept;
      const char* a = (key ? now.k + slot * now.k_stride : now.v + slot * now.v_stride) +
                      int64_t(at) * sizeof(T);
      const char* b =
          (key ? cached.k + from * cached.k_stride : cached.v + from * cached.v_stride) +
          int64_t(at) * sizeof(T);
      if (pair) {
        const int64_t angle = i * half + N * part;
        float u[N], v[N], old_u[N], old_v[N];
        read_turned<T, HALVES>(a, both, p.fresh.cos + angle, p.fresh.sin + angle, u, v);
        read_turned<T, HALVES>(b, both, p.old.cos + angle, p.old.sin + angle, old_u, old_v);
#pragma unroll
        for (int j = 0; j < N; ++j) x[j] += u[j] - old_u[j], y[j] += v[j] - old_v[j];
      } else {
        float u[N], old_u[N];
        as_floats(load16_once(a), u, T());
        as_floats(load16_once(b), old_u, T());
#pragma unroll
        for (int j = 0; j < N; ++j) x[j] += u[j] - old_u[j];
      }
    }
  }
  float* const mine = sums + threadIdx.y * WIDTH + threadIdx.x * 2 * N;
#pragma unroll
  for (int j = 0; j < N; ++j) mine[j] = x[j], mine[N + j] = y[j];
  __syncthreads();
  for (int c = threadIdx.y * DELTA_UNITS + threadIdx.x; c < WIDTH; c += DELTA_UNITS * DELTA_ROWS) {
    const int u = blockIdx.x * DELTA_UNITS + c / (2 * N), j = c % (2 * N);
    if (u >= of_all) continue;
    const bool k = u < of_k, two = k && u % of_head < turned;
    if (j >= N && !two) continue;
    float sum = 0;
    for (int row = 0; row < DELTA_ROWS; ++row) sum += sums[row * WIDTH + c];
    sum *= p.scale[blockIdx.y];
    if (!k) {
      p.v[blockIdx.y * int64_t(p.heads * p.v_dim) + N * (u - of_k) + j] = sum;
      continue;
    }
    const Unit<HALVES, N> place(u % of_head, half);
    const int within = !two    ? N * (u % of_head + turned) + j
                       : j < N ? place.first + j
                               : place.second + j - N;
    p.k[(blockIdx.y * int64_t(p.heads) + u / of_head) * p.dim + within] = sum;
  }
}

template <typename T>
void deltas(const Deltas& p, int documents, bool halves, Stream stream) {
  const int units = p.heads * (p.dim - p.rotary_dim / 2 + p.v_dim) / VECTOR<T>;
  const Extent grid{(units + DELTA_UNITS - 1) / DELTA_UNITS, documents};
  const Extent block{DELTA_UNITS, DELTA_ROWS};
  const size_t shared = sizeof(float) * DELTA_ROWS * DELTA_UNITS * 2 * VECTOR<T>;
  if (halves) {
    launch(deltas_kernel<T, true>, grid, block, shared, stream, p);
  } else {
    launch(deltas_kernel<T, false>, grid, block, shared, stream, p);
  }
}

}  // namespace blend::cuda
