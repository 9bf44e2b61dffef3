// What the kernels' headers compute, for Python: pair rules, online log-sum-exp, and the passes over a tile on every
// compiled instruction set, whatever this CPU would choose. Built by test_headers.py without torch; never shipped.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/pair_tables.h"
#include "cpu/tile.h"
#include "online_lse.h"
#include "pairs.h"
#include "row_losses.h"

namespace py = pybind11;
using namespace contrastive_ext;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;
using Ids = std::optional<Array<int64_t>>;

PairInputs only_images(int64_t rows, int64_t num_images, int64_t positive_offset) {
  PairInputs in{};
  in.num_rows = rows, in.num_images = num_images, in.positive_offset = positive_offset;
  return in;
}

bool may_share_image(int64_t rows, int64_t num_images, int64_t positive_offset, int64_t i0, int64_t i1, int64_t j0,
                     int64_t j1) {
  return PairTables(only_images(rows, num_images, positive_offset)).rules().may_share_image(i0, i1, j0, j1);
}

// lse of all values, each chunk summed at its own maximum, then merged.
double online_lse(const std::vector<std::vector<double>>& chunks) {
  OnlineLse<double> total;
  for (const auto& chunk : chunks) {
    OnlineLse<double> part;
    for (double x : chunk) part.raise(x);
    for (double x : chunk) part.sum += std::exp(x - (part.shift == -INFINITY ? 0.0 : part.shift));
    total.merge(part);
  }
  return total.lse();
}

const Isa& find_isa(const std::string& name) {
  int n = 0;
  const Isa* isas = compiled_isas(&n);
  for (int k = 0; k < n; ++k)
    if (isas[k].name == name && isas[k].usable) return isas[k];
  throw std::invalid_argument(name + " is not compiled in or not usable on this CPU");
}

std::vector<std::string> usable_isas() {
  int n = 0;
  const Isa* isas = compiled_isas(&n);
  std::vector<std::string> names;
  for (int k = 0; k < n; ++k)
    if (isas[k].usable) names.push_back(isas[k].name);
  return names;
}

template <class T>
const TileKernels<T>& kernels(const std::string& isa);
template <>
const TileKernels<float>& kernels<float>(const std::string& isa) {
  return *find_isa(isa).f32;
}
template <>
const TileKernels<double>& kernels<double>(const std::string& isa) {
  return *find_isa(isa).f64;
}

template <class T>
Array<T> exp_of(const std::string& isa, Array<T> x) {
  Array<T> y(x.size());
  kernels<T>(isa).exp(x.data(), y.mutable_data(), x.size());
  return y;
}

template <class T>
Array<T> exp2_of(const std::string& isa, Array<T> x, T factor, T factor_low, T shift) {
  Array<T> y(x.size());
  kernels<T>(isa).exp2_in_range(x.data(), y.mutable_data(), x.size(), factor, factor_low, shift);
  return y;
}

// A tile of any size at (i0, j0) of a larger problem, in padded storage whose padding is NaN.
template <class T>
struct TileFixture {
  PairTables tables;
  PairRules rules;
  std::vector<T> storage;
  Tile<T> tile;
  int64_t padded_rows;

  TileFixture(const Array<T>& s, const PairInputs& in, int64_t i0, int64_t j0, bool special, bool upper)
      : tables(in), rules(tables.rules()) {
    const int64_t rows = s.shape(0), cols = s.shape(1), ld = (cols + kColumnPad - 1) / kColumnPad * kColumnPad;
    padded_rows = (rows + kRowStep - 1) / kRowStep * kRowStep;
    storage.assign(padded_rows * ld, std::numeric_limits<T>::quiet_NaN());
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < cols; ++j) storage[i * ld + j] = s.at(i, j);
    tile = {storage.data(), ld, i0, rows, j0, cols, &rules, special, upper};
  }
};

