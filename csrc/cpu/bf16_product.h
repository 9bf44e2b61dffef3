// Products of bf16 matrices by tile registers (AMX): what is asked, and who computes it. Plain data: this header is
// seen by code compiled for different instruction sets, so it holds no function bodies.
#pragma once

#include <cstdint>

namespace contrastive_ext {

constexpr int64_t kTileRows = 16;   // of a register, and float32 columns of one
constexpr int64_t kTileDepth = 32;  // bf16 elements in a row of a register
constexpr int64_t kTileBlock = 32;  // rows and columns of a product at a time: two registers each way
constexpr int64_t kParts = 3;       // bf16 numbers whose sum a float32 is: high, middle, low

// A product of parts that counts towards the product of two numbers.
struct Bf16Term {
  int a, b;         // which parts
  bool ends_a_sum;  // terms up to here are added up by themselves, the sums are added in their order
};
struct Bf16Terms {
  const Bf16Term* term;
  int64_t count;
};

// Smallest first. What is left out of nine products, middle * low, low * middle and low * low, is below 2^-23.9 of one.
inline constexpr Bf16Term kWholeTerm[] = {{0, 0, true}};
inline constexpr Bf16Term kWeightTerms[] = {{2, 0, false}, {1, 0, false}, {0, 0, true}};  // of one number in parts
inline constexpr Bf16Term kBothTerms[] = {{2, 0, false}, {1, 1, false}, {0, 2, false},
                                          {0, 1, false}, {1, 0, false}, {0, 0, true}};
// The same six. Exchanged sides exchange the first two sums, so that s_ij = s_ji in every bit.
inline constexpr Bf16Term kSymmetricTerms[] = {{0, 2, false}, {0, 1, true},  {2, 0, false},
                                               {1, 0, true},  {1, 1, false}, {0, 0, true}};
inline constexpr Bf16Terms kWhole{kWholeTerm, 1}, kOfWeight{kWeightTerms, 3}, kOfBoth{kBothTerms, 6},
    kSymmetric{kSymmetricTerms, 6};

// c = scale a b, or c += scale a b with a power of two, for a [rows, depth] and b [depth, cols], sums of parts of which
// `terms` are multiplied.
//
// a lies row by row, b in panels of kTileRows columns: elements 2k and 2k + 1 of a column side by side, the pairs k of
// all columns of a panel in a row. Whole blocks of rows, columns and kTileDepth are readable; beyond `depth` a is 0 and
// b finite.
struct Bf16Product {
  float* c;
  int64_t c_row;
  const uint16_t* a;
  int64_t a_row, a_part;  // from one row to the next, from one part to the next
  const uint16_t* b;
  int64_t b_panel, b_part;
  Bf16Terms terms;
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
  // Cuts factor x, `size` numbers, into parts one after the other.
  void (*cut)(const float* x, int64_t size, float factor, uint16_t* parts);
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
