// Fixed-width vectors in the compiler's own vector extension: one spelling for AVX-512, AVX2, SSE2 and NEON.
//
// Include it only after CE_ISA (a namespace) and CE_VECTOR_BYTES are defined and the target of the translation unit is
// set. Nothing here may call a function of the standard library that is not a builtin: its out-of-line copy would be
// compiled for this instruction set and the linker could hand it to the rest of the program.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

namespace contrastive_ext {
namespace CE_ISA {

template <class T>
struct Simd;

template <>
struct Simd<float> {
  static constexpr int kWidth = CE_VECTOR_BYTES / 4;
  typedef int32_t Lane;
  typedef float V __attribute__((vector_size(CE_VECTOR_BYTES)));
  typedef int32_t I __attribute__((vector_size(CE_VECTOR_BYTES)));
  typedef uint8_t Bytes __attribute__((vector_size(CE_VECTOR_BYTES / 4)));
  typedef uint16_t Halves __attribute__((vector_size(CE_VECTOR_BYTES / 2)));
};

template <>
struct Simd<double> {
  static constexpr int kWidth = CE_VECTOR_BYTES / 8;
  typedef int64_t Lane;
  typedef double V __attribute__((vector_size(CE_VECTOR_BYTES)));
  typedef int64_t I __attribute__((vector_size(CE_VECTOR_BYTES)));
  typedef uint8_t Bytes __attribute__((vector_size(CE_VECTOR_BYTES / 8)));
  typedef uint16_t Halves __attribute__((vector_size(CE_VECTOR_BYTES / 4)));
  typedef uint32_t Words __attribute__((vector_size(CE_VECTOR_BYTES / 2)));
};

template <class T>
inline typename Simd<T>::V load(const T* p) {
  typename Simd<T>::V v;
  memcpy(&v, p, sizeof(v));
  return v;
}

template <class T>
inline void store(T* p, typename Simd<T>::V v) {
  memcpy(p, &v, sizeof(v));
}

template <class T>
inline typename Simd<T>::V broadcast(T x) {
  return x - typename Simd<T>::V{};  // x - 0 keeps -0 and NaN
}

// Bytes as lanes and back, one width at a time: GCC 12 takes wider steps element by element.
template <class T>
inline typename Simd<T>::I widen(typename Simd<T>::Bytes bytes) {
  const auto halves = __builtin_convertvector(bytes, typename Simd<T>::Halves);
  if constexpr (sizeof(T) == 8)
    return __builtin_convertvector(__builtin_convertvector(halves, typename Simd<T>::Words), typename Simd<T>::I);
  else
    return __builtin_convertvector(halves, typename Simd<T>::I);
}

template <class T>
inline typename Simd<T>::Bytes narrow(typename Simd<T>::I lanes) {
  typename Simd<T>::Halves halves;
  if constexpr (sizeof(T) == 8)
    halves = __builtin_convertvector(__builtin_convertvector(lanes, typename Simd<T>::Words), typename Simd<T>::Halves);
  else
    halves = __builtin_convertvector(lanes, typename Simd<T>::Halves);
  return __builtin_convertvector(halves, typename Simd<T>::Bytes);
}

// Lanes whose pair class has `bit` keep x, the others become `other`, whatever x was.
template <class T>
inline typename Simd<T>::V keep(const uint8_t* pair_class, uint8_t bit, typename Simd<T>::V x,
                                typename Simd<T>::V other) {
  typename Simd<T>::Bytes bytes;
  memcpy(&bytes, pair_class, sizeof(bytes));
  return (widen<T>(bytes) & bit) != 0 ? x : other;
}

// Whether a lane is not 0.
template <class I>
inline bool any(I lanes) {
  uint64_t words[sizeof(I) / 8], all = 0;
  memcpy(words, &lanes, sizeof(lanes));
  for (uint64_t word : words) all |= word;
  return all != 0;
}

// Elements of two vectors by their numbers, those of the second counted from the end of the first; I: integer lanes.
#if defined(__clang__)
#define CE_SHUFFLE(I, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define CE_SHUFFLE(I, a, b, ...) __builtin_shuffle(a, b, I{__VA_ARGS__})
#endif

template <class T, int... k>
inline void split_pairs(typename Simd<T>::V a, typename Simd<T>::V b, typename Simd<T>::V* firsts,
                        typename Simd<T>::V* seconds, std::integer_sequence<int, k...>) {
  *firsts = CE_SHUFFLE(typename Simd<T>::I, a, b, 2 * k...);
  *seconds = CE_SHUFFLE(typename Simd<T>::I, a, b, 2 * k + 1 ...);
}

// The first and the second elements of the pairs that lie in two vectors.
template <class T>
inline void split_pairs(typename Simd<T>::V a, typename Simd<T>::V b, typename Simd<T>::V* firsts,
                        typename Simd<T>::V* seconds) {
  split_pairs<T>(a, b, firsts, seconds, std::make_integer_sequence<int, Simd<T>::kWidth>());
}

// Which lanes of 64 are not 0, lane 0 in the lowest bit; lanes hold 0 or -1.
template <class T, int kVectors>
inline uint64_t lane_bits(const typename Simd<T>::I (&lanes)[kVectors]) {
  static_assert(kVectors * Simd<T>::kWidth == 64);
  uint64_t words[8], bits = 0;
  for (int v = 0; v < kVectors; ++v) {
    const typename Simd<T>::Bytes bytes = narrow<T>(lanes[v]);
    memcpy(reinterpret_cast<unsigned char*>(words) + v * Simd<T>::kWidth, &bytes, sizeof(bytes));
  }
  for (int w = 0; w < 8; ++w) {
    const uint64_t ones = words[w] & 0x0101010101010101u;  // byte i becomes bit i of the highest byte
    bits |= ones * 0x0102040810204080u >> 56 << 8 * w;
  }
  return bits;
}

// The larger of the two; a NaN in x is ignored.
template <class T>
inline typename Simd<T>::V larger(typename Simd<T>::V x, typename Simd<T>::V than) {
  return x > than ? x : than;
}

template <class T>
inline typename Simd<T>::V smaller(typename Simd<T>::V x, typename Simd<T>::V than) {
  return x < than ? x : than;
}

// Rounds here: the compiler may not fuse what produced x with what follows.
template <class V>
inline V rounded(V x) {
#if defined(__x86_64__)
  asm("" : "+v"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
  return x;
}

// The compiler's vectors have no square root of their own.
#if defined(__x86_64__) && CE_VECTOR_BYTES > 16
inline Simd<float>::V square_root(Simd<float>::V x) {
  asm("vsqrtps %0, %0" : "+v"(x));
  return x;
}
inline Simd<double>::V square_root(Simd<double>::V x) {
  asm("vsqrtpd %0, %0" : "+v"(x));
  return x;
}
#else
inline Simd<float>::V square_root(Simd<float>::V x) {
  for (int lane = 0; lane < Simd<float>::kWidth; ++lane) x[lane] = __builtin_sqrtf(x[lane]);
  return x;
}
inline Simd<double>::V square_root(Simd<double>::V x) {
  for (int lane = 0; lane < Simd<double>::kWidth; ++lane) x[lane] = __builtin_sqrt(x[lane]);
  return x;
}
#endif

template <class T>
inline T horizontal_sum(typename Simd<T>::V v) {
  T lanes[Simd<T>::kWidth];
  memcpy(lanes, &v, sizeof(v));
  for (int half = Simd<T>::kWidth / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

template <class T>
inline T horizontal_max(typename Simd<T>::V v) {
  T best = v[0];
  for (int i = 1; i < Simd<T>::kWidth; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

}  // namespace CE_ISA
}  // namespace contrastive_ext
