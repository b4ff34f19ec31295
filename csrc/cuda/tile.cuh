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

// Where a lane's row lies in tiles of rows as `place` has them, at piece 2 d + half: one of four
// offsets, since the turn leaves a row's eights of pieces where they are.
template <int D>
struct Columns {
  int offset[4];
  __device__ __forceinline__ Columns(int row, int half) {
#pragma unroll
    for (int i = 0; i < 4; ++i) offset[i] = place<D>(row, 2 * i + half);
  }
  __device__ __forceinline__ int operator[](int d) const { return offset[d % 4] + d / 4 * 64; }
};

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

// How the THREADS of a block bring N tokens of D elements into shared memory, step by step. A
// thread takes the same piece of every so many tokens, in K and V alike. It looks up their slots a
// step ahead, all at once: a slot that is asked for right before its copy is waited for, one after
// the other.
template <typename T, int D, int N, int THREADS>
class Stager {
  template <int EACH>  // elements of a piece of 16 bytes
  struct Pieces {
    static constexpr int OF_ROW = D / EACH, ROWS = THREADS / OF_ROW, ROUNDS = (N + ROWS - 1) / ROWS;
    static_assert(THREADS % OF_ROW == 0 && (N % ROWS == 0 || N < ROWS));
    static __device__ __forceinline__ bool within(int row) { return N % ROWS == 0 || row < N; }
  };
  using Same = Pieces<8>;
  using Fp8 = Pieces<16>;

 public:
  // The slots of tokens `first` .. `first + N`, as far as they lie below `end`.
  __device__ __forceinline__ void look_up(const Head& p, int64_t first, int64_t end) {
    if (p.type == KeyType::SAME) {
      look_up<Same>(p, first, end);
    } else {
      look_up<Fp8>(p, first, end);
    }
  }

  // Their head of p's pool into `to`, zeros for what is not there and beyond the head. fp8 is
  // widened on its way, and is there at once; other copies arrive as cp.async does.
  __device__ __forceinline__ void copy(const Head& p, T* to, int head) const {
    if (p.type == KeyType::SAME) {
      each<Same>(p, head, [&](int, int row, int piece, const char* from, bool there) {
        copy16_async(to + place<D>(row, piece), from, there);
      });
      return;
    }
    uint4 found[Fp8::ROUNDS];
    each<Fp8>(p, head, [&](int i, int, int, const char* from, bool there) {
      found[i] = there ? load16(from) : uint4{0, 0, 0, 0};
    });
    each<Fp8>(p, head, [&](int i, int row, int piece, const char*, bool) {
      T *low = to + place<D>(row, 2 * piece), *high = to + place<D>(row, 2 * piece + 1);
      if (p.type == KeyType::E4M3) {
        widen<T, __nv_fp8_e4m3>(low, high, found[i]);
      } else {
        widen<T, __nv_fp8_e5m2>(low, high, found[i]);
      }
    });
  }

 private:
  template <typename P>
  __device__ __forceinline__ void look_up(const Head& p, int64_t first, int64_t end) {
#pragma unroll
    for (int i = 0; i < P::ROUNDS; ++i) {
      const int row = threadIdx.x / P::OF_ROW + i * P::ROWS;
      const int64_t token = first + row;
      const bool there = P::within(row) && token < end;
      slot[i] = there ? static_cast<int>(p.slots ? p.slots[token] : token) : -1;
    }
  }

  template <typename P, typename Body>
  __device__ __forceinline__ void each(const Head& p, int head, Body&& body) const {
    const int piece = threadIdx.x % P::OF_ROW;
    const bool within = piece * (D / P::OF_ROW) < p.dim;
    const char* const mine = p.pool + head * p.head + (within ? 16 * piece : 0);
#pragma unroll
    for (int i = 0; i < P::ROUNDS; ++i) {
      const int row = threadIdx.x / P::OF_ROW + i * P::ROWS;
      const bool there = within && slot[i] >= 0;
      const int64_t at = static_cast<int64_t>(there ? slot[i] : 0) * static_cast<int>(p.slot);
      if (P::within(row)) body(i, row, piece, mine + at, there);
    }
  }

  int slot[Same::ROUNDS > Fp8::ROUNDS ? Same::ROUNDS : Fp8::ROUNDS];
};

}  // namespace blend::cuda
