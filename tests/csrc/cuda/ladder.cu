// The first steps of the Hopper kernels on hardware, from the smallest piece to the whole, each against plain code on
// the host. Stops at the first rung that is wrong: what stands above it would only repeat the fault. No torch, one
// process.
//
//   nvcc -std=c++17 -gencode=arch=compute_90a,code=sm_90a -Icsrc tests/csrc/cuda/ladder.cu csrc/cuda/row_stats_*.cu
//
// `make gpu` builds and runs it under a time limit: a barrier that waits for nobody hangs.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#include "cuda/mbarrier.cuh"
#include "cuda/row_stats_backward.h"
#include "cuda/row_stats_forward.h"
#include "cuda/shape.h"
#include "cuda/shared_layout.h"
#include "cuda/tensor_map.h"
#include "cuda/tma.cuh"
#include "cuda/wgmma.cuh"

using namespace contrastive_ext;
using namespace contrastive_ext::hopper;

namespace {

constexpr int kFeatures = 128, kTileBytes = kRows * kFeatures * 2;
constexpr int kLogits = kRows / 2;  // of a thread and tile [64, 128]

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::printf("FAILED %s: %s\n", what, cudaGetErrorString(status));
  std::exit(1);
}

void verdict(const char* rung, double error, double allowed) {
  const bool good = error <= allowed;  // false for NaN
  std::printf("%s %s: error %.3g, allowed %.3g\n", good ? "ok    " : "FAILED", rung, error, allowed);
  std::fflush(stdout);
  if (!good) std::exit(1);
}

template <class T>
struct DeviceArray {
  T* data = nullptr;
  size_t size;
  explicit DeviceArray(size_t size) : size(size) { check(cudaMalloc(&data, size * sizeof(T)), "cudaMalloc"); }
  explicit DeviceArray(const std::vector<T>& host) : DeviceArray(host.size()) {
    check(cudaMemcpy(data, host.data(), size * sizeof(T), cudaMemcpyHostToDevice), "copy");
  }
  ~DeviceArray() { cudaFree(data); }
  std::vector<T> host(const char* what) const {
    std::vector<T> out(size);
    check(cudaDeviceSynchronize(), what);
    check(cudaMemcpy(out.data(), data, size * sizeof(T), cudaMemcpyDeviceToHost), what);
    return out;
  }
};

// Unit rows of 16-bit numbers, and the same values as float.
template <class T>
struct Matrix {
  std::vector<T> bits;
  std::vector<float> values;
  int64_t rows;
  int features;

  Matrix(int64_t rows, unsigned seed, int features = kFeatures) : rows(rows), features(features) {
    std::srand(seed);
    for (int64_t i = 0; i < rows; ++i) {
      std::vector<float> row(features);
      float norm = 0;
      for (float& x : row) x = static_cast<float>(std::rand()) / static_cast<float>(RAND_MAX) - 0.4f, norm += x * x;
      for (float x : row) {
        bits.push_back(static_cast<T>(x / std::sqrt(norm)));
        values.push_back(static_cast<float>(bits.back()));
      }
    }
  }
  double product(int64_t i, const Matrix& other, int64_t j) const {
    double sum = 0;
    for (int k = 0; k < features; ++k) sum += double{values[i * features + k]} * other.values[j * features + k];
    return sum;
  }
};

template <class T>
CUtensorMap map_of(const DeviceArray<T>& data, int64_t rows) {
  CUtensorMap map;
  const char* error = describe_matrix(&map, data.data, rows, kFeatures, std::is_same_v<T, __nv_bfloat16>, kRows);
  if (!error) return map;
  std::printf("FAILED tensor map: %s\n", error);
  std::exit(1);
}

template <class T>
constexpr Operand operand = std::is_same_v<T, __nv_bfloat16> ? Operand::kBfloat16 : Operand::kHalf;

