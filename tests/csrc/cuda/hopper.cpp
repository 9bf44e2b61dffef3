// The host side of the Hopper kernels for Python: layouts, masks, partition of the work, merge, and the ring protocol
// played by threads. Built by test_hopper.py without CUDA; never shipped.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "cuda/partials.h"
#include "cuda/ring.h"
#include "cuda/shape.h"
#include "cuda/shared_layout.h"
#include "cuda/terms.h"
#include "cuda/thread_columns.h"
#include "cuda/thread_rows.h"
#include "cuda/thread_weights.h"
#include "cuda/tile_mask.h"
#include "cuda/work.h"
#include "exponent_range.h"

namespace py = pybind11;
using namespace contrastive_ext;
using namespace contrastive_ext::hopper;

namespace {

using Ids = std::optional<py::array_t<int64_t, py::array::c_style | py::array::forcecast>>;

std::vector<int> fragment_row(int thread) {
  const Fragment f(thread);
  return {f.row, f.column};
}

// `first_row`: the roles are swapped, and the columns are the rows that the rules speak of
DevicePairs make_rules(int64_t rows, int64_t num_images, int64_t positive_offset, const Ids& row_ids,
                       const Ids& col_ids, int64_t first_row = 0) {
  DevicePairs rules;
  rules.num_rows = rows, rules.num_images = num_images, rules.positive_offset = positive_offset;
  rules.first_row = first_row;
  rules.row_ids = row_ids ? row_ids->data() : nullptr;
  rules.col_ids = col_ids ? col_ids->data() : nullptr;
  return rules;
}

// bits of one thread and row, as the kernels mask them, for tiles of `width` columns
std::vector<bool> negatives(int64_t rows, int64_t num_images, int64_t positive_offset, int64_t first_row,
                            const Ids& row_ids, const Ids& col_ids, int64_t row, int64_t j0, int column, int64_t m,
                            int width, bool reverse) {
  const DevicePairs rules = make_rules(rows, num_images, positive_offset, row_ids, col_ids, first_row);
  const uint32_t bits = width == 128 ? negatives_of_thread<32>(rules, row, j0, column, m, reverse)
                                     : negatives_of_thread<16>(rules, row, j0, column, m, reverse);
  std::vector<bool> kept;
  for (int k = 0; k < width / 4; ++k) kept.push_back(bits >> k & 1);
  return kept;
}

// whether the tiles [begin, end) of rows [i0, i1) are masked, asked in order
std::vector<bool> masked_tiles(int64_t rows, int64_t num_images, int64_t positive_offset, int64_t first_row,
                               const Ids& row_ids, const Ids& col_ids, int i0, int i1, int m, int width, int begin,
                               int end) {
  const DevicePairs rules = make_rules(rows, num_images, positive_offset, row_ids, col_ids, first_row);
  MaskedTiles masked(rules, i0, i1, m, width, begin);
  std::vector<bool> found;
  for (int tile = begin; tile < end; ++tile) found.push_back(masked.meets(rules, tile));
  return found;
}

std::pair<int, int> span(int tiles, int splits, int split) {
  const TileSpan s = span_of_split(tiles, splits, split);
  return {s.begin, s.end};
}

// (lse, count) of every row of partials [splits, 3, rows]
std::vector<std::pair<float, float>> merge(py::array_t<float, py::array::c_style> partials) {
  std::vector<std::pair<float, float>> out;
  for (int64_t row = 0; row < partials.shape(2); ++row) {
    const RowPartial total = merge_splits(partials.data(), partials.shape(2), partials.shape(0), row);
    out.emplace_back(total.lse.lse(), total.count);
  }
  return out;
}

// Every block, warpgroup and thread of the forward in turn, with float products: what the kernel computes but for
// loads, WGMMA and the order of time. Returns (lse, count) of every row.
template <bool kOnline>
std::vector<std::pair<float, float>> play_blocks(const py::array_t<float, py::array::c_style>& u,
                                                 const py::array_t<float, py::array::c_style>& v,
                                                 const DevicePairs& pairs, float factor, int splits) {
  const int n = static_cast<int>(u.shape(0)), m = static_cast<int>(v.shape(0));
  const int64_t depth = u.shape(1);
  const auto product = [&](int64_t i, int64_t j) {  // rows outside are zeros, as TMA delivers them
    float sum = 0;
    for (int64_t k = 0; i < n && j < m && k < depth; ++k) sum += u.at(i, k) * v.at(j, k);
    return sum;
  };
  const int tiles = static_cast<int>((m + 127) / 128);
  std::vector<float> partials(static_cast<size_t>(splits * kParts * n), std::numeric_limits<float>::quiet_NaN());
  for (int i0 = 0; i0 < (n + 127) / 128 * 128; i0 += 64)  // a warpgroup
    for (int split = 0; split < splits; ++split)
      for (int quad = 0; quad < 32; ++quad) {  // the four threads that share two rows
        std::vector<ThreadRows<64>> threads;
        for (int thread = 4 * quad; thread < 4 * quad + 4; ++thread) {
          const Fragment own(thread);
          ThreadRows<64> rows(i0 + own.row, n, kOnline);
          const TileSpan span = span_of_split(tiles, splits, split);
          MaskedTiles masked(pairs, i0, std::min(i0 + 64, n), m, 128, span.begin);
          for (int tile = span.begin; tile < span.end; ++tile) {
            const int64_t j0 = int64_t{tile} * 128;
            float s[64];
            for (int k = 0; k < 64; ++k)
              s[k] = product(i0 + own.row + 8 * (k / 2 % 2), j0 + own.column + k / 4 * 8 + k % 2);
            if (masked.meets(pairs, tile))
              rows.mask(s, own.column, j0, pairs, m);
            else
              rows.count_all();
            rows.add<kOnline>(s, factor);
          }
          threads.push_back(rows);
        }
        for (int h = 0; h < 2; ++h) {
          for (int lane = 1; lane <= 2; lane *= 2) {
            const std::vector<ThreadRows<64>> before = threads;
            for (int k = 0; k < 4; ++k) threads[k].partial[h].merge(before[k ^ lane].partial[h]);
          }
          const int64_t row = i0 + Fragment(4 * quad).row + 8 * h;
          if (row < n) threads[0].partial[h].store(partials.data(), n, split, row);
        }
      }
  std::vector<std::pair<float, float>> out;
  for (int64_t row = 0; row < n; ++row) {
    const RowPartial total = merge_splits(partials.data(), n, splits, row);
    out.emplace_back(total.lse.lse(), total.count);
  }
  return out;
}

// What lane `lane` has of the sum of bit `bit` when lanes have shared theirs down to `half`: the butterfly.
template <class Sum, class Leaf>
Sum shared_sum(const Leaf& leaf, int lane, int half, int k) {
  if (half == kSumsOfThread) return leaf(lane, k);
  const auto before = [&](int of_lane, int index) { return shared_sum<Sum>(leaf, of_lane, 2 * half, index); };
  const auto shares = [&](int of_lane) {
    return Shares<Sum>(before(of_lane, k), before(of_lane, k + half), of_lane & half);
  };
  Sum sum = shares(lane).kept;
  sum.merge(shares(lane ^ half).given);
  return sum;
}

// Columns of every block, with float products: threads, lanes, warps, then blocks. Returns (lse, count) of each.
template <bool kOnline>
std::vector<std::pair<float, float>> play_columns(const py::array_t<float, py::array::c_style>& s,
                                                  const DevicePairs& pairs, float factor) {
  const int n = static_cast<int>(s.shape(0)), m = static_cast<int>(s.shape(1)), blocks = (n + 127) / 128;
  std::vector<float> partials(static_cast<size_t>(blocks * kParts * m), std::numeric_limits<float>::quiet_NaN());
  for (int block = 0; block < blocks; ++block) {
    const int i0 = block * 128;
    MaskedTiles masked(pairs, i0, std::min(i0 + 128, n), i0 + 128 <= n ? m : 0, 128, 0);
    for (int tile = 0; tile < (m + 127) / 128; ++tile) {
      const int j0 = tile * 128;
      const bool is_masked = masked.meets(pairs, tile);
      for (int place = 0; place < 128; ++place) {
        const int j = j0 + column_of_place(place);
        if (j >= m) continue;
        RowPartial total;
        ColumnSum<kOnline> sum{};
        total.count = is_masked ? 0 : 128;
        for (int warp = 0; warp < 8; ++warp) {
          const auto row_of = [&](int lane) { return i0 + warp / 4 * 64 + Fragment(warp % 4 * 32 + lane).row; };
          const auto kept_of = [&](int lane) {
            return negatives_of_columns(row_of(lane), n, Fragment(lane).column, j0, pairs, m);
          };
          const auto leaf = [&](int lane, int bit) {
            float logits[64];
            for (int k = 0; k < 64; ++k) {
              const int i = row_of(lane) + 8 * (k / 2 % 2), c = j0 + Fragment(lane).column + k / 4 * 8 + k % 2;
              logits[k] = i < n && c < m ? s.at(i, c) : 0;
            }
            if (!kOnline) ThreadRows<64>::exponentiate(logits, factor);
            return is_masked ? sum_of_rows<kOnline>(logits, factor, kept_of(lane), bit)
                             : sum_of_rows<kOnline>(logits, factor, AllKept(), bit);
          };
          const auto count = [&](int lane, int bit) { return count_of_rows(kept_of(lane), bit); };
          const int lane = place / kSumsOfLane, k = place % kSumsOfLane;
          const auto more = shared_sum<ColumnSum<kOnline>>(leaf, lane, kSumsOfLane, k);
          if (warp == 0)
            sum = more;
          else
            sum.merge(more);
          if (is_masked) total.count += shared_sum<ColumnSum<false>>(count, lane, kSumsOfLane, k).sum;
        }
        total.lse = sum.lse();
        total.store(partials.data(), m, block, j);
      }
    }
  }
  std::vector<std::pair<float, float>> out;
  for (int64_t j = 0; j < m; ++j) {
    const RowPartial total = merge_splits(partials.data(), m, blocks, j);
    out.emplace_back(total.lse.lse(), total.count);
  }
  return out;
}

// The weights [n, m] that all threads of the backward make, each row's power of two undone: what is left are loads,
// WGMMA and the rounding to 16 bits. Also the largest scaled one.
template <int kLogits, Terms kTerms, bool kFactored>
std::pair<py::array_t<double>, double> play_weights(const py::array_t<float, py::array::c_style>& s,
                                                    const DevicePairs& pairs, float beta, float scale,
                                                    const std::vector<float>& row_lse,
                                                    const std::vector<float>& row_grad,
                                                    const std::vector<float>& col_lse,
                                                    const std::vector<float>& col_grad) {
  constexpr int kColumns = 2 * kLogits;
  const int n = static_cast<int>(s.shape(0)), m = static_cast<int>(s.shape(1));
  const auto largest_of = [](const std::vector<float>& grad) {
    float largest = 0;
    for (float x : grad) largest = std::max(largest, std::fabs(x));
    return largest;
  };
  const bool rows_weigh = has_rows(kTerms), columns_weigh = has_columns(kTerms);
  const float largest = columns_weigh ? largest_of(col_grad) : 0;
  const float bound = std::max(largest, rows_weigh ? largest_of(row_grad) : 0);
  const float factor = beta * scale * kLog2E;
  py::array_t<double> out({n, m});
  double largest_scaled = 0;
  for (int i0 = 0; i0 < n; i0 += 64)
    for (int thread = 0; thread < 128; ++thread) {
      const Fragment own(thread);
      const auto term = [&](int row) {
        return RowTerm(rows_weigh ? row_lse[row] : 0, rows_weigh ? row_grad[row] : 0, beta, largest, bound, kFactored);
      };
      const int row[2] = {std::min(i0 + own.row, n - 1), std::min(i0 + own.row + 8, n - 1)};
      const ThreadWeights<kLogits, kTerms, kFactored> weights{{row[0], row[1]}, {term(row[0]), term(row[1])}};
      MaskedTiles masked(pairs, i0, std::min(i0 + 64, n), m, kColumns, 0);
      for (int tile = 0; tile < (m + kColumns - 1) / kColumns; ++tile) {
        const int j0 = tile * kColumns;
        alignas(8) float vectors[2][kColumns];
        for (int c = 0; c < kColumns; ++c) {
          ColumnTerm column{0, INFINITY};
          if (columns_weigh && j0 + c < m)
            column = ColumnTerm::of(col_lse[j0 + c], col_grad[j0 + c], beta, bound, kFactored);
          vectors[0][c] = column.coefficient, vectors[1][c] = column.lse;
        }
        float w[kLogits];
        const auto column_of = [&](int k) { return j0 + own.column + k / 4 * 8 + k % 2; };
        for (int k = 0; k < kLogits; ++k) w[k] = column_of(k) < m ? s.at(row[k / 2 % 2], column_of(k)) : 0;
        if (masked.meets(pairs, tile))
          weights.weigh_masked(w, factor, *vectors, own.column, j0, pairs, m);
        else
          weights.weigh(w, factor, *vectors, own.column);
        for (int k = 0; k < kLogits; ++k) {
          const int h = k / 2 % 2, i = i0 + own.row + 8 * h;
          if (i >= n || column_of(k) >= m) continue;
          out.mutable_at(i, column_of(k)) = std::ldexp(double{w[k]}, -weights.term[h].exponent);
          largest_scaled = std::max(largest_scaled, std::fabs(double{w[k]}));
        }
      }
    }
  return {out, largest_scaled};
}

// ---- the ring, played by threads

struct Deadlock : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// What PTX says of an mbarrier: a phase ends when `arrivals` have come and no bytes are outstanding.
class Barrier {
 public:
  explicit Barrier(int arrivals) : arrivals_(arrivals), missing_(arrivals) {}
  void arrive(int64_t expected_bytes = 0) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (missing_ == 0) throw std::logic_error("more arrivals than the phase takes");
    bytes_ += expected_bytes, --missing_;
    end_phase_if_complete();
  }
  void complete(int64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    bytes_ -= bytes;
    end_phase_if_complete();
  }
  // Until the phase of that parity is over; the phase before the first one counts as over.
  void wait(uint32_t parity, const char* who) {
    std::unique_lock<std::mutex> lock(mutex_);
    if (!over_.wait_for(lock, std::chrono::seconds(5), [&] { return (phase_ & 1) != parity; })) throw Deadlock(who);
  }
  bool is_idle() const { return missing_ == arrivals_ && bytes_ == 0; }

