// Tile registers in plain C++: configuration, loads, stores and TDPBF16PS as the instruction's description has them,
// for machines without AMX and for the check of those that have it.
//
// TDPBF16PS: an accumulator for the even and one for the odd elements of a row of a, from 0, each step a fused
// multiply-add; their sum is added to c. Rounding to nearest even; denormals are read and written as zero.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace contrastive_ext {

class ModelRegisters {
 public:
  static constexpr int kRegisters = 8, kMaxRows = 16, kMaxRowBytes = 64;

  // Rows and bytes of a row of a register; all are 0 then.
  void configure(int t, int rows, int row_bytes) {
    rows_[t] = rows, row_bytes_[t] = row_bytes;
    memset(data_[t], 0, sizeof(data_[t]));
  }
  void zero(int t) { memset(data_[t], 0, sizeof(data_[t])); }
  // Bytes and rows beyond the register's own are 0.
  void load(int t, const void* at, int64_t row_bytes) {
    zero(t);
    for (int r = 0; r < rows_[t]; ++r)
      memcpy(data_[t][r], static_cast<const char*>(at) + r * row_bytes, static_cast<size_t>(row_bytes_[t]));
  }
  void store(int t, void* at, int64_t row_bytes) const {
    for (int r = 0; r < rows_[t]; ++r)
      memcpy(static_cast<char*>(at) + r * row_bytes, data_[t][r], static_cast<size_t>(row_bytes_[t]));
  }
  void dot(int c, int a, int b) {
    for (int m = 0; m < rows_[c]; ++m) {
      float sums[kMaxRowBytes / 4][2] = {};
      for (int k = 0; k < row_bytes_[a] / 4; ++k)
        for (int n = 0; n < row_bytes_[c] / 4; ++n)
          for (int odd = 0; odd < 2; ++odd)
            sums[n][odd] = flushed(std::fma(element(a, m, 2 * k + odd), element(b, k, 2 * n + odd), sums[n][odd]));
      for (int n = 0; n < row_bytes_[c] / 4; ++n) {
        float value;
        memcpy(&value, data_[c][m] + 4 * n, sizeof(value));
        value = flushed(flushed(value) + flushed(sums[n][0] + sums[n][1]));
        memcpy(data_[c][m] + 4 * n, &value, sizeof(value));
      }
    }
  }

 private:
  static float flushed(float x) {
    return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x;
  }
  float element(int t, int row, int index) const {
    uint16_t upper;
    memcpy(&upper, data_[t][row] + 2 * index, sizeof(upper));
    const uint32_t bits = static_cast<uint32_t>(upper) << 16;
    float x;
    memcpy(&x, &bits, sizeof(x));
    return flushed(x);
  }

  int rows_[kRegisters] = {}, row_bytes_[kRegisters] = {};
  alignas(64) unsigned char data_[kRegisters][kMaxRows][kMaxRowBytes] = {};
};

}  // namespace contrastive_ext