// One warpgroup: one tile of a and one of b by TMA, both copied out as they lie, and the product of 64 rows of a.
template <class T>
__global__ void one_tile(const __grid_constant__ CUtensorMap a_map, const __grid_constant__ CUtensorMap b_map,
                         int first, uint8_t* bytes, float* out) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ uint8_t memory[];
  uint8_t* a = memory + (kAtomBytes - shared_address(memory) % kAtomBytes) % kAtomBytes;
  uint8_t* b = a + kTileBytes;
  __shared__ uint64_t full;
  if (threadIdx.x == 0) {
    init_barrier(full, 1);
    publish_barriers();
    arrive_expecting(full, 2 * kTileBytes);
    load_tile<kFeatures, kRows>(a, a_map, 0, full);
    load_tile<kFeatures, kRows>(b, b_map, 0, full);
  }
  __syncthreads();
  wait(full, 0);
  for (int k = threadIdx.x; k < 2 * kTileBytes; k += blockDim.x) bytes[k] = a[k];
  float s[kLogits];
  begin_products();
  multiply_features<operand<T>, kRows, 0, kFeatures / kStep>(s, k_major(shared_address(a) + first * 128),
                                                             k_major(shared_address(b)));
  end_products();
  wait_for_products(s);
  const Fragment own(threadIdx.x);
  for (int g = 0; g < 16; ++g)
    for (int h = 0; h < 2; ++h)
      for (int e = 0; e < 2; ++e) out[(own.row + 8 * h) * kRows + own.column + 8 * g + e] = s[4 * g + 2 * h + e];
#endif
}

// Rungs 1 and 2: TMA puts elements where swizzled_offset says, zeros beyond the matrix; WGMMA reads them as meant.
template <class T>
void climb_tile(const char* name, int64_t rows_a, int64_t rows_b) {
  const Matrix<T> a(rows_a, 1), b(rows_b, 2);
  const DeviceArray<T> a_data(a.bits), b_data(b.bits);
  const CUtensorMap a_map = map_of(a_data, rows_a), b_map = map_of(b_data, rows_b);
  const DeviceArray<uint8_t> bytes(2 * kTileBytes);
  const DeviceArray<float> out(64 * kRows);
  constexpr int kSharedBytes = 2 * kTileBytes + kAtomBytes;
  check(cudaFuncSetAttribute(one_tile<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes), "attribute");
  for (int first : {0, 64}) {
    one_tile<T><<<1, 128, kSharedBytes>>>(a_map, b_map, first, bytes.data, out.data);
    check(cudaGetLastError(), "launch of one tile");
    const std::vector<uint8_t> raw = bytes.host("TMA of one tile");
    double wrong = 0;
    for (int tile = 0; tile < 2; ++tile)
      for (int row = 0; row < kRows; ++row)
        for (int k = 0; k < kFeatures; ++k) {
          const Matrix<T>& matrix = tile ? b : a;
          T element;
          std::memcpy(&element, &raw[tile * kTileBytes + swizzled_offset(kRows, row, k)], 2);
          wrong += static_cast<float>(element) != (row < matrix.rows ? matrix.values[row * kFeatures + k] : 0.0f);
        }
    std::printf("%s, %ld and %ld rows, from row %d\n", name, static_cast<long>(rows_a), static_cast<long>(rows_b),
                first);
    verdict("  TMA and swizzle, elements out of place", wrong, 0);
    const std::vector<float> s = out.host("WGMMA of one tile");
    double error = 0;
    for (int i = 0; i < 64; ++i)
      for (int j = 0; j < kRows; ++j) {
        const double exact = first + i < rows_a && j < rows_b ? a.product(first + i, b, j) : 0.0;
        const double here = std::fabs(s[i * kRows + j] - exact);
        if (!(here <= error)) error = here;
      }
    verdict("  WGMMA, products", error, 1e-5);
  }
}

// Weights of the rung below: whole eighths, which 16 bits hold.
__host__ __device__ float some_weight(int i, int j) { return ((7 * i + 3 * j) % 11 - 5) / 8.0f; }

// One warpgroup: o[64, 128] = w[64, 128] b, weights in registers, the tile b by TMA and read by rows.
template <class T>
__global__ void weighted_tile(const __grid_constant__ CUtensorMap b_map, float* out) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ uint8_t memory[];
  uint8_t* b = memory + (kAtomBytes - shared_address(memory) % kAtomBytes) % kAtomBytes;
  __shared__ uint64_t full;
  if (threadIdx.x == 0) {
    init_barrier(full, 1);
    publish_barriers();
    arrive_expecting(full, kTileBytes);
    load_tile<kFeatures, kRows>(b, b_map, 0, full);
  }
  __syncthreads();
  wait(full, 0);
  const Fragment own(threadIdx.x);
  float s[kLogits], o[kFeatures / 2] = {};
  uint32_t w[kLogits / 2];
  for (int k = 0; k < kLogits; ++k) s[k] = some_weight(own.row + k / 2 % 2 * 8, own.column + k / 4 * 8 + k % 2);
  pack<operand<T>>(w, s);
  begin_products();
  add_products<operand<T>>(o, w, mn_major(shared_address(b), kRows));
  end_products();
  wait_for_products(o, w);
  for (int k = 0; k < kFeatures / 2; ++k)
    out[(own.row + k / 2 % 2 * 8) * kFeatures + own.column + k / 4 * 8 + k % 2] = o[k];
