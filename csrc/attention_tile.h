// The inner pieces of row attention: packing of K and V, a register-blocked matrix product, and
// the online softmax of one row. All in fp32; all sizes that the compiler must unroll are fixed.
#pragma once

#include <cmath>
#include <limits>

#include "tensors.h"

namespace blend {

constexpr int MR = 6;                               // rows held in registers
constexpr int NV = W == 16 ? 4 : (W == 8 ? 2 : 3);  // vectors per row held in registers
constexpr int NR = NV * W;                          // columns of a packed strip
constexpr int TILE = 4 * MR;                        // rows that share one score tile
constexpr int BK = 2 * (W == 4 ? 60 : 64);          // keys per block: a multiple of NR
static_assert(BK % NR == 0, "a key block holds whole strips");

constexpr float NEVER = -std::numeric_limits<float>::infinity();

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// C[MR][V * W] (+)= A B. A's element (m, k) lies at m * SM + k * SK; B's row k at k * NR.
template <int V, int SM, int SK, bool ADD>
inline void product(const float* a, const float* b, float* c, int64_t k_count, int64_t c_stride) {
  vf acc[MR][V];
  for (int m = 0; m < MR; ++m) {
    for (int v = 0; v < V; ++v) acc[m][v] = ADD ? load(c + m * c_stride + v * W) : vf{};
  }
  for (int64_t k = 0; k < k_count; ++k) {
    vf row[V];
    for (int v = 0; v < V; ++v) row[v] = load(b + k * NR + v * W);
    for (int m = 0; m < MR; ++m) {
      const float x = a[m * SM + k * SK];
      for (int v = 0; v < V; ++v) acc[m][v] += row[v] * x;
    }
  }
  for (int m = 0; m < MR; ++m) {
    for (int v = 0; v < V; ++v) store(c + m * c_stride + v * W, acc[m][v]);
  }
}

// The same for `vectors` <= NV, chosen at run time.
template <int SM, int SK, bool ADD>
inline void product_of(int64_t vectors, const float* a, const float* b, float* c, int64_t k_count,
                       int64_t c_stride) {
  switch (vectors) {
    case 1:
      return product<1, SM, SK, ADD>(a, b, c, k_count, c_stride);
    case 2:
      return product<2, SM, SK, ADD>(a, b, c, k_count, c_stride);
    case 3:
      return product<3, SM, SK, ADD>(a, b, c, k_count, c_stride);
    default:
      return product<NV, SM, SK, ADD>(a, b, c, k_count, c_stride);
  }
}

// K of `keys` slots as strips [ceil(keys / NR)][D][NR]: keys in lanes. Missing keys become zeros.
template <typename T>
void pack_keys(const Cache& k, const int64_t* slots, int64_t keys, int64_t head, float* to) {
  static const float zeros[W] = {};
  const int64_t dim = k.dim;
  for (int64_t j = 0; j < round_up(keys, NR); j += W) {
    const typename T::type* from[W];
    for (int i = 0; i < W; ++i) {
      from[i] = j + i < keys ? k.at<T>(slots[j + i], head) : nullptr;
      if (j + i + W < keys) {
        const char* next = reinterpret_cast<const char*>(k.at<T>(slots[j + i + W], head));
        for (int64_t b = 0; b < dim * (int64_t)sizeof(*from[0]); b += 64)
          __builtin_prefetch(next + b);
      }
    }
    float* column = to + j / NR * dim * NR + j % NR;
    int64_t d = 0;
    for (; d + W <= dim; d += W) {
      vf block[W];
      for (int i = 0; i < W; ++i) block[i] = from[i] ? T::read(from[i] + d) : load(zeros);
      transpose(block);
      for (int i = 0; i < W; ++i) store(column + (d + i) * NR, block[i]);
    }
    for (; d < dim; ++d) {
      for (int i = 0; i < W; ++i) column[d * NR + i] = from[i] ? T::get(from[i] + d) : 0.0f;
    }
  }
}

// V of `keys` slots as panels [ceil(Dv / NR)][BK][NR]: head dims in lanes, zeros past Dv.
template <typename T>
void pack_values(const Cache& v, const int64_t* slots, int64_t keys, int64_t head, float* to) {
  const int64_t dim = v.dim;
  for (int64_t j = 0; j < keys; ++j) {
    const typename T::type* from = v.at<T>(slots[j], head);
    if (j + 8 < keys) {
      const char* next = reinterpret_cast<const char*>(v.at<T>(slots[j + 8], head));
      for (int64_t b = 0; b < dim * (int64_t)sizeof(*from); b += 64) __builtin_prefetch(next + b);
    }
    int64_t d = 0;
    for (; d + W <= dim; d += W) {
      store(to + (d / NR * BK + j) * NR + d % NR, T::read(from + d));
    }
    if (d < dim) {
      float* rest = to + (d / NR * BK + j) * NR + d % NR;
      for (int i = 0; i < W; ++i) rest[i] = d + i < dim ? T::get(from + d + i) : 0.0f;
    }
  }
}

// Running softmax of one row: `peak` is the largest score so far (log2 units), `total` the sum of
// 2^(score - peak).
struct Softmax {
  float peak = NEVER;
  float total = 0;
};

// Turns scores[begin, end) of one row into 2^(score - peak) and updates the row's softmax. The
// row sees keys [low, high), which lies inside [begin, end); the others become 0. begin and end
// are multiples of W. Returns the factor that earlier sums of this row must be multiplied by.
inline float soften(float* scores, int64_t begin, int64_t end, int64_t low, int64_t high,
                    Softmax& row) {
  if (low >= high) {
    for (int64_t j = begin; j < end; j += W) store(scores + j, vf{});
    return 1.0f;
  }
  for (int64_t j = begin; j < low; ++j) scores[j] = NEVER;
  for (int64_t j = high; j < end; ++j) scores[j] = NEVER;
  vf top = load(scores + begin);
  for (int64_t j = begin + W; j < end; j += W) top = max(top, load(scores + j));
  const float peak = std::fmax(row.peak, max(top));
  const float factor = row.peak == peak ? 1.0f : std::exp2(row.peak - peak);
  const vf shift = splat(peak);
  vf total{};
  for (int64_t j = begin; j < end; j += W) {
    const vf p = exp2(load(scores + j) - shift);
    store(scores + j, p);
    total += p;
  }
  row.total = row.total * factor + sum(total);
  row.peak = peak;
  return factor;
}

// scores[begin, end) <- cap * tanh(score), in log2 units.
inline void soft_cap(float* scores, int64_t begin, int64_t end, float cap) {
  for (int64_t j = begin; j < end; j += W) store(scores + j, tanh(load(scores + j)) * cap);
}

}  // namespace blend
