// The k highest scores of each segment, without the host: which tokens they are, which the others
// are, and one flag a token. Among equal scores the lower index wins, NaN ranks highest
// (ops/rows.py: top_rows).
//
// One block a segment, whose scores stay in registers, as far as they fit. The k-th highest is
// found bit by bit: how many are at least as high as a candidate. Each warp owns scores in a row,
// so that one more count says where each of its own belongs.
#pragma once

#include "machine.cuh"

namespace blend::cuda {

constexpr int SELECT_THREADS = 1024;
constexpr int SELECT_WARPS = SELECT_THREADS / 32;
static_assert(SELECT_WARPS == 32);  // a lane of a warp for each

struct Selection {
  const float* scores;      // [total]
  const int64_t* segments;  // [count, 4]: first score, how many, k (0 to as many), chosen before
  int64_t* chosen;          // [sum of k]: indices within the segment, ascending
  int64_t* rest;            // [total - sum of k]: the others
  uint8_t* runs;            // [total]: 1 where chosen
};

// Orders as the scores do: -0 equals 0, NaN is above all. Never 0.
__device__ __forceinline__ unsigned sort_key(float x) {
  const unsigned bits = __float_as_uint(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0xffffffffu;
  if ((bits & 0x7fffffffu) == 0) return 0x80000000u;
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

struct SelectShared {
  unsigned counts[2][SELECT_WARPS];  // of two rounds: one barrier a round
  unsigned above[SELECT_WARPS], equal[SELECT_WARPS];
};

// The warp's part of a segment: `rounds` times 32 scores in a row, KEYS rounds of them in
// registers.
template <int KEYS>
struct WarpKeys {
  const float* scores;
  int64_t first, n, rounds;
  unsigned key[KEYS];

  __device__ __forceinline__ int64_t index(int64_t j) const {
    return first + 32 * j + threadIdx.x % 32;
  }
  // 0 beyond the segment.
  __device__ __forceinline__ unsigned read(int64_t j) const {
    return j < rounds && index(j) < n ? sort_key(scores[index(j)]) : 0;
  }
  __device__ __forceinline__ WarpKeys(const float* of, int64_t count) : scores(of), n(count) {
    rounds = (n + SELECT_THREADS - 1) / SELECT_THREADS;
    first = threadIdx.x / 32 * rounds * 32;
#pragma unroll
    for (int j = 0; j < KEYS; ++j) key[j] = read(j);
  }
  // Calls body(j, key) in ascending order; all lanes of the warp come.
  template <typename Body>
  __device__ __forceinline__ void each(Body&& body) const {
#pragma unroll
    for (int j = 0; j < KEYS; ++j) {
      if (j < rounds) body(j, key[j]);
    }
#pragma unroll 4
    for (int64_t j = KEYS; j < rounds; ++j) body(j, read(j));
  }
  // How many of the lane's are at least `least`, which is not 0.
  __device__ __forceinline__ unsigned count(unsigned least) const {
    unsigned out = 0;
#pragma unroll
    for (int j = 0; j < KEYS; ++j) out += key[j] >= least;
#pragma unroll 4
    for (int64_t j = KEYS; j < rounds; ++j) out += read(j) >= least;
    return out;
  }
};

template <int KEYS>
__global__ void __launch_bounds__(SELECT_THREADS) select_kernel(Selection p) {
  BLEND_SHARED(raw);
  auto& s = *reinterpret_cast<SelectShared*>(raw);
  const int64_t* segment = p.segments + 4 * int64_t(blockIdx.x);
  const int64_t first = segment[0], n = segment[1], k = segment[2], chosen_before = segment[3];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const WarpKeys<KEYS> keys(p.scores + first, n);

  // Tokens above `bound` are chosen, and the first `wanted` of those that equal it.
  unsigned bound = k == 0 ? 0xffffffffu : 0;
  for (int bit = 31; bit >= 0 && k > 0 && k < n; --bit) {
    const unsigned least = bound | 1u << bit;
    const unsigned mine = __reduce_add_sync(WARP_MASK, keys.count(least));
    const int half = bit % 2;
    if (lane == 0) s.counts[half][warp] = mine;
    __syncthreads();
    const unsigned all = __reduce_add_sync(WARP_MASK, s.counts[half][lane]);
    if (all >= k) bound = least;
    if (all == k) break;  // nobody below is as high
  }

  unsigned above = 0, equal = 0;
  keys.each([&](int64_t, unsigned key) { above += key > bound, equal += key && key == bound; });
  above = __reduce_add_sync(WARP_MASK, above), equal = __reduce_add_sync(WARP_MASK, equal);
  if (lane == 0) s.above[warp] = above, s.equal[warp] = equal;
  __syncthreads();
  const unsigned wanted = k - __reduce_add_sync(WARP_MASK, s.above[lane]);
  // In the warps before, then in the rounds before, too.
  unsigned all_above = __reduce_add_sync(WARP_MASK, lane < warp ? s.above[lane] : 0);
  unsigned all_equal = __reduce_add_sync(WARP_MASK, lane < warp ? s.equal[lane] : 0);
  const unsigned lower = (1u << lane) - 1;
  keys.each([&](int64_t j, unsigned key) {
    const bool higher = key > bound, same = key && key == bound;
    const unsigned aboves = __ballot_sync(WARP_MASK, higher),
                   equals = __ballot_sync(WARP_MASK, same);
    const unsigned equal_before = all_equal + __popc(equals & lower);
    const bool runs = higher || (same && equal_before < wanted);
    // Chosen ones before this.
    const int64_t rank = all_above + __popc(aboves & lower) + min(equal_before, wanted);
    all_above += __popc(aboves), all_equal += __popc(equals);
    const int64_t i = keys.index(j);
    if (i >= n) return;
    p.runs[first + i] = runs;
    if (runs) {
      p.chosen[chosen_before + rank] = i;
    } else {
      p.rest[first - chosen_before + i - rank] = i;
    }
  });
}

// most: scores of the longest segment.
inline void select(const Selection& p, int segments, int64_t most, Stream stream) {
  const auto run = [&](auto kernel) {
    launch(kernel, Extent{segments}, Extent{SELECT_THREADS}, sizeof(SelectShared), stream, p);
  };
  if (most <= 4 * SELECT_THREADS) {
    run(select_kernel<4>);
  } else if (most <= 16 * SELECT_THREADS) {
    run(select_kernel<16>);
  } else {
    run(select_kernel<32>);
  }
}

}  // namespace blend::cuda
