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

// What is known of a token before its KV is read.
struct Token {
  int64_t k, v;  // its slot, or the addresses of its K and V
  int64_t to;    // slot
  int group;     // -1: none
  bool stays;    // its slot stays as it is
};

template <bool BIASED>
__device__ __forceinline__ Token token(const Source& src, const Target& dst, const Bias& bias,
                                       int n, int i) {
  Token out{};
  if (i >= n) return out;
  if (src.places) {
    out.k = src.places[i] + src.layer * src.places[2 * int64_t(n) + i];
    out.v = src.places[int64_t(n) + i] + src.layer * src.places[3 * int64_t(n) + i];
  } else {
    out.k = src.slots[i];
  }
  out.to = dst.slots[i];
  out.group = BIASED ? bias.group[i] : -1;
  out.stays = dst.runs && dst.runs[i];
  return out;
}

// 32 bytes of K that are turned, and what is added to them.
template <typename T, bool HALVES, bool BIASED>
struct Turned {
  static constexpr int N = VECTOR<T>;
  int first, second;
  uint4 x_raw, y_raw;
  float cos[N], sin[N], a[N], b[N], a_cos[N], a_sin[N];

  // angle: of the token's first.
  __device__ __forceinline__ void load(const char* k, const Angles& angles, const Bias& bias,
                                       const Heads& h, int64_t angle, int group, int u) {
    const int half = h.rotary_dim / 2, turned = half / N, head = u / turned;
    const int part = u - head * turned;
    const Unit<HALVES, N> unit(part, half);
    first = head * h.dim + unit.first, second = head * h.dim + unit.second;
    x_raw = load16_once(k + int64_t(first) * sizeof(T));
    y_raw = load16_once(k + int64_t(second) * sizeof(T));
    angle += N * part;
    read_floats(angles.cos + angle, cos), read_floats(angles.sin + angle, sin);
    if (BIASED && group >= 0) {
      const float* const from = bias.k + int64_t(group) * h.heads * h.dim;
      read_floats(from + first, a), read_floats(from + second, b);
      read_floats(bias.angles.cos + angle, a_cos), read_floats(bias.angles.sin + angle, a_sin);
    }
  }

  __device__ __forceinline__ void store(char* k, int group) {
    float x[N], y[N];
    as_floats(x_raw, x, T()), as_floats(y_raw, y, T());
    turn<HALVES>(x, y, cos, sin);
    if (BIASED && group >= 0) {
      turn<HALVES>(a, b, a_cos, a_sin);
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] = __fadd_rn(x[i], a[i]), y[i] = __fadd_rn(y[i], b[i]);
    }
    store16(k + int64_t(first) * sizeof(T), from_floats(x, T()));
    store16(k + int64_t(second) * sizeof(T), from_floats(y, T()));
  }
};

// 16 bytes that are not turned: of K beyond its rotation, then of V.
template <typename T, bool BIASED>
struct Plain {
  static constexpr int N = VECTOR<T>;
  bool key;
  int at;
  uint4 raw;
  float a[N];

  __device__ __forceinline__ void load(const char* k, const char* v, const Bias& bias,
                                       const Heads& h, int group, int u) {
    const int rest = (h.dim - h.rotary_dim) / N, of_rest = h.heads * rest;
    key = u < of_rest;
    at = key ? u / rest * h.dim + h.rotary_dim + N * (u % rest) : N * (u - of_rest);
    raw = load16_once((key ? k : v) + int64_t(at) * sizeof(T));
    if (BIASED && group >= 0) {
      read_floats((key ? bias.k : bias.v) + int64_t(group) * h.heads * (key ? h.dim : h.v_dim) + at,
                  a);
    }
  }

  __device__ __forceinline__ void store(char* k, char* v, int group) {
    if (BIASED && group >= 0) {
      float x[N];
      as_floats(raw, x, T());
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] = __fadd_rn(x[i], a[i]);
      raw = from_floats(x, T());
    }
    store16((key ? k : v) + int64_t(at) * sizeof(T), raw);
  }
};

