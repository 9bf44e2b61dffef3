// The model of the tile registers and the kernels over it, for Python. Built by test_bf16_products.py without torch;
// never shipped.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "cpu/bf16_product.h"
#include "cpu/tile.h"
#include "cpu/tile_registers.h"

namespace py = pybind11;
using namespace contrastive_ext;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

// c + a b by one TDPBF16PS: c [rows, cols] float32, a [rows, 2 pairs] and b [pairs, 2 cols] bf16.
Array<float> dot(Array<float> c, Array<uint16_t> a, Array<uint16_t> b) {
  ModelRegisters registers;
  const int rows = static_cast<int>(a.shape(0)), pairs = static_cast<int>(b.shape(0));
  registers.configure(0, rows, static_cast<int>(c.shape(1)) * 4);
  registers.configure(1, rows, pairs * 4);
  registers.configure(2, pairs, static_cast<int>(b.shape(1)) * 2);
  registers.load(0, c.data(), c.shape(1) * 4);
  registers.load(1, a.data(), a.shape(1) * 2);
  registers.load(2, b.data(), b.shape(1) * 2);
  registers.dot(0, 1, 2);
  Array<float> out({c.shape(0), c.shape(1)});
  registers.store(0, out.mutable_data(), c.shape(1) * 4);
  return out;
}

// a [parts, whole blocks of rows, whole depth], b [parts, panels, depth / 2, kTileRows, 2], c changed in place. Sums of
// their own (kSymmetric) where both have parts and c is not added to.
void product(Array<float> c, Array<uint16_t> a, Array<uint16_t> b, int64_t rows, int64_t cols, int64_t depth,
             float scale, bool accumulate) {
  const Bf16Terms terms = a.shape(0) == 1 ? kWhole : b.shape(0) == 1 ? kOfWeight : accumulate ? kOfBoth : kSymmetric;
  const int64_t panel = b.shape(2) * kTileRows * 2;
  amx_model::kBf16Kernels->product({c.mutable_data(), c.shape(1), a.data(), a.shape(2), a.shape(1) * a.shape(2),
                                    b.data(), panel, b.shape(1) * panel, terms, rows, cols, depth, scale, accumulate});
}

const Bf16Kernels& named(const std::string& name) {
  if (name == "model") return *amx_model::kBf16Kernels;
  if (!amx::kBf16Kernels) throw std::invalid_argument("this compiler knows no AMX");
  return *amx::kBf16Kernels;
}

// Three parts [3, kTileBlock, parts_row] and the scale (0: not finite) of the upper left of w.
py::tuple split(const std::string& name, Array<float> w, int64_t rows, int64_t cols, int64_t parts_row) {
  Array<uint16_t> parts({kParts, kTileBlock, parts_row});
  float scale = 0;
  const bool finite = named(name).split({w.data(), w.shape(1), rows, cols, parts.mutable_data(), parts_row}, &scale);
  return py::make_tuple(parts, finite ? scale : 0.0f);
}

// Kernels that are wrong in one way, to see that the comparison with the model notices.
template <int kFault>
void faulty(const Bf16Product& p) {
  Bf16Product q = p;
  if (kFault == 1) ++q.terms.term, --q.terms.count;
  if (kFault == 2) q.depth -= kTileDepth;
  amx_model::kBf16Kernels->product(q);
  if (kFault == 3) q.c[q.c_row + 3] += 1.0f / 4096;
  if (kFault == 4) q.c[7] = __builtin_nanf("");
  if (kFault == 5)
    for (int64_t j = 0; j < q.cols; ++j) q.c[j] = q.c[q.c_row + j];
}

bool accepted(int fault) {
  void (*const products[])(const Bf16Product&) = {faulty<0>, faulty<1>, faulty<2>, faulty<3>, faulty<4>, faulty<5>};
  return multiplies_like_the_model({products[fault], amx_model::kBf16Kernels->split, amx_model::kBf16Kernels->cut});
}

}  // namespace

PYBIND11_MODULE(native_bf16, m) {
  m.def("dot", dot);
  m.def("product", product);
  m.def("split", split);
  m.def("accepted", accepted);
  m.def("compiled", [] { return amx::kBf16Kernels ? "amx, model" : "model"; });
  m.def("isa", [] { return chosen_isa().name; });
  m.def("choose", [](const std::string& name) { return choose_bf16(name.c_str()); });
  m.def("chosen", [] { return py::make_tuple(chosen_bf16().name, chosen_bf16().reason); });
}
