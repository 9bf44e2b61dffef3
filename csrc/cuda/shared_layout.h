// How a tile of 16-bit rows lies in shared memory, and how that is told to WGMMA.
//
// TMA with 128-byte swizzle takes boxes of 64 features (128 bytes): a tile [rows, 128] is two boxes, one after the
// other. Eight rows of a box, 1024 bytes, are an atom; inside it the 16-byte chunk c of row r lies at chunk c ^ (r %
// 8), so that a column of chunks touches every bank once. An atom starts at a multiple of 1024 bytes.
//
// The matrix descriptor of WGMMA (PTX ISA, "Matrix Descriptor Format"):
//
//   bits  0-13  start address / 16
//        16-29  leading dimension offset / 16
//        32-45  stride dimension offset / 16: from one atom of 8 rows to the next, 1024 bytes
//        49-51  base offset: 0, atoms are aligned
//        62-63  swizzle: 1 is 128 bytes
//
// The same tile is an operand in two ways. Rows times rows (scores) sums over features, which lie in the fastest
// direction: K-major, the leading offset is not used with a swizzle, 1 by convention. Weights times rows sums over the
// tile's rows: MN-major, the leading offset leads from one box to the next. The upper word is the same in both ways and
// never changes, so that addresses are arithmetic of one register.
//
// A step of 16 features moves the start address by 32 bytes inside the atom: the hardware applies the exclusive or to
// the address it has computed, so a start in the middle of a row is still read through the same permutation.
#pragma once

#include <cstdint>

#include "../host_device.h"

namespace contrastive_ext {
namespace hopper {

constexpr int kBoxFeatures = 64;  // of 2 bytes: the 128 bytes of the swizzle
constexpr int kAtomBytes = 1024;  // 8 rows of a box
constexpr int kStep = 16;         // features or rows that one WGMMA sums over

// Byte offset of feature `feature` of row `row` in a tile of `rows` rows.
constexpr CE_HOST_DEVICE int swizzled_offset(int rows, int row, int feature) {
  const int box = feature / kBoxFeatures, byte = feature % kBoxFeatures * 2;
  return box * rows * 128 + row * 128 + ((byte / 16) ^ (row % 8)) * 16 + byte % 16;
}

constexpr uint32_t kDescriptorHigh = kAtomBytes >> 4 | uint32_t{1} << 30;

constexpr CE_HOST_DEVICE uint64_t matrix_descriptor(uint32_t low) { return uint64_t{kDescriptorHigh} << 32 | low; }

// Lower words of the operand that starts at shared address `address`, a multiple of kAtomBytes: rows with features to
// sum over, and a tile of `rows` rows to sum over.
constexpr CE_HOST_DEVICE uint32_t k_major(uint32_t address) { return (address & 0x3FFFF) >> 4 | uint32_t{1} << 16; }
constexpr CE_HOST_DEVICE uint32_t mn_major(uint32_t address, int rows) {
  return (address & 0x3FFFF) >> 4 | static_cast<uint32_t>(rows * 128 >> 4) << 16;
}

// What to add to a lower word to move the start by `bytes`. Shared memory ends below 2^18 bytes: no carry leaves the
// field.
constexpr CE_HOST_DEVICE uint32_t descriptor_offset(int bytes) { return static_cast<uint32_t>(bytes) >> 4; }

// Byte offset of the 16 features of step `step` in a tile of `rows` rows, and of its 16 rows of that step.
constexpr CE_HOST_DEVICE int step_offset(int rows, int step) {
  const int feature = step * kStep;
  return feature / kBoxFeatures * rows * 128 + feature % kBoxFeatures * 2;
}
constexpr CE_HOST_DEVICE int row_step_offset(int step) { return step * kStep * 128; }

// Which logits of a tile [64, 8 n] a thread of the warpgroup holds after WGMMA: its value 4 g + 2 h + e is row
// row + 8 h, column column + 8 g + e.
struct Fragment {
  int row, column;
  constexpr CE_HOST_DEVICE explicit Fragment(int thread)
      : row(thread / 32 * 16 + thread % 32 / 4), column(thread % 4 * 2) {}
};

}  // namespace hopper
}  // namespace contrastive_ext
