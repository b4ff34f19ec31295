// Launchers of deviation.cuh and select.cuh: what chooses the rows of HKVD.
#include "deviation.cuh"
#include "launch.h"
#include "select.cuh"

namespace blend::cuda {
namespace {

void v_deviation(TensorView v, TensorView fresh, TensorView src, TensorView out) {
  const Place place(v);
  place.expect_pool(v, "v: expected a pool [slots, heads, dim] with rows of 16 bytes");
  const int64_t n = fresh.numel();
  Deviation p{};
  p.v = static_cast<const char*>(v.data_ptr()), p.v_stride = slot_bytes(v);
  p.fresh = place.indices(fresh, n, "fresh_slots: expected int64 [n]");
  p.src = place.indices(src, n, "src_slots: expected int64 [n]");
  p.heads = v.size(1), p.v_dim = v.size(2), p.n = n;
  p.out = place.dense<float>(out, n, kDLFloat, "out: expected float32 [n]");
  if (n == 0) return;
  by_pool_dtype(v, [&](auto type) { deviation<decltype(type)>(p, true, place.stream()); });
  place.expect_launched();
}

void kv_deviation(TensorView k, TensorView v, TensorView fresh, TensorView src, TensorView cos,
                  TensorView sin, TensorView out, int64_t rotary_dim, int64_t neox) {
  const Place place(k);
  constexpr auto POOL = "k, v: expected pools [slots, heads, dim] with rows of 16 bytes";
  place.expect_pool(k, POOL), place.expect_pool(v, POOL);
  expect(k.size(0) == v.size(0) && k.size(1) == v.size(1) && k.dtype() == v.dtype(),
         "k and v: of the same slots, heads and dtype");
  const int64_t n = fresh.numel(), step = 32 / (k.dtype().bits / 8);
  expect(rotary_dim > 0 && rotary_dim % step == 0 && rotary_dim <= k.size(2),
         "rotary_dim: two rows of 16 bytes, within the head size");
  constexpr auto ANGLES = "cos, sin: expected float32 [n, rotary_dim / 2]";
  const Deviation p{static_cast<const char*>(k.data_ptr()),
                    static_cast<const char*>(v.data_ptr()),
                    slot_bytes(k),
                    slot_bytes(v),
                    place.indices(fresh, n, "fresh_slots: expected int64 [n]"),
                    place.indices(src, n, "src_slots: expected int64 [n]"),
                    place.floats(cos, n * rotary_dim / 2, ANGLES),
                    place.floats(sin, n * rotary_dim / 2, ANGLES),
                    static_cast<int>(k.size(1)),
                    static_cast<int>(k.size(2)),
                    static_cast<int>(v.size(2)),
                    static_cast<int>(rotary_dim),
                    n,
                    place.dense<float>(out, n, kDLFloat, "out: expected float32 [n]")};
  if (n == 0) return;
  by_pool_dtype(k, [&](auto type) { deviation<decltype(type)>(p, neox != 0, place.stream()); });
  place.expect_launched();
}

// segments: int64 [count, 4] (select.cuh). Their sums must fit the other tensors: the host made
// them. most: scores of the longest segment.
void select_rows(TensorView scores, TensorView segments, TensorView chosen, TensorView rest,
                 TensorView runs, int64_t most) {
  const Place place(scores);
  const int64_t total = scores.numel(), count = segments.size(0);
  expect(segments.ndim() == 2 && chosen.numel() + rest.numel() == total,
         "chosen and rest: together as many as there are scores");
  const Selection p{
      place.dense<const float>(scores, total, kDLFloat, "scores: expected float32 [total]"),
      place.indices(segments, 4 * count, "segments: expected int64 [count, 4]"),
      place.dense<int64_t>(chosen, chosen.numel(), kDLInt, "chosen: expected int64"),
      place.dense<int64_t>(rest, rest.numel(), kDLInt, "rest: expected int64"),
      place.dense<uint8_t>(runs, total, kDLUInt, "runs: expected uint8 [total]")};
  if (total == 0) return;
  select(p, static_cast<int>(count), most, place.stream());
  place.expect_launched();
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(v_deviation, v_deviation);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(kv_deviation, kv_deviation);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(select_rows, select_rows);

}  // namespace blend::cuda
