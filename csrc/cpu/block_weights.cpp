// Packs and unpacks; needs no vector instruction: it runs once per model, at the speed of memory.
#include "pe/block_weights.h"

#include <algorithm>
#include <cstring>

#include "pe/gguf_block.h"
#include "runtime/parallel.h"

namespace pe {
namespace {

constexpr int kWord = 4;   // bytes of one 32-bit lane
constexpr int kQuads = 8;  // words of four codes in a group

// Bits [width * field, ...) of every byte of a word.
constexpr uint32_t field_mask(int width, int field) { return ((1u << width) - 1) * 0x01010101u << (width * field); }

// `from` is the lowest bit of the plane in a code; `plane` its first vector, `c` the lane.
void pack_plane(const uint32_t (&quads)[kQuads], int from, int width, int64_t c, uint8_t* plane) {
  for (int j = 0; j < width; ++j) {
    uint32_t word = 0;
    for (int field = 0; field < 8 / width; ++field)
      word |= (quads[j + width * field] >> from & field_mask(width, 0)) << (width * field);
    std::memcpy(plane + (j * kPanelRows + c) * kWord, &word, kWord);
  }
}

template <BlockFormat format>
void pack_group(const GgufBlock& block, int g, int64_t c, uint8_t* group) {
  constexpr BlockFormatInfo f = info(format);
  uint32_t quads[kQuads];
  std::memcpy(quads, block.codes + g * kGroupSize, sizeof quads);
  pack_plane(quads, 0, f.low_bits, c, group);
  if constexpr (f.high_bits != 0) pack_plane(quads, f.low_bits, f.high_bits, c, group + 64 * f.low_bits);
  uint8_t* scales = group + packed_code_bytes(format);
  if constexpr (f.scales == BlockScales::f16) {
    std::memcpy(scales + c * 2, &block.d, 2);
    if constexpr (f.has_min) std::memcpy(scales + kScaleBytes + c * 2, &block.m, 2);
  } else {
    for (int part = 0; part < scale_groups(format); ++part) {
      const int i = g * scale_groups(format) + part;
      const int high = f.has_min && scale_groups(format) == 2 ? block.mins[i] << 4 : 0;
      scales[part * kPanelRows + c] = static_cast<uint8_t>(block.scales[i] | high);
    }
    if constexpr (f.has_min && scale_groups(format) == 1) scales[kPanelRows + c] = static_cast<uint8_t>(block.mins[g]);
  }
}

template <BlockFormat format>
void pack_panel(const BlockWeightsPack& a, int64_t panel) {
  constexpr BlockFormatInfo f = info(format);
  const int64_t row_begin = panel * kPanelRows, num_rows = std::min(kPanelRows, a.num_rows - row_begin);
  uint8_t* packed = a.packed + panel * panel_bytes(format, a.num_cols);
  if (num_rows < kPanelRows) std::memset(packed, 0, static_cast<size_t>(panel_bytes(format, a.num_cols)));
  GgufBlock block;
  for (int64_t c = 0; c < num_rows; ++c) {
    const uint8_t* raw = a.rows[row_begin + c];
    uint8_t* to = packed;
    for (int64_t k = 0; k < a.num_cols; k += f.block_size, raw += f.gguf_block_bytes) {
      read_gguf_block<format>(raw, &block);
      if constexpr (f.scales == BlockScales::super) {
        std::memcpy(to + c * 2, &block.d, 2);
        if constexpr (f.has_min) std::memcpy(to + kScaleBytes + c * 2, &block.m, 2);
      }
      for (int g = 0; g < f.block_size / kGroupSize; ++g) pack_group<format>(block, g, c, to + group_offset(format, g));
      to += packed_block_bytes(format);
    }
  }
}

// --- back ------------------------------------------------------------------------------------------------------------

int plane_bits(const uint8_t* plane, int width, int64_t c, int k) {
  const int quad = k / kWord, vector = quad % width, field = quad / width;
  return plane[(vector * kPanelRows + c) * kWord + k % kWord] >> (width * field) & ((1 << width) - 1);
}

// The d and m of scale group `part` of a group.
struct RowScales {
  float d, m;
};

template <BlockFormat format>
RowScales row_scales(const uint8_t* block, const uint8_t* group, int part, int64_t c) {
  constexpr BlockFormatInfo f = info(format);
  const uint8_t* scales = group + packed_code_bytes(format);
  const auto f16 = [c](const uint8_t* p) { return f16_to_f32(read_u16(p + c * 2)); };
  if constexpr (f.scales == BlockScales::f16) {
    return {f16(scales), f.has_min ? f16(scales + kScaleBytes) : 0.0f};
  } else {
    int scale = static_cast<int8_t>(scales[part * kPanelRows + c]), min = 0;
    if constexpr (f.has_min && scale_groups(format) == 2) {
      min = scales[part * kPanelRows + c] >> 4;
      scale &= 15;
    } else if constexpr (f.has_min) {
      min = scales[kPanelRows + c];
    }
    return {f16(block) * static_cast<float>(scale),
            f.has_min ? f16(block + kScaleBytes) * static_cast<float>(min) : 0.0f};
  }
}

template <BlockFormat format>
void unpack_row(const BlockWeights& w, int64_t row, float* out) {
  constexpr BlockFormatInfo f = info(format);
  const int64_t c = row % kPanelRows;
  const uint8_t* panel = w.packed + row / kPanelRows * panel_bytes(format, w.num_cols);
  for (int64_t g = 0; g < w.num_cols / kGroupSize; ++g) {
    const uint8_t *block = panel + block_offset(format, g), *group = panel + group_offset(format, g);
    for (int k = 0; k < kGroupSize;) {
      const RowScales scales = row_scales<format>(block, group, k / f.scale_group, c);
      for (const int end = k + f.scale_group; k < end; ++k) {
        int code = plane_bits(group, f.low_bits, c, k);
        if constexpr (f.high_bits != 0) code |= plane_bits(group + 64 * f.low_bits, f.high_bits, c, k) << f.low_bits;
        out[g * kGroupSize + k] = block_weight<format>(scales.d, scales.m, code);
      }
    }
  }
}

}  // namespace

void block_weights_pack(const BlockWeightsPack& args) {
  if (args.num_cols == 0) return;  // no bytes: packed may be null
  constexpr int64_t kBytesPerTask = 256 * 1024;
  const int64_t grain = 1 + kBytesPerTask / std::max<int64_t>(panel_bytes(args.format, args.num_cols), 1);
  with_format(args.format, [&](auto format) {
    parallel_for(num_panels(args.num_rows), grain, [&](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; ++panel) pack_panel<format.value>(args, panel);
    });
  });
}

void block_weights_unpack_row(const BlockWeights& weights, int64_t row, float* out) {
  with_format(weights.format, [&](auto format) { unpack_row<format.value>(weights, row, out); });
}

}  // namespace pe
