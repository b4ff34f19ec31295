// Squared distance of two tokens' heads, summed in fp32 over heads and dims. Parallel over tokens.
#include <omp.h>

#include <algorithm>

#include "tensors.h"

namespace blend {
namespace {

template <typename T>
float head_distance(const typename T::type* fresh, const typename T::type* src, int64_t dim) {
  vf lanes{};
  float rest = 0;
  int64_t i = 0;
  for (; i + W <= dim; i += W) {
    const vf d = T::read(fresh + i) - T::read(src + i);
    lanes += d * d;
  }
  for (; i < dim; ++i) {
    const float d = T::get(fresh + i) - T::get(src + i);
    rest += d * d;
  }
  return sum(lanes) + rest;
}

void deviation(TensorView cache_t, TensorView fresh_t, TensorView src_t, TensorView out_t,
               int64_t threads) {
  const Cache cache(cache_t, "cache: expected [n, heads, dim]");
  const int64_t n = fresh_t.numel();
  const int64_t* fresh = indices(fresh_t, n, "fresh_slots: expected int64 [n]");
  const int64_t* src = indices(src_t, n, "src_slots: expected int64 [n]");
  float* out = floats(out_t, n, "out: expected float32 [n]");
  expect_inside(fresh, n, cache.tokens, "fresh_slots outside the pool");
  expect_inside(src, n, cache.tokens, "src_slots outside the pool");
  by_pool_dtype(cache_t, [&](auto type) {
    using T = decltype(type);
#pragma omp parallel for num_threads(std::max<int64_t>(threads, 1)) schedule(static)
    for (int64_t i = 0; i < n; ++i) {
      float total = 0;
      for (int64_t h = 0; h < cache.heads; ++h) {
        total += head_distance<T>(cache.at<T>(fresh[i], h), cache.at<T>(src[i], h), cache.dim);
      }
      out[i] = total;
    }
  });
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(deviation, deviation);

}  // namespace blend
