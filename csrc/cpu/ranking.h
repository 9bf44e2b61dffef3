// From logits to importance weights by rank: contrastive_ext/problem/ranking.py states the mathematics.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "tile.h"

namespace contrastive_ext {

// omega of u in [0, 1] and v = 1 - u:  [low (1 - Phi) + high Phi] / [b (1 - Phi) + c Phi]
template <class T>
inline T rank_weight(const RankShape<T>& shape, T u, T v) {
  const T from_middle = 2 * v - shape.c, above = v + shape.eps;
  const T root = std::sqrt(from_middle * from_middle + 4 * u * above);
  const T phi = u / (shape.b + root), rest = above / (shape.c + 2 * shape.eps + root);  // halved, both
  return (shape.low * rest + shape.high * phi) / (shape.b * rest + shape.c * phi);
}

// Unsigned integers in the order of the numbers. A NaN goes to one of the ends.
inline uint32_t order_key(float x) {
  x += 0.0f;  // -0 and 0 are one value
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  return bits ^ (static_cast<uint32_t>(-static_cast<int32_t>(bits >> 31)) | 0x80000000u);
}
inline uint64_t order_key(double x) {
  x += 0.0;
  uint64_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  return bits ^ (static_cast<uint64_t>(-static_cast<int64_t>(bits >> 63)) | 0x8000000000000000u);
}

// The ranks of one row at a time. A logit's place among 2^2b steps of the row's range (RankKeys) has two digits of b
// bits: two passes of a radix sort, least significant digit first, order a row but for what shares a step, which is
// sorted by the logits themselves.
template <class T>
class RowRanks {
 public:
  explicit RowRanks(int64_t columns) : entries_(static_cast<size_t>(columns)), sorted_(entries_.size()) {
    while (digit_bits_ < kMostBits && (int64_t{1} << digit_bits_) < columns) ++digit_bits_;
    lower_.resize(size_t{1} << digit_bits_), upper_.resize(lower_.size() + 1);  // one for pairs that are ignored
  }
  int32_t steps() const { return 1 << 2 * digit_bits_; }

  // Calls f(column, rank) for every negative; rank of them are not larger.
  template <class F>
  void for_each(const int32_t* key, const T* s, int64_t columns, const F& f) {
    const int64_t count = sort(key, columns);
    const Entry* sorted = sorted_.data();
    for (int64_t k = 0, end; k < count; k = end) {
      for (end = k + 1; end < count && sorted[end].key == sorted[k].key;) ++end;
      if (end == k + 1)
        f(sorted[k].column, end);
      else
        rank_one_step(s, k, end, f);
    }
  }

 private:
  struct Entry {
    uint32_t key, column;
  };
  using Key = decltype(order_key(T()));
  static constexpr int kMostBits = 11;

  // Fills sorted_, ignored pairs last; returns how many come before them.
  int64_t sort(const int32_t* key, int64_t columns) {
    const int bits = digit_bits_;
    const uint32_t digit = (1u << bits) - 1;
    uint32_t *lower = lower_.data(), *upper = upper_.data();
    Entry *entries = entries_.data(), *sorted = sorted_.data();
    std::fill(lower_.begin(), lower_.end(), 0), std::fill(upper_.begin(), upper_.end(), 0);
    for (int64_t j = 0; j < columns; ++j) {
      const uint32_t own = static_cast<uint32_t>(key[j]);
      ++lower[own & digit], ++upper[own >> bits];
    }
    const int64_t count = columns - upper_.back();
    begin_buckets(lower_), begin_buckets(upper_);
    for (int64_t j = 0; j < columns; ++j) {
      const uint32_t own = static_cast<uint32_t>(key[j]);
      entries[lower[own & digit]++] = {own, static_cast<uint32_t>(j)};
    }
    for (int64_t k = 0; k < columns; ++k) sorted[upper[entries[k].key >> bits]++] = entries[k];
    return count;
  }

  static void begin_buckets(std::vector<uint32_t>& counts) {
    uint32_t before = 0;
    for (uint32_t& count : counts) before += std::exchange(count, before);
  }

  // Ranks of sorted_[begin, end), which share a step; equal logits share the largest rank. A step holds few different
  // numbers of float32, so that long runs are mostly equal ones: those are counted, not sorted.
  template <class F>
  void rank_one_step(const T* s, int64_t begin, int64_t end, const F& f) {
    Key lowest = std::numeric_limits<Key>::max(), highest = 0;
    for (int64_t k = begin; k < end; ++k) {
      const Key own = order_key(s[sorted_[k].column]);
      lowest = std::min(lowest, own), highest = std::max(highest, own);
    }
    const Key span = highest - lowest;
    if (span < static_cast<Key>(4 * (end - begin) + 24)) {
      not_larger_.assign(static_cast<size_t>(span) + 1, 0);
      for (int64_t k = begin; k < end; ++k) ++not_larger_[order_key(s[sorted_[k].column]) - lowest];
      for (size_t at = 1; at < not_larger_.size(); ++at) not_larger_[at] += not_larger_[at - 1];
      for (int64_t k = begin; k < end; ++k) {
        const uint32_t column = sorted_[k].column;
        f(column, begin + not_larger_[order_key(s[column]) - lowest]);
      }
      return;
    }
    logits_.clear();
    for (int64_t k = begin; k < end; ++k) logits_.emplace_back(order_key(s[sorted_[k].column]), sorted_[k].column);
    std::sort(logits_.begin(), logits_.end());
    for (size_t k = 0, tied = 0; k < logits_.size(); ++k) {
      while (tied < logits_.size() && logits_[tied].first == logits_[k].first) ++tied;
      f(logits_[k].second, begin + static_cast<int64_t>(tied));
    }
  }

  int digit_bits_ = 4;
  std::vector<Entry> entries_, sorted_;
  std::vector<uint32_t> lower_, upper_, not_larger_;
  std::vector<std::pair<Key, uint32_t>> logits_;  // and their columns
};

// log omega of the ranks 1 to count. Most rows of a call have the same count; ids make a few differ.
template <class T>
class LogWeights {
 public:
  explicit LogWeights(const RankShape<T>& shape) : shape_(shape) {}

  // [count], of rank r at r - 1.
  const std::vector<T>& of(int64_t count) {
    std::vector<T>& table = tables_[count % kTables];
    if (static_cast<int64_t>(table.size()) != count) {
      table.resize(static_cast<size_t>(count));
      for (int64_t r = 0; r < count; ++r)
        table[static_cast<size_t>(r)] = std::log(rank_weight(shape_, static_cast<T>(r + 1) / static_cast<T>(count),
                                                             static_cast<T>(count - r - 1) / static_cast<T>(count)));
    }
    return table;
  }

 private:
  static constexpr int64_t kTables = 16;
  RankShape<T> shape_;
  std::vector<T> tables_[kTables];
};

}  // namespace contrastive_ext
