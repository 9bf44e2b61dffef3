// The gradient of row statistics on Hopper: the loop of main_loop.cuh with weights, which the loop multiplies by the
// same tile from the same shared memory. A block owns its rows' sums (per split of the columns): no atomics, and splits
// are added in their order.
//
// At 128 features a turn is 1024 cycles of tensor cores for two products and 512 of exponentials under the other
// warpgroup's products. The sums take 64 registers a thread, logits 64, weights 32, more than the 168 of a thread if
// all had the same: the producer's warpgroup gives up what it does not need.
#include "row_stats_backward.h"

#include "launch.cuh"
#include "main_loop.cuh"
#include "thread_weights.h"

namespace contrastive_ext {
namespace hopper {
namespace {

constexpr int kThreads = (kConsumers + 1) * kConsumerThreads;
// 128 (24 + 2 * 240) = 64,512 of 65,536 registers, as many as 384 threads of 168 begin with
[[maybe_unused]] constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;

// At 256 features 128 sums leave no room for 64 logits.
constexpr CE_HOST_DEVICE int columns_of_tile(int features) { return features > 128 ? 64 : 128; }
constexpr int kVectors = 2;  // coefficient and lse of a column

// The workspace: largest |a| and |c|, terms of the columns, partial sums [splits, n, features].
constexpr int kHead = 4;
constexpr CE_HOST_DEVICE int64_t partials_begin(int64_t m, int features) {
  const int columns = columns_of_tile(features);
  return kHead + int64_t{number_of_tiles(m, columns)} * kVectors * columns;
}

template <int kFeatures, Terms kTerms>
using BackwardShape = Shape<kFeatures, columns_of_tile(kFeatures), has_columns(kTerms) ? kVectors : 0>;

CE_HOST_DEVICE bool is_factored(const BackwardArguments& arguments, float factor) {
  return arguments.row_lse && arguments.col_lse && fits_factored(arguments.unit, factor);
}

// The functor of the loop: logits of a tile become 16-bit weights.
template <Operand kOperand, class Shape, Terms kTerms, bool kFactored>
struct MakeWeights {
  static constexpr bool kMultiplies = true;
  const BackwardArguments& arguments;
  int column;  // the thread's first of a tile
  float factor;
  MaskedTiles masked;
  ThreadWeights<Shape::kLogits, kTerms, kFactored> rows;
  float o[Shape::kFeatures / 2] = {};
  uint32_t w[Shape::kLogits / 2];

  __device__ __forceinline__ void operator()(float (&s)[Shape::kLogits], int tile,
                                             const float (*vectors)[Shape::kColumns]) {
    if (masked.meets(arguments.pairs, tile))
      rows.weigh_masked(s, factor, *vectors, column, int64_t{tile} * Shape::kColumns, arguments.pairs, arguments.m);
    else
      rows.weigh(s, factor, *vectors, column);
    pack<kOperand>(w, s);
  }
};

template <Operand kOperand, Terms kTerms, bool kFactored, class Shape>
__device__ __forceinline__ void sum_weighted(Shared<Shape>& shared, const BackwardArguments& arguments,
                                             const PlainGrid& work, float factor) {
  const int consumer = warpgroup_of_thread();
  const Fragment own(threadIdx.x % kConsumerThreads);
  const int n = static_cast<int>(arguments.n), m = static_cast<int>(arguments.m);
  const int i0 = work.row_tile * kRows + consumer * kConsumerRows;
  const int rows[2] = {min(i0 + own.row, n - 1), min(i0 + own.row + 8, n - 1)};
  const auto term = [&](int row) {
    const float lse = has_rows(kTerms) ? arguments.row_lse[row] : 0, a = has_rows(kTerms) ? arguments.row_grad[row] : 0;
    const float largest = has_columns(kTerms) ? arguments.workspace[1] : 0;
    const float bound = has_columns(kTerms) ? fmaxf(arguments.workspace[0], largest) : 0;
    return RowTerm(lse, a, arguments.beta, largest, bound, kFactored);
  };
  MakeWeights<kOperand, Shape, kTerms, kFactored> functor{
      arguments,
      own.column,
      factor,
      MaskedTiles(arguments.pairs, i0, min(i0 + kConsumerRows, n), m, Shape::kColumns, work.columns.begin),
      {{rows[0], rows[1]}, {term(rows[0]), term(rows[1])}}};
  consume<kOperand>(shared, work, consumer, functor);
  float* partial =
      gridDim.y == 1 ? arguments.gradient : arguments.workspace + partials_begin(arguments.m, Shape::kFeatures);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = i0 + own.row + 8 * h;
    if (row >= n) continue;
    const float undo = arguments.known_scale() * power_of_two(-functor.rows.term[h].exponent);
    float* to = partial + (int64_t{work.split} * n + row) * Shape::kFeatures + own.column;
#pragma unroll
    for (int g = 0; g < Shape::kFeatures / 8; ++g)
      *reinterpret_cast<float2*>(to + 8 * g) =
          make_float2(functor.o[4 * g + 2 * h] * undo, functor.o[4 * g + 2 * h + 1] * undo);
  }
}

template <Operand kOperand, int kFeatures, Terms kTerms>
__global__ void __launch_bounds__(kThreads, 1)
    row_stats_backward_kernel(const __grid_constant__ BackwardArguments arguments,
                              const __grid_constant__ CUtensorMap u, const __grid_constant__ CUtensorMap v) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Shape = BackwardShape<kFeatures, kTerms>;
  extern __shared__ uint8_t memory[];
  auto& shared = begin_block<Shape>(memory);
  const PlainGrid work({0, number_of_tiles(arguments.m, Shape::kColumns)});
  if (warpgroup_of_thread() == kConsumers) {
    give_registers<kProducerRegisters>();
    if (threadIdx.x == kConsumers * kConsumerThreads) produce(shared, u, v, arguments.workspace + kHead, work);
    return;
  }
  take_registers<kConsumerRegisters>();
  const float factor = arguments.beta * arguments.known_scale() * kLog2E;
  if (kTerms == Terms::kBoth && is_factored(arguments, factor))
    sum_weighted<kOperand, kTerms, /*kFactored=*/kTerms == Terms::kBoth>(shared, arguments, work, factor);
  else
    sum_weighted<kOperand, kTerms, /*kFactored=*/false>(shared, arguments, work, factor);
#else
  __trap();  // built for another architecture than sm_90a; the backend's why_not says so first
#endif
}

// Block 0: the largest |a| of the rows, block 1: of the columns; 0 where a side has no term.
__global__ void largest_kernel(const __grid_constant__ BackwardArguments arguments) {
  __shared__ float of_warp[32];
  const float* grad = blockIdx.x ? arguments.col_grad : arguments.row_grad;
  const int64_t count = !grad ? 0 : blockIdx.x ? arguments.m : arguments.n;
  float largest = 0;
#pragma unroll 8  // loads on their way at once
  for (int64_t k = threadIdx.x; k < count; k += blockDim.x) largest = fmaxf(largest, fabsf(grad[k]));
  for (int lane = 16; lane > 0; lane /= 2) largest = fmaxf(largest, __shfl_xor_sync(0xFFFFFFFF, largest, lane));
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = largest;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (unsigned warp = 1; warp < blockDim.x / 32; ++warp) largest = fmaxf(largest, of_warp[warp]);
    arguments.workspace[blockIdx.x] = largest;
  }
}

