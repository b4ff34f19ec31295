// Copy of tokens' KV with K rotated on the way: V is moved byte by byte, K is read once, turned in
// fp32 and rounded once. Parallel over tokens, hence no slot may be both read and written, and none
// written twice: one bit a slot tells.
#include <omp.h>
#include <tvm/ffi/container/array.h>

#include <algorithm>
#include <vector>

#include "rotation.h"
#include "tensors.h"

namespace blend {
namespace {

using tvm::ffi::Array;
using tvm::ffi::Tensor;

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

// Where one token's K and V come from.
struct Row {
  const Cache *k, *v;
  int64_t token;
};

struct Pool {
  Cache k, v;
  Pool(const TensorView& k_t, const TensorView& v_t)
      : k(k_t, "k: expected [n, heads, dim]"), v(v_t, "v: expected [n, heads, dim]") {}
  template <typename T>
  Pool(const TensorView& k_t, const TensorView& v_t, int64_t layer, T type)
      : k(k_t, layer, type, "k: expected [layers, n, heads, dim] and one of its layers"),
        v(v_t, layer, type, "v: expected [layers, n, heads, dim] and one of its layers") {}
};

// Writes token i of `rows`, turned by its (cos, sin), to slot i of `dst_t`.
void copy_rows(const std::vector<Row>& rows, const TensorView& k_dst_t, const TensorView& v_dst_t,
               const TensorView& dst_t, const TensorView& cos_t, const TensorView& sin_t,
               int64_t rotary_dim, int64_t neox, int64_t threads) {
  const Pool pool(k_dst_t, v_dst_t);
  const int64_t n = rows.size();
  const int64_t* dst = indices(dst_t, n, "dst_slots: expected int64 [n]");
  expect(rotary_dim > 0 && rotary_dim % 2 == 0 && rotary_dim <= pool.k.dim, "rotary_dim");
  const int64_t half = rotary_dim / 2;
  const float* cos = floats(cos_t, n * half, "cos: expected float32 [n, rotary_dim / 2]");
  const float* sin = floats(sin_t, n * half, "sin: expected float32 [n, rotary_dim / 2]");
  expect_inside(dst, n, std::min(pool.k.tokens, pool.v.tokens), "dst_slots outside the pool");
  std::vector<bool> written(pool.k.tokens);
  for (int64_t i = 0; i < n; ++i) {
    expect(!written[dst[i]], "dst_slots names a slot twice");
    written[dst[i]] = true;
  }
  for (const Row& row : rows) {
    expect(row.k->heads == pool.k.heads && row.k->dim == pool.k.dim &&
               row.v->heads == pool.v.heads && row.v->dim == pool.v.dim,
           "source and destination differ in heads or head size");
    expect(row.k->data != pool.k.data || !written[row.token],
           "src_slots and dst_slots share a slot");
  }
  by_pool_dtype(k_dst_t, [&](auto type) {
    using T = decltype(type);
#pragma omp parallel num_threads(std::max<int64_t>(threads, 1))
    {
      Turn turn(rotary_dim, neox != 0);
#pragma omp for schedule(static)
      for (int64_t i = 0; i < n; ++i) {
        const Row& row = rows[i];
        turn.set(cos + i * half, sin + i * half);
        for (int64_t h = 0; h < pool.k.heads; ++h) {
          rotate_head<T>(turn, row.k->at<T>(row.token, h), pool.k.at<T>(dst[i], h), rotary_dim,
                         pool.k.dim);
        }
        copy_token<T>(*row.v, row.token, pool.v, dst[i]);
      }
    }
  });
}

void rotate_copy(TensorView k_t, TensorView v_t, TensorView src_t, TensorView dst_t,
                 TensorView cos_t, TensorView sin_t, int64_t rotary_dim, int64_t neox,
                 int64_t threads) {
  const Pool pool(k_t, v_t);
  const int64_t n = src_t.numel();
  const int64_t* src = indices(src_t, n, "src_slots: expected int64 [n]");
  expect_inside(src, n, std::min(pool.k.tokens, pool.v.tokens), "src_slots outside the pool");
  std::vector<Row> rows(n);
  for (int64_t i = 0; i < n; ++i) rows[i] = {&pool.k, &pool.v, src[i]};
  copy_rows(rows, k_t, v_t, dst_t, cos_t, sin_t, rotary_dim, neox, threads);
}

void rotate_from(Array<Tensor> k_parts, Array<Tensor> v_parts, int64_t layer, TensorView k_dst_t,
                 TensorView v_dst_t, TensorView dst_t, TensorView cos_t, TensorView sin_t,
                 int64_t rotary_dim, int64_t neox, int64_t threads) {
  expect(k_parts.size() == v_parts.size(), "as many parts of V as of K");
  std::vector<Pool> parts;
  parts.reserve(k_parts.size());
  std::vector<Row> rows;
  for (size_t i = 0; i < k_parts.size(); ++i) {
    const TensorView k(k_parts[i]), v(v_parts[i]);
    expect(k.dtype() == k_dst_t.dtype() && v.dtype() == v_dst_t.dtype() && k.dtype() == v.dtype(),
           "all of a pool's dtype");
    by_pool_dtype(k_dst_t, [&](auto type) { parts.emplace_back(k, v, layer, type); });
    const Pool& part = parts.back();
    expect(part.k.tokens == part.v.tokens, "as many tokens of V as of K");
    for (int64_t t = 0; t < part.k.tokens; ++t) rows.push_back({&part.k, &part.v, t});
  }
  copy_rows(rows, k_dst_t, v_dst_t, dst_t, cos_t, sin_t, rotary_dim, neox, threads);
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(rotate_copy, rotate_copy);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(rotate_from, rotate_from);

}  // namespace blend
