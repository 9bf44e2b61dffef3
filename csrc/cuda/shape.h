// Sizes of a sweep over 16-bit rows that stay in shared memory as a whole: a block has 128 rows of u, 64 for each of
// its two consumer warpgroups, and meets tiles of columns (rows of v) that come through a ring of buffers.
#pragma once

#include "shared_layout.h"

namespace contrastive_ext {
namespace hopper {

constexpr int kRows = 128;  // of a block
constexpr int kConsumers = 2, kConsumerThreads = 128, kConsumerRows = kRows / kConsumers;
constexpr int kWarps = kConsumers * kConsumerThreads / 32;  // of the consumers

// kVectors: numbers that come with every column of a tile; kSums: numbers that every warp leaves for it.
template <int kFeatures_, int kColumns_, int kVectors_ = 0, int kSums_ = 0>
struct Shape {
  static constexpr int kFeatures = kFeatures_, kColumns = kColumns_, kVectors = kVectors_, kSums = kSums_;
  static constexpr int kLogits = kColumns / 2;  // of a thread and tile: two rows, a quarter of their columns
  static constexpr int kRowBytes = kRows * kFeatures * 2, kTileBytes = kColumns * kFeatures * 2;
  static constexpr int kVectorBytes = kVectors * kColumns * 4;
  // A tile lasts two turns, 1024 cycles or more: three ahead cover the latency of memory. 128 KiB is what rows leave.
  static constexpr int kStages = 4 * kTileBytes <= 128 * 1024 ? 4 : 2;
  static_assert(kFeatures % kBoxFeatures == 0 && kTileBytes % kAtomBytes == 0, "every tile starts an atom");
};

// Two tiles by turns: one is added up while the next is written.
template <class Shape, int kSums = Shape::kSums>
struct WarpSums {
  float sums[2][kSums][kWarps][Shape::kColumns];
  static_assert(sizeof(sums) % kAtomBytes == 0, "tiles follow, and every tile starts an atom");
};
template <class Shape>
struct WarpSums<Shape, 0> {};

template <class Shape>
struct Shared : WarpSums<Shape> {
  uint8_t rows[Shape::kRowBytes];
  uint8_t columns[Shape::kStages][Shape::kTileBytes];
  alignas(16) float vectors[Shape::kStages][Shape::kVectors ? Shape::kVectors : 1][Shape::kColumns];
  uint64_t rows_full, full[Shape::kStages], empty[Shape::kStages];
};

template <class Shape>
constexpr int kSharedBytes = sizeof(Shared<Shape>) + kAtomBytes;  // room to align the first tile

}  // namespace hopper
}  // namespace contrastive_ext