// Classes [n, m] of all pairs and every row's and column's number of negatives, tile by tile. `scores`, where given, is
// the gate's matrix.
template <class T>
py::tuple classify(const std::string& isa, int64_t n, int64_t m, int64_t num_images, int64_t positive_offset,
                   bool one_set, bool only_equal_ids, Ids row_ids, Ids col_ids, Ids ignored,
                   std::optional<Array<T>> scores, std::vector<T> row_limit, std::vector<T> col_limit,
                   int64_t block_rows, int64_t tile_cols) {
  PairInputs in{n, m, num_images, positive_offset, only_equal_ids, nullptr, nullptr, nullptr, 0, 0, one_set};
  if (row_ids) in.row_ids = row_ids->data();
  if (col_ids) in.col_ids = col_ids->data();
  if (ignored) in.ignored = ignored->data(), in.num_lists = ignored->shape(0), in.list_length = ignored->shape(1);
  const bool both_ways = !col_limit.empty();
  row_limit.resize(n + kRowStep), col_limit.resize(m + kColumnPad);
  py::array_t<uint8_t> classes({n, m});
  std::vector<T> row_count(n), col_count(m);
  for (int64_t i0 = 0; i0 < n; i0 += block_rows)
    for (int64_t j0 = 0; j0 < m; j0 += tile_cols) {
      const int64_t rows = std::min(block_rows, n - i0), cols = std::min(tile_cols, m - j0);
      Array<T> values({rows, cols});
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < cols; ++j) values.mutable_at(i, j) = scores ? scores->at(i0 + i, j0 + j) : T(0);
      TileFixture<T> f(values, in, i0, j0, /*special=*/true, /*upper=*/false);
      if (scores) {
        f.tile.gate = f.tile.s, f.tile.row_limit = row_limit.data() + i0;
        f.tile.col_limit = both_ways ? col_limit.data() + j0 : nullptr;
      }
      std::vector<uint8_t> pairs(rows * cols);
      kernels<T>(isa).classes(f.tile, pairs.data());
      std::vector<T> rows_out(3 * f.padded_rows), cols_out(3 * f.tile.ld);
      f.tile.row_count = rows_out.data(), f.tile.col_count = cols_out.data();
      kernels<T>(isa).moments(f.tile, {rows_out.data() + f.padded_rows, rows_out.data() + 2 * f.padded_rows,
                                       cols_out.data() + f.tile.ld, cols_out.data() + 2 * f.tile.ld});
      for (int64_t i = 0; i < rows; ++i) row_count[i0 + i] += rows_out[i];
      for (int64_t j = 0; j < cols; ++j) col_count[j0 + j] += cols_out[j];
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < cols; ++j) classes.mutable_at(i0 + i, j0 + j) = pairs[i * cols + j];
    }
  return py::make_tuple(classes, row_count, col_count);
}

template <class T>
Array<T> larger_of(const std::string& isa, Array<T> x, Array<T> y) {
  Array<T> out(x.size());
  std::copy(x.data(), x.data() + x.size(), out.mutable_data());
  kernels<T>(isa).larger_of(out.mutable_data(), y.data(), out.size());
  return out;
}

// c = scale a b, or c + a b; a is stored transposed if asked to, c with columns beside it that stay as they are.
template <class T>
Array<T> product(const std::string& isa, Array<T> a, bool transposed, Array<T> b, Array<T> c, T scale,
                 bool accumulate) {
  constexpr int64_t kBeside = 3;
  const int64_t rows = c.shape(0), cols = c.shape(1), depth = b.shape(0);
  std::vector<T> stored(static_cast<size_t>(rows * depth)), out(static_cast<size_t>(rows * (cols + kBeside)), T(-7));
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t k = 0; k < depth; ++k)
      stored[static_cast<size_t>(transposed ? k * rows + i : i * depth + k)] = a.at(i, k);
    for (int64_t j = 0; j < cols; ++j) out[static_cast<size_t>(i * (cols + kBeside) + j)] = c.at(i, j);
  }
  kernels<T>(isa).product({out.data(), cols + kBeside, stored.data(), transposed ? 1 : depth, transposed ? rows : 1,
                           b.data(), cols, rows, cols, depth, scale, accumulate});
  Array<T> result({rows, cols + kBeside});
  std::copy(out.begin(), out.end(), result.mutable_data());
  return result;
}

