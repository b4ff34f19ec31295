// The launchers and kernels of csrc/cuda for the CPU, in one unit, and how the emulator runs them.
#define BLEND_EMULATED 1

#include "../cuda/attention_mass.cu"
#include "../cuda/deltas.cu"
#include "../cuda/gather.cu"
#include "../cuda/join_parts.cu"
#include "../cuda/latent_attention.cu"
#include "../cuda/rotate_scatter.cu"
#include "../cuda/row_attention.cu"
#include "../cuda/select.cu"

namespace {

// How the next launches run (block.h: Settings).
void emulate(int64_t order, int64_t early_copies) {
  emulator::settings = {static_cast<int>(order), early_copies != 0};
}

// How much shared memory a block can have from now on, in bytes.
void emulate_shared(int64_t bytes) { emulator::most_shared = bytes; }

// Launches since the module was loaded.
int64_t launches() { return emulator::counts.launches; }

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(emulate, emulate);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(emulate_shared, emulate_shared);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(launches, launches);
