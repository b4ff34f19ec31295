// Launcher of deltas.cuh.
#include "deltas.cuh"
#include "launch.h"

namespace blend::cuda {
namespace {

// fresh and old: tokens of pools; beside: where old tokens of negative slots lie. k, v: the means,
// of documents first .. first + the documents of `bounds`.
void mean_deltas(TensorView k, TensorView v, TensorView slots, Optional<TensorView> cos,
                 Optional<TensorView> sin, TensorView old_k, TensorView old_v, TensorView old_slots,
                 Optional<TensorView> old_cos, Optional<TensorView> old_sin,
                 Optional<TensorView> beside_k, Optional<TensorView> beside_v, TensorView bounds,
                 TensorView scale, TensorView out_k, TensorView out_v, int64_t rotary_dim,
                 int64_t neox, int64_t first) {
  const Place place(k);
  constexpr auto POOL = "k, v: expected pools [slots, heads, dim] with rows of 16 bytes";
  const auto kept = [&](const TensorView& a, const TensorView& b) {
    place.expect_pool(a, POOL), place.expect_pool(b, POOL);
    expect(a.size(0) == b.size(0) && a.dtype() == k.dtype() && b.dtype() == k.dtype() &&
               a.size(1) == k.size(1) && b.size(1) == k.size(1) && a.size(2) == k.size(2) &&
               b.size(2) == v.size(2),
           "k and v: of the same slots, and everywhere of the same heads and dtype");
    return Kept{static_cast<const char*>(a.data_ptr()), static_cast<const char*>(b.data_ptr()),
                slot_bytes(a), slot_bytes(b)};
  };
  Deltas p{};
  const int64_t n = slots.numel(), documents = scale.numel();
  p.fresh.kept = kept(k, v), p.old.kept = kept(old_k, old_v);
  p.fresh.slots = place.indices(slots, n, "slots: expected int64 [n]");
  p.old.slots = place.indices(old_slots, n, "old slots: expected int64 [n]");
  expect(beside_k.has_value() == beside_v.has_value(), "beside: K and V");
  if (beside_k.has_value()) {
    p.beside = kept(*beside_k, *beside_v);
    expect((*beside_k).size(0) == n, "beside: expected [n, heads, dim]");
  }
  const int64_t step = 32 / (k.dtype().bits / 8);
  expect(rotary_dim >= 0 && rotary_dim % step == 0 && rotary_dim <= k.size(2),
         "rotary_dim: two rows of 16 bytes, within the head size");
  if (rotary_dim > 0) {
    expect(cos.has_value() && sin.has_value() && old_cos.has_value() && old_sin.has_value(),
           "cos, sin: of fresh and old K");
    const auto angles = [&](const TensorView& t) {
      return place.floats(t, n * rotary_dim / 2, "cos, sin: expected float32 [n, rotary_dim / 2]");
    };
    p.fresh.cos = angles(*cos), p.fresh.sin = angles(*sin);
    p.old.cos = angles(*old_cos), p.old.sin = angles(*old_sin);
  }
  p.bounds = place.indices(bounds, documents + 1, "bounds: expected int64 [documents + 1]");
  p.scale = place.dense<float>(scale, documents, kDLFloat, "scale: expected float32 [documents]");
  p.heads = k.size(1), p.dim = k.size(2), p.v_dim = v.size(2), p.rotary_dim = rotary_dim;
  constexpr auto OUT = "out: expected float32 [documents, heads, dim]";
  expect(out_k.ndim() == 3 && out_v.ndim() == 3, OUT);
  const int64_t all = out_k.size(0);
  expect(first >= 0 && first + documents <= all, "first: documents within out");
  p.k = place.floats(out_k, all * p.heads * p.dim, OUT) + first * p.heads * p.dim;
  p.v = place.floats(out_v, all * p.heads * p.v_dim, OUT) + first * p.heads * p.v_dim;
  if (documents == 0) return;
  by_pool_dtype(
      k, [&](auto type) { deltas<decltype(type)>(p, documents, neox != 0, place.stream()); });
  place.expect_launched();
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(mean_deltas, mean_deltas);

}  // namespace blend::cuda
