// Launcher of rows.cuh: what attention of rows has left in parts.
#include "rows.h"

namespace blend::cuda {
namespace {

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

TVM_FFI_DLL_EXPORT_TYPED_FUNC(join_parts, join);

}  // namespace blend::cuda