#endif
}

// Rung 3: WGMMA takes weights from registers and reads the tile the other way.
template <class T>
void climb_weighted_tile(int64_t rows) {
  const Matrix<T> b(rows, 2);
  const DeviceArray<T> data(b.bits);
  const CUtensorMap map = map_of(data, rows);
  const DeviceArray<float> out(64 * kFeatures);
  constexpr int kSharedBytes = kTileBytes + kAtomBytes;
  check(cudaFuncSetAttribute(weighted_tile<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes), "attribute");
  weighted_tile<T><<<1, 128, kSharedBytes>>>(map, out.data);
  check(cudaGetLastError(), "launch of a weighted tile");
  const std::vector<float> o = out.host("weights by a tile");
  double error = 0;
  for (int i = 0; i < 64; ++i)
    for (int k = 0; k < kFeatures; ++k) {
      double exact = 0;
      for (int j = 0; j < rows; ++j) exact += double{some_weight(i, j)} * b.values[j * kFeatures + k];
      const double here = std::fabs(o[i * kFeatures + k] - exact);
      if (!(here <= error)) error = here;
    }
  std::printf("%ld rows\n", static_cast<long>(rows));
  verdict("  WGMMA, weights in registers by the tile's rows", error, 1e-4);
}

// Statistics of one side against the definition: lse and counts of `anchors`, whose logits with the others are
// logit(anchor, other), NaN where a pair is ignored.
template <class Logit>
void compare_statistics(const std::vector<float>& lse, const std::vector<float>& count, int64_t others, float scale,
                        const Logit& logit) {
  double worst = 0, miscounted = 0;
  for (size_t i = 0; i < lse.size(); i += lse.size() > 5000 ? 37 : 1) {
    double largest = -INFINITY, sum = 0;
    std::vector<double> logits;
    for (int64_t j = 0; j < others; ++j) {
      const double s = logit(static_cast<int64_t>(i), j);
      if (!std::isnan(s)) logits.push_back(s);
    }
    for (double s : logits) largest = s > largest ? s : largest;
    for (double s : logits) sum += std::exp(s - largest);
    const double exact = logits.empty() ? -INFINITY : largest + std::log(sum);
    const double error = exact == lse[i] ? 0 : std::fabs(lse[i] - exact);
    if (!(error <= worst)) worst = error;
    miscounted += static_cast<double>(logits.size()) != count[i];
  }
  verdict("  counts that differ", miscounted, 0);
  verdict("  lse", worst, 4e-7 * (10 + 4 * scale));  // a few ulps of the largest logit and of the result
}

// The whole forward against the definition, with the statistics of the columns where asked, and again, bit for bit.
template <class T>
void climb_forward(const char* rung, int64_t n, int64_t m, ForwardPlan plan, float scale, bool unit, DevicePairs pairs,
                   int features = kFeatures, bool has_columns = false) {
  const Matrix<T> u(n, 3, features), v(m, 4, features);
  const Matrix<T>& columns = m == n ? u : v;
  const DeviceArray<T> u_data(u.bits), v_data(columns.bits);
  const DeviceArray<float> lse(n), count(n), col_lse(m), col_count(m), partials(plan.partials(n));
  const DeviceArray<float> column_partials(plan.column_partials(n, m));
  ForwardArguments arguments{};
  arguments.pairs = pairs, arguments.pairs.num_rows = n;
  arguments.n = n, arguments.m = m, arguments.beta = 1, arguments.scale = scale, arguments.unit = unit;
  arguments.partials = partials.data, arguments.column_partials = has_columns ? column_partials.data : nullptr;
  const ForwardResults results{lse.data, count.data, has_columns ? col_lse.data : nullptr,
                               has_columns ? col_count.data : nullptr};
  std::vector<float> first;
  for (int run = 0; run < 3; ++run) {
    for (const auto* array : {&partials, &column_partials})
      check(cudaMemset(array->data, 0xFF, array->size * sizeof(float)), "poison");  // NaN
    const char* error = row_stats_forward(u_data.data, v_data.data, features, operand<T> == Operand::kBfloat16,
                                          arguments, plan, results, nullptr);
    if (error) std::printf("FAILED %s: %s\n", rung, error), std::exit(1);
    const std::vector<float> of_rows = lse.host(rung), of_columns = col_lse.host(rung);
    std::vector<float> got = of_rows;
    if (has_columns) got.insert(got.end(), of_columns.begin(), of_columns.end());
    if (run > 0) {
      if (std::memcmp(first.data(), got.data(), got.size() * sizeof(float))) verdict("  a second run, bits", 1, 0);
      continue;
    }
    first = got;
    std::printf("%s: %ld x %ld, D = %d, %d x %d splits\n", rung, static_cast<long>(n), static_cast<long>(m), features,
                plan.windows, plan.splits);
    const auto logit = [&](int64_t i, int64_t j) {
      return arguments.pairs.same_image(i, j) ? NAN : scale * u.product(i, columns, j);
    };
    compare_statistics(of_rows, count.host(rung), m, scale, logit);
    if (has_columns)
      compare_statistics(of_columns, col_count.host(rung), n, scale, [&](int64_t j, int64_t i) { return logit(i, j); });
  }
}

