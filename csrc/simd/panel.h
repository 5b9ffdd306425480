// Panel: 16 lanes on every ISA level, one per weight row of a panel (pe/block_weights.h), as one, two or 16 registers.
// Lanes never meet but in sum(), whose tree is fixed, and fma() rounds once everywhere: a kernel written in panels
// gives the same bits on every ISA level.
//
//   PanelF    load(p) store(p, v) store(p, v, n) to float* or bf16*; set1 mul fma sum
//   Codes     16 words of 32 bits as they lie in a packed group
//   field<shift, mask>(codes)            bits of every byte, moved down by `shift` (up, where negative) and masked
//   join_field<shift, mask>(low, codes)  the same, or low
//   look_up(codes)                       values of the book + 128 of bytes below 16
//   nibble<i, book>(codes)               four bits i of each word, less 8 or as index of the book, as floats
//   byte<i, bits>(codes)                 byte i of each word, below 2^bits, less half of that, as floats
//   load_f16(p) load_i8(p) load_u4<i>(p) 16 f16, 16 int8, four bits i of 16 bytes, as floats
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
// Bits of every byte, moved down by `shift`, which may be negative, and masked.
template <int shift>
static inline Codes shift_bits(Codes v) {
  if constexpr (shift > 0) return _mm512_srli_epi16(v, shift);
  if constexpr (shift < 0) return _mm512_slli_epi16(v, -shift);
  return v;
}
template <int shift, int mask>
static inline Codes field(Codes v) {
  return _mm512_and_si512(shift_bits<shift>(v), _mm512_set1_epi8(static_cast<char>(mask)));
}
template <int shift, int mask>
static inline Codes join_field(Codes low, Codes v) {
  return _mm512_ternarylogic_epi32(low, shift_bits<shift>(v), _mm512_set1_epi8(static_cast<char>(mask)), 0xf8);
}
static inline Codes look_up(Codes index) {
  const __m128i book = _mm_loadu_si128(reinterpret_cast<const __m128i*>(kCodeBook));
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_xor_si128(book, _mm_set1_epi8(-128))), index);
}
// Two ways that keep different execution units busy.
template <int i, bool book>
static inline PanelF nibble(const Codes& codes) {
  constexpr int bit = 4 * i;
  if constexpr (book || i == 0 || bit > 16) {
    // The permutation reads four bits of each index: nothing need be masked.
    const __m512 table =
        book ? _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(kCodeBook))))
             : _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    return {{{_mm512_permutexvar_ps(i ? _mm512_srli_epi32(codes, bit) : codes, table)}}};
  } else {
    // In the fraction of 2^(23 - bit) the bits weigh 1, 2, 4 and 8.
    const __m512 base = _mm512_set1_ps(static_cast<float>(1 << (23 - bit)));
    const __m512i q = _mm512_ternarylogic_epi32(codes, _mm512_set1_epi32(15 << bit), _mm512_castps_si512(base), 0xea);
    return {{{_mm512_sub_ps(_mm512_castsi512_ps(q), _mm512_set1_ps(static_cast<float>((1 << (23 - bit)) + 8)))}}};
  }
}
template <int i, int bits>
static inline PanelF byte(const Codes& codes) {
  // As above; a byte that does not lie in the fraction as a whole comes down first.
  constexpr int at = (8 * i + bits <= 23 ? i : (23 - bits) / 8) * 8;
  constexpr int base = 1 << (23 - at), mask = ((1 << bits) - 1) << at;
  const __m512i moved = at == 8 * i ? codes : _mm512_srli_epi32(codes, 8 * i - at);
  const __m512i q = _mm512_ternarylogic_epi32(moved, _mm512_set1_epi32(mask),
                                              _mm512_castps_si512(_mm512_set1_ps(static_cast<float>(base))), 0xea);
  return {{{_mm512_sub_ps(_mm512_castsi512_ps(q), _mm512_set1_ps(static_cast<float>(base + (1 << (bits - 1)))))}}};
}
static inline PanelF load_f16(const uint8_t* p) {
  return {{{_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}}};
}
static inline PanelF load_i8(const uint8_t* p) {
  return {{{_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))}}};
}
template <int i>
static inline PanelF load_u4(const uint8_t* p) {
  const __m512i v = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return {{{_mm512_cvtepi32_ps(i ? _mm512_srli_epi32(v, 4) : _mm512_and_si512(v, _mm512_set1_epi32(15)))}}};
}

#elif defined(__AVX2__)

