// Codes of a packed group in bf16, which holds each of them exactly. For levels that permute the 16-bit words of 512 bits.
//
//   bf16_of_words<format>(words)   q - z of the code in the lowest bits of each word, whatever its other bits are. For
//                                  formats that store at most six bits of a code
//   bf16_pair(low, high)           codes in f32 as pairs: those of `low` in the lower half of each lane
#pragma once
#include "simd/panel_codes.h"

namespace pe::PE_ISA {

constexpr int kBF16CodeBits = 6;

struct BF16Codes {
  alignas(64) uint16_t value[1 << kBF16CodeBits];
};

// All codes of the format, again and again: bits above those of a code find the same value.
template <BlockFormat format>
static constexpr BF16Codes bf16_codes() {
  constexpr int num_codes = 1 << stored_bits(format);
  BF16Codes codes = {};
  for (int i = 0; i < 1 << kBF16CodeBits; ++i) {
    const int code = i % num_codes;
    const float value = static_cast<float>(info(format).has_book ? kCodeBook[code % 16] : code - middle_code(format));
    codes.value[i] = static_cast<uint16_t>(__builtin_bit_cast(uint32_t, value) >> 16);
  }
  return codes;
}

template <BlockFormat format>
[[gnu::always_inline]] static inline __m512i bf16_of_words(__m512i words) {
  constexpr int bits = stored_bits(format);
  static_assert(bits <= kBF16CodeBits);
  alignas(64) static constexpr BF16Codes kCodes = bf16_codes<format>();
  const __m512i low = _mm512_load_si512(kCodes.value);
  if constexpr (bits < kBF16CodeBits) return _mm512_permutexvar_epi16(words, low);
  return _mm512_permutex2var_epi16(low, words, _mm512_load_si512(kCodes.value + 32));
}

// Small integers have nothing in the lower half of their f32.
static inline __m512i bf16_pair(const PanelF& low, const PanelF& high) {
  return _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(low.part[0].v), 16),
                         _mm512_castps_si512(high.part[0].v));
}

}  // namespace pe::PE_ISA
