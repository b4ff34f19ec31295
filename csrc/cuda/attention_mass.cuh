// How much a few query rows attend to each of many keys, the softmax's log-sum-exp being known from
// the attention pass: mass[h, j] = sum over rows r and the query heads of key head h of
// w[r] exp(s[r, j] - lse[r]). One more pass over K. Nothing of size queries x keys is stored, no
// atomics: a block owns 64 keys of one key head and walks all rows, in a fixed order.
//
// For m rows and n keys: 2 m n heads D operations of the tensor cores, m n heads exponentials.
#pragma once

#include "tile.cuh"

namespace blend::cuda {

constexpr int MASS_KEYS = 64;  // of a block: 4 warps of 16
constexpr int MASS_ROWS = 32;  // rows x query heads of a step

struct Mass {
  const void* q;              // [rows, heads, dim]
  Head k;                     // slots: [n]
  const int64_t* row_pos;     // [rows]
  const int64_t* key_pos;     // [n] or null: first_pos + j
  const float* lse;           // [rows, heads], base 2
  const float* weights;       // [rows]
  float* mass;                // [kv heads, n], overwritten
  int64_t q_row, q_head;      // strides in elements
  int64_t first_pos, window;  // window < 0: none
  int64_t n;
  int rows, heads, group;
  float scale_log2;  // softmax scale x log2 e; with a cap: scale / cap
  float cap_log2;    // cap x log2 e; 0: none
};

// Group `step` of the packed rows (row r, query head of the group: r * group + head) of a key head.
template <typename T, int D>
__device__ __forceinline__ void stage_queries(const Mass& p, T* to, int step, int head) {
  const int count = p.rows * p.group;
  for (int u = threadIdx.x; u < MASS_ROWS * (D / 8); u += blockDim.x) {
    const int row = u / (D / 8), piece = u % (D / 8), r = step * MASS_ROWS + row;
    const bool there = r < count && 8 * piece < p.k.dim;
    const int64_t at =
        there ? r / p.group * p.q_row + (head * p.group + r % p.group) * p.q_head + 8 * piece : 0;
    copy16_async(to + place<D>(row, piece), static_cast<const T*>(p.q) + at, there);
  }
  copy_commit();
}

template <typename T, int D>
__global__ void __launch_bounds__(128, 4) attention_mass_kernel(Mass p) {
  BLEND_SHARED(raw);
  T* keys = reinterpret_cast<T*>(raw);
  T* queries = keys + MASS_KEYS * D;  // two stages
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int head = blockIdx.y, count = p.rows * p.group;
  const int64_t first = int64_t(blockIdx.x) * MASS_KEYS;

  stage_tokens<T, D, MASS_KEYS>(p.k, keys, first, p.n, head);
  stage_queries<T, D>(p, queries, 0, head);
  copy_wait<1>();
  __syncthreads();

  // The warp's 16 keys stay in registers for the whole walk.
  uint32_t a[D / 16][4];
#pragma unroll
  for (int d = 0; d < D / 16; ++d) {
    load_matrices(a[d], keys + place<D>(warp * 16 + lane % 16, 2 * d + lane / 16));
  }

  float sum[2] = {0.0f, 0.0f};  // of keys g and g + 8
  int64_t key[2], pos[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    key[half] = first + warp * 16 + g + 8 * half;
    pos[half] = p.first_pos + key[half];
    if (p.key_pos && key[half] < p.n) pos[half] = p.key_pos[key[half]];
  }
  const int steps = (count + MASS_ROWS - 1) / MASS_ROWS;
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps) {
      stage_queries<T, D>(p, queries + (step + 1) % 2 * MASS_ROWS * D, step + 1, head);
    } else {
      copy_commit();  // as many groups in flight as before
    }
    copy_wait<1>();
    __syncthreads();
    const T* q = queries + step % 2 * MASS_ROWS * D;
#pragma unroll
    for (int part = 0; part < MASS_ROWS / 16; ++part) {  // 16 packed rows: two tiles of 8
      float s[2][4] = {};
#pragma unroll
      for (int d = 0; d < D / 16; ++d) {
        uint32_t b[4];
        load_matrices(b, q + place<D>(part * 16 + lane / 16 * 8 + lane % 8, 2 * d + lane / 8 % 2));
        multiply<T>(s[0], a[d], b[0], b[1]);
        multiply<T>(s[1], a[d], b[2], b[3]);
      }
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int r = step * MASS_ROWS + part * 16 + tile * 8 + 2 * t + c;
          if (r >= count) continue;
          const int row = r / p.group;
          const float weight = p.weights[row];
          const float lse = p.lse[int64_t(row) * p.heads + head * p.group + r % p.group];
          const int64_t at = p.row_pos[row];
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float x = s[tile][2 * half + c] * p.scale_log2;
            if (p.cap_log2 > 0.0f) x = p.cap_log2 * tanhf(x);
            const bool seen = pos[half] <= at && (p.window < 0 || pos[half] >= at - p.window);
            if (seen) sum[half] += weight * power2(x - lse);
          }
        }
      }
    }
    __syncthreads();  // before this stage is filled again
  }
  // Four lanes hold parts of one key's sum.
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    sum[half] += __shfl_xor_sync(WARP_MASK, sum[half], 1);
    sum[half] += __shfl_xor_sync(WARP_MASK, sum[half], 2);
    if (t == 0 && key[half] < p.n) p.mass[head * p.n + key[half]] = sum[half];
  }
  copy_wait<0>();
}

template <typename T, int D>
void attention_mass(const Mass& p, Stream stream) {
  const Extent grid{static_cast<int>((p.n + MASS_KEYS - 1) / MASS_KEYS), p.heads / p.group};
  const size_t shared = size_t(MASS_KEYS + 2 * MASS_ROWS) * D * sizeof(T);
  launch(attention_mass_kernel<T, D>, grid, Extent{128}, shared, stream, p);
}

}  // namespace blend::cuda
