// A program without torch: the generic tile kernels against plain loops in double, for machines that cannot run torch
// (test_other_machines.py compiles it for AArch64 and runs it in an emulator). Prints what it compared; 1 if it is off.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "cpu/tile.h"

using namespace contrastive_ext;

namespace contrastive_ext {
namespace generic {
extern const TileKernels<float> kKernelsF32;
extern const TileKernels<double> kKernelsF64;
}  // namespace generic
}  // namespace contrastive_ext

namespace {

int bad = 0;

template <class T>
void compare(const char* what, const std::vector<T>& got, const std::vector<double>& expected, double roundings) {
  double worst = 0, largest = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double difference = std::fabs(double(got[i]) - expected[i]), size = std::fabs(expected[i]);
    if (!(difference <= worst)) worst = difference;  // a NaN stays
    if (size > largest) largest = size;
  }
  const double eps = sizeof(T) == 4 ? 1.1920929e-7 : 2.220446e-16;
  const bool wrong = !(worst <= roundings * eps * largest);
  bad += wrong;
  std::printf("%s %s: %.1f roundings%s\n", what, sizeof(T) == 4 ? "float" : "double", worst / (eps * largest),
              wrong ? "  WRONG" : "");
}

template <class T>
void run(const TileKernels<T>& kernels, int64_t rows, int64_t cols) {
  const int64_t ld = (cols + kColumnPad - 1) / kColumnPad * kColumnPad;
  const int64_t high = (rows + kRowStep - 1) / kRowStep * kRowStep;
  std::mt19937 random(7);
  std::uniform_real_distribution<double> uniform(-10, 10);
  std::vector<T> s(high * ld, T(NAN));  // padding holds anything
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j) s[i * ld + j] = T(uniform(random));
  PairRules rules{};
  const Tile<T> tile{s.data(), ld, 0, rows, 0, cols, &rules, false, false};

  std::vector<T> row_max(high), row_sum(high), col_max(ld, T(-INFINITY)), col_sum(ld), shift(high), col_shift(ld);
  kernels.moments(tile, {row_max.data(), row_sum.data(), col_max.data(), col_sum.data()});
  std::vector<double> max_of_row(rows, -INFINITY), sum_of_row(rows), max_of_col(cols, -INFINITY), exp_of_row(rows),
      exp_of_col(cols), weight(rows * cols);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j) {
      const double x = s[i * ld + j];
      max_of_row[i] = std::fmax(max_of_row[i], x), max_of_col[j] = std::fmax(max_of_col[j], x), sum_of_row[i] += x;
    }
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j) {
      const double x = s[i * ld + j];
      exp_of_row[i] += std::exp(x - max_of_row[i]), exp_of_col[j] += std::exp(x - max_of_col[j]);
      weight[i * cols + j] = 0.5 * std::exp(x - max_of_row[i]) + 0.25 * std::exp(x - max_of_col[j]);
    }
  compare("row maxima", row_max, max_of_row, 0);
  compare("row sums", row_sum, sum_of_row, 8.0 * cols);

  std::vector<T> row_exp(high), col_exp(ld), row_coef(high, T(0.5)), col_coef(ld, T(0.25));
  for (int64_t i = 0; i < high; ++i) shift[i] = i < rows ? row_max[i] : T(0);
  for (int64_t j = 0; j < ld; ++j) col_shift[j] = j < cols ? col_max[j] : T(0);
  kernels.exp_sums(tile, {T(1), T(0), T(0), T(0), shift.data(), col_shift.data(), row_exp.data(), nullptr,
                          col_exp.data(), nullptr, nullptr, nullptr});
  col_exp.resize(cols);
  compare("row exponentials", row_exp, exp_of_row, 64);
  compare("column exponentials", col_exp, exp_of_col, 64);

  Weights<T> weights{};
  weights.num_exponents = 1;
  weights.beta[0] = T(1);
  weights.row_coef[0] = row_coef.data(), weights.row_shift[0] = shift.data();
  weights.col_coef[0] = col_coef.data(), weights.col_shift[0] = col_shift.data();
  kernels.weights(tile, weights);  // in place of the logits
  std::vector<T> got(rows * cols);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j) got[i * cols + j] = s[i * ld + j];
  compare("gradient weights", got, weight, 64);
}

template <class T>
void run_product(const TileKernels<T>& kernels, int64_t rows, int64_t depth, int64_t cols) {
  std::mt19937 random(8);
  std::uniform_real_distribution<double> uniform(-1, 1);
  std::vector<T> a(rows * depth), b(depth * cols), c(rows * cols);
  for (T& x : a) x = T(uniform(random));
  for (T& x : b) x = T(uniform(random));
  std::vector<double> exact(rows * cols);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j)
      for (int64_t k = 0; k < depth; ++k) exact[i * cols + j] += double(a[i * depth + k]) * double(b[k * cols + j]);
  kernels.product({c.data(), cols, a.data(), depth, 1, b.data(), cols, rows, cols, depth, T(1), false});
  compare("product", c, exact, double(depth));
  std::vector<T> turned(rows * depth);
  kernels.transpose(turned.data(), rows, a.data(), depth, rows, depth);
  kernels.product({c.data(), cols, turned.data(), 1, rows, b.data(), cols, rows, cols, depth, T(1), false});
  compare("product of a transposed", c, exact, double(depth));
}

}  // namespace

int main() {
  run_product<float>(generic::kKernelsF32, 13, 300, 70);
  run_product<double>(generic::kKernelsF64, 13, 300, 70);
  for (const int64_t cols : {1, 67, 512}) {
    run<float>(generic::kKernelsF32, 7, cols);
    run<double>(generic::kKernelsF64, 7, cols);
  }
  return bad != 0;
}
