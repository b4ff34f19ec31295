// The k highest scores of each segment, without the host: which tokens they are, which the others
// are, and one flag a token. Among equal scores the lower index wins, NaN ranks highest
// (ops/rows.py: top_rows).
//
// One block a segment. Four passes over the scores find the k-th highest, 8 bits of it a pass; one
// more writes the result in order. The scores lie in L2 after the first.
#pragma once

#include "machine.cuh"

namespace blend::cuda {

constexpr int SELECT_THREADS = 512;
constexpr int SELECT_WARPS = SELECT_THREADS / 32;
constexpr int BINS = 256;

struct Selection {
  const float* scores;      // [total]
  const int64_t* segments;  // [count, 4]: first score, how many, k (0 to as many), chosen before
  int64_t* chosen;          // [sum of k]: indices within the segment, ascending
  int64_t* rest;            // [total - sum of k]: the others
  uint8_t* runs;            // [total]: 1 where chosen
};

// Orders as the scores do: -0 equals 0, NaN is above all.
__device__ __forceinline__ unsigned sort_key(float x) {
  const unsigned bits = __float_as_uint(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0xffffffffu;
  if ((bits & 0x7fffffffu) == 0) return 0x80000000u;
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// Adds one to `bins[bin]` for each lane, once a distinct bin; bin < 0: none. All lanes call it.
__device__ __forceinline__ void count_in(unsigned* bins, int bin) {
  const unsigned peers = __match_any_sync(WARP_MASK, bin);
  const unsigned lower = (1u << (threadIdx.x % 32)) - 1;
  if (bin >= 0 && !(peers & lower)) atomicAdd(bins + bin, static_cast<unsigned>(__popc(peers)));
}

struct SelectShared {
  unsigned bins[BINS];
  unsigned bin, before;  // found: the bin of the k-th, how many lie in higher ones
  unsigned above[2][SELECT_WARPS], equal[2][SELECT_WARPS];  // by warp, of two tiles
};

// By one warp: the bin, from the highest, in which the `wanted`-th count lies.
__device__ __forceinline__ void find_bin(SelectShared& s, unsigned wanted) {
  const int lane = threadIdx.x,
            top = BINS - 1 - 8 * lane;  // this lane's: top, top - 1, ... top - 7
  unsigned mine = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) mine += s.bins[top - i];
  unsigned through = mine;
#pragma unroll
  for (int by = 1; by < 32; by *= 2) {
    const unsigned other = __shfl_up_sync(WARP_MASK, through, by);
    if (lane >= by) through += other;
  }
  unsigned before = through - mine;
  if (before >= wanted || through < wanted) return;
  int bin = top;
  while (before + s.bins[bin] < wanted) before += s.bins[bin--];
  s.bin = bin, s.before = before;
}

__global__ void __launch_bounds__(SELECT_THREADS) select_kernel(Selection p) {
  BLEND_SHARED(raw);
  auto& s = *reinterpret_cast<SelectShared*>(raw);
  const int64_t* segment = p.segments + 4 * int64_t(blockIdx.x);
  const int64_t first = segment[0], n = segment[1], k = segment[2], chosen_before = segment[3];
  const float* scores = p.scores + first;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

  // Tokens above `key` are chosen, and the first `wanted` of those that equal it.
  unsigned key = k == 0 ? 0xffffffffu : 0, wanted = static_cast<unsigned>(k);
  for (int shift = 24; shift >= 0 && k > 0 && k < n; shift -= 8) {
    for (int i = threadIdx.x; i < BINS; i += SELECT_THREADS) s.bins[i] = 0;
    __syncthreads();
    for (int64_t tile = 0; tile < n; tile += SELECT_THREADS) {
      const int64_t i = tile + threadIdx.x;
      int bin = -1;
      if (i < n) {
        const unsigned mine = sort_key(scores[i]);
        if (shift == 24 || mine >> (shift + 8) == key >> (shift + 8)) bin = mine >> shift & 255;
      }
      count_in(s.bins, bin);
    }
    __syncthreads();
    if (warp == 0) find_bin(s, wanted);
    __syncthreads();
    key |= s.bin << shift, wanted -= s.before;
  }

  unsigned all_above = 0, all_equal = 0;  // in the tiles before
  for (int64_t tile = 0; tile < n; tile += SELECT_THREADS) {
    const int64_t i = tile + threadIdx.x;
    const unsigned mine = i < n ? sort_key(scores[i]) : 0;
    const bool above = i < n && mine > key, equal = i < n && mine == key;
    const unsigned aboves = __ballot_sync(WARP_MASK, above),
                   equals = __ballot_sync(WARP_MASK, equal);
    const int half = tile / SELECT_THREADS % 2;  // two halves: one barrier a tile
    if (lane == 0) s.above[half][warp] = __popc(aboves), s.equal[half][warp] = __popc(equals);
    __syncthreads();
    const unsigned lower = (1u << lane) - 1;
    unsigned above_before = all_above + __popc(aboves & lower);
    unsigned equal_before = all_equal + __popc(equals & lower);
    for (int w = 0; w < SELECT_WARPS; ++w) {
      all_above += s.above[half][w], all_equal += s.equal[half][w];
      if (w < warp) above_before += s.above[half][w], equal_before += s.equal[half][w];
    }
    if (i >= n) continue;
    const bool runs = above || (equal && equal_before < wanted);
    const int64_t rank = above_before + min(equal_before, wanted);  // chosen ones before this
    p.runs[first + i] = runs;
    if (runs) {
      p.chosen[chosen_before + rank] = i;
    } else {
      p.rest[first - chosen_before + i - rank] = i;
    }
  }
}

inline void select(const Selection& p, int segments, Stream stream) {
  launch(select_kernel, Extent{segments}, Extent{SELECT_THREADS}, sizeof(SelectShared), stream, p);
}

}  // namespace blend::cuda
