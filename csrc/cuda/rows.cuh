// What rows attend with, whatever computes it: their tiles, the end of a softmax, and how the parts
// of a row's keys are joined.
#pragma once

#include "tile.cuh"

namespace blend::cuda {

constexpr int ROW_TILE = 128;  // packed rows of a tile
constexpr float NEVER = -INFINITY;
constexpr float LN_2 = 0.6931471805599453f, LOG2_E = 1.4426950408889634f;
constexpr int LAST = 0x7fffffff;

// A tile: one request's rows and keys, of those of all, and the packed row of it where the tile
// begins. Made on the host; int64 in this order.
struct Tile {
  int64_t first_row, rows, first_key, keys, begin;
};

struct Rows {
  const void* q;               // [rows, heads, dim]
  Head k, v;                   // slots: of all requests' keys
  void* out;                   // [rows, heads, v.dim]; null: there are parts
  float* lse;                  // [rows, heads], natural; null: not wanted
  float *part_out, *part_lse;  // [parts, rows, heads, v.dim]; [parts, rows, heads], base 2
  const int64_t* tiles;        // Tile each
  const int64_t* row_pos;      // [rows]
  const int64_t* key_pos;      // [keys] or null: key j of a request is at first_pos + j
  const float* sinks;          // [heads] or null
  int64_t q_row, q_head;       // strides in elements
  int64_t first_pos, window;   // window < 0: none
  int rows, heads, group, dim;
  int first_part, parts;  // of this launch
  float scale_log2;       // softmax scale x log2 e; with a cap: scale / cap
  float cap_log2;         // cap x log2 e; 0: none
};

__device__ __forceinline__ int clamped(int64_t x, int64_t low, int64_t high) {
  return static_cast<int>(max(low, min(x, high)));
}

// What a block's packed rows see, those of a tile's `count` from `first` on, and its part of that,
// in steps of KEYS; `group` packed rows are one row. Positions are indices of keys where these are
// one run.
template <int ROWS, int KEYS>
struct Seen {
  int64_t origin;
  bool windowed, listed;
  int part, begin, end;  // keys of the tile
  int steps;
  int inside_from, inside_to;  // of steps that begin between these every row sees all

  __device__ __forceinline__ Seen(const Rows& p, const Tile& tile, int first, int count,
                                  int group) {
    const int64_t* const pos = p.row_pos + tile.first_row;
    const int keys = tile.keys;
    origin = p.key_pos ? 0 : p.first_pos;
    windowed = p.window >= 0, listed = p.key_pos != nullptr;
    const int lowest = clamped(pos[first / group] - origin, -1, LAST - 1);
    const int highest = clamped(pos[(min(first + ROWS, count) - 1) / group] - origin, -1, LAST - 1);
    const int last = listed ? keys : min(highest + 1, keys);
    const int begin_all =
        listed || !windowed ? 0 : clamped(lowest - p.window, 0, keys) / KEYS * KEYS;
    const int steps_all = max(0, (last - begin_all + KEYS - 1) / KEYS);
    const int each = (steps_all + p.parts - 1) / p.parts;
    part = blockIdx.z;
    begin = begin_all + min(part * each, steps_all) * KEYS;
    end = min(last, begin_all + min((part + 1) * each, steps_all) * KEYS);
    steps = max(0, (end - begin + KEYS - 1) / KEYS);
    inside_from = windowed ? clamped(highest - p.window, 0, LAST) : 0;
    inside_to = listed ? -1 : min(lowest, end - 1) - (KEYS - 1);
  }
};

// What ends a softmax whose exponentials, base 2 and with `top` taken off, add up to `total`:
// what multiplies the weighted sum of values, and the log-sum-exp, base 2.
struct Softmax {
  float inverse, lse;
  __device__ __forceinline__ Softmax(float top, float total, const float* sink) {
    const bool some = total > 0.0f;
    const float more = sink ? *sink * LOG2_E : NEVER, peak = some ? fmaxf(top, more) : more;
    const float all = some ? total * power2(top - peak) + power2(more - peak) : 1.0f;
    inverse = some ? power2(top - peak) / all : 0.0f;
    lse = peak + log2f(all);
  }
};

// A warp a (row, head): the first `parts` parts. What saw no key has nothing in part_out.
template <typename T>
__global__ void __launch_bounds__(128) join_parts_kernel(Rows p) {
  const int64_t cells = int64_t(p.rows) * p.heads;
  const int64_t cell = int64_t(blockIdx.x) * 4 + threadIdx.x / 32;
  if (cell >= cells) return;
  float top = NEVER, total = 0.0f;
  for (int i = 0; i < p.parts; ++i) top = fmaxf(top, p.part_lse[i * cells + cell]);
  for (int i = 0; i < p.parts && top > NEVER; ++i) {
    total += power2(p.part_lse[i * cells + cell] - top);
  }
  const Softmax done(top, total, p.sinks ? p.sinks + cell % p.heads : nullptr);
  if (threadIdx.x % 32 == 0 && p.lse) p.lse[cell] = done.lse * LN_2;
  for (int d = 2 * (threadIdx.x % 32); d < p.v.dim; d += 64) {
    float a = 0.0f, b = 0.0f;
    for (int i = 0; i < p.parts; ++i) {
      const float lse = p.part_lse[i * cells + cell];
      if (lse == NEVER) continue;
      const float weight = power2(lse - top), *from = p.part_out + (i * cells + cell) * p.v.dim + d;
      a += weight * from[0], b += weight * from[1];
    }
    static_cast<uint32_t*>(p.out)[(cell * p.v.dim + d) / 2] =
        pack(a * done.inverse, b * done.inverse, T());
  }
}

template <typename T>
void join_parts(const Rows& p, Stream stream) {
  const int64_t cells = int64_t(p.rows) * p.heads;
  launch(join_parts_kernel<T>, Extent{static_cast<int>((cells + 3) / 4)}, Extent{128}, 0, stream,
         p);
}

}  // namespace blend::cuda