// Of a block, row y copies tokens blockIdx.x * blockDim.y + y and on, a grid further each; its
// threads share a token's units. All that a thread reads of a token's UNITS units of K and of as
// many bytes beside them is on its way before the first is used.
template <typename T, bool HALVES, bool BIASED, int UNITS, int THREADS, int BLOCKS>
__global__ void __launch_bounds__(THREADS, BLOCKS)
    rotate_scatter_kernel(Source src, Target dst, Angles angles, Bias bias, Heads h, int n) {
  constexpr int N = VECTOR<T>, PLAIN = 2 * UNITS;
  const int half = h.rotary_dim / 2, pairs = h.heads * (half / N);
  const int others = h.heads * ((h.dim - h.rotary_dim) / N + h.v_dim / N);
  for (int i = blockIdx.x * blockDim.y + threadIdx.y; i < n; i += gridDim.x * blockDim.y) {
    const Token at = token<BIASED>(src, dst, bias, n, i);
    if (at.stays) continue;
    const char* const k_from =
        src.places ? reinterpret_cast<const char*>(at.k) : src.k + at.k * src.k_stride;
    const char* const v_from =
        src.places ? reinterpret_cast<const char*>(at.v) : src.v + at.k * src.v_stride;
    // u: the first unit that is turned; p: the first of the others, of which there are two for one.
    for (int u = threadIdx.x, p = u; u < pairs || p < others;
         u += UNITS * blockDim.x, p += PLAIN * blockDim.x) {
      Turned<T, HALVES, BIASED> turned[UNITS];
      Plain<T, BIASED> plain[PLAIN];
#pragma unroll
      for (int j = 0; j < UNITS; ++j) {
        const int unit = u + j * blockDim.x;
        if (unit < pairs) {
          turned[j].load(k_from, angles, bias, h, int64_t(i) * half, at.group, unit);
        }
      }
#pragma unroll
      for (int j = 0; j < PLAIN; ++j) {
        const int unit = p + j * blockDim.x;
        if (unit < others) plain[j].load(k_from, v_from, bias, h, at.group, unit);
      }
      char* const k_to = dst.k + at.to * dst.k_stride;
      char* const v_to = dst.v + at.to * dst.v_stride;
#pragma unroll
      for (int j = 0; j < PLAIN; ++j) {
        if (int(p + j * blockDim.x) < others) plain[j].store(k_to, v_to, at.group);
      }
#pragma unroll
      for (int j = 0; j < UNITS; ++j) {
        if (int(u + j * blockDim.x) < pairs) turned[j].store(k_to, at.group);
      }
    }
  }
}

// blocks: at most so many, 0: as many as there is work for. UNITS, THREADS, BLOCKS: of a thread, of
// a block, of a multiprocessor.
template <typename T, bool HALVES, bool BIASED, int UNITS, int THREADS, int BLOCKS>
void rotate_scatter_by(const Source& src, const Target& dst, const Angles& angles, const Bias& bias,
                       const Heads& heads, int64_t n, int64_t blocks, Stream stream) {
  const int units = heads.heads * (heads.dim + heads.v_dim) / VECTOR<T>;
  int threads = 8;  // a token: a power of two, so that rows of a block fill whole warps
  while (threads < 64 && 4 * UNITS * threads < units) threads *= 2;
  const int rows = THREADS / threads;
  const int64_t all = (n + rows - 1) / rows;
  const Extent grid{static_cast<int>(blocks > 0 && blocks < all ? blocks : all)};
  launch(rotate_scatter_kernel<T, HALVES, BIASED, UNITS, THREADS, BLOCKS>, grid,
         Extent{threads, rows}, 0, stream, src, dst, angles, bias, heads, static_cast<int>(n));
}

// n: below 2^31 less what one grid takes.
template <typename T>
void rotate_scatter(const Source& src, const Target& dst, const Angles& angles, const Bias& bias,
                    const Heads& heads, int64_t n, bool halves, int64_t blocks, Stream stream) {
  constexpr int FEW = sizeof(T) == 1 ? 4 : 7, FEWER = sizeof(T) == 1 ? 2 : 4;
  const auto run = [&](auto by) { by(src, dst, angles, bias, heads, n, blocks, stream); };
  if (bias.k) {
    run(halves ? rotate_scatter_by<T, true, true, 1, 128, FEWER>
               : rotate_scatter_by<T, false, true, 1, 128, FEWER>);
  } else {
    run(halves ? rotate_scatter_by<T, true, false, 1, 128, FEW>
               : rotate_scatter_by<T, false, false, 1, 128, FEW>);
  }
}

}  // namespace blend::cuda
