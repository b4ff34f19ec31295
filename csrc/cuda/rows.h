// What the launchers of attention of rows check, and what they fill in.
#pragma once

#include "attention.h"
#include "rows.cuh"

namespace blend::cuda {

inline constexpr auto OUT = "out: expected [rows, heads, value dim], dense, of q's dtype, aligned";
inline constexpr auto LSE = "lse: expected float32 [rows, heads]";
inline constexpr auto SINKS = "sinks: expected float32 [heads]";
inline constexpr auto PARTS =
    "part_out, part_lse: expected float32 [parts, rows, heads, dim], [.. heads]";

// What both launchers fill in, `parts` being all there are. out, or parts: one of the two.
inline void expect_outputs(const Place& place, Rows& p, const TensorView& like, int64_t value_dim,
                           const Optional<TensorView>& out, const Optional<TensorView>& lse,
                           const Optional<TensorView>& part_out,
                           const Optional<TensorView>& part_lse, const Optional<TensorView>& sinks,
                           int64_t parts) {
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
// first_part .. first_part + parts of all_parts are computed, or, with `out`, all of it as one. k
// is checked, and v, the head of a pool, fits it.
inline Rows expect_rows(const Place& place, const TensorView& q, const TensorView& k, const Head& v,
                        const int64_t* slots, int64_t keys, const TensorView& row_pos,
                        const Optional<TensorView>& key_pos, const TensorView& tiles,
                        const Optional<TensorView>& sinks, const Optional<TensorView>& out,
                        const Optional<TensorView>& lse, const Optional<TensorView>& part_out,
                        const Optional<TensorView>& part_lse, int64_t first_part, int64_t parts,
                        int64_t all_parts, int64_t first_pos, int64_t window, double scale,
                        double cap) {
  const Scale scales(scale, cap);
  Rows p{};
  p.rows = q.size(0), p.heads = q.size(1), p.group = q.size(1) / k.size(1), p.dim = q.size(2);
  p.q = q.data_ptr(), p.k = head_of(q, k, slots), p.v = v;
  p.row_pos = place.indices(row_pos, p.rows, "q_pos: expected int64 [rows]");
  if (key_pos.has_value()) p.key_pos = place.indices(*key_pos, keys, "key_pos: expected int64 [n]");
  expect(tiles.ndim() == 2 && tiles.size(1) == 5, "tiles: expected int64 [tiles, 5]");
  p.tiles = place.indices(tiles, tiles.numel(), "tiles: expected int64 [tiles, 5]");
  expect(out.has_value() ? !part_out.has_value() && parts == 1
                         : part_out.has_value() && !lse.has_value() && !sinks.has_value(),
         "row_attention: one part has out, several have part_out");
  expect(parts > 0 && first_part >= 0 && first_part + parts <= all_parts,
         "parts: expected some of all");
  expect_outputs(place, p, q, v.dim, out, lse, part_out, part_lse, sinks, all_parts);
  p.first_part = first_part, p.parts = parts;
  p.q_row = q.stride(0), p.q_head = q.stride(1), p.first_pos = first_pos, p.window = window;
  p.scale_log2 = scales.score, p.cap_log2 = scales.cap;
  return p;
}

// Slots of `keys` tokens of a pool, or of the whole pool.
struct Slots {
  const int64_t* at = nullptr;
  int64_t keys;
  Slots(const Place& place, const Optional<TensorView>& slots, const TensorView& k)
      : keys(slots.has_value() ? (*slots).numel() : k.size(0)) {
    if (slots.has_value()) at = place.indices(*slots, keys, "kv_slots: expected int64 [n]");
  }
};

}  // namespace blend::cuda
