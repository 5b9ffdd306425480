// VecF on AVX-512: 16 lanes, remainders by mask.
#pragma once
#include <immintrin.h>
#include <stdint.h>

#include "pe/dtype.h"

namespace pe::PE_ISA {

struct VecF {
  static constexpr int64_t size = 16;
  __m512 v;
};

static inline __mmask16 lanes(int64_t n) { return static_cast<__mmask16>((1u << n) - 1u); }

static inline VecF load(const float* p) { return {_mm512_loadu_ps(p)}; }
static inline VecF load(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(lanes(n), p)}; }
static inline VecF widen_bf16(__m256i bits) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
static inline VecF load(const bf16* p) { return widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
static inline VecF load(const bf16* p, int64_t n) { return widen_bf16(_mm256_maskz_loadu_epi16(lanes(n), p)); }

static inline void store(float* p, VecF a) { _mm512_storeu_ps(p, a.v); }
static inline void store(float* p, VecF a, int64_t n) { _mm512_mask_storeu_ps(p, lanes(n), a.v); }
static inline __m256i narrow_bf16(VecF a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
}
static inline void store(bf16* p, VecF a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(a)); }
static inline void store(bf16* p, VecF a, int64_t n) { _mm256_mask_storeu_epi16(p, lanes(n), narrow_bf16(a)); }

static inline VecF set1(float s) { return {_mm512_set1_ps(s)}; }
static inline VecF add(VecF a, VecF b) { return {_mm512_add_ps(a.v, b.v)}; }
static inline VecF sub(VecF a, VecF b) { return {_mm512_sub_ps(a.v, b.v)}; }
static inline VecF mul(VecF a, VecF b) { return {_mm512_mul_ps(a.v, b.v)}; }
static inline VecF div(VecF a, VecF b) { return {_mm512_div_ps(a.v, b.v)}; }
static inline VecF fma(VecF a, VecF b, VecF c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
static inline VecF neg(VecF a) {
  return {_mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(a.v), _mm512_set1_epi32(INT32_MIN)))};
}
static inline VecF max(VecF a, VecF b) { return {_mm512_max_ps(a.v, b.v)}; }
static inline VecF min(VecF a, VecF b) { return {_mm512_min_ps(a.v, b.v)}; }
static inline VecF sqrt(VecF a) { return {_mm512_sqrt_ps(a.v)}; }
// a > b ? yes : no, lane by lane; a comparison with NaN is false.
static inline VecF select_gt(VecF a, VecF b, VecF yes, VecF no) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ), no.v, yes.v)};
}
static inline VecF round(VecF a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// a * 2^n for integral n.
static inline VecF scale_by_power_of_2(VecF a, VecF n) { return {_mm512_scalef_ps(a.v, n.v)}; }
static inline float sum(VecF a) { return _mm512_reduce_add_ps(a.v); }
static inline float max_lane(VecF a) { return _mm512_reduce_max_ps(a.v); }

}  // namespace pe::PE_ISA
