// Everything up to target_end.h is compiled for the instruction sets in CE_TARGET. No include guard on purpose.
#if defined(__clang__)
// Clang wants the attribute's string literally, so the two sets in use are spelled out.
#if CE_VECTOR_BYTES == 64
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), \
                             apply_to = function)
#else
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#endif
#else
#pragma GCC push_options
#define CE_PRAGMA_TEXT(text) _Pragma(#text)
#define CE_PRAGMA_TARGET(set) CE_PRAGMA_TEXT(GCC target(set))
CE_PRAGMA_TARGET(CE_TARGET)
#endif
