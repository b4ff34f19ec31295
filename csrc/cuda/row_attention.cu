// Launcher of row_attention.cuh.
#include "row_attention.cuh"
#include "rows.h"

namespace blend::cuda {
namespace {

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
  const Slots of(place, slots, k);
  const Rows p = expect_rows(place, q, k, head_of(q, v, of.at), of.at, of.keys, row_pos, key_pos,
                             tiles, sinks, out, lse, part_out, part_lse, first_part, parts,
                             all_parts, first_pos, window, scale, cap);
  if (tiles.size(0) == 0) return;
  by_queries(q, std::max(p.k.dim, p.v.dim), [&](auto type, auto size) {
    row_attention<decltype(type), decltype(size)::value>(p, tiles.size(0), place.stream());
  });
  place.expect_launched();
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(row_attention, attend);

}  // namespace blend::cuda
