// block_weights -- GGUF weights in blocks of 32, kept bit for bit in an order that vector kernels stream.
//
// Math       w[n,k], groups of 32 k:   q4_0  w = d * (q - 8)    q4_1  w = d * q + m    q8_0  w = d * q
//            d, m f16 per row and group; q 4 bits unsigned (q4_*) or int8 (q8_0)
// Shapes     N rows (outputs), K columns, K % 32 == 0. Rows come in panels of 16; a last partial panel is filled with
//            rows of zero bytes, which decode to zero
// Layout     [panel][group][bytes of one group], no gaps:
//              q4_*   4 vectors of 64 bytes; byte b of 32-bit lane c of vector j holds q[c, 4j+b] in its low and
//                     q[c, 16+4j+b] in its high four bits
//              q8_0   8 vectors of 64 bytes; byte b of lane c of vector j holds q[c, 4j+b] + 128
//              then   16 f16 d, one per row c of the panel; then, for q4_1, 16 f16 m
//            so panels are independent: the packed bytes of matrices whose N is a multiple of 16 may be concatenated
// Alignment  groups start at multiples of 32 bytes from the first byte, which itself may have any address
// Lossless   pack moves bits only; unpack_row gives what the GGUF reference dequantisation gives, in f32
// Reference  pyengine/reference/block_weights.py; the GGUF block formats of ggml
#pragma once
#include <cstdint>

namespace pe {

enum class BlockFormat : uint8_t { q4_0, q4_1, q8_0 };

constexpr int64_t kBlockSize = 32;   // k per group: one d, one m
constexpr int64_t kPanelRows = 16;   // rows of the weight per panel
constexpr int64_t kScaleBytes = 32;  // 16 f16

// One block of a raw GGUF row: scales first, then the codes.
static constexpr int64_t block_scale_bytes(BlockFormat format) { return format == BlockFormat::q4_1 ? 4 : 2; }
static constexpr int64_t block_code_bytes(BlockFormat format) { return format == BlockFormat::q8_0 ? 32 : 16; }
static constexpr int64_t block_weights_row_bytes(BlockFormat format, int64_t num_cols) {
  return num_cols / kBlockSize * (block_scale_bytes(format) + block_code_bytes(format));
}

// One packed group of a panel: 288, 320 or 544 bytes.
static constexpr int64_t packed_code_bytes(BlockFormat format) { return kPanelRows * block_code_bytes(format); }
static constexpr int64_t packed_group_bytes(BlockFormat format) {
  return kPanelRows * (block_scale_bytes(format) + block_code_bytes(format));
}
static constexpr int64_t num_panels(int64_t num_rows) { return (num_rows + kPanelRows - 1) / kPanelRows; }
static constexpr int64_t panel_bytes(BlockFormat format, int64_t num_cols) {
  return num_cols / kBlockSize * packed_group_bytes(format);
}
static constexpr int64_t block_weights_packed_bytes(BlockFormat format, int64_t num_rows, int64_t num_cols) {
  return num_panels(num_rows) * panel_bytes(format, num_cols);
}

// A packed matrix, not owned.
struct BlockWeights {
  const uint8_t* packed;
  int64_t num_rows, num_cols;  // N, K
  BlockFormat format;
};

struct BlockWeightsPack {
  const uint8_t* const* rows;  // [N], each a row of GGUF blocks, wherever it lies
  uint8_t* packed;
  int64_t num_rows, num_cols;
  BlockFormat format;
};
void block_weights_pack(const BlockWeightsPack& args);

// out[K] = row `row` of the weight.
void block_weights_unpack_row(const BlockWeights& weights, int64_t row, float* out);

}  // namespace pe
