// Panel: 16 lanes on every ISA level, one per weight row of a panel (pe/block_weights.h), as one, two or 16 registers.
// Lanes never meet but in sum(), whose tree is fixed, and fma() rounds once everywhere: a kernel written in panels
// gives the same bits on every ISA level.
//
//   PanelF    load(p) store(p, v) store(p, v, n) to float* or bf16*; set1 mul fma sum
//   Codes     16 words of 32 bits as they lie in a packed group
//   nibble<i>(codes)   four bits i of each word, less 8, as floats
//   byte<i>(codes)     byte i of each word, less 128, as floats
//   load_f16(p)        16 f16 as floats
#pragma once
#include <stdint.h>

#include "pe/block_weights.h"
#include "pe/f16.h"
#include "simd/vec.h"

namespace pe::PE_ISA {

// Constant trip counts: array elements indexed by the counter live in registers.
#define PE_UNROLL _Pragma("GCC unroll 16")

struct PanelF {
  static constexpr int kParts = kPanelRows / VecF::size;
  VecF part[kParts];
};

template <int64_t num_bytes>
[[gnu::always_inline]] static inline void prefetch(const uint8_t* p) {
  PE_UNROLL for (int64_t i = 0; i < num_bytes; i += 64) __builtin_prefetch(p + i);
}

template <class Lane>
[[gnu::always_inline]] static inline PanelF make_panel(const Lane& lane) {
  PanelF r;
  PE_UNROLL for (int p = 0; p < PanelF::kParts; ++p) r.part[p] = lane(p);
  return r;
}

static inline PanelF panel_set1(float s) {
  const VecF v = set1(s);
  return make_panel([&](int) { return v; });
}
static inline PanelF panel_load(const float* p) {
  return make_panel([&](int i) { return load(p + i * VecF::size); });
}
static inline PanelF mul(const PanelF& a, const PanelF& b) {
  return make_panel([&](int i) { return mul(a.part[i], b.part[i]); });
}
static inline PanelF add(const PanelF& a, const PanelF& b) {
  return make_panel([&](int i) { return add(a.part[i], b.part[i]); });
}
#if defined(__FMA__)
static inline PanelF fma(const PanelF& a, const PanelF& b, const PanelF& c) {
  return make_panel([&](int i) { return fma(a.part[i], b.part[i], c.part[i]); });
}
#else
static inline PanelF fma(const PanelF& a, const PanelF& b, const PanelF& c) {
  return make_panel([&](int i) {
    return make([&](int j) { return __builtin_fmaf(a.part[i].v[j], b.part[i].v[j], c.part[i].v[j]); });
  });
}
#endif

template <class T>
static inline void panel_store(T* p, const PanelF& a) {
  for (int i = 0; i < PanelF::kParts; ++i) store(p + i * VecF::size, a.part[i]);
}
// The first n lanes, 0 < n < 16.
template <class T>
static inline void panel_store(T* p, const PanelF& a, int64_t n) {
  for (int i = 0; i < PanelF::kParts; ++i) {
    const int64_t left = n - i * VecF::size;
    if (left >= VecF::size)
      store(p + i * VecF::size, a.part[i]);
    else if (left > 0)
      store(p + i * VecF::size, a.part[i], left);
  }
}

// Lane i += lane i + 8, then + 4, + 2, + 1.
static inline float sum(const PanelF& a) {
  alignas(64) float lane[kPanelRows];
  panel_store(lane, a);
  for (int width = 8; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  return lane[0];
}

#if defined(__AVX512F__)

using Codes = __m512i;
static inline Codes load_codes(const uint8_t* p) { return _mm512_loadu_si512(p); }
// Two ways that keep different execution units busy.
template <int i>
static inline PanelF nibble(const Codes& codes) {
  constexpr int bit = 4 * i;
  if constexpr (i == 0 || bit > 16) {
    // The permutation reads four bits of each index: nothing need be masked.
    const __m512 table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    return {{{_mm512_permutexvar_ps(i ? _mm512_srli_epi32(codes, bit) : codes, table)}}};
  } else {
    // In the fraction of 2^(23 - bit) the bits weigh 1, 2, 4 and 8.
    const __m512 base = _mm512_set1_ps(static_cast<float>(1 << (23 - bit)));
    const __m512i q = _mm512_ternarylogic_epi32(codes, _mm512_set1_epi32(15 << bit), _mm512_castps_si512(base), 0xea);
    return {{{_mm512_sub_ps(_mm512_castsi512_ps(q), _mm512_set1_ps(static_cast<float>((1 << (23 - bit)) + 8)))}}};
  }
}
template <int i>
static inline PanelF byte(const Codes& codes) {
  const __m512i flipped = _mm512_xor_si512(codes, _mm512_set1_epi32(static_cast<int>(0x80808080u)));
  return {{{_mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(flipped, 24 - 8 * i), 24))}}};
}
static inline PanelF load_f16(const uint8_t* p) {
  return {{{_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}}};
}

#elif defined(__AVX2__)

struct Codes {
  __m256i part[2];
};
static inline Codes load_codes(const uint8_t* p) {
  const __m256i* v = reinterpret_cast<const __m256i*>(p);
  return {{_mm256_loadu_si256(v), _mm256_loadu_si256(v + 1)}};
}
template <int i>
static inline PanelF nibble(const Codes& codes) {
  return make_panel([&](int p) {
    const __m256i q = _mm256_and_si256(_mm256_srli_epi32(codes.part[p], 4 * i), _mm256_set1_epi32(15));
    return VecF{_mm256_sub_ps(_mm256_cvtepi32_ps(q), _mm256_set1_ps(8.0f))};
  });
}
template <int i>
static inline PanelF byte(const Codes& codes) {
  return make_panel([&](int p) {
    const __m256i q = _mm256_and_si256(_mm256_srli_epi32(codes.part[p], 8 * i), _mm256_set1_epi32(255));
    return VecF{_mm256_sub_ps(_mm256_cvtepi32_ps(q), _mm256_set1_ps(128.0f))};
  });
}
static inline PanelF load_f16(const uint8_t* p) {
  const __m128i* v = reinterpret_cast<const __m128i*>(p);
  return {{{_mm256_cvtph_ps(_mm_loadu_si128(v))}, {_mm256_cvtph_ps(_mm_loadu_si128(v + 1))}}};
}

#else

struct Codes {
  uint32_t lane[kPanelRows];
};
static inline Codes load_codes(const uint8_t* p) {
  Codes codes;
  memcpy(codes.lane, p, sizeof codes.lane);
  return codes;
}
template <int i>
static inline PanelF nibble(const Codes& codes) {
  return make_panel([&](int p) {
    return make([&](int j) { return static_cast<float>(codes.lane[8 * p + j] >> (4 * i) & 15u) - 8.0f; });
  });
}
template <int i>
static inline PanelF byte(const Codes& codes) {
  return make_panel([&](int p) {
    return make([&](int j) { return static_cast<float>(codes.lane[8 * p + j] >> (8 * i) & 255u) - 128.0f; });
  });
}
static inline PanelF load_f16(const uint8_t* p) {
  return make_panel([&](int part) {
    return make([&](int j) {
      uint16_t bits;
      memcpy(&bits, p + 2 * (8 * part + j), sizeof bits);
      return f16_to_f32(bits);
    });
  });
}

#endif

}  // namespace pe::PE_ISA
