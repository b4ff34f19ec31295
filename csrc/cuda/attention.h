// What the launchers of attention share: checks of queries, dispatch by type and head size.
#pragma once

#include "launch.h"
#include "tile.cuh"

namespace blend::cuda {

// Checks q [rows, heads, dim] against the pool k [slots, kv heads, dim], and k.
inline void expect_queries(const Place& place, const TensorView& q, const TensorView& k) {
  expect(is(q, kDLBfloat, 16) || is(q, kDLFloat, 16), "q: expected bfloat16 or float16");
  place.expect_pool(k, "k: expected a pool [slots, heads, dim] with rows of 16 bytes");
  expect(q.ndim() == 3 && q.size(2) == k.size(2) && q.stride(2) == 1,
         "q: expected [rows, heads, dim] of k's head size");
  expect(q.stride(0) % 8 == 0 && q.stride(1) % 8 == 0 &&
             reinterpret_cast<uintptr_t>(q.data_ptr()) % 16 == 0,
         "q: rows of 16 bytes");
  expect(k.size(1) > 0 && q.size(1) % k.size(1) == 0 && q.size(1) > 0,
         "q: a multiple of k's heads");
}

// How a kernel for queries of q's type reads the pool. slots: as Head has them.
inline Head head_of(const TensorView& q, const TensorView& pool, const int64_t* slots) {
  Head out{static_cast<const char*>(pool.data_ptr()), slots, slot_bytes(pool)};
  out.dim = pool.size(2), out.head = pool.size(2) * (pool.dtype().bits / 8);
  if (pool.dtype() == q.dtype()) return out;
  out.type = is(pool, kDLFloat8_e4m3fn, 8) ? KeyType::E4M3 : KeyType::E5M2;
  expect(out.type == KeyType::E4M3 || is(pool, kDLFloat8_e5m2, 8),
         "k: of q's dtype, float8_e4m3fn or float8_e5m2");
  return out;
}

// What multiplies a score before, and with a cap after, it is capped. What is hidden scores minus
// infinity, which only a number above 0 leaves as it is: scale 0 goes by way of a cap.
struct Scale {
  float score, cap;
  Scale(double scale, double logit_cap)
      : score(logit_cap > 0 ? scale / logit_cap : scale * LOG2_OF_E),
        cap(logit_cap > 0 ? logit_cap * LOG2_OF_E : 0) {
    expect(scale >= 0, "scale: expected 0 or more");
    if (score == 0) cap = std::max(cap, 1.0f);
  }

 private:
  static constexpr double LOG2_OF_E = 1.4426950408889634;
};

// Calls body(T(), std::integral_constant<int, D>()): q's element type, the tile that holds `dim`.
template <typename Body>
void by_queries(const TensorView& q, int dim, Body&& body) {
  const auto by_dim = [&](auto type) {
    if (dim <= 64) return body(type, std::integral_constant<int, 64>());
    if (dim <= 128) return body(type, std::integral_constant<int, 128>());
    expect(dim <= 256, "q: heads of at most 256 elements");
    body(type, std::integral_constant<int, 256>());
  };
  if (is(q, kDLBfloat, 16)) {
    by_dim(__nv_bfloat16());
  } else {
    by_dim(__half());
  }
}

}  // namespace blend::cuda
