// Attention of scattered rows by true position over the paged pool: a row at position p sees the
// keys at positions <= p and, under a window w, >= p - w. No mask is built. A request's rows ascend
// in position, hence a tile of them sees a run of keys, whose bounds are read from the device; only
// in the steps at its ends are positions compared.
//
// A block takes a tile (64 packed rows: row x query head of one key head), a key head, and one part
// of the tile's keys; the tiles of all requests of a batch are one launch. Scores stay in
// registers. Each part leaves its state, and join_parts_kernel joins them in a fixed order.
//
// For R rows over S keys, half of which are seen: 2 R S heads D operations of the tensor cores.
#pragma once

#include "tile.cuh"

namespace blend::cuda {

constexpr int ROW_WARPS = 4;
constexpr int ROW_TILE = 16 * ROW_WARPS;  // packed rows of a block
constexpr float NEVER = -INFINITY;
constexpr float LN_2 = 0.6931471805599453f, LOG2_E = 1.4426950408889634f;
constexpr int LAST = 0x7fffffff;

// Keys of a step: two stages of K and V are 32 to 64 KiB.
template <int D>
constexpr int ROW_KEYS = D > 128 ? 32 : 64;

// Do the queries stay in registers? Long heads leave no room for them.
template <int D>
constexpr bool KEEPS_QUERIES = D <= 128;

// Blocks for which a multiprocessor's registers are dealt out: three of heads of 128 would spill.
template <int D>
constexpr int ROW_BLOCKS = D <= 64 ? 3 : 2;

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

template <typename T, int D>
__global__ void __launch_bounds__(32 * ROW_WARPS, ROW_BLOCKS<D>) row_attention_kernel(Rows p) {
  constexpr int KEYS = ROW_KEYS<D>;
  BLEND_SHARED(raw);
  // Two stages of K, two of V. Queries that move on to registers pass through the first.
  T* const stages = reinterpret_cast<T*>(raw);
  T* const queries = KEEPS_QUERIES<D> ? stages : stages + 4 * KEYS * D;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int head = blockIdx.y;
  const Tile& tile = *reinterpret_cast<const Tile*>(p.tiles + 5 * int64_t(blockIdx.x));
  const int count = tile.rows * p.group, first = tile.begin, keys = tile.keys;
  const int64_t first_row = tile.first_row, first_key = tile.first_key;

  // Positions as indices of keys, where these are one: what the tile's rows see, and this part.
  const int64_t origin = p.key_pos ? 0 : p.first_pos;
  const int64_t* const pos = p.row_pos + first_row;
  const int lowest = clamped(pos[first / p.group] - origin, -1, LAST - 1);
  const int highest =
      clamped(pos[(min(first + ROW_TILE, count) - 1) / p.group] - origin, -1, LAST - 1);
  const bool windowed = p.window >= 0, listed = p.key_pos != nullptr;
  const int last = listed ? keys : min(highest + 1, keys);
  const int begin_all = listed || !windowed ? 0 : clamped(lowest - p.window, 0, keys) / KEYS * KEYS;
  const int steps_all = max(0, (last - begin_all + KEYS - 1) / KEYS);
  const int each = (steps_all + p.parts - 1) / p.parts, part = blockIdx.z;
  const int begin = begin_all + min(part * each, steps_all) * KEYS;
  const int end = min(last, begin_all + min((part + 1) * each, steps_all) * KEYS);
  const int steps = max(0, (end - begin + KEYS - 1) / KEYS);
  // Of steps that begin at these keys and between them every row sees all.
  const int inside_from = windowed ? clamped(highest - p.window, 0, LAST) : 0;
  const int inside_to = listed ? -1 : min(lowest, end - 1) - (KEYS - 1);

  for (int u = threadIdx.x; u < ROW_TILE * (D / 8); u += blockDim.x) {
    const int row = u / (D / 8), piece = u % (D / 8), r = first + row;
    const bool there = r < count && 8 * piece < p.dim;
    const int64_t at = there ? (first_row + r / p.group) * p.q_row +
                                   (head * p.group + r % p.group) * p.q_head + 8 * piece
                             : 0;
    copy16_async(queries + place<D>(row, piece), static_cast<const T*>(p.q) + at, there);
  }
  copy_commit();
  copy_wait<0>();
  __syncthreads();
  const auto load_queries = [&](uint32_t (&a)[4], int d) {
    load_matrices(a, queries + place<D>(warp * 16 + lane % 16, 2 * d + lane / 16));
  };
  uint32_t kept[KEEPS_QUERIES<D> ? D / 16 : 1][4];
  if constexpr (KEEPS_QUERIES<D>) {
#pragma unroll
    for (int d = 0; d < D / 16; ++d) load_queries(kept[d], d);
  }
  __syncthreads();  // before the stages are filled

  // This lane's rows are g and g + 8 of the warp's sixteen.
  const bool idle = first + warp * 16 >= count;
  int low[2], high[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = first + warp * 16 + g + 8 * half;
    const int64_t at = r < count ? pos[r / p.group] - origin : 0;
    low[half] = windowed ? clamped(at - p.window, 0, LAST) : 0;
    high[half] = clamped(at, -1, listed ? LAST - 1 : keys - 1);
  }

  float o[D / 8][4] = {}, top[2] = {NEVER, NEVER}, total[2] = {};
  const auto stage = [&](const Head& tokens, int which, int from) {
    stage_tokens<T, D, KEYS>(tokens, stages + which * KEYS * D, first_key + from, first_key + end,
                             head);
  };
  if (steps > 0) stage(p.k, 0, begin), stage(p.v, 2, begin);
  for (int step = 0; step < steps; ++step) {
    const int now = step % 2, next = 1 - now, from = begin + step * KEYS;
    if (step + 1 < steps) {
      stage(p.k, next, from + KEYS), stage(p.v, 2 + next, from + KEYS);
    } else {
      copy_commit(), copy_commit();  // as many groups in flight as before
    }
    copy_wait<3>();  // all but the last three: this step's K is there
    __syncthreads();
    uint32_t weights[KEYS / 16][4];  // the second product's left side
    if (!idle) {
      const T* k = stages + now * KEYS * D;
      float s[KEYS / 8][4] = {};
#pragma unroll
      for (int d = 0; d < D / 16; ++d) {
        uint32_t mine[4];
        if constexpr (!KEEPS_QUERIES<D>) load_queries(mine, d);
        const uint32_t (&a)[4] = KEEPS_QUERIES<D> ? kept[KEEPS_QUERIES<D> ? d : 0] : mine;
#pragma unroll
        for (int n = 0; n < KEYS / 16; ++n) {
          uint32_t b[4];
          load_matrices(b, k + place<D>(n * 16 + lane / 16 * 8 + lane % 8, 2 * d + lane / 8 % 2));
          multiply<T>(s[2 * n], a, b[0], b[1]);
          multiply<T>(s[2 * n + 1], a, b[2], b[3]);
        }
      }
      const bool inside = from >= inside_from && from <= inside_to;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float peak = top[half];
#pragma unroll
        for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            float x = s[n][2 * half + c] * p.scale_log2;
            if (p.cap_log2 > 0.0f) x = p.cap_log2 * tanhf(x);
            if (!inside) {
              int at = from + n * 8 + 2 * t + c;
              if (listed) at = at < end ? clamped(p.key_pos[first_key + at], 0, LAST) : LAST;
              if (at > high[half] || at < low[half]) x = NEVER;
            }
            s[n][2 * half + c] = x;
            peak = fmaxf(peak, x);
          }
        }
        peak = fmaxf(peak, __shfl_xor_sync(WARP_MASK, peak, 1));
        peak = fmaxf(peak, __shfl_xor_sync(WARP_MASK, peak, 2));
        const float base = peak == NEVER ? 0.0f : peak, factor = power2(top[half] - base);
        float sum = 0.0f;
#pragma unroll
        for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const float e = power2(s[n][2 * half + c] - base);
            s[n][2 * half + c] = e;
            sum += e;
          }
        }
        top[half] = peak;
        total[half] = total[half] * factor + sum;
