// Squared distance of two tokens' heads, summed in fp32 over heads and dims; the second token may
// be rotated on the way (rotary_dim 0: not). Parallel over tokens.
#include <omp.h>

#include <algorithm>

#include "rotation.h"
#include "tensors.h"

namespace blend {
namespace {

template <typename T>
struct Distance {
  const typename T::type* fresh;
  vf lanes{};
  float rest = 0;

  void vector(int64_t i, vf value) {
    const vf d = T::read(fresh + i) - value;
    lanes += d * d;
  }
  void scalar(int64_t i, float value) {
    const float d = T::get(fresh + i) - value;
    rest += d * d;
  }
};

template <typename T>
float head_distance(const Turn& turn, const typename T::type* fresh, const typename T::type* src,
                    int64_t rotary_dim, int64_t dim) {
  Distance<T> distance{fresh};
  if (rotary_dim > 0) {
    turn.apply<T>(
        src, [&](int64_t i, vf value) { distance.vector(i, value); },
        [&](int64_t i, float value) { distance.scalar(i, value); });
  }
  int64_t i = rotary_dim;
  for (; i + W <= dim; i += W) distance.vector(i, T::read(src + i));
  for (; i < dim; ++i) distance.scalar(i, T::get(src + i));
  return sum(distance.lanes) + distance.rest;
}

void deviation(TensorView cache_t, TensorView fresh_t, TensorView src_t, TensorView cos_t,
               TensorView sin_t, TensorView out_t, int64_t rotary_dim, int64_t neox,
               int64_t threads) {
  const Cache cache(cache_t, "cache: expected [n, heads, dim]");
  const int64_t n = fresh_t.numel();
  const int64_t* fresh = indices(fresh_t, n, "fresh_slots: expected int64 [n]");
  const int64_t* src = indices(src_t, n, "src_slots: expected int64 [n]");
  expect(rotary_dim >= 0 && rotary_dim % 2 == 0 && rotary_dim <= cache.dim, "rotary_dim");
  const int64_t half = rotary_dim / 2;
  const float* cos = floats(cos_t, n * half, "cos: expected float32 [n, rotary_dim / 2]");
  const float* sin = floats(sin_t, n * half, "sin: expected float32 [n, rotary_dim / 2]");
  float* out = floats(out_t, n, "out: expected float32 [n]");
  expect_inside(fresh, n, cache.tokens, "fresh_slots outside the pool");
  expect_inside(src, n, cache.tokens, "src_slots outside the pool");
  by_dtype(cache_t, [&](auto type) {
    using T = decltype(type);
#pragma omp parallel num_threads(std::max<int64_t>(threads, 1))
    {
      Turn turn(rotary_dim, neox != 0);
#pragma omp for schedule(static)
      for (int64_t i = 0; i < n; ++i) {
        if (rotary_dim > 0) turn.set(cos + i * half, sin + i * half);
        float total = 0;
        for (int64_t h = 0; h < cache.heads; ++h) {
          total += head_distance<T>(turn, cache.at<T>(fresh[i], h), cache.at<T>(src[i], h),
                                    rotary_dim, cache.dim);
        }
        out[i] = total;
      }
    }
  });
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(deviation, deviation);

}  // namespace blend
