// The bf16 kernels over the model of the tile registers: the same loops, on every machine.
#include <cstdint>
#include <cstring>

#include "bf16_product.h"
#include "tile_registers.h"

#define CE_REGISTERS amx_model

namespace contrastive_ext {
namespace amx_model {

struct Registers {
  ModelRegisters model;
  void load_configuration() {
    for (int t = 0; t < ModelRegisters::kRegisters; ++t) model.configure(t, kTileRows, kTileDepth * sizeof(uint16_t));
  }
  void release() {
    for (int t = 0; t < ModelRegisters::kRegisters; ++t) model.configure(t, 0, 0);
  }
  template <int t>
  void zero() {
    model.zero(t);
  }
  template <int t>
  void load(const void* at, int64_t row_bytes) {
    model.load(t, at, row_bytes);
  }
  template <int t>
  void store(void* at, int64_t row_bytes) {
    model.store(t, at, row_bytes);
  }
  template <int c, int a, int b>
  void dot() {
    model.dot(c, a, b);
  }
};

}  // namespace amx_model
}  // namespace contrastive_ext

#include "bf16_kernels.h"

namespace contrastive_ext {
namespace amx_model {
namespace {
const Bf16Kernels kKernels = {bf16_product, bf16_split, bf16_cut};
}
const Bf16Kernels* const kBf16Kernels = &kKernels;
}  // namespace amx_model
}  // namespace contrastive_ext
