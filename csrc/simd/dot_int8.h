// 16 columns of int32 sums of u8 * s8 products, four products a step. Sums wrap modulo 2^32.
//
//   Dot16                          16 int32 accumulators
//   zero_dots()
//   load_line(p)                   64 bytes: 16 columns x 4 weights, prepared for this level
//   load_quad(p) load_quad(p, n)   4 (or n, the rest zero) activations, for all columns
//   accumulate(dots, line, quad)   dots[c] + sum_j line[c][j] * quad[j]
//   store_dots(out, dots)          in column order
#pragma once
#include <stdint.h>
#include <string.h>

#include "simd/unroll.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace pe::PE_ISA {

static inline int32_t read_quad(const int8_t* p, int64_t n = 4) {
  int32_t quad = 0;
  memcpy(&quad, p, static_cast<size_t>(n));
  return quad;
}

#if defined(__AVX512VNNI__)

struct Dot16 {
  __m512i sums;
};
using Line = __m512i;
using Quad = __m512i;

static inline Dot16 zero_dots() { return {_mm512_setzero_si512()}; }
static inline Line load_line(const uint8_t* p) { return _mm512_loadu_si512(p); }
static inline Quad load_quad(const int8_t* p) { return _mm512_set1_epi32(read_quad(p)); }
static inline Quad load_quad(const int8_t* p, int64_t n) { return _mm512_set1_epi32(read_quad(p, n)); }
static inline Dot16 accumulate(Dot16 d, Line line, Quad quad) { return {_mm512_dpbusd_epi32(d.sums, line, quad)}; }
static inline void store_dots(int32_t* out, const Dot16& d) { _mm512_storeu_si512(out, d.sums); }

#elif defined(__AVX512BW__)

// Bytes widen to 16 bits, which multiply and add in pairs without saturation; a column is two neighbouring sums.
struct Dot16 {
  __m512i low, high;
};
struct Line {
  __m512i low, high;
};
using Quad = __m512i;

static inline Dot16 zero_dots() { return {_mm512_setzero_si512(), _mm512_setzero_si512()}; }
static inline Line load_line(const uint8_t* p) {
  return {_mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))),
          _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32)))};
}
static inline Quad widen_quad(int32_t quad) {
  return _mm512_broadcastq_epi64(_mm_cvtepi8_epi16(_mm_cvtsi32_si128(quad)));
}
static inline Quad load_quad(const int8_t* p) { return widen_quad(read_quad(p)); }
static inline Quad load_quad(const int8_t* p, int64_t n) { return widen_quad(read_quad(p, n)); }
static inline Dot16 accumulate(Dot16 d, Line line, Quad quad) {
  return {_mm512_add_epi32(d.low, _mm512_madd_epi16(line.low, quad)),
          _mm512_add_epi32(d.high, _mm512_madd_epi16(line.high, quad))};
}
static inline void store_dots(int32_t* out, const Dot16& d) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  _mm512_storeu_si512(out, _mm512_add_epi32(_mm512_permutex2var_epi32(d.low, even, d.high),
                                            _mm512_permutex2var_epi32(d.low, odd, d.high)));
}

#elif defined(__AVX2__)

struct Dot16 {
  __m256i quarter[4];  // four columns each, a column in two neighbouring sums
};
struct Line {
  __m256i quarter[4];
};
using Quad = __m256i;

static inline Dot16 zero_dots() {
  const __m256i zero = _mm256_setzero_si256();
  return {{zero, zero, zero, zero}};
}
static inline Line load_line(const uint8_t* p) {
  Line line;
  unroll<4>([&](auto i) PE_INLINE {
    line.quarter[i] = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16 * i)));
  });
  return line;
}
static inline Quad widen_quad(int32_t quad) {
  return _mm256_broadcastq_epi64(_mm_cvtepi8_epi16(_mm_cvtsi32_si128(quad)));
}
static inline Quad load_quad(const int8_t* p) { return widen_quad(read_quad(p)); }
static inline Quad load_quad(const int8_t* p, int64_t n) { return widen_quad(read_quad(p, n)); }
static inline Dot16 accumulate(Dot16 d, Line line, Quad quad) {
  unroll<4>([&](auto i)
                PE_INLINE { d.quarter[i] = _mm256_add_epi32(d.quarter[i], _mm256_madd_epi16(line.quarter[i], quad)); });
  return d;
}
static inline void store_dots(int32_t* out, const Dot16& d) {
  for (int i = 0; i < 4; i += 2) {
    const __m256i pairs = _mm256_hadd_epi32(d.quarter[i], d.quarter[i + 1]);  // columns 0 1 4 5 2 3 6 7
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 4 * i), _mm256_permute4x64_epi64(pairs, 0xd8));
  }
}

#else

struct Dot16 {
  uint32_t sums[16];
};
struct Line {
  const uint8_t* bytes;
};
struct Quad {
  int32_t v[4];
};

static inline Dot16 zero_dots() { return {}; }
static inline Line load_line(const uint8_t* p) { return {p}; }
static inline Quad load_quad(const int8_t* p, int64_t n) {
  Quad quad = {};
  for (int64_t j = 0; j < n; ++j) quad.v[j] = p[j];
  return quad;
}
static inline Quad load_quad(const int8_t* p) { return load_quad(p, 4); }
static inline Dot16 accumulate(Dot16 d, Line line, const Quad& quad) {
  for (int c = 0; c < 16; ++c)
    for (int j = 0; j < 4; ++j) d.sums[c] += static_cast<uint32_t>(line.bytes[4 * c + j] * quad.v[j]);
  return d;
}
static inline void store_dots(int32_t* out, const Dot16& d) { memcpy(out, d.sums, sizeof d.sums); }

#endif

}  // namespace pe::PE_ISA
