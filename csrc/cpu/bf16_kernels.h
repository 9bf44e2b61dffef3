// The product and the cut of weights over tile registers, written once for the instructions and for their model: a type
// Registers with load_configuration, release, zero, load, dot and store. Included once per unit, without guard.
//
// Two by two accumulators take two registers of a and two of b: 8 loads and 12 products a step where a has three parts.
// Every element of c is a sum (kSymmetric: three) in the order of the depth, wherever it stands and whatever thread
// makes it; s_ij = s_ji.

namespace contrastive_ext {
namespace CE_REGISTERS {

inline void add_block(const Bf16Product& p, int64_t i, int64_t j, const float (*block)[kTileBlock]) {
  const int64_t rows = p.rows - i < kTileBlock ? p.rows - i : kTileBlock;
  const int64_t cols = p.cols - j < kTileBlock ? p.cols - j : kTileBlock;
  for (int64_t r = 0; r < rows; ++r) {
    float* c = p.c + (i + r) * p.c_row + j;
    if (p.accumulate)
      for (int64_t k = 0; k < cols; ++k) c[k] += p.scale * block[r][k];
    else
      for (int64_t k = 0; k < cols; ++k) c[k] = p.scale * block[r][k];
  }
}

// The sums of terms [begin, end) of one block of c.
inline void multiply_block(Registers& registers, const Bf16Product& p, int64_t i, int64_t j, const Bf16Term* begin,
                           const Bf16Term* end, float (*block)[kTileBlock]) {
  registers.template zero<0>(), registers.template zero<1>();
  registers.template zero<2>(), registers.template zero<3>();
  for (int64_t k = 0; k < p.depth; k += kTileDepth) {
    int loaded = -1;  // part of b
    for (const Bf16Term* term = begin; term < end; ++term) {
      if (term->b != loaded) {
        constexpr int64_t kRowBytes = kTileDepth * sizeof(uint16_t);
        const uint16_t* b = p.b + j / kTileRows * p.b_panel + term->b * p.b_part + k * kTileRows;
        registers.template load<6>(b, kRowBytes);
        registers.template load<7>(b + p.b_panel, kRowBytes);
        loaded = term->b;
      }
      const uint16_t* a = p.a + term->a * p.a_part + i * p.a_row + k;
      const int64_t row_bytes = p.a_row * static_cast<int64_t>(sizeof(uint16_t));
      registers.template load<4>(a, row_bytes);
      registers.template load<5>(a + kTileRows * p.a_row, row_bytes);
      registers.template dot<0, 4, 6>(), registers.template dot<1, 4, 7>();
      registers.template dot<2, 5, 6>(), registers.template dot<3, 5, 7>();
    }
  }
  registers.template store<0>(&block[0][0], sizeof(block[0]));
  registers.template store<1>(&block[0][kTileRows], sizeof(block[0]));
  registers.template store<2>(&block[kTileRows][0], sizeof(block[0]));
  registers.template store<3>(&block[kTileRows][kTileRows], sizeof(block[0]));
}

inline void bf16_product(const Bf16Product& p) {
  Registers registers;
  registers.load_configuration();
  alignas(64) float block[kTileBlock][kTileBlock], sum[kTileBlock][kTileBlock];
  for (int64_t j = 0; j < p.cols; j += kTileBlock) {
    for (int64_t i = 0; i < p.rows; i += kTileBlock) {
      const Bf16Term *begin = p.terms.term, *const all = begin + p.terms.count;
      for (const Bf16Term* end = begin; end < all; begin = end) {
        while (!end++->ends_a_sum) {
        }
        const bool first = begin == p.terms.term;
        multiply_block(registers, p, i, j, begin, end, first ? block : sum);
        for (int64_t r = 0; r < (first ? 0 : kTileBlock); ++r)
          for (int64_t k = 0; k < kTileBlock; ++k) block[r][k] += sum[r][k];
      }
      add_block(p, i, j, block);
    }
  }
  registers.release();
}

inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

// The upper half of a finite number that is rounded to bf16, to even.
inline uint32_t nearest(float x) {
  const uint32_t bits = bits_of(x);
  return (bits + 0x7fffu + (bits >> 16 & 1)) & 0xffff0000u;
}

// A float32 has 24 significant bits: rounded to 8, the rest rounded to 8, and what then is left has no more than 8.
inline void cut_number(float x, uint16_t* high, uint16_t* middle, uint16_t* low) {
  const uint32_t upper = nearest(x);
  const float rest = x - float_of(upper);
  const uint32_t next = nearest(rest);
  *high = static_cast<uint16_t>(upper >> 16);
  *middle = static_cast<uint16_t>(next >> 16);
  *low = static_cast<uint16_t>(bits_of(rest - float_of(next)) >> 16);
}

inline void bf16_cut(const float* x, int64_t size, float factor, uint16_t* parts) {
  for (int64_t k = 0; k < size; ++k) cut_number(x[k] * factor, parts + k, parts + size + k, parts + 2 * size + k);
}

inline bool bf16_split(const Bf16Split& s, float* scale) {
  constexpr uint32_t kMagnitude = 0x7fffffffu, kInfinite = 0x7f800000u;
  uint32_t largest = 0;
  for (int64_t r = 0; r < s.rows; ++r) {
    const float* w = s.w + r * s.w_row;
    for (int64_t c = 0; c < s.cols; ++c) {
      const uint32_t magnitude = bits_of(w[c]) & kMagnitude;
      largest = magnitude > largest ? magnitude : largest;
    }
  }
  if (largest >= kInfinite) return false;
  // the largest between 1 and 2: no part and no product of normal numbers is small enough to be flushed and to matter
  const uint32_t exponent = largest >> 23, clamped = exponent < 1 ? 1 : exponent > 253 ? 253 : exponent;
  *scale = float_of(clamped << 23);
  const float inverse = float_of((254 - clamped) << 23);

  const int64_t part = kTileBlock * s.parts_row;
  for (int64_t r = 0; r < kTileBlock; ++r) {
    uint16_t* high = s.parts + r * s.parts_row;
    uint16_t *middle = high + part, *low = middle + part;
    const int64_t cols = r < s.rows ? s.cols : 0;
    const float* w = s.w + r * s.w_row;
    for (int64_t c = 0; c < cols; ++c) cut_number(w[c] * inverse, high + c, middle + c, low + c);
    const size_t padding = static_cast<size_t>(s.parts_row - cols) * sizeof(uint16_t);
    memset(high + cols, 0, padding), memset(middle + cols, 0, padding), memset(low + cols, 0, padding);
  }
  return true;
}

}  // namespace CE_REGISTERS
}  // namespace contrastive_ext
