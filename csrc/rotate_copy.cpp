// Copy of tokens' KV with K rotated on the way: V is moved byte by byte, K is read once, turned in
// fp32 and rounded once. What is added to either is added in fp32, before the rounding. Tokens that
// run are left out where flags tell. Parallel over tokens, hence no slot may be both read and
// written, and none written twice: one bit a slot tells.
#include <omp.h>
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/optional.h>

#include <algorithm>
#include <vector>

#include "rotation.h"
#include "tensors.h"

namespace blend {
namespace {

using tvm::ffi::Array;
using tvm::ffi::Optional;
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

// to = from + add, in fp32, rounded once.
template <typename T>
void add_row(const typename T::type* from, const float* add, typename T::type* to, int64_t dim) {
  int64_t i = 0;
  for (; i + W <= dim; i += W) T::write(to + i, T::read(from + i) + load(add + i));
  for (; i < dim; ++i) T::put(to + i, T::get(from + i) + add[i]);
}

// `from` turned by `turn` plus `add` turned by `forth`; `scratch` holds as many elements.
template <typename T>
void rotate_head_and_add(const Turn& turn, const typename T::type* from, const Turn& forth,
                         const float* add, float* scratch, typename T::type* to, int64_t rotary_dim,
                         int64_t dim) {
  forth.apply<F32>(
      add, [&](int64_t i, vf value) { store(scratch + i, value); },
      [&](int64_t i, float value) { scratch[i] = value; });
  turn.apply<T>(
      from, [&](int64_t i, vf value) { T::write(to + i, value + load(scratch + i)); },
      [&](int64_t i, float value) { T::put(to + i, value + scratch[i]); });
  add_row<T>(from + rotary_dim, add + rotary_dim, to + rotary_dim, dim - rotary_dim);
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

// What is added to tokens at their new places: K [groups, heads, dim] as at position 0, V, whose of
// them each token gets (-1: none), and what turns K to its place.
struct Bias {
  TensorView k, v, group, cos, sin;
};

// Writes token i of `rows`, turned by its (cos, sin), to slot i of `dst_t`; not where `runs` (uint8
// [n]) is 1.
void copy_rows(const std::vector<Row>& rows, const TensorView& k_dst_t, const TensorView& v_dst_t,
               const TensorView& dst_t, const TensorView& cos_t, const TensorView& sin_t,
               const Optional<TensorView>& runs_t, int64_t rotary_dim, int64_t neox,
               int64_t threads, const Bias* bias = nullptr) {
  const Pool pool(k_dst_t, v_dst_t);
  const int64_t n = rows.size();
  const int64_t* dst = indices(dst_t, n, "dst_slots: expected int64 [n]");
  expect(rotary_dim > 0 && rotary_dim % 2 == 0 && rotary_dim <= pool.k.dim, "rotary_dim");
  const int64_t half = rotary_dim / 2;
  const float* cos = floats(cos_t, n * half, "cos: expected float32 [n, rotary_dim / 2]");
  const float* sin = floats(sin_t, n * half, "sin: expected float32 [n, rotary_dim / 2]");
  const uint8_t* runs =
      runs_t.has_value() ? flags(*runs_t, n, "runs: expected uint8 [n]") : nullptr;
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
  const int32_t* group = nullptr;
  const float *add_k = nullptr, *add_v = nullptr, *add_cos = nullptr, *add_sin = nullptr;
  if (bias != nullptr) {
    const int64_t groups = bias->k.ndim() == 3 ? bias->k.size(0) : -1;
    add_k = floats(bias->k, groups * pool.k.heads * pool.k.dim,
                   "bias k: expected [groups, heads, dim]");
    add_v = floats(bias->v, groups * pool.v.heads * pool.v.dim,
                   "bias v: expected [groups, heads, dim]");
    add_cos = floats(bias->cos, n * half, "bias cos: expected float32 [n, rotary_dim / 2]");
    add_sin = floats(bias->sin, n * half, "bias sin: expected float32 [n, rotary_dim / 2]");
    group = groups_of(bias->group, n, groups, "bias group: expected int32 [n], -1 or a group");
  }
  by_pool_dtype(k_dst_t, [&](auto type) {
    using T = decltype(type);
#pragma omp parallel num_threads(std::max<int64_t>(threads, 1))
    {
      Turn turn(rotary_dim, neox != 0), forth(rotary_dim, neox != 0);
      std::vector<float> scratch(rotary_dim);
#pragma omp for schedule(static)
      for (int64_t i = 0; i < n; ++i) {
        if (runs != nullptr && runs[i]) continue;
        const Row& row = rows[i];
        turn.set(cos + i * half, sin + i * half);
        if (group == nullptr || group[i] < 0) {
          for (int64_t h = 0; h < pool.k.heads; ++h) {
            rotate_head<T>(turn, row.k->at<T>(row.token, h), pool.k.at<T>(dst[i], h), rotary_dim,
                           pool.k.dim);
          }
          copy_token<T>(*row.v, row.token, pool.v, dst[i]);
          continue;
        }
        forth.set(add_cos + i * half, add_sin + i * half);
        for (int64_t h = 0; h < pool.k.heads; ++h) {
          const int64_t at = group[i] * pool.k.heads + h;
          rotate_head_and_add<T>(turn, row.k->at<T>(row.token, h), forth, add_k + at * pool.k.dim,
                                 scratch.data(), pool.k.at<T>(dst[i], h), rotary_dim, pool.k.dim);
          add_row<T>(row.v->at<T>(row.token, h), add_v + at * pool.v.dim, pool.v.at<T>(dst[i], h),
                     pool.v.dim);
        }
      }
    }
  });
}

std::vector<Row> rows_inside(const Pool& pool, const TensorView& src_t) {
  const int64_t n = src_t.numel();
  const int64_t* src = indices(src_t, n, "src_slots: expected int64 [n]");
  expect_inside(src, n, std::min(pool.k.tokens, pool.v.tokens), "src_slots outside the pool");
  std::vector<Row> rows(n);
  for (int64_t i = 0; i < n; ++i) rows[i] = {&pool.k, &pool.v, src[i]};
  return rows;
}

// One layer of parts outside the pool.
struct Parts {
  std::vector<Pool> parts;
  std::vector<Row> rows;

  Parts(const Array<Tensor>& k_parts, const Array<Tensor>& v_parts, int64_t layer,
        const TensorView& like) {
    expect(k_parts.size() == v_parts.size(), "as many parts of V as of K");
    parts.reserve(k_parts.size());
    for (size_t i = 0; i < k_parts.size(); ++i) {
      const TensorView k(k_parts[i]), v(v_parts[i]);
      expect(k.dtype() == like.dtype() && v.dtype() == like.dtype(), "all of a pool's dtype");
      by_pool_dtype(like, [&](auto type) { parts.emplace_back(k, v, layer, type); });
      const Pool& part = parts.back();
      expect(part.k.tokens == part.v.tokens, "as many tokens of V as of K");
      for (int64_t t = 0; t < part.k.tokens; ++t) rows.push_back({&part.k, &part.v, t});
    }
  }
};

void rotate_copy(TensorView k_t, TensorView v_t, TensorView src_t, TensorView dst_t,
                 TensorView cos_t, TensorView sin_t, Optional<TensorView> runs, int64_t rotary_dim,
                 int64_t neox, int64_t threads) {
  const Pool pool(k_t, v_t);
  copy_rows(rows_inside(pool, src_t), k_t, v_t, dst_t, cos_t, sin_t, runs, rotary_dim, neox,
            threads);
}

void rotate_copy_and_add(TensorView k_t, TensorView v_t, TensorView src_t, TensorView dst_t,
                         TensorView cos_t, TensorView sin_t, TensorView add_k, TensorView add_v,
                         TensorView group, TensorView add_cos, TensorView add_sin,
                         Optional<TensorView> runs, int64_t rotary_dim, int64_t neox,
                         int64_t threads) {
  const Pool pool(k_t, v_t);
  const Bias bias{add_k, add_v, group, add_cos, add_sin};
  copy_rows(rows_inside(pool, src_t), k_t, v_t, dst_t, cos_t, sin_t, runs, rotary_dim, neox,
            threads, &bias);
}

void rotate_from(Array<Tensor> k_parts, Array<Tensor> v_parts, int64_t layer, TensorView k_dst_t,
                 TensorView v_dst_t, TensorView dst_t, TensorView cos_t, TensorView sin_t,
                 Optional<TensorView> runs, int64_t rotary_dim, int64_t neox, int64_t threads) {
  expect(v_dst_t.dtype() == k_dst_t.dtype(), "V of K's dtype");
  const Parts parts(k_parts, v_parts, layer, k_dst_t);
  copy_rows(parts.rows, k_dst_t, v_dst_t, dst_t, cos_t, sin_t, runs, rotary_dim, neox, threads);
}

void rotate_from_and_add(Array<Tensor> k_parts, Array<Tensor> v_parts, int64_t layer,
                         TensorView k_dst_t, TensorView v_dst_t, TensorView dst_t, TensorView cos_t,
                         TensorView sin_t, TensorView add_k, TensorView add_v, TensorView group,
                         TensorView add_cos, TensorView add_sin, Optional<TensorView> runs,
                         int64_t rotary_dim, int64_t neox, int64_t threads) {
  expect(v_dst_t.dtype() == k_dst_t.dtype(), "V of K's dtype");
  const Parts parts(k_parts, v_parts, layer, k_dst_t);
  const Bias bias{add_k, add_v, group, add_cos, add_sin};
  copy_rows(parts.rows, k_dst_t, v_dst_t, dst_t, cos_t, sin_t, runs, rotary_dim, neox, threads,
            &bias);
}

// Tokens `index_t` of the parts' layer, as they are.
void take_from(Array<Tensor> k_parts, Array<Tensor> v_parts, int64_t layer, TensorView index_t,
               TensorView k_out_t, TensorView v_out_t) {
  const Parts parts(k_parts, v_parts, layer, k_out_t);
  const Pool out(k_out_t, v_out_t);
  const int64_t n = index_t.numel();
  const int64_t* index = indices(index_t, n, "index: expected int64 [n]");
  expect(out.k.tokens == n && out.v.tokens == n, "a place for each token");
  expect_inside(index, n, parts.rows.size(), "index outside the parts");
  by_pool_dtype(k_out_t, [&](auto type) {
    using T = decltype(type);
    for (int64_t i = 0; i < n; ++i) {
      const Row& row = parts.rows[index[i]];
      expect(row.k->heads == out.k.heads && row.k->dim == out.k.dim &&
                 row.v->heads == out.v.heads && row.v->dim == out.v.dim,
             "parts and places differ in heads or head size");
      copy_token<T>(*row.k, row.token, out.k, i);
      copy_token<T>(*row.v, row.token, out.v, i);
    }
  });
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(rotate_copy, rotate_copy);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(rotate_copy_and_add, rotate_copy_and_add);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(rotate_from, rotate_from);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(rotate_from_and_add, rotate_from_and_add);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(take_from, take_from);

}  // namespace blend
