// Attention of scattered rows by true position over the paged pool of a latent cache (MLA, in its
// absorbed form): one key head for all query heads, and a value is the first columns of its key.
// What a row sees, tiles, parts and how they are joined are row_attention.cuh's.
//
// A block takes packed rows (row x query head) of a tile, hence several heads of a token or several
// tokens, and one part of the tile's keys. A step of keys is brought into shared memory once: as
// keys its warps share out rows and keys, as values columns. Between the two, weights pass through
// shared memory, and a step has three barriers.
//
// For R rows of H heads over S keys, half of which are seen: R S H (576 + 512) operations of the
// tensor cores.
#pragma once

#include "rows.cuh"

namespace blend::cuda {

constexpr int LATENT_KEY = 576, LATENT_VALUE = 512;  // columns, at most

// How a block goes about it. ROWS: packed rows of it. KEYS: of a step. STAGES: steps that have room
// in shared memory; with one the next step's keys come when all are done with this one's.
template <int ROWS_, int KEYS_, int STAGES_, int WARPS_>
struct LatentPlan {
  static constexpr int ROWS = ROWS_, KEYS = KEYS_, STAGES = STAGES_, WARPS = WARPS_;
  static constexpr int THREADS = 32 * WARPS;
  static constexpr int HIGH = ROWS / 16;                // sixteens of rows
  static constexpr int SPLIT = WARPS / HIGH;            // warps that share a sixteen's keys
  static constexpr int COLUMNS = LATENT_VALUE / WARPS;  // of values that a warp adds up
  static constexpr int WEIGHTS = 64;  // columns of a row of weights, as `place` wants
  static constexpr size_t SHARED =
      2 * ((ROWS + STAGES * KEYS) * LATENT_KEY + ROWS * WEIGHTS) + 4 * (SPLIT + 1) * ROWS;
  static_assert(ROW_TILE % ROWS == 0 && KEYS <= WEIGHTS && KEYS / SPLIT % 16 == 0);
  static_assert(COLUMNS % 64 == 0 && THREADS % 8 == 0 && KEYS * 8 % THREADS == 0);
};

// By how much shared memory a block can have: Hopper's and Blackwell's 227 KiB, Ampere's 163, and
// what every one has since Ampere.
using LargeLatentPlan = LatentPlan<64, 64, 2, 8>;
using MiddleLatentPlan = LatentPlan<64, 32, 2, 8>;
using SmallLatentPlan = LatentPlan<32, 32, 1, 4>;

template <typename Plan>
__host__ __device__ constexpr bool is_plan_of(size_t shared) {
  if (shared >= LargeLatentPlan::SHARED) return std::is_same_v<Plan, LargeLatentPlan>;
  if (shared >= MiddleLatentPlan::SHARED) return std::is_same_v<Plan, MiddleLatentPlan>;
  return std::is_same_v<Plan, SmallLatentPlan>;
}

// Eight fp8 values as T, exactly.
template <typename T>
__device__ __forceinline__ uint4 widened(uint2 eight, KeyType type) {
  float x[16], low[8];
  const uint4 v{eight.x, eight.y, 0, 0};
  if (type == KeyType::E4M3) {
    as_floats(v, x, __nv_fp8_e4m3());
  } else {
    as_floats(v, x, __nv_fp8_e5m2());
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) low[i] = x[i];
  return from_floats(low, T());
}

// How a block's threads bring tokens into shared memory, each in rows of LATENT_KEY elements. Eight
// lanes take a token, 128 bytes of it at a time; its slot is looked up a step ahead.
template <typename T, typename Plan>
class LatentStager {
  static constexpr int AT_ONCE = Plan::THREADS / 8, ROUNDS = Plan::KEYS / AT_ONCE;

 public:
  // The slots of tokens `first` .. `first + KEYS`, as far as they lie below `end`.
  __device__ __forceinline__ void look_up(const Head& p, int64_t first, int64_t end) {
#pragma unroll
    for (int i = 0; i < ROUNDS; ++i) {
      const int64_t token = first + threadIdx.x / 8 + i * AT_ONCE;
      slot[i] = token < end ? static_cast<int>(p.slots ? p.slots[token] : token) : -1;
    }
  }