// Sums of columns by warps, by consumers, over tiles of rows, over windows.
template <class T>
void climb_columns(int features) {
  const auto climb = [&](const char* rung, int64_t n, int64_t m, ForwardPlan plan, float scale, bool unit,
                         DevicePairs pairs) {
    climb_forward<T>(rung, n, m, plan, scale, unit, pairs, features, /*has_columns=*/true);
  };
  DevicePairs none, pairs;
  pairs.num_images = 600;
  climb("columns: one block, one tile", 128, 128, {1, 1}, 10, true, none);
  climb("columns: both buffers again and again", 128, 21 * 128, {1, 1}, 10, true, none);
  climb("columns: tails of both sides", 70, 333, {1, 1}, 10, true, none);
  climb("columns: pairs, splits and windows", 600, 600, {2, 2}, 10, true, pairs);
  climb("columns: running maximum by temperature", 600, 600, {1, 2}, 200, true, pairs);
  climb("columns: running maximum by request", 130, 700, {1, 3}, 10, false, none);
  climb("columns: more blocks than processors", 40000, 200, {1, 1}, 10, true, none);
}

enum class Anchors { kRows, kColumns, kBoth };

// The whole backward against the definition with lse and coefficients of its own, and again, bit for bit.
template <class T>
void climb_backward(const char* rung, int features, int64_t n, int64_t m, int splits, float scale, bool unit,
                    Anchors anchors, DevicePairs pairs) {
  const Matrix<T> u(n, 3, features), v(m, 4, features);
  const Matrix<T>& columns = m == n ? u : v;
  const bool has_rows = anchors != Anchors::kColumns, has_columns = anchors != Anchors::kRows;
  pairs.num_rows = n;
  // every exponential of a kept pair is at most 1, as lse makes them
  const auto term = [&](int64_t count) {
    std::vector<float> lse, grad;
    for (int64_t i = 0; i < count; ++i) {
      lse.push_back(scale * 1.01f + static_cast<float>(i % 7) / 4);
      grad.push_back((static_cast<float>(i % 11) - 4.5f) / static_cast<float>(count));
    }
    return std::pair(lse, grad);
  };
  const auto [row_lse, row_grad] = term(n);
  const auto [col_lse, col_grad] = term(m);
  const DeviceArray<T> u_data(u.bits), v_data(columns.bits);
  const DeviceArray<float> a(row_lse), b(row_grad), c(col_lse), d(col_grad), gradient(n * features);
  const DeviceArray<float> workspace(backward_workspace(n, m, features, splits));
  BackwardArguments arguments{};
  arguments.pairs = pairs, arguments.n = n, arguments.m = m, arguments.beta = 1, arguments.scale = scale;
  arguments.unit = unit, arguments.workspace = workspace.data, arguments.gradient = gradient.data;
  if (has_rows) arguments.row_lse = a.data, arguments.row_grad = b.data;
  if (has_columns) arguments.col_lse = c.data, arguments.col_grad = d.data;
  std::vector<float> first;
  for (int run = 0; run < 3; ++run) {
    check(cudaMemset(gradient.data, 0xFF, gradient.size * sizeof(float)), "poison");  // NaN
    check(cudaMemset(workspace.data, 0xFF, workspace.size * sizeof(float)), "poison");
    const char* error = row_stats_backward(u_data.data, v_data.data, features, operand<T> == Operand::kBfloat16,
                                           arguments, splits, nullptr);
    if (error) std::printf("FAILED %s: %s\n", rung, error), std::exit(1);
    const std::vector<float> got = gradient.host(rung);
    if (run > 0) {
      if (std::memcmp(first.data(), got.data(), got.size() * sizeof(float))) verdict("  a second run, bits", 1, 0);
      continue;
    }
    first = got;
    double worst = 0;  // in units of the error that rounding every weight to 16 bits allows
    const double rounding = operand<T> == Operand::kBfloat16 ? 1.0 / 256 : 1.0 / 2048;
    for (int64_t i = 0; i < n; i += n > 300 ? 37 : 1) {
      std::vector<double> exact(features), magnitude(features);
      for (int64_t j = 0; j < m; ++j) {
        if (pairs.same_image(i, j)) continue;
        const double s = scale * u.product(i, columns, j);
        double w = 0;
        if (has_rows) w += row_grad[i] * std::exp(s - row_lse[i]);
        if (has_columns) w += col_grad[j] * std::exp(s - col_lse[j]);
        for (int k = 0; k < features; ++k) {
          const double x = scale * w * columns.values[j * features + k];
          exact[k] += x, magnitude[k] += std::fabs(x);
        }
      }
      for (int k = 0; k < features; ++k) {
        const double allowed = (rounding + 4e-7 * (10 + 4 * scale)) * magnitude[k] + 1e-9 * scale;
        const double here = std::fabs(got[i * features + k] - exact[k]) / allowed;
        if (!(here <= worst)) worst = here;
      }
    }
    std::printf("%s: %ld x %ld, D = %d, %d splits\n", rung, static_cast<long>(n), static_cast<long>(m), features,
                splits);
    verdict("  gradient, of what rounded weights allow", worst, 1);
  }
}

