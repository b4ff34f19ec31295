// Tokens of a KV pool as tiles in shared memory, for kernels that multiply them on tensor cores.
#pragma once

#include "elements.cuh"

namespace blend::cuda {

enum class KeyType : int { SAME, E4M3, E5M2 };  // as the queries', or fp8

// Rows of D 16-bit elements in shared memory, in pieces of 16 bytes. Eight rows of one column lie
// in eight banks: the piece's place is turned by the row.
template <int D>
__device__ __forceinline__ int place(int row, int piece) {
  return row * D + ((piece ^ (row & 7)) << 3);
}

// 16 fp8 values as T, exactly: two pieces.
template <typename T, typename Fp8>
__device__ __forceinline__ void widen(T* first, T* second, uint4 v) {
  float x[16], low[8], high[8];
  as_floats(v, x, Fp8());
#pragma unroll
  for (int i = 0; i < 8; ++i) low[i] = x[i], high[i] = x[8 + i];
  store16(first, from_floats(low, T()));
  store16(second, from_floats(high, T()));
}

// One head of N tokens of a pool. slots: of the tokens; null: token i lies in slot i. Strides in
// bytes.
struct Head {
  const char* pool;
  const int64_t* slots;
  int64_t slot, head;
  int dim;
  KeyType type;
};

// Tokens `first` .. `first + N`, as far as they lie below `end`, into `to`, in one group of copies;
// zeros beyond, and beyond the head. fp8 is widened on its way, and is there at once.
template <typename T, int D, int N>
__device__ __forceinline__ void stage_tokens(const Head& p, T* to, int64_t first, int64_t end,
                                             int head) {
  const bool same = p.type == KeyType::SAME;
  const int of_row = same ? D / 8 : D / 16, wide = same ? 8 : 16;  // loads, elements of one
  for (int u = threadIdx.x; u < N * of_row; u += blockDim.x) {
    const int row = u / of_row, piece = u % of_row;
    const bool there = first + row < end && wide * piece < p.dim;
    const int64_t token = first + row, slot = there ? (p.slots ? p.slots[token] : token) : 0;
    const char* from = p.pool + (there ? slot * p.slot + head * p.head + 16 * piece : 0);
    if (same) {
      copy16_async(to + place<D>(row, piece), from, there);
      continue;
    }
    const uint4 v = there ? load16(from) : uint4{0, 0, 0, 0};
    T *low = to + place<D>(row, 2 * piece), *high = to + place<D>(row, 2 * piece + 1);
    if (p.type == KeyType::E4M3) {
      widen<T, __nv_fp8_e4m3>(low, high, v);
    } else {
      widen<T, __nv_fp8_e5m2>(low, high, v);
    }
  }
  copy_commit();
}

}  // namespace blend::cuda
