// Tokens' KV into dense memory, byte for byte: out of the pool into the bodies of stored chunks,
// and out of parts that lie anywhere into one layer's K and V. Knows no types: a token is some 16
// bytes.
//
// Memory bound: each 16 bytes are read once and written once.
#pragma once

#include "machine.cuh"

namespace blend::cuda {

// 16-byte words that a thread reads before it writes one.
constexpr int IN_FLIGHT = 4;

// How many 16-byte words one token's K and V have in a layer.
struct Words {
  int k, v;
};

// One token; the threads of a row of the block share its words.
__device__ __forceinline__ void copy_token(const char* k_from, const char* v_from, char* k_to,
                                           char* v_to, Words words) {
  const int total = words.k + words.v;
  for (int begin = threadIdx.x; begin < total; begin += IN_FLIGHT * blockDim.x) {
    uint4 moved[IN_FLIGHT];
#pragma unroll
    for (int j = 0; j < IN_FLIGHT; ++j) {
      const int u = begin + j * blockDim.x;
      if (u >= total) break;
      moved[j] =
          load16_once(u < words.k ? k_from + 16 * int64_t(u) : v_from + 16 * int64_t(u - words.k));
    }
#pragma unroll
    for (int j = 0; j < IN_FLIGHT; ++j) {
      const int u = begin + j * blockDim.x;
      if (u >= total) break;
      store16(u < words.k ? k_to + 16 * int64_t(u) : v_to + 16 * int64_t(u - words.k), moved[j]);
    }
  }
}

// Chunks of one sequence, each as [layer][K | V][token] (store/chunk.py), one behind the other.
struct Gather {
  const int64_t* layers;  // [4, count]: addresses of K and V in the pool, bytes from slot to slot
  int64_t count;          // of layers
  const int64_t* slots;   // [n]
  const int64_t* chunks;  // [chunks, 3]: first of its slots, how many, byte of `out` it begins at
  char* out;
  Words words;
};

// blockIdx.z: chunk, .y: layer; of a block, row y copies token blockIdx.x * blockDim.y + y.
__global__ void __launch_bounds__(256) gather_kernel(Gather p) {
  const int64_t* chunk = p.chunks + 3 * int64_t(blockIdx.z);
  const int64_t first = chunk[0], tokens = chunk[1];
  const int64_t i = int64_t(blockIdx.x) * blockDim.y + threadIdx.y, layer = blockIdx.y;
  if (i >= tokens) return;
  const int64_t slot = p.slots[first + i];
  const auto* k = reinterpret_cast<const char*>(p.layers[layer]);
  const auto* v = reinterpret_cast<const char*>(p.layers[p.count + layer]);
  const int64_t k_bytes = 16 * int64_t(p.words.k), v_bytes = 16 * int64_t(p.words.v);
  char* to = p.out + chunk[2] + layer * tokens * (k_bytes + v_bytes);
  copy_token(k + slot * p.layers[2 * p.count + layer], v + slot * p.layers[3 * p.count + layer],
             to + i * k_bytes, to + tokens * k_bytes + i * v_bytes, p.words);
}

// Tokens of one layer, each from an address of its own.
struct Take {
  const int64_t* places;  // [4, n]: addresses of K and V in layer 0, bytes from layer to layer
  int64_t n, layer;
  const int64_t* index;  // [count] which of the n; null: all of them
  int64_t count;
  char *k, *v;  // [count] tokens each
  Words words;
};

// Of a block, row y copies tokens blockIdx.x * blockDim.y + y and on, a grid further each.
__global__ void __launch_bounds__(256) take_kernel(Take p) {
  const int64_t step = int64_t(gridDim.x) * blockDim.y;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.y + threadIdx.y; i < p.count; i += step) {
    const int64_t from = p.index ? p.index[i] : i;
    const int64_t k = p.places[from] + p.layer * p.places[2 * p.n + from];
    const int64_t v = p.places[p.n + from] + p.layer * p.places[3 * p.n + from];
    copy_token(reinterpret_cast<const char*>(k), reinterpret_cast<const char*>(v),
               p.k + i * 16 * int64_t(p.words.k), p.v + i * 16 * int64_t(p.words.v), p.words);
  }
}

// Threads x rows: a token has as many threads as it has work for, a power of two, so that rows of
// a block fill whole warps.
inline Extent block_of(Words words) {
  int threads = 8;
  while (threads < 64 && threads * IN_FLIGHT < words.k + words.v) threads *= 2;
  return {threads, 256 / threads};
}

// most: tokens of the longest chunk.
inline void gather(const Gather& p, int64_t chunks, int64_t most, Stream stream) {
  const Extent block = block_of(p.words);
  const Extent grid{static_cast<int>((most + block.y - 1) / block.y), static_cast<int>(p.count),
                    static_cast<int>(chunks)};
  launch(gather_kernel, grid, block, 0, stream, p);
}

// blocks: at most so many, 0: as many as there is work for.
inline void take(const Take& p, int64_t blocks, Stream stream) {
  const Extent block = block_of(p.words);
  const int64_t all = (p.count + block.y - 1) / block.y;
  const Extent grid{static_cast<int>(blocks > 0 && blocks < all ? blocks : all)};
  launch(take_kernel, grid, block, 0, stream, p);
}

}  // namespace blend::cuda
