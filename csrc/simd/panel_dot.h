// Exact integer dot products of one packed group of 32 codes, unsigned, with 32 activations in [-127, 127].
//
//   DotCodes<format>              codes of a group as unsigned bytes, k in groups of four per lane
//   load_dot_codes<format>(p)
//   dot(codes, x, start)          start + sum_k code[k] * x[k] in every lane, as PanelI; nothing wraps or saturates
//   panel_int(i) to_float(v)
#pragma once
#include "simd/panel.h"

namespace pe::PE_ISA {

// Four activations, as a lane of the dot product reads them.
static inline int32_t load_word(const int8_t* x) {
  int32_t word;
  memcpy(&word, x, sizeof word);
  return word;
}

#if defined(__AVX512F__)

using PanelI = __m512i;
static inline PanelI panel_int(int32_t i) { return _mm512_set1_epi32(i); }
static inline PanelF to_float(PanelI v) { return {{{_mm512_cvtepi32_ps(v)}}}; }
static inline Codes low_nibbles(Codes v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
static inline Codes high_nibbles(Codes v) { return low_nibbles(_mm512_srli_epi16(v, 4)); }

#elif defined(__AVX2__)

struct PanelI {
  __m256i part[2];
};
static inline PanelI panel_int(int32_t i) { return {{_mm256_set1_epi32(i), _mm256_set1_epi32(i)}}; }
static inline PanelF to_float(const PanelI& v) {
  return {{{_mm256_cvtepi32_ps(v.part[0])}, {_mm256_cvtepi32_ps(v.part[1])}}};
}
static inline Codes low_nibbles(const Codes& v) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {{_mm256_and_si256(v.part[0], mask), _mm256_and_si256(v.part[1], mask)}};
}
static inline Codes high_nibbles(const Codes& v) {
  return low_nibbles({{_mm256_srli_epi16(v.part[0], 4), _mm256_srli_epi16(v.part[1], 4)}});
}

#else

struct PanelI {
  int32_t lane[kPanelRows];
};
static inline PanelI panel_int(int32_t i) {
  PanelI v;
  for (int32_t& lane : v.lane) lane = i;
  return v;
}
static inline PanelF to_float(const PanelI& v) {
  return make_panel([&](int p) { return make([&](int j) { return static_cast<float>(v.lane[8 * p + j]); }); });
}
static inline Codes low_nibbles(Codes v) {
  for (uint32_t& lane : v.lane) lane &= 0x0f0f0f0fu;
  return v;
}
static inline Codes high_nibbles(Codes v) {
  for (uint32_t& lane : v.lane) lane = lane >> 4 & 0x0f0f0f0fu;
  return v;
}

#endif

#if defined(__AVX512VNNI__) || !defined(__AVX2__)

// Sums of four products go straight to 32 bits.
template <BlockFormat format>
struct DotCodes {
  Codes quad[8];  // of k = 4i ... 4i + 3
};

template <BlockFormat format>
[[gnu::always_inline]] static inline DotCodes<format> load_dot_codes(const uint8_t* group) {
  DotCodes<format> codes;
  if constexpr (format == BlockFormat::q8_0) {
    PE_UNROLL for (int i = 0; i < 8; ++i) codes.quad[i] = load_codes(group + i * 64);
  } else {
    PE_UNROLL for (int i = 0; i < 4; ++i) {
      const Codes both = load_codes(group + i * 64);
      codes.quad[i] = low_nibbles(both);
      codes.quad[4 + i] = high_nibbles(both);
    }
  }
  return codes;
}

#if defined(__AVX512VNNI__)
static inline PanelI dot_quad(Codes codes, int32_t word, PanelI acc) {
  return _mm512_dpbusd_epi32(acc, codes, _mm512_set1_epi32(word));
}
#else
static inline PanelI dot_quad(const Codes& codes, int32_t word, PanelI acc) {
  for (int c = 0; c < kPanelRows; ++c)
    for (int b = 0; b < 4; ++b)
      acc.lane[c] += static_cast<int32_t>(codes.lane[c] >> (8 * b) & 255u) * static_cast<int8_t>(word >> (8 * b));
  return acc;
}
#endif

template <BlockFormat format>
[[gnu::always_inline]] static inline PanelI dot(const DotCodes<format>& codes, const int8_t* x, PanelI start) {
  PE_UNROLL for (int i = 0; i < 8; ++i) start = dot_quad(codes.quad[i], load_word(x + 4 * i), start);
  return start;
}

#else

// Without VNNI pairs of products are summed in 16 bits: 8 pairs of at most 2 * 15 * 127 each stay below 2^15. Bytes are
// two sets of four bits, so that they fit too: code = low + 16 * high.
template <BlockFormat format>
struct DotCodes {
  static constexpr int kSets = format == BlockFormat::q8_0 ? 2 : 1;
  Codes quad[kSets][8];
};

template <BlockFormat format>
[[gnu::always_inline]] static inline DotCodes<format> load_dot_codes(const uint8_t* group) {
  DotCodes<format> codes;
  if constexpr (format == BlockFormat::q8_0) {
    PE_UNROLL for (int i = 0; i < 8; ++i) {
      const Codes both = load_codes(group + i * 64);
      codes.quad[0][i] = low_nibbles(both);
      codes.quad[1][i] = high_nibbles(both);
    }
  } else {
    PE_UNROLL for (int i = 0; i < 4; ++i) {
      const Codes both = load_codes(group + i * 64);
      codes.quad[0][i] = low_nibbles(both);
      codes.quad[0][4 + i] = high_nibbles(both);
    }
  }
  return codes;
}

#if defined(__AVX512F__)
static inline Codes zero_pairs() { return _mm512_setzero_si512(); }
static inline Codes add_pairs(Codes codes, int32_t word, Codes pairs) {
  return _mm512_add_epi16(pairs, _mm512_maddubs_epi16(codes, _mm512_set1_epi32(word)));
}
static inline PanelI add_scaled(Codes pairs, int scale, PanelI acc) {
  return _mm512_add_epi32(acc, _mm512_madd_epi16(pairs, _mm512_set1_epi16(static_cast<int16_t>(scale))));
}
#else
static inline Codes zero_pairs() { return {{_mm256_setzero_si256(), _mm256_setzero_si256()}}; }
static inline Codes add_pairs(const Codes& codes, int32_t word, const Codes& pairs) {
  const __m256i x = _mm256_set1_epi32(word);
  return {{_mm256_add_epi16(pairs.part[0], _mm256_maddubs_epi16(codes.part[0], x)),
           _mm256_add_epi16(pairs.part[1], _mm256_maddubs_epi16(codes.part[1], x))}};
}
static inline PanelI add_scaled(const Codes& pairs, int scale, const PanelI& acc) {
  const __m256i by = _mm256_set1_epi16(static_cast<int16_t>(scale));
  return {{_mm256_add_epi32(acc.part[0], _mm256_madd_epi16(pairs.part[0], by)),
           _mm256_add_epi32(acc.part[1], _mm256_madd_epi16(pairs.part[1], by))}};
}
#endif

template <BlockFormat format>
[[gnu::always_inline]] static inline PanelI dot(const DotCodes<format>& codes, const int8_t* x, PanelI start) {
  PE_UNROLL for (int set = 0; set < DotCodes<format>::kSets; ++set) {
    Codes pairs = zero_pairs();
    PE_UNROLL for (int i = 0; i < 8; ++i) pairs = add_pairs(codes.quad[set][i], load_word(x + 4 * i), pairs);
    start = add_scaled(pairs, set ? 16 : 1, start);
  }
  return start;
}

#endif

}  // namespace pe::PE_ISA
