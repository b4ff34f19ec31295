// Launchers of row_attention.cuh.
#include "attention.h"
#include "row_attention.cuh"

namespace blend::cuda {
namespace {

constexpr auto OUT = "out: expected [rows, heads, value dim], dense, of q's dtype, aligned";
constexpr auto LSE = "lse: expected float32 [rows, heads]";
constexpr auto SINKS = "sinks: expected float32 [heads]";
constexpr auto PARTS = "part_out, part_lse: expected float32 [parts, rows, heads, dim], [.. heads]";

// What both launchers fill in, `parts` being all there are. out, or parts: one of the two.
void expect_outputs(const Place& place, Rows& p, const TensorView& like, int64_t value_dim,
                    const Optional<TensorView>& out, const Optional<TensorView>& lse,
                    const Optional<TensorView>& part_out, const Optional<TensorView>& part_lse,
                    const Optional<TensorView>& sinks, int64_t parts) {
  const int64_t cells = int64_t(p.rows) * p.heads;
  expect(part_out.has_value() == part_lse.has_value(), PARTS);
  if (out.has_value()) {
    const TensorView to = *out;
    expect(place.has(to) && to.dtype() == like.dtype() && to.IsContiguous() &&
               to.numel() == cells * value_dim &&
               reinterpret_cast<uintptr_t>(to.data_ptr()) % 4 == 0,
           OUT);
    p.out = to.data_ptr();
  }
  if (part_out.has_value()) {
    p.part_out = place.dense<float>(*part_out, parts * cells * value_dim, kDLFloat, PARTS);
    p.part_lse = place.dense<float>(*part_lse, parts * cells, kDLFloat, PARTS);
  }
  if (lse.has_value()) p.lse = place.dense<float>(*lse, cells, kDLFloat, LSE);
  if (sinks.has_value()) p.sinks = place.dense<float>(*sinks, p.heads, kDLFloat, SINKS);
}

// tiles: int64 [tiles, 5] (Tile). They must fit the other tensors: the host made them. Parts
// first_part .. first_part + parts of all_parts are computed, or, with `out`, all of it as one.
void attend(TensorView q, TensorView k, TensorView v, Optional<TensorView> slots,
            TensorView row_pos, Optional<TensorView> key_pos, TensorView tiles,
            Optional<TensorView> sinks, Optional<TensorView> out, Optional<TensorView> lse,
            Optional<TensorView> part_out, Optional<TensorView> part_lse, int64_t first_part,
            int64_t parts, int64_t all_parts, int64_t first_pos, int64_t window, double scale,
            double cap) {
  const Place place(q);
  expect_queries(place, q, k);
  place.expect_pool(v, "v: expected a pool [slots, heads, dim] with rows of 16 bytes");
  expect(v.size(0) == k.size(0) && v.size(1) == k.size(1) && v.dtype() == k.dtype(),
         "v: of k's slots, heads and dtype");
  const Scale scales(scale, cap);
  Rows p{};
  p.rows = q.size(0), p.heads = q.size(1), p.group = q.size(1) / k.size(1), p.dim = q.size(2);
  const int64_t keys = slots.has_value() ? (*slots).numel() : k.size(0);
  const int64_t* at =
      slots.has_value() ? place.indices(*slots, keys, "kv_slots: expected int64 [n]") : nullptr;
  p.q = q.data_ptr(), p.k = head_of(q, k, at), p.v = head_of(q, v, at);
  p.row_pos = place.indices(row_pos, p.rows, "q_pos: expected int64 [rows]");
  if (key_pos.has_value()) p.key_pos = place.indices(*key_pos, keys, "key_pos: expected int64 [n]");
  expect(tiles.ndim() == 2 && tiles.size(1) == 5, "tiles: expected int64 [tiles, 5]");
  p.tiles = place.indices(tiles, tiles.numel(), "tiles: expected int64 [tiles, 5]");
  expect(out.has_value() ? !part_out.has_value() && parts == 1
                         : part_out.has_value() && !lse.has_value() && !sinks.has_value(),
         "row_attention: one part has out, several have part_out");
  expect(parts > 0 && first_part >= 0 && first_part + parts <= all_parts,
         "parts: expected some of all");
  expect_outputs(place, p, q, v.size(2), out, lse, part_out, part_lse, sinks, all_parts);
  p.first_part = first_part, p.parts = parts;
  p.q_row = q.stride(0), p.q_head = q.stride(1), p.first_pos = first_pos, p.window = window;
  p.scale_log2 = scales.score, p.cap_log2 = scales.cap;
  if (tiles.size(0) == 0) return;
  by_queries(q, std::max(p.k.dim, p.v.dim), [&](auto type, auto size) {
    row_attention<decltype(type), decltype(size)::value>(p, tiles.size(0), place.stream());
  });
  place.expect_launched();
}

void join(TensorView part_out, TensorView part_lse, Optional<TensorView> sinks, TensorView out,
          Optional<TensorView> lse) {
  const Place place(out);
  expect(out.ndim() == 3 && (is(out, kDLBfloat, 16) || is(out, kDLFloat, 16)), OUT);
  expect(part_lse.ndim() == 3 && part_lse.size(0) > 0, PARTS);
  Rows p{};
  p.rows = out.size(0), p.heads = out.size(1), p.v.dim = out.size(2), p.parts = part_lse.size(0);
  expect(p.v.dim % 2 == 0, OUT);
  expect_outputs(place, p, out, p.v.dim, out, lse, part_out, part_lse, sinks, p.parts);
  if (p.rows == 0) return;
  by_queries(out, 0, [&](auto type, auto) { join_parts<decltype(type)>(p, place.stream()); });
  place.expect_launched();
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(row_attention, attend);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(join_parts, join);

}  // namespace blend::cuda