struct Codes {
  __m256i part[2];
};
template <class Part>
[[gnu::always_inline]] static inline Codes make_codes(const Part& part) {
  return {{part(0), part(1)}};
}
static inline Codes load_codes(const uint8_t* p) {
  return make_codes([&](int i) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p) + i); });
}
template <int shift>
static inline __m256i shift_bits(__m256i v) {
  if constexpr (shift > 0) return _mm256_srli_epi16(v, shift);
  if constexpr (shift < 0) return _mm256_slli_epi16(v, -shift);
  return v;
}
template <int shift, int mask>
static inline Codes field(const Codes& v) {
  const __m256i bits = _mm256_set1_epi8(static_cast<char>(mask));
  return make_codes([&](int i) { return _mm256_and_si256(shift_bits<shift>(v.part[i]), bits); });
}
template <int shift, int mask>
static inline Codes join_field(const Codes& low, const Codes& v) {
  const Codes high = field<shift, mask>(v);
  return make_codes([&](int i) { return _mm256_or_si256(low.part[i], high.part[i]); });
}
static inline Codes look_up(const Codes& index) {
  const __m128i book = _mm_loadu_si128(reinterpret_cast<const __m128i*>(kCodeBook));
  const __m256i table = _mm256_broadcastsi128_si256(_mm_xor_si128(book, _mm_set1_epi8(-128)));
  return make_codes([&](int i) { return _mm256_shuffle_epi8(table, index.part[i]); });
}
template <int i, bool book>
static inline PanelF nibble(const Codes& codes) {
  return make_panel([&](int p) {
    const __m256i q = _mm256_and_si256(_mm256_srli_epi32(codes.part[p], 4 * i), _mm256_set1_epi32(15));
    if constexpr (book) {
      // Index bytes with their top bit set give zero.
      const __m256i one = _mm256_or_si256(q, _mm256_set1_epi32(static_cast<int>(0x80808000u)));
      return VecF{_mm256_sub_ps(_mm256_cvtepi32_ps(look_up({{one, one}}).part[0]), _mm256_set1_ps(128.0f))};
    } else {
      return VecF{_mm256_sub_ps(_mm256_cvtepi32_ps(q), _mm256_set1_ps(8.0f))};
    }
  });
}
template <int i, int bits>
static inline PanelF byte(const Codes& codes) {
  return make_panel([&](int p) {
    const __m256i q = _mm256_and_si256(_mm256_srli_epi32(codes.part[p], 8 * i), _mm256_set1_epi32(255));
    return VecF{_mm256_sub_ps(_mm256_cvtepi32_ps(q), _mm256_set1_ps(static_cast<float>(1 << (bits - 1))))};
  });
}
static inline PanelF load_f16(const uint8_t* p) {
  const __m128i* v = reinterpret_cast<const __m128i*>(p);
  return {{{_mm256_cvtph_ps(_mm_loadu_si128(v))}, {_mm256_cvtph_ps(_mm_loadu_si128(v + 1))}}};
}
static inline PanelF load_i8(const uint8_t* p) {
  return make_panel([&](int i) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8 * i));
    return VecF{_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes))};
  });
}
template <int i>
static inline PanelF load_u4(const uint8_t* p) {
  return make_panel([&](int part) {
    const __m256i v = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8 * part)));
    return VecF{_mm256_cvtepi32_ps(i ? _mm256_srli_epi32(v, 4) : _mm256_and_si256(v, _mm256_set1_epi32(15)))};
  });
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
template <int shift, int mask>
static inline Codes field(Codes v) {
  for (uint32_t& lane : v.lane)
    lane = (shift >= 0 ? lane >> (shift & 31) : lane << (-shift & 31)) & static_cast<uint32_t>(mask) * 0x01010101u;
  return v;
}
template <int shift, int mask>
static inline Codes join_field(Codes low, const Codes& v) {
  const Codes high = field<shift, mask>(v);
  for (int c = 0; c < kPanelRows; ++c) low.lane[c] |= high.lane[c];
  return low;
}
static inline Codes look_up(Codes index) {
  for (uint32_t& lane : index.lane) {
    uint32_t values = 0;
    for (int b = 0; b < 4; ++b) values |= static_cast<uint32_t>(kCodeBook[lane >> (8 * b) & 15u] + 128) << (8 * b);
    lane = values;
  }
  return index;
}
template <int i, bool book>
static inline PanelF nibble(const Codes& codes) {
  return make_panel([&](int p) {
    return make([&](int j) {
      const uint32_t q = codes.lane[8 * p + j] >> (4 * i) & 15u;
      return book ? static_cast<float>(kCodeBook[q]) : static_cast<float>(q) - 8.0f;
    });
  });
}
template <int i, int bits>
static inline PanelF byte(const Codes& codes) {
  return make_panel([&](int p) {
    return make([&](int j) {
      return static_cast<float>(codes.lane[8 * p + j] >> (8 * i) & 255u) - static_cast<float>(1 << (bits - 1));
    });
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
static inline PanelF load_i8(const uint8_t* p) {
  return make_panel(
      [&](int part) { return make([&](int j) { return static_cast<float>(static_cast<int8_t>(p[8 * part + j])); }); });
}
template <int i>
static inline PanelF load_u4(const uint8_t* p) {
  return make_panel(
      [&](int part) { return make([&](int j) { return static_cast<float>(p[8 * part + j] >> (4 * i) & 15); }); });
}

#endif

}  // namespace pe::PE_ISA
