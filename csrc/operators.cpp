// What the library registers with torch: the schema of every operator, and what it says about its build. Kernels are
// put behind the schemas where they are (cpu/ops.cpp, cpu/unit_rows.cpp, cpu/whole_loss_ops.cpp, cuda/ops.cu);
// contrastive_ext/backends/native.py holds a loaded library against the schemas that it expects.
#include <string>

#include "compat.h"
#include "cpu/bf16_product.h"
#include "cpu/tile.h"

namespace contrastive_ext {
namespace {

#if !defined(CONTRASTIVE_EXT_VERSION)
#define CONTRASTIVE_EXT_VERSION "not stated"
#endif

// Who multiplies bf16 operands, and why not AMX.
std::string bf16_products() {
  const Bf16Choice choice = chosen_bf16();
  return choice.kernels ? choice.name : std::string(choice.name) + ": " + choice.reason;
}

// One line of JSON: what was built and what runs on this CPU; without nvcc there are no cuda_archs.
std::string native_build_info() {
  const uint64_t target = TORCH_FEATURE_VERSION;
  int count = 0;
  const Isa* isas = compiled_isas(&count);
  std::string paths;
  for (int i = 0; i < count; ++i) paths += std::string(i ? ", " : "") + "\"" + isas[i].name + "\"";
  return "{\"version\": \"" CONTRASTIVE_EXT_VERSION "\", \"abi_target\": \"" + std::to_string(target >> 56) + "." +
         std::to_string((target >> 48) & 0xff) + "\", \"compiler\": \"" +
#if defined(__clang__)
         "clang "
#else
         "gcc "
#endif
         + std::string(__VERSION__) + "\", \"cpu_isas\": [" + paths + "], \"cpu_isa\": \"" + chosen_isa().name +
         "\", \"cpu_bf16\": \"" + bf16_products() +
#if defined(CONTRASTIVE_EXT_CUDA_ARCHS)
         "\", \"cuda_archs\": \"" CONTRASTIVE_EXT_CUDA_ARCHS +
#endif
         "\"}";
}

// Sets who multiplies bf16 operands ("": asks only; see choose_bf16) and says who does.
std::string use_bf16_products(std::string name) {
  STD_TORCH_CHECK(name.empty() || choose_bf16(name.c_str()), "bf16 products cannot be ", name,
                  " here; auto, model and widened always can, amx where native_build_info says so.");
  return chosen_bf16().name;
}

// The arguments that describe a problem, those of Request.
const std::string kProblem =
    "Tensor u, Tensor? v, float scale, float[] exponents, int num_images, int positive_offset, bool only_equal_ids, "
    "Tensor? row_ids, Tensor? col_ids, Tensor? ignored, Tensor? gate_scorers, Tensor? gate_features, "
    "Tensor? gate_row_limit, Tensor? gate_col_limit, bool unit, bool split_products";
// The problem of the Hopper kernels; a scale tensor is read on the device.
[[maybe_unused]] const std::string kCudaProblem =
    "Tensor u, Tensor? v, Tensor? scale, float scale_value, float exponent, int num_images, int positive_offset, "
    "Tensor? row_ids, Tensor? col_ids, bool unit";
// The call of a whole loss.
const std::string kCall = "Tensor z1, Tensor z2, Tensor? scale, float scale_value, str layout, bool normalize";

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(contrastive_ext, m) {
  const auto define = [&](const std::string& schema) { m.def(schema.c_str()); };
  define("row_stats_forward_cpu(" + kProblem +
         ", bool columns, bool means, bool diagnostics, bool maximum) -> "
         "(Tensor lse, Tensor aux, Tensor col_lse, Tensor col_aux, Tensor mean)");
  define("row_stats_backward_cpu(" + kProblem +
         ", Tensor lse, Tensor grad_lse, Tensor? col_lse, Tensor? grad_col_lse, bool need_u, bool need_v) -> "
         "(Tensor du, Tensor dv)");
  define("ranked_stats_forward_cpu(" + kProblem +
         ", float[] ranking, int bins, bool diagnostics) -> (Tensor lse, Tensor aux, Tensor axis, Tensor below)");
  define("ranked_stats_backward_cpu(" + kProblem +
         ", float[] ranking, int bins, Tensor lse, Tensor axis, Tensor below, Tensor grad_lse, bool need_u, "
         "bool need_v) -> (Tensor du, Tensor dv)");
  define("pair_sums_forward_cpu(" + kProblem +
         ", Tensor offset, float sign) -> (Tensor sum, Tensor slope, Tensor count)");
  define("pair_sums_backward_cpu(" + kProblem +
         ", Tensor offset, float sign, Tensor grad_sum, bool need_u, bool need_v) -> (Tensor du, Tensor dv)");
  define(
      "top_columns_cpu(Tensor scorers, Tensor? features, int k, int num_images, Tensor? col_ids, Tensor? row_ids, "
      "Tensor? excluded, Tensor? below) -> (Tensor scores, Tensor columns)");
  define("unit_rows_cpu(Tensor z, ScalarType operand_dtype) -> (Tensor unit, Tensor norm)");
  define("unit_rows_backward_cpu(Tensor z, Tensor norm, Tensor grad) -> Tensor dz");
  define("whole_loss_forward_cpu(" + kCall +
         ", str formula, float[] parameters, float[] exponents, str reduction) -> "
         "(Tensor loss, Tensor operands, Tensor norm, Tensor lse, Tensor coefficients, Tensor clamped)");
  define("whole_loss_backward_cpu(" + kCall +
         ", float[] exponents, str reduction, Tensor operands, Tensor norm, Tensor lse, Tensor coefficients, "
         "Tensor grad_loss, bool need_scale) -> (Tensor dz1, Tensor dz2, Tensor dscale)");
#if defined(CONTRASTIVE_EXT_CUDA_ARCHS)
  define("row_stats_forward_cuda(" + kCudaProblem +
         ", bool columns, int stream) -> (Tensor lse, Tensor count, Tensor col_lse, Tensor col_count)");
  define("row_stats_backward_cuda(" + kCudaProblem +
         ", Tensor lse, Tensor grad_lse, Tensor? col_lse, Tensor? grad_col_lse, bool need_u, bool need_v, int stream)"
         " -> (Tensor du, Tensor dv)");
#endif
  define("native_build_info() -> str");
  define("use_bf16_products_cpu(str name) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(contrastive_ext, CompositeExplicitAutograd, m) {
  m.impl("native_build_info", TORCH_BOX(&native_build_info));
  m.impl("use_bf16_products_cpu", TORCH_BOX(&use_bf16_products));
}

}  // namespace contrastive_ext
