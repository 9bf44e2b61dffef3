// Products of bf16 matrices by tile registers (AMX): what is asked, and who computes it. Plain data: this header is
// seen by code compiled for different instruction sets, so it holds no function bodies.
#pragma once

#include <cstdint>

namespace contrastive_ext {

constexpr int64_t kTileRows = 16;   // of a register, and float32 columns of one
constexpr int64_t kTileDepth = 32;  // bf16 elements in a row of a register
constexpr int64_t kTileBlock = 32;  // rows and columns of a product at a time: two registers each way
constexpr int64_t kWeightParts = 3;

// c = scale a b, or c += scale a b with a power of two, for a [rows, depth], the sum of `parts` matrices, and
// b [depth, cols].
//
// a lies row by row, b in panels of kTileRows columns: elements 2k and 2k + 1 of a column side by side, the pairs k of
// all columns of a panel in a row. Whole blocks of rows, columns and kTileDepth are readable; beyond `depth` a is 0 and
// b finite.
struct Bf16Product {
  float* c;
  int64_t c_row;
  const uint16_t* a;
  int64_t a_row, a_part;  // from one row to the next, from one part to the next
  int64_t parts;
  const uint16_t* b;
  int64_t b_panel;
  int64_t rows, cols, depth;
  float scale;
  bool accumulate;
};

// w [rows, cols], rows <= kTileBlock, cut into three bf16 matrices [kTileBlock, parts_row] whose sum it is in every
// bit; what lies beyond rows and cols is 0.
struct Bf16Split {
  const float* w;
  int64_t w_row;
  int64_t rows, cols;
  uint16_t* parts;
  int64_t parts_row;  // a multiple of kTileDepth
};

struct Bf16Kernels {
  void (*product)(const Bf16Product&);
  // Cuts w / *scale for a power of two that keeps the parts in range; false where an element is not finite.
  bool (*split)(const Bf16Split&, float* scale);
};

namespace amx {
extern const Bf16Kernels* const kBf16Kernels;  // null: the compiler knows no AMX
}
namespace amx_model {
extern const Bf16Kernels* const kBf16Kernels;
}

// Who multiplies bf16 operands; decided on first use, the same for every call of the process.
struct Bf16Choice {
  const Bf16Kernels* kernels;  // null: nobody, they are widened to float32
  const char* name;            // "amx", "model" (tests only) or "widened"
  const char* reason;          // why they are widened, or ""
};
Bf16Choice chosen_bf16();
// For tests and timings: "auto", "amx", "model" or "widened" from the next call on. False where it cannot be.
bool choose_bf16(const char* name);
// Whether `kernels` multiply as the model does, on one small random block.
bool multiplies_like_the_model(const Bf16Kernels& kernels);

}  // namespace contrastive_ext