  // Zeros for what is not there and beyond the last column.
  __device__ __forceinline__ void copy(const Head& p, T* to) const {
    const int piece = threadIdx.x % 8;
#pragma unroll
    for (int i = 0; i < ROUNDS; ++i) {
      const int row = threadIdx.x / 8 + i * AT_ONCE;
      const char* const from = p.pool + static_cast<int64_t>(max(slot[i], 0)) * p.slot;
      T* const mine = to + place<LATENT_KEY>(row, piece);
      const int dim = slot[i] < 0 ? 0 : p.dim;
      if (p.type == KeyType::SAME) {
#pragma unroll
        for (int c = 0; c < LATENT_KEY / 64; ++c) {
          const int column = 64 * c + 8 * piece;
          const bool there = column < dim;
          copy16_async(mine + 64 * c, there ? from + 2 * column : p.pool, there);
        }
        continue;
      }
#pragma unroll 3
      for (int c = 0; c < LATENT_KEY / 64; ++c) {
        const int column = 64 * c + 8 * piece;
        const uint2 eight = column < dim ? load8_once(from + column) : uint2{0, 0};
        store16(mine + 64 * c, widened<T>(eight, p.type));
      }
    }
  }

 private:
  int slot[ROUNDS];
};

template <typename T, typename Plan>
__device__ __forceinline__ void attend_to_latents(const Rows& p) {
  constexpr int KEY = LATENT_KEY, KEYS = Plan::KEYS, STAGES = Plan::STAGES, ROWS = Plan::ROWS;
  constexpr int HIGH = Plan::HIGH, SPLIT = Plan::SPLIT, OWN = KEYS / SPLIT;
  constexpr int COLUMNS = Plan::COLUMNS, WEIGHTS = Plan::WEIGHTS;
  BLEND_SHARED(raw);
  T* const queries = reinterpret_cast<T*>(raw);
  T* const stages = queries + ROWS * KEY;
  T* const weights = stages + STAGES * KEYS * KEY;
  float* const peaks = reinterpret_cast<float*>(weights + ROWS * WEIGHTS);  // [SPLIT, ROWS]
  float* const shrinks = peaks + SPLIT * ROWS;                              // [ROWS]
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const Tile& tile = *reinterpret_cast<const Tile*>(p.tiles + 5 * int64_t(blockIdx.y));
  const int count = tile.rows * p.heads, keys = tile.keys;
  const int first = tile.begin + blockIdx.x * ROWS;
  if (first >= count) return;
  const int64_t first_row = tile.first_row, first_key = tile.first_key;

  const int64_t* const pos = p.row_pos + first_row;
  const Seen<ROWS, KEYS> view(p, tile, first, count, p.heads);

  for (int row = threadIdx.x / 8; row < ROWS; row += Plan::THREADS / 8) {
    const int r = first + row, piece = threadIdx.x % 8;
    const T* const from = static_cast<const T*>(p.q) +
                          (r < count ? (first_row + r / p.heads) * p.q_row : 0) +
                          r % p.heads * p.q_head;
#pragma unroll
    for (int c = 0; c < KEY / 64; ++c) {
      const int column = 64 * c + 8 * piece;
      const bool there = r < count && column < p.dim;
      copy16_async(queries + place<KEY>(row, piece) + 64 * c, there ? from + column : p.q, there);
    }
  }
  copy_commit();
  LatentStager<T, Plan> stager;
  const auto look_up = [&](int step) {
    stager.look_up(p.k, first_key + view.begin + int64_t(step) * KEYS, first_key + view.end);
  };
  look_up(0);

  // As keys: this warp's sixteen rows, of which the lane's are g and g + 8, and its share of a
  // step's keys.
  const int mine = warp % HIGH * 16, share = warp / HIGH;
  int low[2], high[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = first + mine + g + 8 * half;
    const int64_t at = r < count ? pos[r / p.heads] - view.origin : 0;
    low[half] = view.windowed ? clamped(at - p.window, 0, LAST) : 0;
    high[half] = clamped(at, -1, view.listed ? LAST - 1 : keys - 1);
  }
  // Where this lane's rows of matrices lie: of sixteen rows, at columns 16 d. Queries and values go
  // by lane % 16, keys by eights.
  const Columns<KEY> of_rows(lane % 16, lane / 16);
  const Columns<KEY> of_keys(lane / 16 * 8 + lane % 8, lane / 8 % 2);
  const Columns<WEIGHTS> of_weights(lane % 16, lane / 16);

  // What multiplies a score in the exponent: with a cap it is done already.
  const float factor = p.cap_log2 > 0.0f ? 1.0f : p.scale_log2;
  float o[HIGH][COLUMNS / 8][4] = {}, top[2] = {NEVER, NEVER}, total[2] = {};
  const auto stage_of = [&](int step) { return stages + step % STAGES * KEYS * KEY; };
  const auto stage = [&](int step) {  // its slots are looked up; those of the next one come
    if (step < view.steps) {
      stager.copy(p.k, stage_of(step));
      if (step + 1 < view.steps) look_up(step + 1);
    }
    copy_commit();  // an empty one too: as many groups in flight
  };
  if constexpr (STAGES > 1) stage(0);
  for (int step = 0; step < view.steps; ++step) {
    if constexpr (STAGES == 1) {
      __syncthreads();  // all are done with the keys of the step before
      stage(step);
    }
    copy_wait<0>();
    __syncthreads();  // this step's keys are there, and all are done with those of the one before
    if constexpr (STAGES > 1) stage(step + 1);
    const int from = view.begin + step * KEYS;
    const T* const k = stage_of(step);
    float s[OWN / 8][4] = {};
#pragma unroll
    for (int d = 0; d < KEY / 16; ++d) {
      uint32_t a[4];
      load_matrices(a, queries + mine * KEY + of_rows[d]);
#pragma unroll
      for (int n = 0; n < OWN / 16; ++n) {
        uint32_t b[4];
        load_matrices(b, k + (share * OWN + n * 16) * KEY + of_keys[d]);
        multiply<T>(s[2 * n], a, b[0], b[1]);
        multiply<T>(s[2 * n + 1], a, b[2], b[3]);
      }
    }
    if (p.cap_log2 > 0.0f) {
#pragma unroll
      for (int n = 0; n < OWN / 8; ++n) {
#pragma unroll
        for (float& x : s[n]) x = p.cap_log2 * tanhf(x * p.scale_log2);
      }
    }
    if (from < view.inside_from || from > view.inside_to) {
#pragma unroll
      for (int n = 0; n < OWN / 8; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          int at = from + share * OWN + n * 8 + 2 * t + c;
          if (view.listed) at = at < view.end ? clamped(p.key_pos[first_key + at], 0, LAST) : LAST;
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const bool seen = at <= high[half] && at >= low[half];
            float& x = s[n][half * 2 + c];
            x = seen ? x : NEVER;
          }
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float peak = NEVER;
#pragma unroll
      for (int n = 0; n < OWN / 8; ++n) {
        peak = fmaxf(peak, fmaxf(s[n][half * 2], s[n][half * 2 + 1]));
      }
      peak = fmaxf(peak, __shfl_xor_sync(WARP_MASK, peak, 1));
      peak = fmaxf(peak, __shfl_xor_sync(WARP_MASK, peak, 2));
      if (t == 0) peaks[share * ROWS + mine + g + 8 * half] = peak;
    }
    __syncthreads();  // the warps that share the rows' keys know each other's highest scores
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = mine + g + 8 * half;
      float all = NEVER;
#pragma unroll
      for (int i = 0; i < SPLIT; ++i) all = fmaxf(all, peaks[i * ROWS + row]);
      all = all == NEVER ? top[half] : fmaxf(top[half], all * factor);
      const float base = all == NEVER ? 0.0f : all, shrink = power2(top[half] - base);
      if (share == 0 && t == 0) shrinks[row] = shrink;
      top[half] = all;
      float sum = 0.0f;
#pragma unroll
      for (int n = 0; n < OWN / 8; ++n) {
        const float x = power2(fmaf(s[n][half * 2], factor, -base));
        const float y = power2(fmaf(s[n][half * 2 + 1], factor, -base));
        sum += x + y;
        T* const to = weights + place<WEIGHTS>(row, share * (OWN / 8) + n) + 2 * t;
        *reinterpret_cast<uint32_t*>(to) = pack(x, y, T());
      }
      total[half] = total[half] * shrink + sum;
    }
    __syncthreads();  // all weights are there

    // As values: all rows, and this warp's columns. Most steps meet no higher score.
    bool some = false;
#pragma unroll
    for (int i = 0; i < ROWS; i += 32) some |= shrinks[i + lane] != 1.0f;
    if (__ballot_sync(WARP_MASK, some)) {
#pragma unroll
      for (int half = 0; half < 2 * HIGH; ++half) {
        const float shrink = shrinks[g + 8 * half];
#pragma unroll
        for (int d = 0; d < COLUMNS / 8; ++d) {
          o[half / 2][d][half % 2 * 2] *= shrink;
          o[half / 2][d][half % 2 * 2 + 1] *= shrink;
        }
      }
    }
#pragma unroll
    for (int n = 0; n < KEYS / 16; ++n) {
      uint32_t a[HIGH][4];
#pragma unroll
      for (int m = 0; m < HIGH; ++m) {
        load_matrices(a[m], weights + m * 16 * WEIGHTS + of_weights[n]);
      }
#pragma unroll
      for (int d = 0; d < COLUMNS / 16; ++d) {
        uint32_t b[4];
        load_matrices_turned(b, k + n * 16 * KEY + warp * COLUMNS + of_rows[d]);
#pragma unroll
        for (int m = 0; m < HIGH; ++m) {
          multiply<T>(o[m][2 * d], a[m], b[0], b[1]);
          multiply<T>(o[m][2 * d + 1], a[m], b[2], b[3]);
        }
      }
    }
  }
  copy_wait<0>();
  __syncthreads();  // all have read the last step's
#pragma unroll
  for (int half = 0; half < 2; ++half) {  // four lanes hold parts of one row's sum
    total[half] += __shfl_xor_sync(WARP_MASK, total[half], 1);
    total[half] += __shfl_xor_sync(WARP_MASK, total[half], 2);
    const int row = mine + g + 8 * half;
    if (t == 0) peaks[share * ROWS + row] = total[half];
    if (t == 0 && share == 0) shrinks[row] = top[half];
  }
  __syncthreads();
#pragma unroll
  for (int half = 0; half < 2 * HIGH; ++half) {
    const int row = g + 8 * half, r = first + row;
    if (r >= count) continue;
    float all = 0.0f;
#pragma unroll
    for (int i = 0; i < SPLIT; ++i) all += peaks[i * ROWS + row];
    const int64_t cell = (first_row + r / p.heads) * p.heads + r % p.heads;
    const bool whole = p.out != nullptr;
    const float* sink = whole && p.sinks ? p.sinks + cell % p.heads : nullptr;
    const Softmax done(shrinks[row], all, sink);
    const int64_t cells = int64_t(p.rows) * p.heads;
    const int64_t at = whole ? cell : (p.first_part + view.part) * cells + cell;
    const bool once = warp == 0 && t == 0;
    if (once && !whole) p.part_lse[at] = done.lse;
    if (once && whole && p.lse) p.lse[at] = done.lse * LN_2;
    if (!whole && view.steps == 0) continue;  // nobody reads it
#pragma unroll
    for (int d = 0; d < COLUMNS / 8; ++d) {
      const int column = warp * COLUMNS + 8 * d + 2 * t;
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

// An architecture has code for one plan: `latent_attention` takes no other there.
template <typename T, typename Plan>
__global__ void __launch_bounds__(Plan::THREADS, 1) latent_attention_kernel(Rows p) {
  if constexpr (COMPILED_SHARED == 0 || is_plan_of<Plan>(COMPILED_SHARED)) {
    attend_to_latents<T, Plan>(p);
  }
}

// shared: bytes that a block can have.
template <typename T>
void latent_attention(const Rows& p, int tiles, size_t shared, Stream stream) {
  const auto by = [&](auto plan) {
    using Plan = decltype(plan);
    if (!is_plan_of<Plan>(shared)) return;
    launch(latent_attention_kernel<T, Plan>, Extent{ROW_TILE / Plan::ROWS, tiles, p.parts},
           Extent{Plan::THREADS}, Plan::SHARED, stream, p);
  };
  by(LargeLatentPlan()), by(MiddleLatentPlan()), by(SmallLatentPlan());
}

}  // namespace blend::cuda
