// What the pair rules look up, built once per call: ids as small numbers, lists sorted and turned around.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../pairs.h"
#include "tile.h"

namespace contrastive_ext {

// The memory behind SortedLists.
class ListStorage {
 public:
  ListStorage() = default;
  // Of lists [count, length] in any order, the numbers in [0, end), each once.
  ListStorage(const int64_t* lists, int64_t count, int64_t length, int64_t end) : begin_{0} {
    for (int64_t k = 0; k < count; ++k) {
      const int64_t* list = lists + k * length;
      for (int64_t at = 0; at < length; ++at)
        if (list[at] >= 0 && list[at] < end) item_.push_back(list[at]);
      std::sort(item_.begin() + begin_.back(), item_.end());
      item_.erase(std::unique(item_.begin() + begin_.back(), item_.end()), item_.end());
      begin_.push_back(static_cast<int64_t>(item_.size()));
    }
  }
  // Which lists hold each number in [0, end).
  ListStorage turned_around(int64_t end) const {
    ListStorage turned;
    turned.begin_.assign(static_cast<size_t>(end) + 1, 0), turned.item_.resize(item_.size());
    for (int64_t number : item_) ++turned.begin_[static_cast<size_t>(number) + 1];
    for (size_t number = 0; number < static_cast<size_t>(end); ++number)
      turned.begin_[number + 1] += turned.begin_[number];
    std::vector<int64_t> next(turned.begin_.begin(), turned.begin_.end() - 1);
    for (size_t k = 0; k + 1 < begin_.size(); ++k)  // ascending lists: every turned list comes out ascending
      for (int64_t at = begin_[k]; at < begin_[k + 1]; ++at) turned.item_[next[item_[at]]++] = static_cast<int64_t>(k);
    return turned;
  }
  SortedLists view() const { return {begin_.data(), item_.data()}; }

 private:
  std::vector<int64_t> begin_, item_;
};

// Ids (null: a side without) and `ignored` lists [num_lists, list_length] (null: none) as the caller gave them.
struct PairInputs {
  int64_t num_rows, num_columns, num_images, positive_offset;
  bool only_equal_ids;
  const int64_t *row_ids, *col_ids;
  const int64_t* ignored;
  int64_t num_lists, list_length;
  bool one_set;
};

class PairTables {
 public:
  explicit PairTables(const PairInputs& in) : in_(in) {
    if (in.row_ids || in.col_ids) number_ids();
    if (!in.ignored) return;
    ignored_ = ListStorage(in.ignored, in.num_lists, in.list_length, in.num_columns);
    if (in.one_set) ignoring_ = ignored_.turned_around(in.num_rows);
  }
  PairTables(const PairTables&) = delete;  // rules() points into it
  PairTables& operator=(const PairTables&) = delete;

  PairRules rules() const {
    PairRules rules;
    rules.num_rows = in_.num_rows, rules.num_images = in_.num_images, rules.positive_offset = in_.positive_offset;
    rules.only_equal_ids = in_.only_equal_ids;
    if (!row_ids_.empty()) rules.row_ids = row_ids_.data(), rules.col_ids = col_ids_.data();
    if (!in_.ignored) return rules;
    rules.num_lists = in_.num_lists;
    rules.ignored = ignored_.view();
    if (in_.one_set) rules.ignoring = ignoring_.view();
    return rules;
  }

 private:
  void number_ids() {
    std::vector<int64_t> distinct{kUnfilled};  // sorts first: kUnfilledId
    if (in_.row_ids) distinct.insert(distinct.end(), in_.row_ids, in_.row_ids + in_.num_rows);
    // both, whatever memory they share: the rows' ids may be the beginning of the columns'
    if (in_.col_ids) distinct.insert(distinct.end(), in_.col_ids, in_.col_ids + in_.num_columns);
    std::sort(distinct.begin(), distinct.end());
    distinct.erase(std::unique(distinct.begin(), distinct.end()), distinct.end());
    const auto number = [&](const int64_t* ids, int64_t count, int32_t missing) {
      std::vector<int32_t> numbers(static_cast<size_t>(count + kColumnPad), missing);
      for (int64_t i = 0; ids && i < count; ++i)
        numbers[i] =
            static_cast<int32_t>(std::lower_bound(distinct.begin(), distinct.end(), ids[i]) - distinct.begin());
      return numbers;
    };
    row_ids_ = number(in_.row_ids, in_.num_rows, kNoRowId);
    col_ids_ = number(in_.col_ids, in_.num_columns, kNoColumnId);
  }

  PairInputs in_;
  std::vector<int32_t> row_ids_, col_ids_;
  ListStorage ignored_, ignoring_;
};

}  // namespace contrastive_ext
