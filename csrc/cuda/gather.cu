// Launchers of gather.cuh.
#include "gather.cuh"
#include "launch.h"

namespace blend::cuda {
namespace {

Words words_of(int64_t k_bytes, int64_t v_bytes) {
  expect(k_bytes >= 0 && v_bytes >= 0 && k_bytes % 16 == 0 && v_bytes % 16 == 0,
         "a token's K and V: whole rows of 16 bytes");
  return {static_cast<int>(k_bytes / 16), static_cast<int>(v_bytes / 16)};
}

// Dense, aligned to 16 bytes; null where there is nothing to write.
char* aligned(const Place& place, const TensorView& t, int64_t bytes, const char* message) {
  auto* at = reinterpret_cast<char*>(place.dense<uint8_t>(t, bytes, kDLUInt, message));
  expect(reinterpret_cast<uintptr_t>(at) % 16 == 0, message);
  return at;
}

// layers, chunks: gather.cuh. What is in them must fit the other tensors: the host made them.
// most: tokens of the longest chunk.
void gather_chunks(TensorView out, TensorView layers, TensorView slots, TensorView chunks,
                   int64_t k_bytes, int64_t v_bytes, int64_t most) {
  const Place place(out);
  expect(layers.ndim() == 2 && layers.size(0) == 4, "layers: expected int64 [4, layers]");
  expect(chunks.ndim() == 2 && chunks.size(1) == 3, "chunks: expected int64 [chunks, 3]");
  const int64_t count = layers.size(1), parts = chunks.size(0);
  expect(count <= 65535 && parts <= 65535, "layers, chunks: at most 65535");
  const Gather p{place.indices(layers, 4 * count, "layers: expected int64 [4, layers]"),
                 count,
                 place.indices(slots, slots.numel(), "slots: expected int64 [n]"),
                 place.indices(chunks, 3 * parts, "chunks: expected int64 [chunks, 3]"),
                 aligned(place, out, out.numel(), "out: expected uint8, dense and aligned"),
                 words_of(k_bytes, v_bytes)};
  if (out.numel() == 0) return;
  gather(p, parts, most, place.stream());
  place.expect_launched();
}

// places: int64 [4, n] as rotate_from has it. k, v: uint8 [count * bytes]; index: int64 [count].
void take_from(TensorView places, int64_t layer, int64_t blocks, TensorView k, TensorView v,
               Optional<TensorView> index, int64_t count, int64_t k_bytes, int64_t v_bytes) {
  const Place place(v);
  expect(layer >= 0 && count >= 0, "layer, count: not negative");
  expect(places.ndim() == 2 && places.size(0) == 4, "places: expected int64 [4, n]");
  const int64_t n = places.size(1);
  expect(index.has_value() || count == n, "count: as many as there are places");
  const Take p{
      place.indices(places, 4 * n, "places: expected int64 [4, n]"),
      n,
      layer,
      index.has_value() ? place.indices(*index, count, "index: expected int64 [count]") : nullptr,
      count,
      aligned(place, k, count * k_bytes, "k: expected uint8 [count * k_bytes], aligned"),
      aligned(place, v, count * v_bytes, "v: expected uint8 [count * v_bytes], aligned"),
      words_of(k_bytes, v_bytes)};
  if (count == 0) return;
  take(p, blocks, place.stream());
  place.expect_launched();
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(gather_chunks, gather_chunks);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(take_from, take_from);

}  // namespace blend::cuda
