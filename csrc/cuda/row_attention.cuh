// Attention of scattered rows by true position over the paged pool: a row at position p sees the
// keys at positions <= p and, under a window w, >= p - w. No mask is built. A request's rows ascend
// in position, hence a tile of them sees a run of keys, whose bounds are read from the device; only
// in the steps at its ends are positions compared.
//
// A block takes a tile (128 packed rows: row x query head of one key head; long heads half of it),
// a key head, and one part of the tile's keys; the tiles of all requests of a batch are one launch.
// Keys and values arrive a step ahead, and a step has one barrier. Scores stay in registers.
// Each part leaves its state, and join_parts_kernel joins them in a fixed order.
//
// For R rows over S keys, half of which are seen: 2 R S heads D operations of the tensor cores.
#pragma once

#include "rows.cuh"

namespace blend::cuda {

// How a block goes about it. WARPS: of 16 x HIGH packed rows each: what a warp reads of keys and
// values serves them all. KEYS: of a step. STAGES: steps whose keys and values have room in shared
// memory. BLOCKS: for which a multiprocessor's registers are dealt out. QUERIES: do they stay in
// registers?
template <int WARPS_, int HIGH_, int KEYS_, int STAGES_, int BLOCKS_, bool QUERIES_>
struct RowPlan {
  static constexpr int WARPS = WARPS_, HIGH = HIGH_, KEYS = KEYS_;
  static constexpr int STAGES = STAGES_, BLOCKS = BLOCKS_;
  static constexpr bool QUERIES = QUERIES_;
  static constexpr int THREADS = 32 * WARPS, ROWS = 16 * HIGH * WARPS;  // of a block
  static_assert(ROW_TILE % ROWS == 0);
};

// The fastest of eleven on an H100, heads of 128, 16,000 and 32,000 keys. Shared memory is 96 KiB
// at most: what each multiprocessor since Ampere gives a block. Products by wgmma were 3 and 8 %
// faster, and wrong for heads of 64: nvcc 13.0 gave the queries' registers away within the loop.
template <int D>
using RowPlanOf = std::conditional_t<
    (D > 128), RowPlan<4, 1, 32, 2, 2, false>,
    std::conditional_t<(D > 64), RowPlan<4, 2, 64, 2, 2, false>, RowPlan<4, 2, 64, 2, 2, true>>>;

__device__ BLEND_APART float cap(float x, float scale_log2, float cap_log2) {
  return cap_log2 * tanhf(x * scale_log2);
}

template <typename T, int D, typename Plan>
__global__ void __launch_bounds__(Plan::THREADS, Plan::BLOCKS) row_attention_kernel(Rows p) {
  constexpr int KEYS = Plan::KEYS, STAGES = Plan::STAGES, ROWS = Plan::ROWS;
  constexpr int HALVES = ROW_TILE / ROWS;  // blocks of a tile
  constexpr int HIGH = Plan::HIGH;
  BLEND_SHARED(raw);
  // Each stage: K, then V. Queries that move on to registers pass through the first.
  T* const stages = reinterpret_cast<T*>(raw);
  T* const queries = Plan::QUERIES ? stages : stages + STAGES * 2 * KEYS * D;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int head = blockIdx.x / HALVES;
  const Tile& tile = *reinterpret_cast<const Tile*>(p.tiles + 5 * int64_t(blockIdx.y));
  const int count = tile.rows * p.group, keys = tile.keys;
  const int first = tile.begin + blockIdx.x % HALVES * ROWS;
  if (first >= count) return;
  const int64_t first_row = tile.first_row, first_key = tile.first_key;

  const int64_t* const pos = p.row_pos + first_row;
  const Seen<ROWS, KEYS> view(p, tile, first, count, p.group);

  for (int u = threadIdx.x; u < ROWS * (D / 8); u += Plan::THREADS) {
    const int row = u / (D / 8), piece = u % (D / 8), r = first + row;
    const bool there = r < count && 8 * piece < p.dim;
    const int64_t at = there ? (first_row + r / p.group) * p.q_row +
                                   (head * p.group + r % p.group) * p.q_head + 8 * piece
                             : 0;
    copy16_async(queries + place<D>(row, piece), static_cast<const T*>(p.q) + at, there);
  }
  copy_commit();
  Stager<T, D, KEYS, Plan::THREADS> stager;
  const auto look_up = [&](int step) {
    stager.look_up(p.k, first_key + view.begin + int64_t(step) * KEYS, first_key + view.end);
  };
  look_up(0);
  copy_wait<0>();
  __syncthreads();
  const int warp_row = warp * 16 * HIGH;
  // Where this lane's rows of matrices lie: of sixteen rows, at columns 16 d. Queries and values go
  // by lane % 16, keys by eights.
  const Columns<D> of_rows(lane % 16, lane / 16);
  const Columns<D> of_keys(lane / 16 * 8 + lane % 8, lane / 8 % 2);
  const auto load_queries = [&](uint32_t (&a)[HIGH][4], int d) {
#pragma unroll
    for (int m = 0; m < HIGH; ++m) {
      load_matrices(a[m], queries + (warp_row + 16 * m) * D + of_rows[d]);
    }
  };
  uint32_t kept[Plan::QUERIES ? D / 16 : 1][HIGH][4];
  if constexpr (Plan::QUERIES) {
#pragma unroll
    for (int d = 0; d < D / 16; ++d) load_queries(kept[d], d);
  }
  __syncthreads();  // before the stages are filled

  // This lane's rows are g and g + 8 of each sixteen of the warp's.
  const bool idle = first + warp_row >= count;
  int low[2 * HIGH], high[2 * HIGH];
#pragma unroll
  for (int half = 0; half < 2 * HIGH; ++half) {
    const int r = first + warp_row + g + 8 * half;
    const int64_t at = r < count ? pos[r / p.group] - view.origin : 0;
    low[half] = view.windowed ? clamped(at - p.window, 0, LAST) : 0;
    high[half] = clamped(at, -1, view.listed ? LAST - 1 : keys - 1);
  }

  // What multiplies a score in the exponent: with a cap it is done already.
  const float factor = p.cap_log2 > 0.0f ? 1.0f : p.scale_log2;
  float o[HIGH][D / 8][4] = {}, top[2 * HIGH], total[2 * HIGH] = {};
#pragma unroll
  for (float& x : top) x = NEVER;
  const auto stage_of = [&](int step) { return stages + step % STAGES * 2 * KEYS * D; };
  const auto stage = [&](int step) {  // its slots are looked up; those of the next one come
    if (step < view.steps) {
      T* const to = stage_of(step);
      stager.copy(p.k, to, head);
      stager.copy(p.v, to + KEYS * D, head);
      if (step + 1 < view.steps) look_up(step + 1);
    }
    copy_commit();  // an empty one too: as many groups in flight
  };
#pragma unroll
  for (int step = 0; step < STAGES - 1; ++step) stage(step);
  for (int step = 0; step < view.steps; ++step) {
    copy_wait<STAGES - 2>();
    __syncthreads();  // this step's keys are there, and all are done with those of the one before
    stage(step + STAGES - 1);
    if (idle) continue;
    const int from = view.begin + step * KEYS;
    const T *k = stage_of(step), *v = k + KEYS * D;
    float s[HIGH][KEYS / 8][4] = {};
#pragma unroll
    for (int d = 0; d < D / 16; ++d) {
      uint32_t mine[HIGH][4];
      if constexpr (!Plan::QUERIES) load_queries(mine, d);
      const uint32_t (&a)[HIGH][4] = Plan::QUERIES ? kept[Plan::QUERIES ? d : 0] : mine;
#pragma unroll
      for (int n = 0; n < KEYS / 16; ++n) {
        uint32_t b[4];
        load_matrices(b, k + n * 16 * D + of_keys[d]);
#pragma unroll
        for (int m = 0; m < HIGH; ++m) {
          multiply<T>(s[m][2 * n], a[m], b[0], b[1]);
          multiply<T>(s[m][2 * n + 1], a[m], b[2], b[3]);
        }
      }
    }
    // The steps that everyone takes have no branches: what is rare stands before them as a whole.
    if (p.cap_log2 > 0.0f) {
#pragma unroll
      for (int n = 0; n < HIGH * KEYS / 8; ++n) {
#pragma unroll
        for (float& x : s[n / (KEYS / 8)][n % (KEYS / 8)]) x = cap(x, p.scale_log2, p.cap_log2);
      }
    }
    if (from < view.inside_from || from > view.inside_to) {
#pragma unroll
      for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          int at = from + n * 8 + 2 * t + c;
          if (view.listed) at = at < view.end ? clamped(p.key_pos[first_key + at], 0, LAST) : LAST;
#pragma unroll
          for (int half = 0; half < 2 * HIGH; ++half) {
            const bool seen = at <= high[half] && at >= low[half];
            float& x = s[half / 2][n][half % 2 * 2 + c];
            x = seen ? x : NEVER;
          }
        }
      }
    }
    // Several chains of operations side by side: by row and column.
    float peak[2 * HIGH][2], sum[2 * HIGH][2], base[2 * HIGH], shrink[2 * HIGH];
#pragma unroll
    for (int half = 0; half < 2 * HIGH; ++half) peak[half][0] = peak[half][1] = NEVER;
#pragma unroll
    for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
      for (int half = 0; half < 2 * HIGH; ++half) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          peak[half][c] = fmaxf(peak[half][c], s[half / 2][n][half % 2 * 2 + c]);
        }
      }
    }
    bool shrinks = false;
