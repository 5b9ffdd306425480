// The codes and scales of a packed group (pe/block_weights.h), for every format at once.
//
//   quad<format, i>(group)     the codes k = 4i ... 4i + 3 of each row of a panel as unsigned bytes q
//   code_run<format, i>(group) the same as floats q - z
//   load_group_scales<format>(panel, g, part)   d and m of scale group `part` of group g
//   prefetch_group<format>(panel, g, ahead)     what lies `ahead` bytes after group g
#pragma once
#include "simd/panel.h"
#include "simd/unroll.h"

namespace pe::PE_ISA {

constexpr int kGroupQuads = static_cast<int>(kGroupSize) / 4;

template <BlockFormat format, int i>
[[gnu::always_inline]] static inline Codes quad(const uint8_t* group) {
  constexpr int low = info(format).low_bits, high = info(format).high_bits;
  const Codes stored = load_codes(group + 64 * (i % low));
  if constexpr (low == 8) return stored;
  const Codes codes = field<i / low * low, (1 << low) - 1>(stored);
  if constexpr (info(format).has_book) return look_up(codes);
  if constexpr (high == 0) {
    return codes;
  } else {
    constexpr int mask = ((1 << high) - 1) << low;
    return join_field<i / high * high - low, mask>(codes, load_codes(group + 64 * (low + i % high)));
  }
}

// Consecutive codes, as floats.
template <int count>
struct CodeRun {
  PanelF code[count];
};

template <BlockFormat format, int i>
[[gnu::always_inline]] static inline CodeRun<4> code_run(const uint8_t* group) {
  if constexpr (stored_bits(format) == 4) {
    constexpr int field = i / 4;
    constexpr bool book = info(format).has_book;
    const Codes codes = load_codes(group + 64 * (i % 4));
    return {{nibble<field, book>(codes), nibble<field + 2, book>(codes), nibble<field + 4, book>(codes),
             nibble<field + 6, book>(codes)}};
  } else {
    constexpr int bits = code_bits(format);
    const Codes codes = quad<format, i>(group);
    return {{byte<0, bits>(codes), byte<1, bits>(codes), byte<2, bits>(codes), byte<3, bits>(codes)}};
  }
}

template <BlockFormat format>
[[gnu::always_inline]] static inline void prefetch_group(const uint8_t* panel, int64_t g, int64_t ahead) {
  prefetch<packed_group_bytes(format) + super_scale_bytes(format)>(panel + group_offset(format, g) + ahead);
}

struct GroupScales {
  PanelF d, m;  // m: formats with a minimum only
};

template <BlockFormat format>
[[gnu::always_inline]] static inline GroupScales load_group_scales(const uint8_t* panel, int64_t g, int part) {
  const uint8_t* scales = panel + group_offset(format, g) + packed_code_bytes(format);
  GroupScales s;
  if constexpr (info(format).scales == BlockScales::f16) {
    s.d = load_f16(scales);
    if constexpr (has_min(format)) s.m = load_f16(scales + kScaleBytes);
  } else {
    const uint8_t* block = panel + block_offset(format, g);
    scales += part * kPanelRows;
    if constexpr (has_min(format) && scale_groups(format) == 2) {
      s.d = mul(load_f16(block), load_u4<0>(scales));
      s.m = mul(load_f16(block + kScaleBytes), load_u4<1>(scales));
    } else {
      s.d = mul(load_f16(block), load_i8(scales));
      if constexpr (has_min(format)) s.m = mul(load_f16(block + kScaleBytes), load_i8(scales + kPanelRows));
    }
  }
  return s;
}

}  // namespace pe::PE_ISA
