// Pairs of bf16 side by side in lanes of 32 bits, which VDPBF16PS multiplies and adds: the second element of each pair
// first, then the first one, both rounded. Subnormal operands and sums count as zero. The levels avx512_bf16 and amx.
#pragma once
#include <stdint.h>
#include <string.h>

#include "simd/vec.h"

namespace pe::PE_ISA {

// Elements 0 ... 15 and 16 ... 31 in turn.
[[gnu::always_inline]] static inline __m512i interleave_halves(__m512i two_rows) {
  const __m512i order =
      _mm512_setr_epi32(16 << 16 | 0, 17 << 16 | 1, 18 << 16 | 2, 19 << 16 | 3, 20 << 16 | 4, 21 << 16 | 5,
                        22 << 16 | 6, 23 << 16 | 7, 24 << 16 | 8, 25 << 16 | 9, 26 << 16 | 10, 27 << 16 | 11,
                        28 << 16 | 12, 29 << 16 | 13, 30 << 16 | 14, 31 << 16 | 15);
  return _mm512_permutexvar_epi16(order, two_rows);
}

// 32 elements; 16, with zeros behind them.
[[gnu::always_inline]] static inline __m512i load_32(const bf16* p) { return _mm512_loadu_si512(p); }
[[gnu::always_inline]] static inline __m512i load_16(const bf16* p) {
  return _mm512_zextsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

// sum + the products of `pairs` with the two elements at x.
[[gnu::always_inline]] static inline VecF add_pair(VecF sum, __m512i pairs, const bf16* x) {
  int32_t both;
  memcpy(&both, x, sizeof both);
  return {
      _mm512_dpbf16_ps(sum.v, reinterpret_cast<__m512bh>(pairs), reinterpret_cast<__m512bh>(_mm512_set1_epi32(both)))};
}

}  // namespace pe::PE_ISA
