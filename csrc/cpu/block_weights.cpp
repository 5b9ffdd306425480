// Packs and unpacks; needs no vector instruction: it runs once per model, at the speed of memory.
#include "pe/block_weights.h"

#include <algorithm>
#include <cstring>

#include "pe/f16.h"
#include "runtime/parallel.h"

namespace pe {
namespace {

constexpr int64_t kWord = 4;  // bytes of one 32-bit lane
// int8 to offset binary, four codes at a time.
constexpr uint32_t kFlipSigns = 0x80808080u;

void pack_panel(const BlockWeightsPack& a, int64_t panel) {
  const int64_t scale_bytes = block_scale_bytes(a.format), code_bytes = block_code_bytes(a.format);
  const int64_t block_bytes = scale_bytes + code_bytes, num_groups = a.num_cols / kBlockSize;
  const int64_t row_begin = panel * kPanelRows, num_rows = std::min(kPanelRows, a.num_rows - row_begin);
  const uint32_t flip = a.format == BlockFormat::q8_0 ? kFlipSigns : 0;
  uint8_t* packed = a.packed + panel * panel_bytes(a.format, a.num_cols);
  if (num_rows < kPanelRows) std::memset(packed, 0, static_cast<size_t>(panel_bytes(a.format, a.num_cols)));
  for (int64_t c = 0; c < num_rows; ++c) {
    const uint8_t* block = a.rows[row_begin + c];
    uint8_t* group = packed;
    for (int64_t g = 0; g < num_groups; ++g, block += block_bytes, group += packed_group_bytes(a.format)) {
      for (int64_t j = 0; j < code_bytes / kWord; ++j) {
        uint32_t word;
        std::memcpy(&word, block + scale_bytes + j * kWord, kWord);
        word ^= flip;
        std::memcpy(group + (j * kPanelRows + c) * kWord, &word, kWord);
      }
      for (int64_t s = 0; s < scale_bytes / 2; ++s)
        std::memcpy(group + packed_code_bytes(a.format) + s * kScaleBytes + c * 2, block + s * 2, 2);
    }
  }
}

float read_f16(const uint8_t* p) {
  uint16_t bits;
  std::memcpy(&bits, p, sizeof bits);
  return f16_to_f32(bits);
}

}  // namespace

void block_weights_pack(const BlockWeightsPack& args) {
  if (args.num_cols == 0) return;  // no bytes: packed may be null
  constexpr int64_t kBytesPerTask = 256 * 1024;
  const int64_t grain = 1 + kBytesPerTask / std::max<int64_t>(panel_bytes(args.format, args.num_cols), 1);
  parallel_for(num_panels(args.num_rows), grain, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) pack_panel(args, panel);
  });
}

void block_weights_unpack_row(const BlockWeights& w, int64_t row, float* out) {
  const int64_t c = row % kPanelRows;
  const uint8_t* group = w.packed + row / kPanelRows * panel_bytes(w.format, w.num_cols);
  for (int64_t k = 0; k < w.num_cols; k += kBlockSize, out += kBlockSize, group += packed_group_bytes(w.format)) {
    const uint8_t* scales = group + packed_code_bytes(w.format) + c * 2;
    const float d = read_f16(scales);
    const float m = w.format == BlockFormat::q4_1 ? read_f16(scales + kScaleBytes) : 0.0f;
    for (int64_t i = 0; i < kBlockSize; ++i) {
      const auto byte = [&](int64_t at) { return group[(at / kWord * kPanelRows + c) * kWord + at % kWord]; };
      switch (w.format) {
        case BlockFormat::q4_0:
          out[i] = d * static_cast<float>((byte(i % 16) >> (i < 16 ? 0 : 4) & 15) - 8);
          break;
        case BlockFormat::q4_1:
          out[i] = d * static_cast<float>(byte(i % 16) >> (i < 16 ? 0 : 4) & 15) + m;
          break;
        case BlockFormat::q8_0:
          out[i] = d * static_cast<float>(byte(i) - 128);
          break;
      }
    }
  }
}

}  // namespace pe
