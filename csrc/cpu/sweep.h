// The one tile loop: row blocks handed out from a counter, column tiles in order, column results added in a fixed
// order.
//
// Threads take row blocks as they become free, so which thread works on which block is a matter of chance; the result
// is not. What a tile adds to its rows stays with the thread that owns the block. What it adds to its columns waits for
// its turn: column tile J takes block b only after block b - 1. Every block sweeps its tiles from left to right and
// blocks start in order, so a thread follows the previous block one tile behind and rarely waits, column results need
// no private copies, and the order of the sums is the same for any number of threads.
#pragma once

#include <atomic>
#include <exception>
#include <memory>
#include <thread>

#include "../compat.h"

namespace contrastive_ext {

struct TileRange {
  int64_t i0, i1;  // rows
  int64_t j0, j1;  // columns
  bool first;      // first tile of its row block
  bool upper;      // holds part of the diagonal of one set
};

struct TileGrid {
  int64_t rows, cols;
  int64_t block_rows, tile_cols;
  bool triangle;        // one set: only pairs on or above the diagonal, each serves its row and its column
  bool column_results;  // columns take results too
  int64_t depth;        // D, to keep small problems on one thread

  int64_t row_blocks() const { return (rows + block_rows - 1) / block_rows; }
  int64_t col_tiles() const { return (cols + tile_cols - 1) / tile_cols; }
};

// Whose turn it is at every column tile.
class Turns {
 public:
  explicit Turns(int64_t tiles) : next_block_(new std::atomic<int64_t>[static_cast<size_t>(tiles)]) {
    for (int64_t t = 0; t < tiles; ++t) next_block_[t].store(0, std::memory_order_relaxed);
  }
  // False when another thread failed: its turns will never come.
  bool wait(int64_t tile, int64_t block) const {
    for (int spins = 0; next_block_[tile].load(std::memory_order_acquire) != block; ++spins) {
      if (failed_.load(std::memory_order_relaxed)) return false;
      if (spins > 256) std::this_thread::yield();
    }
    return true;
  }
  void pass(int64_t tile, int64_t block) { next_block_[tile].store(block + 1, std::memory_order_release); }
  void fail() { failed_.store(true, std::memory_order_relaxed); }

 private:
  std::unique_ptr<std::atomic<int64_t>[]> next_block_;
  std::atomic<bool> failed_{false};
};

// Threads that `grid` is worth: the same answer for both directions, because products of a library may differ in the
// last bit between its own threads and ours (choose_tile_sizes says why that matters).
inline int64_t sweep_threads(const TileGrid& grid) {
  constexpr double kFlopsPerThread = 1e6;  // about 10 us, twice what waking a thread costs
  const double flops =
      4.0 * static_cast<double>(grid.rows) * static_cast<double>(grid.cols) * static_cast<double>(grid.depth);
  int64_t threads = torch::stable::get_num_threads();
  if (threads > grid.row_blocks()) threads = grid.row_blocks();
  if (static_cast<double>(threads) > flops / kFlopsPerThread) threads = static_cast<int64_t>(flops / kFlopsPerThread);
  return threads < 1 ? 1 : threads;
}

// Runs worker.begin(i0, i1), worker.compute(tile) and worker.add_columns(tile) for every tile of the block,
// worker.end(i0, i1). make_worker() is called once per thread. add_columns runs in block order for every column; in a
// triangle nobody else adds to the columns [i0, i1) once end(i0, i1) runs.
template <class MakeWorker>
void sweep_tiles(const TileGrid& grid, const MakeWorker& make_worker) {
  if (grid.rows == 0) return;
  const int64_t blocks = grid.row_blocks(), tiles = grid.col_tiles();
  Turns turns(tiles);
  std::atomic<int64_t> next_block{0};
  std::exception_ptr error;
  std::atomic<bool> has_error{false};

  auto run_blocks = [&] {
    auto worker = make_worker();
    for (int64_t block; (block = next_block.fetch_add(1)) < blocks;) {
      const int64_t i0 = block * grid.block_rows,
                    i1 = i0 + grid.block_rows < grid.rows ? i0 + grid.block_rows : grid.rows;
      worker.begin(i0, i1);
      const int64_t first = grid.triangle ? i0 / grid.tile_cols : 0;
      for (int64_t t = first; t < tiles; ++t) {
        TileRange tile;
        tile.i0 = i0, tile.i1 = i1;
        tile.j0 = t * grid.tile_cols;
        tile.j1 = tile.j0 + grid.tile_cols < grid.cols ? tile.j0 + grid.tile_cols : grid.cols;
        if (grid.triangle && tile.j0 < i0) tile.j0 = i0;
        tile.first = t == first;
        tile.upper = grid.triangle && tile.j0 < i1;
        worker.compute(tile);
        if (!grid.column_results) continue;
        if (!turns.wait(t, block)) return;
        worker.add_columns(tile);
        turns.pass(t, block);
      }
      worker.end(i0, i1);
    }
  };

  torch::stable::parallel_for(0, sweep_threads(grid), 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      try {
        run_blocks();
      } catch (...) {
        if (!has_error.exchange(true)) error = std::current_exception();
        turns.fail();
      }
    }
  });
  if (error) std::rethrow_exception(error);
}

}  // namespace contrastive_ext