 private:
  void end_phase_if_complete() {
    if (missing_ > 0 || bytes_ != 0) return;
    ++phase_, missing_ = arrivals_;
    over_.notify_all();
  }
  std::mutex mutex_;
  std::condition_variable over_;
  int arrivals_, missing_;
  int64_t bytes_ = 0;
  uint32_t phase_ = 0;
};

// A barrier by number: `threads` come, those that sync wait for all of them.
class NamedBarrier {
 public:
  explicit NamedBarrier(int threads) : threads_(threads) {}
  void arrive() { come(); }
  void sync() {
    std::unique_lock<std::mutex> lock(mutex_);
    const uint64_t mine = generation_;
    count();
    if (!over_.wait_for(lock, std::chrono::seconds(5), [&] { return generation_ != mine; })) throw Deadlock("turn");
  }
  bool is_idle() const { return came_ == 0; }

 private:
  void come() {
    const std::lock_guard<std::mutex> lock(mutex_);
    count();
  }
  void count() {
    if (++came_ < threads_) return;
    came_ = 0, ++generation_;
    over_.notify_all();
  }
  std::mutex mutex_;
  std::condition_variable over_;
  int threads_, came_ = 0;
  uint64_t generation_ = 0;
};

struct JoiningThread {
  std::thread thread;
  ~JoiningThread() { join(); }
  void join() {
    if (thread.joinable()) thread.join();
  }
};

