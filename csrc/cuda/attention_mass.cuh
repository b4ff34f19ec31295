// How much a few query rows attend to each of many keys, the softmax's log-sum-exp being known from
// the attention pass: mass[h, j] = sum over rows r and the query heads of key head h of
// w[r] exp(s[r, j] - lse[r]), added to what layers before have left there, as it is or times the
// norm of the key's value. One more pass over K. Nothing of size queries x keys is stored, no
// atomics: a warp owns 32 keys of one key head and walks all rows, in a fixed order.
//
// For m rows and n keys: 2 m n heads D operations of the tensor cores, m n heads exponentials.
//
// Keys go from the pool straight into registers. A product of a key and a query may take their
// elements in any order: a lane of the tensor cores' fragments gets 16 bytes in a row of each, so
// that both are read as they lie.
#pragma once

#include "tile.cuh"

namespace blend::cuda {

constexpr int MASS_STAGES = 3;     // of queries: one is used, two are on their way
constexpr int MASS_BLOCKS = 256;   // with fewer blocks than this, blocks of half as many keys
constexpr int MASS_THREADS = 256;  // of a block, at most
constexpr float LOG2_OF_E = 1.4426950408889634f;

struct Mass {
  const void* q;              // [rows, heads, dim]
  Head k, v;                  // slots: [n]; v.pool null: attention counts as it is
  const int64_t* row_pos;     // [rows]
  const int64_t* key_pos;     // [n] or null: first_pos + j
  const float* lse;           // [rows, heads], natural
  const float* weights;       // [rows]
  float *mass, *late;         // [kv heads, n], added to; late: never by value; null: not wanted
  int64_t q_row, q_head;      // strides in elements
  int64_t first_pos, window;  // window < 0: none
  int64_t n;
  int rows, heads, group;
  uint32_t row_factor;  // 2^31 / group, rounded up
  float scale_log2;     // softmax scale x log2 e; with a cap: scale / cap
  float cap_log2;       // cap x log2 e; 0: none
  float value_unit;     // what multiplies the norm of a value
};

// What the queries of a step need: packed rows (row r, query head of the group: r * group + head).
template <typename T, int D>
struct MassStage {
  static constexpr int QUERIES = D <= 128 ? 64 : D <= 256 ? 32 : 16;
  T query[QUERIES * D];
  float entry[2 * QUERIES];  // log-sum-exp, weight
  int64_t pos[QUERIES];

  // Rows of D elements in pieces of 16 bytes: what eight lanes read at once, four pieces of each of
  // two rows, lies in all banks.
  static __device__ __forceinline__ int place(int row, int piece) {
    return row * D + ((piece ^ ((row & 1) << 2)) << 3);
  }
};

// Row of packed row r, without a division: exact while r * group < 2^31.
__device__ __forceinline__ int row_of(const Mass& p, int r) {
  return static_cast<int>(uint64_t(2 * r) * p.row_factor >> 32);
}

// The queries of a step, if there are any, in one group of copies.
template <typename T, int D>
__device__ __forceinline__ void stage_queries(const Mass& p, MassStage<T, D>& to, int begin,
                                              int head) {
  constexpr int QUERIES = MassStage<T, D>::QUERIES, PIECES = D / 8;
  const int count = p.rows * p.group;
  if (begin < count) {
    const int piece = threadIdx.x % PIECES, pass = blockDim.x / PIECES;
    const int own = threadIdx.x / PIECES;  // threads beyond the last whole pass take none
    const T* const of_head = static_cast<const T*>(p.q) + head * p.group * p.q_head + 8 * piece;
    for (int q = own < pass ? own : QUERIES; q < QUERIES; q += pass) {
      const int row = row_of(p, begin + q), of = begin + q - row * p.group;
      const bool there = begin + q < count && 8 * piece < p.k.dim;
      copy16_async(to.query + to.place(q, piece),
                   there ? of_head + row * p.q_row + of * p.q_head : p.q, there);
    }
    if (threadIdx.x < QUERIES) {
      const int q = threadIdx.x;
      const bool there = begin + q < count;
      const int row = there ? row_of(p, begin + q) : 0, of = there ? begin + q - row * p.group : 0;
      copy_async<4>(to.entry + 2 * q, p.lse + int64_t(row) * p.heads + head * p.group + of, there);
      copy_async<4>(to.entry + 2 * q + 1, p.weights + row, there);
      copy_async<8>(to.pos + q, p.row_pos + row, there);
    }
  }
  copy_commit();
}

// Eight elements of a key, as they lie, and as T.
template <typename T>
struct KeyPiece {
  uint4 raw;
  __device__ __forceinline__ void load(const char* from) { raw = load16_once(from); }
  template <typename>
  __device__ __forceinline__ uint4 as() const {
    return raw;
  }
};

template <__nv_fp8_interpretation_t KIND>
struct Fp8Piece {
  uint2 raw;
  __device__ __forceinline__ void load(const char* from) { raw = load8_once(from); }
  template <typename T>
  __device__ __forceinline__ uint4 as() const {
    float x[16], low[8];
    fp8_as_floats<KIND>({raw.x, raw.y, 0, 0}, x);
#pragma unroll
    for (int i = 0; i < 8; ++i) low[i] = x[i];
    return from_floats(low, T());
  }
};

template <>
struct KeyPiece<__nv_fp8_e4m3> : Fp8Piece<__NV_E4M3> {};
template <>
struct KeyPiece<__nv_fp8_e5m2> : Fp8Piece<__NV_E5M2> {};

// The warp's keys as left operands: row `i` of a lane is key lane / 4 + 8 i (beyond the last of n:
// that one), from element `column` of its head on. Elements 8 (lane % 4) and on of chunk c, 32
// elements, are its parts of products 2 c and 2 c + 1. All loads begin before the first is used.
template <typename T, typename K, int TILES, int PRODUCTS>
__device__ __forceinline__ void load_rows_as(const Head& p, int64_t n,
                                             uint32_t (&a)[TILES][PRODUCTS][4], int64_t first,
                                             int head, int column) {
  constexpr int ROWS = 2 * TILES, CHUNKS = PRODUCTS / 2, SIZE = sizeof(K);
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  int64_t slot[ROWS];
#pragma unroll
  for (int i = 0; i < ROWS; ++i) slot[i] = min(first + g + 8 * i, n - 1);
  if (p.slots) {
#pragma unroll
    for (int i = 0; i < ROWS; ++i) slot[i] = p.slots[slot[i]];
  }
  KeyPiece<K> piece[CHUNKS][ROWS];
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) {
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      piece[c][i].raw = {};
      if (column + 32 * c + 8 * t < p.dim) {
        piece[c][i].load(p.pool + slot[i] * p.slot + head * p.head +
                         (column + 32 * c + 8 * t) * SIZE);
      }
    }
  }
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) {
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      const uint4 v = piece[c][i].template as<T>();
      auto &even = a[i / 2][2 * c], &odd = a[i / 2][2 * c + 1];
      even[i % 2] = v.x, even[2 + i % 2] = v.y;
      odd[i % 2] = v.z, odd[2 + i % 2] = v.w;
    }
  }
}

