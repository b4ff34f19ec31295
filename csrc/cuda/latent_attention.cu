// Launcher of latent_attention.cuh.
#include "latent_attention.cuh"
#include "rows.h"

namespace blend::cuda {
namespace {

// k: the pool [slots, 1, rank + rotated]; values are the first value_dim columns of it. Else as
// row_attention.
void attend_latents(TensorView q, TensorView k, Optional<TensorView> slots, TensorView row_pos,
                    Optional<TensorView> key_pos, TensorView tiles, Optional<TensorView> sinks,
                    Optional<TensorView> out, Optional<TensorView> lse,
                    Optional<TensorView> part_out, Optional<TensorView> part_lse, int64_t value_dim,
                    int64_t first_part, int64_t parts, int64_t all_parts, int64_t first_pos,
                    int64_t window, double scale, double cap) {
  const Place place(q);
  expect_queries(place, q, k);
  expect(k.size(1) == 1 && k.size(2) <= LATENT_KEY, "k: one head of at most 576 columns");
  expect(value_dim > 0 && value_dim % 2 == 0 &&
             value_dim <= std::min<int64_t>(LATENT_VALUE, k.size(2)),
         "value_dim: an even number of k's columns, at most 512");
  const Slots of(place, slots, k);
  Head v = head_of(q, k, of.at);
  v.dim = value_dim;
  const Rows p =
      expect_rows(place, q, k, v, of.at, of.keys, row_pos, key_pos, tiles, sinks, out, lse,
                  part_out, part_lse, first_part, parts, all_parts, first_pos, window, scale, cap);
  if (tiles.size(0) == 0) return;
  by_queries(q, 0, [&](auto type, auto) {
    latent_attention<decltype(type)>(p, tiles.size(0), place.most_shared(), place.stream());
  });
  place.expect_launched();
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(latent_attention, attend_latents);

}  // namespace blend::cuda
