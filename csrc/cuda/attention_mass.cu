// Launcher of attention_mass.cuh.
#include "attention.h"
#include "attention_mass.cuh"

namespace blend::cuda {
namespace {

void mass(TensorView q, TensorView k, TensorView slots, TensorView row_pos,
          Optional<TensorView> key_pos, TensorView lse, TensorView weights, Optional<TensorView> v,
          TensorView to, Optional<TensorView> late, int64_t first_pos, int64_t window, double scale,
          double cap, double value_unit) {
  const Place place(q);
  expect_queries(place, q, k);
  const int64_t rows = q.size(0), heads = q.size(1), kv_heads = k.size(1), n = slots.numel();
  const Scale scales(scale, cap);
  Mass p{};
  p.q = q.data_ptr();
  p.k = head_of(q, k, place.indices(slots, n, "kv_slots: expected int64 [n]"));
  p.row_pos = place.indices(row_pos, rows, "q_pos: expected int64 [rows]");
  if (key_pos.has_value()) p.key_pos = place.indices(*key_pos, n, "key_pos: expected int64 [n]");
  p.lse = place.dense<float>(lse, rows * heads, kDLFloat, "lse: expected float32 [rows, heads]");
  p.weights = place.dense<float>(weights, rows, kDLFloat, "weights: expected float32 [rows]");
  constexpr auto MASS = "mass: expected float32 [kv heads, n]";
  p.mass = place.dense<float>(to, kv_heads * n, kDLFloat, MASS);
  if (late.has_value()) p.late = place.dense<float>(*late, kv_heads * n, kDLFloat, MASS);
  if (v.has_value()) {
    place.expect_pool(*v, "v: expected a pool [slots, heads, dim] with rows of 16 bytes");
    expect((*v).size(0) == k.size(0) && (*v).size(1) == kv_heads && (*v).dtype() == k.dtype(),
           "v: of k's slots, heads and dtype");
    p.v = head_of(q, *v, p.k.slots);
    p.value_unit = value_unit;
  }
  p.q_row = q.stride(0), p.q_head = q.stride(1);
  p.first_pos = first_pos, p.window = window, p.n = n;
  p.rows = rows, p.heads = heads, p.group = heads / kv_heads;
  p.scale_log2 = scales.score, p.cap_log2 = scales.cap;
  if (n == 0) return;
  if (p.k.dim > 256) {  // a latent cache's
    expect(p.k.dim <= 576, "q: heads of at most 576 elements");
    by_queries(q, 0,
               [&](auto type, auto) { attention_mass<decltype(type), 576>(p, place.stream()); });
  } else {
    by_queries(q, p.k.dim, [&](auto type, auto size) {
      attention_mass<decltype(type), decltype(size)::value>(p, place.stream());
    });
  }
  place.expect_launched();
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(attention_mass, mass);

}  // namespace blend::cuda