template <typename T, int TILES, int PRODUCTS>
__device__ __forceinline__ void load_rows(const Head& p, int64_t n,
                                          uint32_t (&a)[TILES][PRODUCTS][4], int64_t first,
                                          int head, int column) {
  if (p.type == KeyType::SAME) {
    load_rows_as<T, T>(p, n, a, first, head, column);
  } else if (p.type == KeyType::E4M3) {
    load_rows_as<T, __nv_fp8_e4m3>(p, n, a, first, head, column);
  } else {
    load_rows_as<T, __nv_fp8_e5m2>(p, n, a, first, head, column);
  }
}

template <typename T, int D>
__global__ void __launch_bounds__(MASS_THREADS, D <= 256 ? 2 : 1) attention_mass_kernel(Mass p) {
  using Stage = MassStage<T, D>;
  constexpr int TILES = D <= 128 ? 2 : 1, KEYS = 16 * TILES;  // of a warp
  BLEND_SHARED(raw);
  Stage* const stages = reinterpret_cast<Stage*>(raw);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int head = blockIdx.y, count = p.rows * p.group;
  const int64_t first = (int64_t(blockIdx.x) * (blockDim.x / 32) + warp) * KEYS;

  for (int i = 0; i < MASS_STAGES - 1; ++i) {
    stage_queries(p, stages[i], i * Stage::QUERIES, head);
  }

  uint32_t a[TILES][D / 16][4];
  load_rows<T>(p.k, p.n, a, first, head, 0);
  const auto pos_of = [&](int i) {
    const int64_t key = min(first + g + 8 * i, p.n - 1);
    return p.key_pos ? p.key_pos[key] : p.first_pos + key;
  };
  int64_t lowest = pos_of(0), highest = lowest;  // of the warp's keys
#pragma unroll
  for (int i = 1; i < 2 * TILES; ++i) {
    const int64_t pos = pos_of(i);
    lowest = min(lowest, pos), highest = max(highest, pos);
  }
#pragma unroll
  for (int by = 4; by < 32; by *= 2) {
    lowest = min(lowest, __shfl_xor_sync(WARP_MASK, lowest, by));
    highest = max(highest, __shfl_xor_sync(WARP_MASK, highest, by));
  }

  const bool capped = p.cap_log2 > 0.0f;
  const float factor = capped ? 1.0f : p.scale_log2;
  float sum[2 * TILES] = {};  // of keys g + 8 i
  int now = 0;
  for (int begin = 0; begin < count; begin += Stage::QUERIES) {
    copy_wait<MASS_STAGES - 2>();
    __syncthreads();  // the step's queries are there, and those of the step before are done with
    stage_queries(p, stages[now == 0 ? MASS_STAGES - 1 : now - 1],
                  begin + (MASS_STAGES - 1) * Stage::QUERIES, head);
    const Stage& s = stages[now];
    now = now == MASS_STAGES - 1 ? 0 : now + 1;

    bool hides = false;  // some query of the step some key of the warp
#pragma unroll
    for (int q = lane; q < Stage::QUERIES; q += 32) {
      const int64_t at = s.pos[q];
      hides |= begin + q < count && (highest > at || (p.window >= 0 && lowest < at - p.window));
    }
    const bool all = __ballot_sync(WARP_MASK, hides) == 0;
    for (int part = 0; part < Stage::QUERIES && begin + part < count; part += 16) {
      float x[TILES][2][4] = {};  // two tiles of 8 queries
#pragma unroll
      for (int c = 0; c < D / 32; ++c) {
        uint4 b[2];
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          b[n] = load16(s.query + Stage::place(part + 8 * n + g, 4 * c + t));
        }
#pragma unroll
        for (int i = 0; i < 2 * TILES; ++i) {
          multiply<T>(x[i / 2][i % 2], a[i / 2][2 * c], b[i % 2].x, b[i % 2].y);
        }
#pragma unroll
        for (int i = 0; i < 2 * TILES; ++i) {
          multiply<T>(x[i / 2][i % 2], a[i / 2][2 * c + 1], b[i % 2].z, b[i % 2].w);
        }
      }
      if (capped) {
#pragma unroll
        for (int i = 0; i < 8 * TILES; ++i) {
          float& value = x[i / 8][i / 4 % 2][i % 4];
          value = p.cap_log2 * tanhf(p.scale_log2 * value);
        }
      }
      const auto add = [&](auto every) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const int q = part + 8 * n + 2 * t;
          float entry[4];  // of queries q and q + 1
          read_floats(s.entry + 2 * q, entry);
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const float base = entry[2 * c] * LOG2_OF_E, weight = entry[2 * c + 1];
#pragma unroll
            for (int i = 0; i < 2 * TILES; ++i) {
              if constexpr (!decltype(every)::value) {
                const int64_t pos = pos_of(i), at = s.pos[q + c];
                if (pos > at || (p.window >= 0 && pos < at - p.window)) continue;
              }
              sum[i] += weight * power2(x[i / 2][n][i % 2 * 2 + c] * factor - base);
            }
          }
        }
      };
      all ? add(std::true_type()) : add(std::false_type());
    }
  }
  // Four lanes hold parts of one key's sum.