// A producer, a "TMA" that delivers later and piecewise, two consumers of four warps each: every warp must find every
// tile, whole, in order; products are issued in turns; nothing is left over. Throws on the first violation.
template <int kStages>
void play(int tiles, int seed, int delays) {
  constexpr int kWarps = 4, kBoxes = 2, kBytes = 64;
  std::vector<std::unique_ptr<Barrier>> full, empty;
  for (int s = 0; s < kStages; ++s)
    full.push_back(std::make_unique<Barrier>(1)), empty.push_back(std::make_unique<Barrier>(2 * kWarps));
  std::vector<std::unique_ptr<NamedBarrier>> turns;
  for (int c = 0; c < 2; ++c) turns.push_back(std::make_unique<NamedBarrier>(2 * kWarps));
  std::atomic<int> buffer[kStages][kBoxes];
  for (auto& stage : buffer)
    for (auto& box : stage) box = -1;
  std::atomic<int> issued{0};  // warps that have issued: 8 per tile, consumer 0's four before consumer 1's
  std::mutex error_mutex;
  std::string error;

  const auto guarded = [&](int id, const auto& body) {
    return std::thread([&, id, body] {
      try {
        std::mt19937 random(static_cast<unsigned>(seed * 31 + id));
        body([&] {
          if (delays && random() % 4 == 0)
            std::this_thread::sleep_for(std::chrono::microseconds(random() % static_cast<unsigned>(delays)));
        });
      } catch (const std::exception& e) {
        const std::lock_guard<std::mutex> lock(error_mutex);
        if (error.empty()) error = e.what();
      }
    });
  };
  std::vector<std::thread> threads;
  threads.push_back(guarded(0, [&](const auto& dawdle) {
    RingPosition<kStages> at;
    JoiningThread deliveries[kStages];
    for (int tile = 0; tile < tiles; ++tile, at.advance()) {
      empty[at.stage]->wait(at.empty_parity(), "producer");
      deliveries[at.stage].join();
      full[at.stage]->arrive(kBoxes * kBytes);
      deliveries[at.stage].thread = std::thread([&, tile, stage = at.stage] {
        for (int box = 0; box < kBoxes; ++box) {
          buffer[stage][box] = tile;
          full[stage]->complete(kBytes);
        }
      });
      dawdle();
    }
  }));
  for (int warp = 0; warp < 2 * kWarps; ++warp)
    threads.push_back(guarded(1 + warp, [&, consumer = warp / kWarps](const auto& dawdle) {
      RingPosition<kStages> at;
      if (gives_first_turn(consumer)) turns[1 - consumer]->arrive();
      for (int tile = 0; tile < tiles; ++tile, at.advance()) {
        full[at.stage]->wait(at.full_parity(), "consumer");
        turns[consumer]->sync();
        const int before = issued.fetch_add(1);
        if (before / kWarps != 2 * tile + consumer) throw std::logic_error("issued out of turn");
        if (gives_turn(consumer, tile + 1 == tiles)) turns[1 - consumer]->arrive();
        dawdle();
        for (auto& box : buffer[at.stage])
          if (box != tile) throw std::logic_error("a stage was overwritten or not filled");
        empty[at.stage]->arrive();
        dawdle();
      }
    }));
  for (auto& thread : threads) thread.join();
  if (!error.empty()) throw std::runtime_error(error);
  for (const auto& barrier : full)
    if (!barrier->is_idle()) throw std::runtime_error("a phase of full was left open");
  for (const auto& turn : turns)
    if (!turn->is_idle()) throw std::runtime_error("a turn was given that nobody took");
}

}  // namespace

