// The kernels of faults.cuh in the emulator, which must find each fault.
#define BLEND_EMULATED 1

#include "faults.cuh"

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/function.h>

namespace {

using tvm::ffi::TensorView;

const float* floats(const TensorView& t) { return static_cast<const float*>(t.data_ptr()); }
float* target(const TensorView& t) { return static_cast<float*>(t.data_ptr()); }

template <int FAULT = NONE>
void with_fault(int64_t fault, const TensorView& x, const TensorView& out) {
  if (fault == FAULT) {
    if (FAULT < SHUFFLE_OF_HALF_A_WARP) {
      const int steps = x.numel() / 256;
      launch(pipeline<FAULT>, Extent{1}, Extent{64}, 2048, nullptr, floats(x), target(out), steps);
    } else {
      launch(warp_sum<FAULT>, Extent{1}, Extent{64}, 8, nullptr, floats(x), target(out));
    }
  } else if constexpr (FAULT + 1 < FAULTS) {
    with_fault<FAULT + 1>(fault, x, out);
  }
}

void run(int64_t fault, TensorView x, TensorView out) { with_fault(fault, x, out); }

void sums(TensorView x, TensorView out) {
  launch(warp_sum<NONE>, Extent{1}, Extent{64}, 8, nullptr, floats(x), target(out));
}

void matrices(TensorView a, TensorView b, TensorView out) {
  const auto go = [&](auto type) {
    using T = decltype(type);
    launch(product<T>, Extent{1}, Extent{32}, 1024, nullptr, static_cast<const T*>(a.data_ptr()),
           static_cast<const T*>(b.data_ptr()), target(out));
  };
  if (a.dtype().code == kDLBfloat) {
    go(__nv_bfloat16());
  } else {
    go(__half());
  }
}

// A launch of `threads` threads and `shared` bytes that the hardware would refuse.
void refused(int64_t threads, int64_t shared, TensorView x, TensorView out) {
  launch(warp_sum<NONE>, Extent{1}, Extent{int(threads)}, shared, nullptr, floats(x), target(out));
}

void emulate(int64_t order, int64_t early_copies) {
  emulator::settings = {static_cast<int>(order), early_copies != 0};
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(run, run);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(sums, sums);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(matrices, matrices);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(refused, refused);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(emulate, emulate);