// Terms of the columns, [tiles][kVectors][columns of a tile]: a block of as many threads for each tile. Columns beyond
// the last one weigh nothing.
__global__ void column_terms_kernel(const __grid_constant__ BackwardArguments arguments) {
  const int64_t j = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const float reach = arguments.beta * arguments.known_scale() * kLog2E;
  const float bound = fmaxf(arguments.workspace[0], arguments.workspace[1]);
  ColumnTerm term{0, INFINITY};
  if (j < arguments.m)
    term = ColumnTerm::of(arguments.col_lse[j], arguments.col_grad[j], arguments.beta, bound,
                          is_factored(arguments, reach));
  float* to = arguments.workspace + kHead + int64_t{blockIdx.x} * kVectors * blockDim.x + threadIdx.x;
  to[0] = term.coefficient, to[blockDim.x] = term.lse;
}

// gradient = the sum of the splits, the first one first.
__global__ void add_splits_kernel(const float4* partials, int64_t size, int splits, float4* gradient) {
  const int64_t k = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (k >= size) return;
  float4 total = partials[k];
  for (int split = 1; split < splits; ++split) {
    const float4 more = partials[split * size + k];
    total.x += more.x, total.y += more.y, total.z += more.z, total.w += more.w;
  }
  gradient[k] = total;
}

template <Operand kOperand, int kFeatures>
struct Launch {
  template <Terms kTerms>
  static const char* sweep(const void* u, const void* v, const BackwardArguments& arguments, int splits,
                           cudaStream_t stream) {
    return launch_sweep<BackwardShape<kFeatures, kTerms>, kOperand>(
        row_stats_backward_kernel<kOperand, kFeatures, kTerms>, kThreads, u, arguments.n, v, arguments.m, splits,
        stream, arguments);
  }
  static const char* run(const void* u, const void* v, const BackwardArguments& arguments, int splits,
                         cudaStream_t stream) {
    if (!arguments.col_lse) return sweep<Terms::kRows>(u, v, arguments, splits, stream);
    if (!arguments.row_lse) return sweep<Terms::kColumns>(u, v, arguments, splits, stream);
    return sweep<Terms::kBoth>(u, v, arguments, splits, stream);
  }
};

}  // namespace

int backward_splits(int64_t n, int64_t m, int features, int processors) {
  return gradient_splits(number_of_tiles(n, kRows), number_of_tiles(m, columns_of_tile(features)), processors,
                         n * features * static_cast<int64_t>(sizeof(float)));
}

int64_t backward_workspace(int64_t n, int64_t m, int features, int splits) {
  return partials_begin(m, features) + (splits > 1 ? int64_t{splits} * n * features : 0);
}

const char* row_stats_backward(const void* u, const void* v, int features, bool bfloat16,
                               const BackwardArguments& arguments, int splits, cudaStream_t stream) {
  const int64_t size = arguments.n * features;
  if (size == 0) return nullptr;
  if (arguments.m == 0) {
    const cudaError_t status = cudaMemsetAsync(arguments.gradient, 0, size * sizeof(float), stream);
    return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
  }
  if (arguments.col_lse) {
    largest_kernel<<<2, 512, 0, stream>>>(arguments);
    const int columns = columns_of_tile(features);
    column_terms_kernel<<<number_of_tiles(arguments.m, columns), columns, 0, stream>>>(arguments);
  }
  const char* error = launch_instance<Launch>(features, bfloat16, u, v, arguments, splits, stream);
  if (error || splits == 1) return error;
  constexpr int kThreadsOfSum = 256;
  const auto partials = reinterpret_cast<const float4*>(arguments.workspace + partials_begin(arguments.m, features));
  add_splits_kernel<<<number_of_tiles(size / 4, kThreadsOfSum), kThreadsOfSum, 0, stream>>>(
      partials, size / 4, splits, reinterpret_cast<float4*>(arguments.gradient));
  return launch_error();
}

}  // namespace hopper
}  // namespace contrastive_ext