#pragma unroll
    for (int half = 0; half < 2 * HIGH; ++half) {
      float all = fmaxf(peak[half][0], peak[half][1]);
      all = fmaxf(all, __shfl_xor_sync(WARP_MASK, all, 1));
      all = fmaxf(all, __shfl_xor_sync(WARP_MASK, all, 2));
      all = all == NEVER ? top[half] : fmaxf(top[half], all * factor);
      base[half] = all == NEVER ? 0.0f : all;
      shrink[half] = power2(top[half] - base[half]);
      shrinks |= shrink[half] != 1.0f;
      top[half] = all;
      sum[half][0] = sum[half][1] = 0.0f;
    }
#pragma unroll
    for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
      for (int half = 0; half < 2 * HIGH; ++half) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& x = s[half / 2][n][half % 2 * 2 + c];
          x = power2(fmaf(x, factor, -base[half]));
          sum[half][c] += x;
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2 * HIGH; ++half) {
      total[half] = total[half] * shrink[half] + (sum[half][0] + sum[half][1]);
    }
    // Most steps meet no higher score, and then nothing shrinks.
    if (__ballot_sync(WARP_MASK, shrinks)) {
#pragma unroll
      for (int d = 0; d < D / 8; ++d) {
#pragma unroll
        for (int half = 0; half < 2 * HIGH; ++half) {
          o[half / 2][d][half % 2 * 2] *= shrink[half];
          o[half / 2][d][half % 2 * 2 + 1] *= shrink[half];
        }
      }
    }