PYBIND11_MODULE(hopper_headers, m) {
  m.attr("UNFILLED") = kUnfilled;
  m.def("swizzled_offset", swizzled_offset);
  m.def("step_offset", step_offset);
  m.def("row_step_offset", row_step_offset);
  m.def("matrix_descriptor", matrix_descriptor);
  m.def("k_major", k_major);
  m.def("mn_major", mn_major);
  m.def("descriptor_offset", descriptor_offset);
  m.def("fragment", fragment_row);
  m.def("negatives", negatives);
  m.def("masked_tiles", masked_tiles);
  m.def("span_of_split", span);
  m.def("choose_splits", choose_splits);
  m.def("gradient_splits", gradient_splits);
  m.def("merge", merge);
  m.def("fits_without_shift", fits_without_shift);
  m.def("fits_factored", fits_factored);
  m.def("exponent_to_largest", exponent_to_largest);
  m.def("power_of_two", power_of_two);
  m.def("play_weights", [](py::array_t<float, py::array::c_style> s, int64_t num_images, int64_t positive_offset,
                           Ids row_ids, Ids col_ids, float beta, float scale, std::vector<float> row_lse,
                           std::vector<float> row_grad, std::vector<float> col_lse, std::vector<float> col_grad,
                           bool factored, bool narrow) {
    const DevicePairs pairs = make_rules(s.shape(0), num_images, positive_offset, row_ids, col_ids);
    const auto play = [&](auto weights) {
      return weights(s, pairs, beta, scale, row_lse, row_grad, col_lse, col_grad);
    };
    if (col_grad.empty())
      return narrow ? play(play_weights<32, Terms::kRows, false>) : play(play_weights<64, Terms::kRows, false>);
    if (row_grad.empty())
      return narrow ? play(play_weights<32, Terms::kColumns, false>) : play(play_weights<64, Terms::kColumns, false>);
    if (factored)
      return narrow ? play(play_weights<32, Terms::kBoth, true>) : play(play_weights<64, Terms::kBoth, true>);
    return narrow ? play(play_weights<32, Terms::kBoth, false>) : play(play_weights<64, Terms::kBoth, false>);
  });
  m.def("play_blocks", [](py::array_t<float, py::array::c_style> u, py::array_t<float, py::array::c_style> v,
                          int64_t num_images, int64_t positive_offset, Ids row_ids, Ids col_ids, float factor,
                          bool online, int splits) {
    const DevicePairs pairs = make_rules(u.shape(0), num_images, positive_offset, row_ids, col_ids);
    return online ? play_blocks<true>(u, v, pairs, factor, splits) : play_blocks<false>(u, v, pairs, factor, splits);
  });
  m.def("column_of_place", column_of_place);
  m.def("choose_windows", choose_windows);
  m.def("play_columns", [](py::array_t<float, py::array::c_style> s, int64_t num_images, int64_t positive_offset,
                           Ids row_ids, Ids col_ids, float factor, bool online) {
    const DevicePairs pairs = make_rules(s.shape(0), num_images, positive_offset, row_ids, col_ids);
    return online ? play_columns<true>(s, pairs, factor) : play_columns<false>(s, pairs, factor);
  });
  m.def("play", [](int stages, int tiles, int seed, int delays) {
    const py::gil_scoped_release release;
    switch (stages) {
      case 1:
        return play<1>(tiles, seed, delays);
      case 2:
        return play<2>(tiles, seed, delays);
      case 4:
        return play<4>(tiles, seed, delays);
      default:
        throw std::invalid_argument("stages must be 1, 2 or 4");
    }
  });
}
