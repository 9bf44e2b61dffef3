// Who computes what: a block owns one tile of rows and one split of the column tiles.
//
// A plain grid (row tile, split), not a persistent one: all blocks of a launch have the same work to within one tile,
// so a queue of work would only re-create this order. (A sweep of the upper triangle will need one: there work
// differs.)
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

// How many splits finish first: waves of blocks, each as long as its column tiles plus what a block costs anyway (its
// start, the load of its rows, the first tile's latency: about three tiles of 1024 cycles). The smallest such number,
// so that there are few partial results to merge.
inline int choose_splits(int row_tiles, int column_tiles, int processors) {
  constexpr int64_t kStart = 3;
  int best = 1;
  int64_t best_time = INT64_MAX;
  const int most = column_tiles < processors ? column_tiles : processors;
  for (int splits = 1; splits <= most; ++splits) {
    const int64_t waves = (int64_t{row_tiles} * splits + processors - 1) / processors;
    const int64_t time = waves * ((column_tiles + splits - 1) / splits + kStart);
    if (time < best_time) best_time = time, best = splits;
  }
  return best;
}

}  // namespace hopper
}  // namespace contrastive_ext