#pragma unroll
    for (int n = 0; n < KEYS / 16; ++n) {
      // Two tiles of eight keys, packed, lie as a left side of sixteen does.
      uint32_t weights[HIGH][4];
#pragma unroll
      for (int m = 0; m < HIGH; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* two = s[m][2 * n + i / 2] + i % 2 * 2;
          weights[m][i] = pack(two[0], two[1], T());
        }
      }
#pragma unroll
      for (int d = 0; d < D / 16; ++d) {
        uint32_t b[4];
        load_matrices_turned(b, v + n * 16 * D + of_rows[d]);
#pragma unroll
        for (int m = 0; m < HIGH; ++m) {
          multiply<T>(o[m][2 * d], weights[m], b[0], b[1]);
          multiply<T>(o[m][2 * d + 1], weights[m], b[2], b[3]);
        }
      }
    }
  }
  copy_wait<0>();
#pragma unroll
  for (int half = 0; half < 2 * HIGH; ++half) {  // four lanes hold parts of one row's sum
    total[half] += __shfl_xor_sync(WARP_MASK, total[half], 1);
    total[half] += __shfl_xor_sync(WARP_MASK, total[half], 2);
    const int r = first + warp_row + g + 8 * half;
    if (r >= count) continue;
    const int64_t cell = (first_row + r / p.group) * p.heads + head * p.group + r % p.group;
    const bool whole = p.out != nullptr;
    const float* sink = whole && p.sinks ? p.sinks + cell % p.heads : nullptr;
    const Softmax done(top[half], total[half], sink);
    const int64_t cells = int64_t(p.rows) * p.heads;
    const int64_t at = whole ? cell : (p.first_part + view.part) * cells + cell;
    if (t == 0 && !whole) p.part_lse[at] = done.lse;
    if (t == 0 && whole && p.lse) p.lse[at] = done.lse * LN_2;
    if (!whole && view.steps == 0) continue;  // nobody reads it
#pragma unroll
    for (int d = 0; d < D / 8; ++d) {
      const int column = 8 * d + 2 * t;
      if (column >= p.v.dim) continue;
      const float* two = o[half / 2][d] + half % 2 * 2;
      const float a = two[0] * done.inverse, b = two[1] * done.inverse;
      if (whole) {
        static_cast<uint32_t*>(p.out)[(at * p.v.dim + column) / 2] = pack(a, b, T());
      } else {
        p.part_out[at * p.v.dim + column] = a, p.part_out[at * p.v.dim + column + 1] = b;
      }
    }
  }
}

template <typename T, int D, typename Plan = RowPlanOf<D>>
void row_attention(const Rows& p, int tiles, Stream stream) {
  // Heads first: tiles begin in their order, those with most keys first.
  const Extent grid{p.heads / p.group * (ROW_TILE / Plan::ROWS), tiles, p.parts};
  const size_t queries = Plan::QUERIES ? 0 : Plan::ROWS;
  const size_t shared = (Plan::STAGES * 2 * Plan::KEYS + queries) * D * sizeof(T);
  launch(row_attention_kernel<T, D, Plan>, grid, Extent{Plan::THREADS}, shared, stream, p);
}

}  // namespace blend::cuda
