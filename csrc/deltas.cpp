// What tokens' KV differs by from another copy of it at another position: K of both turned to one
// position, in fp32. Parallel over tokens.
#include <omp.h>

#include <algorithm>

#include "rotation.h"
#include "tensors.h"

namespace blend {
namespace {

// The two rotations of a pass over tokens, [n, rotary_dim / 2] each; rotary_dim 0: K is not turned.
struct Angles {
  const float *cos, *sin;
  Angles(const TensorView& cos_t, const TensorView& sin_t, int64_t n)
      : cos(floats(cos_t, n, "cos: expected float32 [n, rotary_dim / 2]")),
        sin(floats(sin_t, n, "sin: expected float32 [n, rotary_dim / 2]")) {}
};

template <typename T>
void load_rest(const typename T::type* from, float* to, int64_t begin, int64_t dim) {
  int64_t i = begin;
  for (; i + W <= dim; i += W) store(to + i, T::read(from + i));
  for (; i < dim; ++i) to[i] = T::get(from + i);
}

template <typename T>
void subtract_rest(const typename T::type* from, float* to, int64_t begin, int64_t dim) {
  int64_t i = begin;
  for (; i + W <= dim; i += W) store(to + i, load(to + i) - T::read(from + i));
  for (; i < dim; ++i) to[i] -= T::get(from + i);
}

void deltas(TensorView k_t, TensorView v_t, TensorView fresh_t, TensorView old_k_t,
            TensorView old_v_t, TensorView old_t, TensorView cos_t, TensorView sin_t,
            TensorView old_cos_t, TensorView old_sin_t, TensorView out_k_t, TensorView out_v_t,
            int64_t rotary_dim, int64_t neox, int64_t threads) {
  const Cache k(k_t, "k: expected [n, heads, dim]"), v(v_t, "v: expected [n, heads, dim]");
  const Cache old_k(old_k_t, "old k: expected [n, heads, dim]");
  const Cache old_v(old_v_t, "old v: expected [n, heads, dim]");
  const int64_t n = fresh_t.numel(), half = rotary_dim / 2;
  const int64_t* fresh = indices(fresh_t, n, "slots: expected int64 [n]");
  const int64_t* old = indices(old_t, n, "old slots: expected int64 [n]");
  expect_inside(fresh, n, std::min(k.tokens, v.tokens), "slots outside the pool");
  expect_inside(old, n, std::min(old_k.tokens, old_v.tokens), "old slots outside their cache");
  expect(k.heads == old_k.heads && k.dim == old_k.dim && v.heads == old_v.heads &&
             v.dim == old_v.dim && k.heads == v.heads,
         "new and old KV differ in heads or head size");
  expect(rotary_dim >= 0 && rotary_dim % 2 == 0 && rotary_dim <= k.dim, "rotary_dim");
  const Angles now(cos_t, sin_t, n * half), before(old_cos_t, old_sin_t, n * half);
  float* out_k = floats(out_k_t, n * k.heads * k.dim, "out k: expected float32 [n, heads, dim]");
  float* out_v = floats(out_v_t, n * v.heads * v.dim, "out v: expected float32 [n, heads, dim]");
  by_pool_dtype(k_t, [&](auto type) {
    by_pool_dtype(old_k_t, [&](auto old_type) {
      using T = decltype(type);
      using O = decltype(old_type);
#pragma omp parallel num_threads(std::max<int64_t>(threads, 1))
      {
        Turn turn(rotary_dim, neox != 0), back(rotary_dim, neox != 0);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < n; ++i) {
          turn.set(now.cos + i * half, now.sin + i * half);
          back.set(before.cos + i * half, before.sin + i * half);
          for (int64_t h = 0; h < k.heads; ++h) {
            float* to = out_k + (i * k.heads + h) * k.dim;
            turn.template apply<T>(
                k.at<T>(fresh[i], h), [&](int64_t j, vf x) { store(to + j, x); },
                [&](int64_t j, float x) { to[j] = x; });
            load_rest<T>(k.at<T>(fresh[i], h), to, rotary_dim, k.dim);
            back.template apply<O>(
                old_k.at<O>(old[i], h), [&](int64_t j, vf x) { store(to + j, load(to + j) - x); },
                [&](int64_t j, float x) { to[j] -= x; });
            subtract_rest<O>(old_k.at<O>(old[i], h), to, rotary_dim, k.dim);
            to = out_v + (i * v.heads + h) * v.dim;
            load_rest<T>(v.at<T>(fresh[i], h), to, 0, v.dim);
            subtract_rest<O>(old_v.at<O>(old[i], h), to, 0, v.dim);
          }
        }
      }
    });
  });
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(deltas, deltas);

}  // namespace blend
