// One block of a GGUF row, taken apart: codes in the order of k, scales as integers times f16.
// Values are defined by ggml-quants.c of https://github.com/ggml-org/ggml (dequantize_row_*).
#pragma once
#include <stdint.h>
#include <string.h>

#include "pe/block_weights.h"
#include "pe/f16.h"

namespace pe {
namespace {

// Where the parts of a block lie. The bits of a plane of w bits come in runs: a run of n bytes holds the lowest w bits
// of its bytes for n codes, then the next w bits for the next n codes, and so on.
struct GgufLayout {
  int d, m, scales;  // -1: none
  int low, low_run, high, high_run;
};

constexpr GgufLayout gguf_layout(BlockFormat format) {
  switch (format) {
    case BlockFormat::q4_0:
    case BlockFormat::iq4_nl:
      return {0, -1, -1, 2, 16, -1, 0};
    case BlockFormat::q4_1:
      return {0, 2, -1, 4, 16, -1, 0};
    case BlockFormat::q5_0:
      return {0, -1, -1, 6, 16, 2, 1};
    case BlockFormat::q5_1:
      return {0, 2, -1, 8, 16, 4, 1};
    case BlockFormat::q8_0:
      return {0, -1, -1, 2, 32, -1, 0};
    case BlockFormat::q2_k:
      return {80, 82, 0, 16, 32, -1, 0};
    case BlockFormat::q3_k:
      return {108, -1, 96, 32, 32, 0, 32};
    case BlockFormat::q4_k:
      return {0, 2, 4, 16, 32, -1, 0};
    case BlockFormat::q5_k:
      return {0, 2, 4, 48, 32, 16, 32};
    case BlockFormat::q6_k:
      return {208, -1, 192, 0, 64, 128, 32};
    case BlockFormat::iq4_xs:
      return {0, -1, 2, 8, 16, -1, 0};
  }
  return {};
}

// d of scale group i is f16(d) * scales[i], m is f16(m) * mins[i].
struct GgufBlock {
  uint8_t codes[kSuperSize];
  int8_t scales[kSuperSize / 16], mins[kSuperSize / 16];
  uint16_t d, m;
};

// codes[...] += (the next w bits) << shift, for every code of a block.
template <int width, int shift>
inline void add_plane(const uint8_t* bytes, int run, int num_codes, uint8_t* codes) {
  constexpr int kFields = 8 / width, kMask = (1 << width) - 1;
  for (int done = 0; done < num_codes; done += run * kFields, bytes += run)
    for (int field = 0; field < kFields; ++field)
      for (int i = 0; i < run; ++i)
        codes[done + field * run + i] |= static_cast<uint8_t>((bytes[i] >> (field * width) & kMask) << shift);
}

template <BlockFormat format>
inline void read_scales(const uint8_t* p, GgufBlock* out) {
  const auto set = [out](int i, int scale, int min) {
    out->scales[i] = static_cast<int8_t>(scale);
    out->mins[i] = static_cast<int8_t>(min);
  };
  if constexpr (format == BlockFormat::q2_k) {
    for (int i = 0; i < 16; ++i) set(i, p[i] & 15, p[i] >> 4);
  } else if constexpr (format == BlockFormat::q3_k) {
    for (int i = 0; i < 16; ++i) {
      const int low = p[i % 8] >> (i / 8 * 4) & 15, high = p[8 + i % 4] >> (i / 4 * 2) & 3;
      set(i, (low | high << 4) - 32, 0);
    }
  } else if constexpr (format == BlockFormat::q6_k) {
    for (int i = 0; i < 16; ++i) set(i, static_cast<int8_t>(p[i]), 0);
  } else if constexpr (format == BlockFormat::iq4_xs) {
    const int high = p[0] | p[1] << 8;
    for (int i = 0; i < 8; ++i) set(i, ((p[2 + i / 2] >> (i % 2 * 4) & 15) | (high >> (2 * i) & 3) << 4) - 32, 0);
  } else {
    for (int i = 0; i < 4; ++i) {
      set(i, p[i] & 63, p[4 + i] & 63);
      set(4 + i, (p[8 + i] & 15) | (p[i] >> 6) << 4, (p[8 + i] >> 4) | (p[4 + i] >> 6) << 4);
    }
  }
}

inline uint16_t read_u16(const uint8_t* p) {
  uint16_t bits;
  memcpy(&bits, p, sizeof bits);
  return bits;
}

template <BlockFormat format>
inline void read_gguf_block(const uint8_t* block, GgufBlock* out) {
  constexpr GgufLayout layout = gguf_layout(format);
  constexpr int kNumCodes = static_cast<int>(info(format).block_size);
  memset(out->codes, 0, kNumCodes);
  add_plane<info(format).low_bits, 0>(block + layout.low, layout.low_run, kNumCodes, out->codes);
  if constexpr (info(format).high_bits != 0)
    add_plane<info(format).high_bits, info(format).low_bits>(block + layout.high, layout.high_run, kNumCodes,
                                                             out->codes);
  if constexpr (format == BlockFormat::q8_0)  // int8, here less its sign
    for (int i = 0; i < kNumCodes; ++i) out->codes[i] ^= 0x80;
  out->d = read_u16(block + layout.d);
  out->m = has_min(format) ? read_u16(block + layout.m) : uint16_t{0};
  if constexpr (info(format).scales == BlockScales::super) {
    out->m ^= has_min(format) ? 0x8000 : 0;  // GGUF subtracts
    read_scales<format>(block + layout.scales, out);
  } else {
    out->scales[0] = out->mins[0] = 1;
  }
}

// The weight of a code, rounded as the reference of ggml rounds it.
template <BlockFormat format>
inline float block_weight(float d, float m, int code) {
  if constexpr (info(format).has_book) return d * static_cast<float>(kCodeBook[code]);
  if constexpr (has_min(format)) return d * static_cast<float>(code) + m;
  return d * static_cast<float>(code - middle_code(format));
}

}  // namespace
}  // namespace pe