#pragma unroll
  for (int i = 0; i < 2 * TILES; ++i) {
    sum[i] += __shfl_xor_sync(WARP_MASK, sum[i], 1);
    sum[i] += __shfl_xor_sync(WARP_MASK, sum[i], 2);
    const int64_t key = first + g + 8 * i;
    const bool mine = t == 0 && key < p.n;
    if (mine && p.late) p.late[head * p.n + key] += sum[i];
    if (mine && !p.v.pool) p.mass[head * p.n + key] += sum[i];
  }
  if (!p.v.pool) return;
  float norm[2 * TILES] = {};
  for (int column = 0; column < p.v.dim; column += D) {
    load_rows<T>(p.v, p.n, a, first, head, column);
#pragma unroll
    for (int i = 0; i < 2 * TILES * (D / 16); ++i) {
      const auto& of = a[i % (2 * TILES) / 2][i / (2 * TILES)];
      const float2 x = unpack(of[i % 2], T()), y = unpack(of[2 + i % 2], T());
      norm[i % (2 * TILES)] += x.x * x.x + x.y * x.y + (y.x * y.x + y.y * y.y);
    }
  }
#pragma unroll
  for (int i = 0; i < 2 * TILES; ++i) {
    norm[i] += __shfl_xor_sync(WARP_MASK, norm[i], 1);
    norm[i] += __shfl_xor_sync(WARP_MASK, norm[i], 2);
    const int64_t key = first + g + 8 * i;
    if (t == 0 && key < p.n) p.mass[head * p.n + key] += sum[i] * sqrtf(norm[i]) * p.value_unit;
  }
}

// warps: of a block; 0: as many as there is work for.
template <typename T, int D>
void attention_mass(Mass p, Stream stream, int warps = 0) {
  constexpr int KEYS = D <= 128 ? 32 : 16;
  const int kv_heads = p.heads / p.group;
  const auto blocks = [&](int of) { return (p.n + KEYS * of - 1) / (KEYS * of); };
  if (warps == 0) warps = blocks(8) * kv_heads < MASS_BLOCKS ? 4 : 8;
  p.row_factor = ((1u << 31) + p.group - 1) / p.group;
  launch(attention_mass_kernel<T, D>, Extent{static_cast<int>(blocks(warps)), kv_heads},
         Extent{32 * warps}, MASS_STAGES * sizeof(MassStage<T, D>), stream, p);
}

}  // namespace blend::cuda