template <class T>
Array<T> transpose(const std::string& isa, Array<T> x) {
  Array<T> y({x.shape(1), x.shape(0)});
  kernels<T>(isa).transpose(y.mutable_data(), x.shape(0), x.data(), x.shape(1), x.shape(0), x.shape(1));
  return y;
}

// Every place, as callers go through the blocks; no limits: an empty array.
template <class T>
std::vector<int64_t> above(const std::string& isa, Array<T> x, int64_t begin, int64_t end, T limit, Array<T> limits) {
  std::vector<int64_t> places;
  int64_t block = 0;
  while (uint64_t found =
             kernels<T>(isa).above(x.data(), begin, end, limit, limits.size() ? limits.data() : nullptr, &block)) {
    for (int64_t bit = 0; bit < kLaneBlock; ++bit)
      if (found >> bit & 1) places.push_back(block + bit);
    begin = block + kLaneBlock;
  }
  return places;
}

template <class T>
py::list to_lists(const std::vector<std::vector<T>>& parts, int64_t rows, int64_t cols) {
  py::list out;
  for (size_t k = 0; k < parts.size(); ++k) {
    const auto end = parts[k].begin() + (k < parts.size() / 2 ? rows : cols);
    out.append(py::cast(std::vector<T>(parts[k].begin(), end)));
  }
  return out;
}

// row max, row sum, column max, column sum
template <class T>
py::list moments(const std::string& isa, Array<T> s, int64_t num_rows, int64_t num_images, int64_t i0, int64_t j0,
                 bool special, bool upper) {
  TileFixture<T> f(s, only_images(num_rows, num_images, 0), i0, j0, special, upper);
  std::vector<T> row_max(f.padded_rows), row_sum(f.padded_rows), col_max(f.tile.ld, -INFINITY), col_sum(f.tile.ld);
  kernels<T>(isa).moments(f.tile, {row_max.data(), row_sum.data(), col_max.data(), col_sum.data()});
  return to_lists<T>({row_max, row_sum, col_max, col_sum}, f.tile.rows, f.tile.cols);
}

// row sum, row sum of squares, column sum, column sum of squares; shifts given (online) or one static shift
template <class T>
py::list exp_sums(const std::string& isa, Array<T> s, int64_t num_rows, int64_t num_images, int64_t i0, int64_t j0,
                  bool special, bool upper, T beta, T factor, T factor_low, T shift2, std::vector<T> row_shift,
                  std::vector<T> col_shift) {
  TileFixture<T> f(s, only_images(num_rows, num_images, 0), i0, j0, special, upper);
  const bool online = !row_shift.empty();
  row_shift.resize(f.padded_rows), col_shift.resize(f.tile.ld);
  std::vector<T> row_sum(f.padded_rows), row_square(f.padded_rows), col_sum(f.tile.ld), col_square(f.tile.ld);
  ExpSums<T> args{};
  args.beta = beta, args.factor = factor, args.factor_low = factor_low, args.shift2 = shift2;
  args.row_shift = online ? row_shift.data() : nullptr, args.col_shift = col_shift.data();
  args.row_sum = row_sum.data(), args.row_square_sum = row_square.data();
  args.col_sum = col_sum.data(), args.col_square_sum = col_square.data();
  kernels<T>(isa).exp_sums(f.tile, args);
  return to_lists<T>({row_sum, row_square, col_sum, col_square}, f.tile.rows, f.tile.cols);
}

