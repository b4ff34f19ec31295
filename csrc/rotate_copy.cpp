// Copy of tokens' KV with K rotated on the way: V is moved byte by byte, K is read once, turned in
// fp32 and rounded once. Parallel over tokens, hence no slot may be both read and written, and none
// written twice: one bit a slot tells.
#include <omp.h>

#include <algorithm>

#include "rotation.h"
#include "tensors.h"

namespace blend {
namespace {

template <typename T>
void rotate_head(const Turn& turn, const typename T::type* from, typename T::type* to,
                 int64_t rotary_dim, int64_t dim) {
  turn.apply<T>(
      from, [&](int64_t i, vf value) { T::write(to + i, value); },
      [&](int64_t i, float value) { T::put(to + i, value); });
  if (dim > rotary_dim) {
    std::memcpy(to + rotary_dim, from + rotary_dim, (dim - rotary_dim) * sizeof(*to));
  }
}

template <typename T>
void copy_token(const Cache& src, int64_t s, const Cache& dst, int64_t d) {
  const bool dense = src.head_stride == src.dim && dst.head_stride == dst.dim;
  const int64_t pieces = dense ? 1 : src.heads;
  const int64_t bytes = (dense ? src.heads : 1) * src.dim * sizeof(typename T::type);
  for (int64_t h = 0; h < pieces; ++h) std::memcpy(dst.at<T>(d, h), src.at<T>(s, h), bytes);
}

void rotate_copy(TensorView k_src_t, TensorView v_src_t, TensorView src_t, TensorView k_dst_t,
                 TensorView v_dst_t, TensorView dst_t, TensorView cos_t, TensorView sin_t,
                 int64_t rotary_dim, int64_t neox, int64_t threads) {
  const Cache k_src(k_src_t, "k_src: expected [n, heads, dim]"),
      v_src(v_src_t, "v_src: expected [n, heads, dim]"),
      k_dst(k_dst_t, "k_dst: expected [n, heads, dim]"),
      v_dst(v_dst_t, "v_dst: expected [n, heads, dim]");
  const int64_t n = src_t.numel();
  const int64_t* src = indices(src_t, n, "src_slots: expected int64 [n]");
  const int64_t* dst = indices(dst_t, n, "dst_slots: expected int64 [n]");
  expect(rotary_dim > 0 && rotary_dim % 2 == 0 && rotary_dim <= k_src.dim, "rotary_dim");
  const int64_t half = rotary_dim / 2;
  const float* cos = floats(cos_t, n * half, "cos: expected float32 [n, rotary_dim / 2]");
  const float* sin = floats(sin_t, n * half, "sin: expected float32 [n, rotary_dim / 2]");
  expect(k_src.heads == k_dst.heads && k_src.dim == k_dst.dim && v_src.heads == v_dst.heads &&
             v_src.dim == v_dst.dim,
         "source and destination differ in heads or head size");
  expect_inside(src, n, std::min(k_src.tokens, v_src.tokens), "src_slots outside the source");
  expect_inside(dst, n, std::min(k_dst.tokens, v_dst.tokens), "dst_slots outside the pool");
  std::vector<bool> written(k_dst.tokens);
  for (int64_t i = 0; i < n; ++i) {
    expect(!written[dst[i]], "dst_slots names a slot twice");
    written[dst[i]] = true;
  }
  for (int64_t i = 0; i < n && k_src.data == k_dst.data; ++i) {
    expect(!written[src[i]], "src_slots and dst_slots share a slot");
  }
  by_dtype(k_src_t, [&](auto type) {
    using T = decltype(type);
#pragma omp parallel num_threads(std::max<int64_t>(threads, 1))
    {
      Turn turn(rotary_dim, neox != 0);
#pragma omp for schedule(static)
      for (int64_t i = 0; i < n; ++i) {
        turn.set(cos + i * half, sin + i * half);
        for (int64_t h = 0; h < k_src.heads; ++h) {
          rotate_head<T>(turn, k_src.at<T>(src[i], h), k_dst.at<T>(dst[i], h), rotary_dim,
                         k_src.dim);
        }
        copy_token<T>(v_src, src[i], v_dst, dst[i]);
      }
    }
  });
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(rotate_copy, rotate_copy);

}  // namespace blend
