// From logits to importance weights by rank: contrastive_ext/problem/ranking.py states the mathematics.
#pragma once

#include <cmath>
#include <cstdint>
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

// Sorts one row of (key, column) pairs at a time: least significant digit first, 11 bits a pass, so 3 passes for float
// whatever the values are. A comparison sort of the same pairs takes nine times as long (docs/measurements.md).
template <class T>
class RadixSort {
 public:
  using Key = decltype(order_key(T()));
  struct Entry {
    Key key;
    uint32_t column;
  };

  explicit RadixSort(int64_t most) : entries_(static_cast<size_t>(most)), other_(static_cast<size_t>(most)) {}

  void clear() {
    size_ = 0;
    for (auto& digit : counts_)
      for (uint32_t& count : digit) count = 0;
  }
  void add(T x, int64_t column) {
    const Key key = order_key(x);
    entries_[static_cast<size_t>(size_++)] = {key, static_cast<uint32_t>(column)};
    for (int pass = 0; pass < kPasses; ++pass) ++counts_[pass][digit(key, pass)];
  }
  int64_t size() const { return size_; }

  // The pairs in order, valid until the next clear().
  const Entry* sort() {
    Entry *from = entries_.data(), *to = other_.data();
    for (int pass = 0; pass < kPasses; ++pass) {
      uint32_t* next = counts_[pass];
      if (size_ > 0 && next[digit(from[0].key, pass)] == size_) continue;  // one digit for all: nothing moves
      uint32_t before = 0;
      for (int value = 0; value < kDigits; ++value) {
        const uint32_t count = next[value];
        next[value] = before;
        before += count;
      }
      for (int64_t k = 0; k < size_; ++k) to[next[digit(from[k].key, pass)]++] = from[k];
      std::swap(from, to);
    }
    return from;
  }

 private:
  static constexpr int kDigitBits = 11, kDigits = 1 << kDigitBits;
  static constexpr int kPasses = (static_cast<int>(sizeof(Key)) * 8 + kDigitBits - 1) / kDigitBits;
  static uint32_t digit(Key key, int pass) { return static_cast<uint32_t>(key >> (pass * kDigitBits)) & (kDigits - 1); }

  std::vector<Entry> entries_, other_;
  uint32_t counts_[kPasses][kDigits] = {};
  int64_t size_ = 0;
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
