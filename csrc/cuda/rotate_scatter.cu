// Launchers of rotate_scatter.cuh.
#include "launch.h"
#include "rotate_scatter.cuh"

namespace blend::cuda {
namespace {

// What both launchers share: the pool, the rotation and what is added.
struct Call {
  Place place;
  Target target;
  Angles angles;
  Bias bias{};
  Heads heads;
  int64_t n;

  Call(const TensorView& k, const TensorView& v, const TensorView& dst, const TensorView& cos,
       const TensorView& sin, const Optional<TensorView>& runs, int64_t rotary_dim)
      : place(k), n(dst.numel()) {
    constexpr auto POOL = "k, v: expected pools [slots, heads, dim] with rows of 16 bytes";
    place.expect_pool(k, POOL), place.expect_pool(v, POOL);
    expect(k.size(0) == v.size(0) && k.size(1) == v.size(1) && k.dtype() == v.dtype(),
           "k and v: of the same slots, heads and dtype");
    const int64_t step = 32 / (k.dtype().bits / 8);
    expect(rotary_dim > 0 && rotary_dim % step == 0 && rotary_dim <= k.size(2),
           "rotary_dim: two rows of 16 bytes, within the head size");
    constexpr auto ANGLES = "cos, sin: expected float32 [n, rotary_dim / 2]";
    angles = {place.floats(cos, n * rotary_dim / 2, ANGLES),
              place.floats(sin, n * rotary_dim / 2, ANGLES)};
    target = {static_cast<char*>(k.data_ptr()),
              static_cast<char*>(v.data_ptr()),
              place.indices(dst, n, "dst_slots: expected int64 [n]"),
              slot_bytes(k),
              slot_bytes(v),
              nullptr};
    if (runs.has_value()) {
      target.runs = place.dense<uint8_t>(*runs, n, kDLUInt, "runs: expected uint8 [n]");
    }
    heads = {static_cast<int>(k.size(1)), static_cast<int>(k.size(2)), static_cast<int>(v.size(2)),
             static_cast<int>(rotary_dim)};
  }

  void add(const TensorView& k, const TensorView& v, const TensorView& group, const TensorView& cos,
           const TensorView& sin) {
    expect(k.ndim() == 3 && v.ndim() == 3, "bias: expected float32 [groups, heads, dim]");
    const int64_t cells = k.size(0) * heads.heads;
    constexpr auto ANGLES = "bias's cos, sin: expected float32 [n, rotary_dim / 2]";
    bias = {
        place.floats(k, cells * heads.dim, "bias of K: expected float32 [groups, heads, dim]"),
        place.floats(v, cells * heads.v_dim, "bias of V: expected float32 [groups, heads, dim]"),
        place.dense<const int32_t>(group, n, kDLInt, "group: expected int32 [n]"),
        {place.floats(cos, n * heads.rotary_dim / 2, ANGLES),
         place.floats(sin, n * heads.rotary_dim / 2, ANGLES)}};
  }

  void run(const TensorView& k, const Source& source, bool halves, int64_t blocks) const {
    if (n == 0) return;
    by_pool_dtype(k, [&](auto type) {
      rotate_scatter<decltype(type)>(source, target, angles, bias, heads, n, halves, blocks,
                                     place.stream());
    });
    place.expect_launched();
  }
};

using MaybeBias = Optional<TensorView>;

void add_bias(Call& call, const MaybeBias& k, const MaybeBias& v, const MaybeBias& group,
              const MaybeBias& cos, const MaybeBias& sin) {
  const int given =
      k.has_value() + v.has_value() + group.has_value() + cos.has_value() + sin.has_value();
  expect(given == 0 || given == 5, "a bias has K, V, group, cos and sin");
  if (given) call.add(*k, *v, *group, *cos, *sin);
}

void rotate_copy(TensorView k, TensorView v, TensorView src, TensorView dst, TensorView cos,
                 TensorView sin, MaybeBias bias_k, MaybeBias bias_v, MaybeBias group,
                 MaybeBias bias_cos, MaybeBias bias_sin, Optional<TensorView> runs,
                 int64_t rotary_dim, int64_t neox) {
  Call call(k, v, dst, cos, sin, runs, rotary_dim);
  add_bias(call, bias_k, bias_v, group, bias_cos, bias_sin);
  const Source source{call.target.k,
                      call.target.v,
                      call.place.indices(src, call.n, "src_slots: expected int64 [n]"),
                      slot_bytes(k),
                      slot_bytes(v),
                      nullptr,
                      0};
  call.run(k, source, neox != 0, 0);
}

// places: int64 [4, n], for each token the addresses of its K and V in layer 0 and their steps in
// bytes from layer to layer. Each address and step is a multiple of 16. blocks: at most so many, 0:
// as many as there is work for.
void rotate_from(TensorView places, int64_t layer, int64_t blocks, TensorView k, TensorView v,
                 TensorView dst, TensorView cos, TensorView sin, MaybeBias bias_k, MaybeBias bias_v,
                 MaybeBias group, MaybeBias bias_cos, MaybeBias bias_sin, Optional<TensorView> runs,
                 int64_t rotary_dim, int64_t neox) {
  Call call(k, v, dst, cos, sin, runs, rotary_dim);
  add_bias(call, bias_k, bias_v, group, bias_cos, bias_sin);
  expect(layer >= 0, "layer: not negative");
  const Source source{
      nullptr, nullptr, nullptr,
      0,       0,       call.place.indices(places, 4 * call.n, "places: expected int64 [4, n]"),
      layer};
  call.run(k, source, neox != 0, blocks);
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(rotate_copy, rotate_copy);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(rotate_from, rotate_from);

}  // namespace blend::cuda
