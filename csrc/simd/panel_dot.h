// Exact integer dot products of the codes of one packed group, unsigned, with activations in [-127, 127].
//
//   DotCodes<format>              codes of a group as unsigned bytes, k in groups of four per lane
//   load_dot_codes<format>(p)
//   dot<part>(codes, x, start)    start + sum_k code[k] * x[k] over scale group `part`, in every lane, as PanelI; x is
//                                 that of the whole group. Nothing wraps or saturates
//   panel_int(i) to_float(v)
#pragma once
#include "simd/panel_codes.h"

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

#elif defined(__AVX2__)

struct PanelI {
  __m256i part[2];
};
static inline PanelI panel_int(int32_t i) { return {{_mm256_set1_epi32(i), _mm256_set1_epi32(i)}}; }
static inline PanelF to_float(const PanelI& v) {
  return {{{_mm256_cvtepi32_ps(v.part[0])}, {_mm256_cvtepi32_ps(v.part[1])}}};
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

#endif

#if defined(__AVX512VNNI__) || !defined(__AVX2__)

// Sums of four products go straight to 32 bits.
template <BlockFormat format>
struct DotCodes {
  Codes quad[kGroupQuads];
};

template <BlockFormat format>
[[gnu::always_inline]] static inline DotCodes<format> load_dot_codes(const uint8_t* group) {
  DotCodes<format> codes;
  unroll<kGroupQuads>([&](auto i) PE_INLINE { codes.quad[i] = quad<format, i>(group); });
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

template <int part, BlockFormat format>
[[gnu::always_inline]] static inline PanelI dot(const DotCodes<format>& codes, const int8_t* x, PanelI start) {
  constexpr int count = kGroupQuads / scale_groups(format), first = part * count;
  PE_UNROLL for (int i = first; i < first + count; ++i) start = dot_quad(codes.quad[i], load_word(x + 4 * i), start);
  return start;
}

#else

// Without VNNI pairs of products are summed in 16 bits, as many as stay below 2^15 whatever the codes. Bytes are two
// sets of four bits, so that they fit too: code = low + 16 * high.
template <BlockFormat format>
struct DotCodes {
  static constexpr int kSets = code_bits(format) == 8 ? 2 : 1;
  static constexpr int kSetBits = code_bits(format) / kSets;
  static constexpr int kQuadsAtOnce = 32767 / (2 * 127 * ((1 << kSetBits) - 1));
  Codes quad[kSets][kGroupQuads];
};

template <BlockFormat format>
[[gnu::always_inline]] static inline DotCodes<format> load_dot_codes(const uint8_t* group) {
  DotCodes<format> codes;
  unroll<kGroupQuads>([&](auto i) PE_INLINE {
    const Codes q = quad<format, i>(group);
    if constexpr (DotCodes<format>::kSets == 1) {
      codes.quad[0][i] = q;
    } else {
      codes.quad[0][i] = field<0, 15>(q);
      codes.quad[1][i] = field<4, 15>(q);
    }
  });
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

template <int part, BlockFormat format>
[[gnu::always_inline]] static inline PanelI dot(const DotCodes<format>& codes, const int8_t* x, PanelI start) {
  using Dot = DotCodes<format>;
  constexpr int count = kGroupQuads / scale_groups(format), first = part * count;
  constexpr int at_once = Dot::kQuadsAtOnce < count ? Dot::kQuadsAtOnce : count;
  PE_UNROLL for (int set = 0; set < Dot::kSets; ++set) {
    PE_UNROLL for (int run = first; run < first + count; run += at_once) {
      Codes pairs = zero_pairs();
      PE_UNROLL for (int i = run; i < run + at_once; ++i) {
        pairs = add_pairs(codes.quad[set][i], load_word(x + 4 * i), pairs);
      }
      start = add_scaled(pairs, set ? 16 : 1, start);
    }
  }
  return start;
}

#endif

}  // namespace pe::PE_ISA