#pragma unroll
        for (int d = 0; d < D / 8; ++d) o[d][2 * half] *= factor, o[d][2 * half + 1] *= factor;
      }
      // Two tiles of eight keys, packed, lie as a left side of sixteen does.
#pragma unroll
      for (int n = 0; n < KEYS / 16; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* two = s[2 * n + i / 2] + i % 2 * 2;
          weights[n][i] = pack(two[0], two[1], T());
        }
      }
    }
    copy_wait<2>();  // this step's V
    __syncthreads();
    if (!idle) {
      const T* v = stages + (2 + now) * KEYS * D;
#pragma unroll
      for (int n = 0; n < KEYS / 16; ++n) {
#pragma unroll
        for (int d = 0; d < D / 16; ++d) {
          uint32_t b[4];
          load_matrices_turned(b, v + place<D>(n * 16 + lane % 16, 2 * d + lane / 16));
          multiply<T>(o[2 * d], weights[n], b[0], b[1]);
          multiply<T>(o[2 * d + 1], weights[n], b[2], b[3]);
        }
      }
    }
    __syncthreads();  // before this stage is filled again
  }
  copy_wait<0>();
#pragma unroll
  for (int half = 0; half < 2; ++half) {  // four lanes hold parts of one row's sum
    total[half] += __shfl_xor_sync(WARP_MASK, total[half], 1);
    total[half] += __shfl_xor_sync(WARP_MASK, total[half], 2);
    const int r = first + warp * 16 + g + 8 * half;
    if (r >= count) continue;
    const int64_t cell = (first_row + r / p.group) * p.heads + head * p.group + r % p.group;
    const bool whole = p.out != nullptr;
    const float* sink = whole && p.sinks ? p.sinks + cell % p.heads : nullptr;
    const Softmax done(top[half], total[half], sink);
    const int64_t cells = int64_t(p.rows) * p.heads;
    const int64_t at = whole ? cell : (p.first_part + part) * cells + cell;
    if (t == 0 && !whole) p.part_lse[at] = done.lse;
    if (t == 0 && whole && p.lse) p.lse[at] = done.lse * LN_2;
    if (!whole && steps == 0) continue;  // nobody reads it
#pragma unroll
    for (int d = 0; d < D / 8; ++d) {
      const int column = 8 * d + 2 * t;
      const float a = o[d][2 * half] * done.inverse, b = o[d][2 * half + 1] * done.inverse;
      if (column >= p.v.dim) continue;
      if (whole) {
        static_cast<uint32_t*>(p.out)[(at * p.v.dim + column) / 2] = pack(a, b, T());
      } else {
        p.part_out[at * p.v.dim + column] = a, p.part_out[at * p.v.dim + column + 1] = b;
      }
    }
  }
}

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

template <typename T, int D>
void row_attention(const Rows& p, int tiles, Stream stream) {
  const Extent grid{tiles, p.heads / p.group, p.parts};
  const size_t queries = KEEPS_QUERIES<D> ? 0 : ROW_TILE;
  const size_t shared = (4 * ROW_KEYS<D> + queries) * D * sizeof(T);
  launch(row_attention_kernel<T, D>, grid, Extent{32 * ROW_WARPS}, shared, stream, p);
}

template <typename T>
void join_parts(const Rows& p, Stream stream) {
  const int64_t cells = int64_t(p.rows) * p.heads;
  launch(join_parts_kernel<T>, Extent{static_cast<int>((cells + 3) / 4)}, Extent{128}, 0, stream,
         p);
}

}  // namespace blend::cuda