// W for 1 or 2 exponents; col_coef empty: rows only
template <class T>
Array<T> weights(const std::string& isa, Array<T> s, int64_t num_rows, int64_t num_images, int64_t i0, int64_t j0,
                 bool special, bool upper, bool shared, std::vector<T> beta, std::vector<T> factor,
                 std::vector<std::vector<T>> row_coef, std::vector<std::vector<T>> row_shift,
                 std::vector<std::vector<T>> col_coef, std::vector<std::vector<T>> col_shift) {
  TileFixture<T> f(s, only_images(num_rows, num_images, 0), i0, j0, special, upper);
  Weights<T> args{};
  args.num_exponents = static_cast<int>(beta.size());
  args.shared = shared, args.square = beta.size() == 2 && beta[1] == 2 * beta[0];
  for (size_t k = 0; k < beta.size(); ++k) {
    args.beta[k] = beta[k], args.factor[k] = factor[k];
    row_coef[k].resize(f.padded_rows), row_shift[k].resize(f.padded_rows);
    args.row_coef[k] = row_coef[k].data(), args.row_shift[k] = row_shift[k].data();
    if (col_coef.empty()) continue;
    col_coef[k].resize(f.tile.ld), col_shift[k].resize(f.tile.ld);
    args.col_coef[k] = col_coef[k].data(), args.col_shift[k] = col_shift[k].data();
  }
  kernels<T>(isa).weights(f.tile, args);
  Array<T> out({f.tile.rows, f.tile.cols});
  for (int64_t i = 0; i < f.tile.rows; ++i)
    for (int64_t j = 0; j < f.tile.cols; ++j) out.mutable_at(i, j) = f.storage[i * f.tile.ld + j];
  return out;
}

// Columns loss, dL/dlse_0, dL/dlse_1, dL/dpos, dL/dscale, clamped; rows are those of lse_0, lse_1, pos, count.
template <class T>
Array<T> row_losses(const std::string& formula, std::vector<double> parameters, Array<T> rows, T scale) {
  RowLossParameters<T> p;
  if (!make_parameters(formula, parameters.data(), parameters.size(), &p)) throw std::invalid_argument(formula);
  Array<T> out({rows.shape(0), static_cast<py::ssize_t>(6)});
  for (py::ssize_t i = 0; i < rows.shape(0); ++i) {
    const RowLossResult<T> row = row_loss(p, rows.at(i, 0), rows.at(i, 1), rows.at(i, 2), rows.at(i, 3), scale);
    const T values[] = {row.loss, row.by_lse[0], row.by_lse[1], row.by_pos, row.by_scale, T(row.clamped)};
    for (int c = 0; c < 6; ++c) out.mutable_at(i, c) = values[c];
  }
  return out;
}

template <class T>
void define(py::module_& m, const char* suffix) {
  const auto name = [&](const char* base) { return std::string(base) + suffix; };
  m.def(name("exp_").c_str(), exp_of<T>);
  m.def(name("exp2_").c_str(), exp2_of<T>);
  m.def(name("classify_").c_str(), classify<T>);
  m.def(name("product_").c_str(), product<T>);
  m.def(name("transpose_").c_str(), transpose<T>);
  m.def(name("larger_of_").c_str(), larger_of<T>);
  m.def(name("above_").c_str(), above<T>);
  m.def(name("moments_").c_str(), moments<T>);
  m.def(name("exp_sums_").c_str(), exp_sums<T>);
  m.def(name("weights_").c_str(), weights<T>);
  m.def(name("row_losses_").c_str(), row_losses<T>);
}

}  // namespace

PYBIND11_MODULE(native_headers, m) {
  m.attr("UNFILLED") = kUnfilled;
  m.attr("COLUMN_IS_NEGATIVE") = kColumnIsNegative;
  m.attr("ROW_IS_NEGATIVE") = kRowIsNegative;
  m.def("usable_isas", usable_isas);
  m.def("may_share_image", may_share_image);
  m.def("online_lse", online_lse);
  define<float>(m, "f32");
  define<double>(m, "f64");
}
