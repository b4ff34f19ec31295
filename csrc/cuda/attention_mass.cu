// Launcher of attention_mass.cuh.
#include "attention_mass.cuh"
#include "launch.h"

namespace blend::cuda {
namespace {

constexpr double LOG2_E = 1.4426950408889634;

KeyType key_type(const TensorView& q, const TensorView& k) {
  if (k.dtype() == q.dtype()) return KeyType::SAME;
  if (is(k, kDLFloat8_e4m3fn, 8)) return KeyType::E4M3;
  expect(is(k, kDLFloat8_e5m2, 8), "k: of q's dtype, float8_e4m3fn or float8_e5m2");
  return KeyType::E5M2;
}

template <typename T>
void run(const Mass& p, Stream stream) {
  if (p.dim <= 64) return attention_mass<T, 64>(p, stream);
  if (p.dim <= 128) return attention_mass<T, 128>(p, stream);
  expect(p.dim <= 256, "q: heads of at most 256 elements");
  attention_mass<T, 256>(p, stream);
}

void mass(TensorView q, TensorView k, TensorView slots, TensorView row_pos,
          Optional<TensorView> key_pos, TensorView lse, TensorView weights, TensorView out,
          int64_t first_pos, int64_t window, double scale, double cap) {
  const Place place(q);
  const bool bf16 = is(q, kDLBfloat, 16);
  expect(bf16 || is(q, kDLFloat, 16), "q: expected bfloat16 or float16");
  place.expect_pool(k, "k: expected a pool [slots, heads, dim] with rows of 16 bytes");
  expect(q.ndim() == 3 && q.size(2) == k.size(2) && q.stride(2) == 1,
         "q: expected [rows, heads, dim] of k's head size");
  expect(q.stride(0) % 8 == 0 && q.stride(1) % 8 == 0 &&
             reinterpret_cast<uintptr_t>(q.data_ptr()) % 16 == 0,
         "q: rows of 16 bytes");
  const int64_t rows = q.size(0), heads = q.size(1), kv_heads = k.size(1), n = slots.numel();
  expect(kv_heads > 0 && heads % kv_heads == 0 && heads > 0, "q: a multiple of k's heads");
  Mass p{};
  p.q = q.data_ptr(), p.k = static_cast<const char*>(k.data_ptr());
  p.slots = place.indices(slots, n, "kv_slots: expected int64 [n]");
  p.row_pos = place.indices(row_pos, rows, "q_pos: expected int64 [rows]");
  if (key_pos.has_value()) p.key_pos = place.indices(*key_pos, n, "key_pos: expected int64 [n]");
  p.lse = place.dense<float>(lse, rows * heads, kDLFloat, "lse: expected float32 [rows, heads]");
  p.weights = place.dense<float>(weights, rows, kDLFloat, "weights: expected float32 [rows]");
  p.mass = place.dense<float>(out, kv_heads * n, kDLFloat, "mass: expected float32 [kv heads, n]");
  p.q_row = q.stride(0), p.q_head = q.stride(1);
  p.k_slot = slot_bytes(k), p.k_head = k.size(2) * (k.dtype().bits / 8);
  p.first_pos = first_pos, p.window = window, p.n = n;
  p.rows = rows, p.heads = heads, p.group = heads / kv_heads, p.dim = q.size(2);
  p.scale_log2 = cap > 0 ? scale / cap : scale * LOG2_E, p.cap_log2 = cap > 0 ? cap * LOG2_E : 0;
  p.key_type = key_type(q, k);
  if (n == 0) return;
  if (bf16) {
    run<__nv_bfloat16>(p, place.stream());
  } else {
    run<__half>(p, place.stream());
  }
  place.expect_launched();
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(attention_mass, mass);

}  // namespace blend::cuda
