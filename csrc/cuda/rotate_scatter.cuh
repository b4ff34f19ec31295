// Reused tokens into a request's slots: K turned by its token's rotation, V as it is, both with
// their document's bias where there is one. One pass: each 16 bytes are read once and written once.
//
// Memory bound: n tokens of H heads of D + Dv elements are read and written, and n angles read.
#pragma once

#include "rotation.cuh"

namespace blend::cuda {

// Tokens in one pool (slots), or each at an address of its own: parts that lie anywhere, in device
// memory or in page-locked host memory.
struct Source {
  const char *k, *v;           // the pool
  const int64_t* slots;        // [n]
  int64_t k_stride, v_stride;  // bytes from slot to slot
  const int64_t* places;       // [4, n] or null: addresses of K and V in layer 0, bytes a layer
  int64_t layer;
};

struct Target {
  char *k, *v;
  const int64_t* slots;        // [n]
  int64_t k_stride, v_stride;  // bytes
  const uint8_t* runs;         // [n] or null: tokens that are computed, whose slots stay untouched
};

struct Angles {
  const float *cos, *sin;  // [n, rotary_dim / 2]
};

// Added in fp32 before the one rounding: to K after a rotation of its own (to the new position).
struct Bias {
  const float *k, *v;    // [groups, heads, dim], [groups, heads, v_dim]
  const int32_t* group;  // [n], -1: none
  Angles angles;
};

struct Heads {
  int heads, dim, v_dim, rotary_dim;
};

// Of a block, row y copies tokens blockIdx.x * blockDim.y + y and on, a grid further each; its
// threads share a token's units.
template <typename T, bool HALVES, bool BIASED>
__global__ void __launch_bounds__(256, BIASED && sizeof(T) == 1 ? 1 : 2)
    rotate_scatter_kernel(Source src, Target dst, Angles angles, Bias bias, Heads h, int64_t n) {
  constexpr int N = VECTOR<T>;
  const int64_t step = int64_t(gridDim.x) * blockDim.y;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.y + threadIdx.y; i < n; i += step) {
    if (dst.runs && dst.runs[i]) continue;
    const char *k_from, *v_from;
    if (src.places) {
      k_from = reinterpret_cast<const char*>(src.places[i] + src.layer * src.places[2 * n + i]);
      v_from = reinterpret_cast<const char*>(src.places[n + i] + src.layer * src.places[3 * n + i]);
    } else {
      k_from = src.k + src.slots[i] * src.k_stride;
      v_from = src.v + src.slots[i] * src.v_stride;
    }
    char* k_to = dst.k + dst.slots[i] * dst.k_stride;
    char* v_to = dst.v + dst.slots[i] * dst.v_stride;
    const int64_t group = BIASED ? bias.group[i] : -1;
    const float* k_bias = bias.k + group * h.heads * h.dim;
    const float* v_bias = bias.v + group * h.heads * h.v_dim;

    const int half = h.rotary_dim / 2, turned = half / N, rest = (h.dim - h.rotary_dim) / N;
    const int of_head = turned + rest, of_k = h.heads * of_head, of_v = h.heads * h.v_dim / N;
    for (int u = threadIdx.x; u < of_k + of_v; u += blockDim.x) {
      const int head = u / of_head, part = u % of_head;
      if (u < of_k && part < turned) {
        const Unit<HALVES, N> unit(part, half);
        const int first = head * h.dim + unit.first, second = head * h.dim + unit.second;
        float x[N], y[N], cos[N], sin[N];
        as_floats(load16_once(k_from + int64_t(first) * sizeof(T)), x, T());
        as_floats(load16_once(k_from + int64_t(second) * sizeof(T)), y, T());
        read_floats(angles.cos + i * half + N * part, cos);
        read_floats(angles.sin + i * half + N * part, sin);
        turn<HALVES>(x, y, cos, sin);
        if (BIASED && group >= 0) {
          float a[N], b[N];
          read_floats(k_bias + first, a);
          read_floats(k_bias + second, b);
          read_floats(bias.angles.cos + i * half + N * part, cos);
          read_floats(bias.angles.sin + i * half + N * part, sin);
          turn<HALVES>(a, b, cos, sin);
#pragma unroll
          for (int j = 0; j < N; ++j) x[j] = __fadd_rn(x[j], a[j]), y[j] = __fadd_rn(y[j], b[j]);
        }
        store16(k_to + int64_t(first) * sizeof(T), from_floats(x, T()));
        store16(k_to + int64_t(second) * sizeof(T), from_floats(y, T()));
      } else {
        const bool key = u < of_k;
        const int at = key ? head * h.dim + h.rotary_dim + N * (part - turned) : N * (u - of_k);
        uint4 moved = load16_once((key ? k_from : v_from) + int64_t(at) * sizeof(T));
        if (BIASED && group >= 0) {
          float x[N], a[N];
          as_floats(moved, x, T());
          read_floats((key ? k_bias : v_bias) + at, a);
#pragma unroll
          for (int j = 0; j < N; ++j) x[j] = __fadd_rn(x[j], a[j]);
          moved = from_floats(x, T());
        }
        store16((key ? k_to : v_to) + int64_t(at) * sizeof(T), moved);
      }
    }
  }
}

// blocks: at most so many, 0: as many as there is work for.
template <typename T>
void rotate_scatter(const Source& src, const Target& dst, const Angles& angles, const Bias& bias,
                    const Heads& heads, int64_t n, bool halves, int64_t blocks, Stream stream) {
  const int units = heads.heads * (heads.dim + heads.v_dim) / VECTOR<T>;
  int threads = 8;  // a token: a power of two, so that rows of a block fill whole warps
  while (threads < 64 && threads < units) threads *= 2;
  const int rows = 256 / threads;
  const int64_t all = (n + rows - 1) / rows;
  const Extent grid{static_cast<int>(blocks > 0 && blocks < all ? blocks : all)};
  const Extent block{threads, rows};
  const auto run = [&](auto kernel) {
    launch(kernel, grid, block, 0, stream, src, dst, angles, bias, heads, n);
  };
  if (bias.k) {
    halves ? run(rotate_scatter_kernel<T, true, true>) : run(rotate_scatter_kernel<T, false, true>);
  } else {
    halves ? run(rotate_scatter_kernel<T, true, false>)
           : run(rotate_scatter_kernel<T, false, false>);
  }
}

}  // namespace blend::cuda
