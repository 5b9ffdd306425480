// VecF to and from int8 memory. Partial accesses touch no byte past the last element.
//
//   store_int8(p, v) store_int8(p, v, n)   integral lanes in [-128, 127]
//   load_int8(p) load_int8(p, n)
#pragma once
#include <string.h>

#include "simd/vec.h"

namespace pe::PE_ISA {

#if defined(__AVX512F__)

static inline __m128i narrow_int8(VecF a) { return _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(a.v)); }
static inline VecF widen_int8(__m128i bytes) { return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))}; }

static inline void store_int8(int8_t* p, VecF a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_int8(a)); }
static inline void store_int8(int8_t* p, VecF a, int64_t n) { _mm_mask_storeu_epi8(p, lanes(n), narrow_int8(a)); }
static inline VecF load_int8(const int8_t* p) {
  return widen_int8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
static inline VecF load_int8(const int8_t* p, int64_t n) { return widen_int8(_mm_maskz_loadu_epi8(lanes(n), p)); }

#elif defined(__AVX2__)

static inline __m128i narrow_int8(VecF a) {
  const __m256i whole = _mm256_cvtps_epi32(a.v);
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
  return _mm_packs_epi16(words, words);
}
static inline VecF widen_int8(__m128i bytes) { return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes))}; }

static inline void store_int8(int8_t* p, VecF a) { _mm_storel_epi64(reinterpret_cast<__m128i*>(p), narrow_int8(a)); }
static inline void store_int8(int8_t* p, VecF a, int64_t n) {
  alignas(16) int8_t bytes[16];
  _mm_store_si128(reinterpret_cast<__m128i*>(bytes), narrow_int8(a));
  memcpy(p, bytes, static_cast<size_t>(n));
}
static inline VecF load_int8(const int8_t* p) {
  return widen_int8(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
static inline VecF load_int8(const int8_t* p, int64_t n) {
  alignas(16) int8_t bytes[16] = {};
  memcpy(bytes, p, static_cast<size_t>(n));
  return widen_int8(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes)));
}

#else

static inline void store_int8(int8_t* p, VecF a, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = static_cast<int8_t>(a.v[i]);
}
static inline void store_int8(int8_t* p, VecF a) { store_int8(p, a, VecF::size); }
static inline VecF load_int8(const int8_t* p, int64_t n) {
  return make([&](int i) { return i < n ? static_cast<float>(p[i]) : 0.0f; });
}
static inline VecF load_int8(const int8_t* p) { return load_int8(p, VecF::size); }

#endif

}  // namespace pe::PE_ISA
