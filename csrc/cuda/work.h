// Who computes what.
#pragma once

#include <cstdint>

#include "../host_device.h"

namespace contrastive_ext {
namespace hopper {

struct TileSpan {
  int begin, end;
};

// Split `split` of `splits`: sizes differ by at most one, every tile is in exactly one.
constexpr CE_HOST_DEVICE TileSpan span_of_split(int tiles, int splits, int split) {
  return {static_cast<int>(int64_t{tiles} * split / splits), static_cast<int>(int64_t{tiles} * (split + 1) / splits)};
}

// A block owns one tile of rows and one split of the column tiles of a launch. A plain grid, not a persistent one: all
// blocks of a launch have the same work to within one tile, so a queue of work would only re-create this order.
struct PlainGrid {
  int row_tile, split;
  TileSpan columns;

#if defined(__CUDACC__)
  __device__ explicit PlainGrid(TileSpan tiles)
      : row_tile(blockIdx.x),
        split(blockIdx.y),
        columns(span_of_split(tiles.end - tiles.begin, gridDim.y, blockIdx.y)) {
    columns.begin += tiles.begin, columns.end += tiles.begin;
  }
  static dim3 of(int row_tiles, int splits) { return dim3(row_tiles, splits); }
#endif
};

constexpr CE_HOST_DEVICE int number_of_tiles(int64_t rows, int size) {
  return static_cast<int>((rows + size - 1) / size);
}

// How many splits finish first: waves of blocks, each as long as its column tiles plus what a block costs anyway, in
// tiles: its start, the load of its rows, the first tile's latency, its part of a merge. The smallest such number of at
// most `most`, so that there are few partial results to merge.
inline int choose_splits(int row_tiles, int column_tiles, int processors, int start, int most) {
  int best = 1;
  int64_t best_time = INT64_MAX;
  if (most > column_tiles) most = column_tiles;
  for (int splits = 1; splits <= most; ++splits) {
    const int64_t waves = (int64_t{row_tiles} * splits + processors - 1) / processors;
    const int64_t time = waves * ((column_tiles + splits - 1) / splits + start);
    if (time < best_time) best_time = time, best = splits;
  }
  return best;
}

// Memory that partial results may take where more of them would finish sooner, or in fewer launches.
constexpr int64_t kMostBytes = int64_t{64} << 20;

// Into how many windows of its columns a sweep is cut that leaves `bytes` for a window of all of them.
inline int choose_windows(int column_tiles, int64_t bytes) {
  const int64_t windows = (bytes + kMostBytes - 1) / kMostBytes;
  return static_cast<int>(windows < 1 ? 1 : windows < column_tiles ? windows : column_tiles > 0 ? column_tiles : 1);
}

// The number of splits for a gradient of `bytes`, of which every split leaves a copy: enough to occupy the processors,
// and up to four where that evens out the last wave, but 64 MiB in all.
inline int gradient_splits(int row_tiles, int column_tiles, int processors, int64_t bytes) {
  constexpr int kStart = 6, kMost = 4;
  int most = row_tiles > 0 && processors / row_tiles > kMost ? processors / row_tiles : kMost;
  if (most * bytes > kMostBytes) most = bytes < kMostBytes ? static_cast<int>(kMostBytes / bytes) : 1;
  return choose_splits(row_tiles, column_tiles, processors, kStart, most);
}

}  // namespace hopper
}  // namespace contrastive_ext
