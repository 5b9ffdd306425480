// Transposition of small tiles through registers, with conversion between f32 and bf16, in pe::PE_ISA.
#pragma once
#include "simd/vec.h"

namespace pe::PE_ISA {

// Transposes the square of VecF::size vectors in place.
#if defined(__AVX512F__)
static inline void transpose_square(VecF (&v)[16]) {
  __m512 a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {  // pairs of rows
    a[i] = _mm512_unpacklo_ps(v[i].v, v[i + 1].v);
    a[i + 1] = _mm512_unpackhi_ps(v[i].v, v[i + 1].v);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4)  // 4x4 blocks: b[i + j] holds columns j, j + 4, j + 8 and j + 12 of rows i..i+3
    for (int j = 0; j < 2; ++j) {
      const __m512d low = _mm512_castps_pd(a[i + j]), high = _mm512_castps_pd(a[i + j + 2]);
      b[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      b[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512 even_low = _mm512_shuffle_f32x4(b[j], b[j + 4], 0x88);
    const __m512 odd_low = _mm512_shuffle_f32x4(b[j], b[j + 4], 0xdd);
    const __m512 even_high = _mm512_shuffle_f32x4(b[j + 8], b[j + 12], 0x88);
    const __m512 odd_high = _mm512_shuffle_f32x4(b[j + 8], b[j + 12], 0xdd);
    v[j].v = _mm512_shuffle_f32x4(even_low, even_high, 0x88);
    v[j + 4].v = _mm512_shuffle_f32x4(odd_low, odd_high, 0x88);
    v[j + 8].v = _mm512_shuffle_f32x4(even_low, even_high, 0xdd);
    v[j + 12].v = _mm512_shuffle_f32x4(odd_low, odd_high, 0xdd);
  }
}
#elif defined(__AVX2__)
static inline void transpose_square(VecF (&v)[8]) {
  __m256 a[8], b[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps(v[i].v, v[i + 1].v);
    a[i + 1] = _mm256_unpackhi_ps(v[i].v, v[i + 1].v);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 4)  // 4x4 blocks: b[i + j] holds columns j and j + 4 of rows i..i+3
    for (int j = 0; j < 2; ++j) {
      b[i + 2 * j] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0x44);
      b[i + 2 * j + 1] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0xee);
    }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    v[j].v = _mm256_permute2f128_ps(b[j], b[j + 4], 0x20);
    v[j + 4].v = _mm256_permute2f128_ps(b[j], b[j + 4], 0x31);
  }
}
#else
static inline void transpose_square(VecF (&v)[8]) {
  for (int i = 0; i < 8; ++i)
    for (int j = 0; j < i; ++j) {
      const float swapped = v[i].v[j];
      v[i].v[j] = v[j].v[i];
      v[j].v[i] = swapped;
    }
}
#endif

// to[c, r] = from[r, c] for c < num_cols <= 16 and r < num_rows; zero for num_rows <= r < width <= 16. Reads and writes
// nothing else.
template <class From, class To>
static inline void transpose_tile(const From* from, int64_t from_row_stride, int64_t num_rows, int64_t num_cols, To* to,
                                  int64_t to_row_stride, int64_t width) {
  constexpr int64_t size = VecF::size;
  for (int64_t r = 0; r < width; r += size)
    for (int64_t c = 0; c < num_cols; c += size) {
      const int64_t cols = num_cols - c < size ? num_cols - c : size;
      VecF v[size];
#pragma GCC unroll 16
      for (int64_t i = 0; i < size; ++i) {
        const From* row = from + (r + i) * from_row_stride + c;
        v[i] = r + i >= num_rows ? set1(0.0f) : cols == size ? load(row) : load(row, cols);
      }
      transpose_square(v);
      const int64_t rows = width - r;
#pragma GCC unroll 16
      for (int64_t i = 0; i < size; ++i) {
        if (i >= cols) continue;
        To* row = to + (c + i) * to_row_stride + r;
        rows >= size ? store(row, v[i]) : store(row, v[i], rows);
      }
    }
}

}  // namespace pe::PE_ISA
