// VecF on AVX2 + FMA: 8 lanes. AVX2 has no masked 16-bit access, so bf16 remainders go through a small buffer.
#pragma once
#include <immintrin.h>
#include <stdint.h>

#include "pe/dtype.h"

namespace pe::PE_ISA {

struct VecF {
  static constexpr int64_t size = 8;
  __m256 v;
};

static inline __m256i lanes(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

static inline VecF load(const float* p) { return {_mm256_loadu_ps(p)}; }
static inline VecF load(const float* p, int64_t n) { return {_mm256_maskload_ps(p, lanes(n))}; }
static inline VecF widen_bf16(__m128i bits) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
}
static inline VecF load(const bf16* p) { return widen_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
static inline VecF load(const bf16* p, int64_t n) {
  alignas(16) uint16_t bits[8] = {};
  for (int64_t i = 0; i < n; ++i) bits[i] = p[i].bits;
  return widen_bf16(_mm_load_si128(reinterpret_cast<const __m128i*>(bits)));
}

static inline void store(float* p, VecF a) { _mm256_storeu_ps(p, a.v); }
static inline void store(float* p, VecF a, int64_t n) { _mm256_maskstore_ps(p, lanes(n), a.v); }
static inline __m128i narrow_bf16(VecF a) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0xd8);
  return _mm256_castsi256_si128(packed);
}
static inline void store(bf16* p, VecF a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_bf16(a)); }
static inline void store(bf16* p, VecF a, int64_t n) {
  alignas(16) uint16_t bits[8];
  _mm_store_si128(reinterpret_cast<__m128i*>(bits), narrow_bf16(a));
  for (int64_t i = 0; i < n; ++i) p[i].bits = bits[i];
}

static inline VecF set1(float s) { return {_mm256_set1_ps(s)}; }
static inline VecF add(VecF a, VecF b) { return {_mm256_add_ps(a.v, b.v)}; }
static inline VecF sub(VecF a, VecF b) { return {_mm256_sub_ps(a.v, b.v)}; }
static inline VecF mul(VecF a, VecF b) { return {_mm256_mul_ps(a.v, b.v)}; }
static inline VecF div(VecF a, VecF b) { return {_mm256_div_ps(a.v, b.v)}; }
static inline VecF fma(VecF a, VecF b, VecF c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
static inline VecF neg(VecF a) { return {_mm256_xor_ps(a.v, _mm256_set1_ps(-0.0f))}; }
static inline VecF max(VecF a, VecF b) { return {_mm256_max_ps(a.v, b.v)}; }
static inline VecF min(VecF a, VecF b) { return {_mm256_min_ps(a.v, b.v)}; }
static inline VecF sqrt(VecF a) { return {_mm256_sqrt_ps(a.v)}; }
// a > b ? yes : no, lane by lane; a comparison with NaN is false.
static inline VecF select_gt(VecF a, VecF b, VecF yes, VecF no) {
  return {_mm256_blendv_ps(no.v, yes.v, _mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ))};
}
static inline VecF round(VecF a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// a * 2^n for integral n in [-252, 254], in two steps so that subnormal results and 2^128 are reached.
static inline VecF scale_by_power_of_2(VecF a, VecF n) {
  const __m256i whole = _mm256_cvtps_epi32(n.v), half = _mm256_srai_epi32(whole, 1);
  const __m256i rest = _mm256_sub_epi32(whole, half), bias = _mm256_set1_epi32(127);
  const __m256 first = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
  const __m256 second = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23));
  return {_mm256_mul_ps(_mm256_mul_ps(a.v, first), second)};
}
static inline float sum(VecF a) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
static inline float max_lane(VecF a) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

}  // namespace pe::PE_ISA