DevicePairs images(int64_t num_images, int64_t positive_offset = 0) {
  DevicePairs rules;
  rules.num_images = num_images, rules.positive_offset = positive_offset;
  return rules;
}

template <class T>
void climb(const char* name) {
  std::printf("---- %s\n", name);
  climb_tile<T>(name, 128, 128);
  climb_tile<T>(name, 100, 37);
  climb_forward<T>("one block, one tile, nothing masked", 128, 128, {1, 1}, 10, true, images(0));
  climb_forward<T>("one block, ring without reuse, ping-pong", 128, 4 * 128, {1, 1}, 10, true, images(0));
  climb_forward<T>("one block, ring with reuse", 128, 21 * 128, {1, 1}, 10, true, images(0));
  climb_forward<T>("tails of rows and columns", 70, 333, {1, 1}, 10, true, images(0));
  climb_forward<T>("splits and merge", 130, 21 * 128 + 5, {1, 7}, 10, true, images(0));
  climb_forward<T>("two views: the mask", 600, 600, {1, 2}, 10, true, images(300));
  climb_forward<T>("every column is a positive: empty rows", 200, 200, {1, 1}, 10, true, images(1));
  climb_forward<T>("a shard of gathered columns", 140, 900, {1, 3}, 10, true, images(70, 333));
  climb_forward<T>("online maximum by temperature", 600, 600, {1, 2}, 200, true, images(300));
  climb_forward<T>("online maximum by request", 130, 700, {1, 3}, 10, false, images(0));
  climb_forward<T>("more blocks than processors", 40000, 200, {1, 1}, 10, true, images(0));
  climb_weighted_tile<T>(128);
  climb_weighted_tile<T>(37);
  for (int features : {128, 64, 256}) {
    if (features != 128) climb_forward<T>("forward, other sizes", 600, 2000, {1, 3}, 10, true, images(0), features);
    climb_columns<T>(features);
    climb_backward<T>("one block, one tile", features, 128, 128, 1, 10, true, Anchors::kRows, images(0));
    climb_backward<T>("ring with reuse", features, 128, 21 * 128, 1, 10, true, Anchors::kRows, images(0));
    climb_backward<T>("terms of columns", features, 128, 21 * 128, 1, 10, true, Anchors::kColumns, images(0));
    climb_backward<T>("one exponential for both", features, 600, 600, 1, 10, true, Anchors::kBoth, images(300));
    climb_backward<T>("an exponential for each", features, 600, 600, 1, 10, false, Anchors::kBoth, images(300));
    climb_backward<T>("tails and splits", features, 130, 2000, 3, 10, true, Anchors::kBoth, images(130, 333));
    climb_backward<T>("more blocks than processors", features, 40000, 200, 1, 10, true, Anchors::kRows, images(0));
  }
}

}  // namespace

int main() {
  int device = 0, major = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "attribute");
  if (major != 9) return std::printf("this GPU is no Hopper: nothing was checked\n"), 0;
  climb<__half>("float16");
  climb<__nv_bfloat16>("bfloat16");
  std::printf("the whole ladder is green\n");
  return 0;
}
