// block_weights -- GGUF weights in blocks, kept bit for bit in an order that vector kernels stream.
//
// Math       w[n,k] = d * (q - z)  or, in formats with a minimum,  w[n,k] = d * q + m. The code q is an unsigned integer
//            of the format's bits and z half its range; in a format with a book, q - z is book[index]. So q and q - z
//            are exact in 9 bits with sign, in bf16 and in f32
//            d (and m) are shared by 32 or 16 consecutive k of a row, the scale group:
//              scales f16    d and m are f16, one for each 32 k
//              scales super  d = D * c, m = M * e; D and M f16, one for each 256 k, and c and e integers from -128 to
//                            127, one for each scale group: d and m are exact in f32
// Shapes     N rows (outputs), K columns, a multiple of block_size. Rows come in panels of 16; a last partial panel is
//            filled with rows of zero bytes, which decode to zero
// Layout     [panel][block of 32 or 256 k][super scales, then its groups of 32 k], no gaps
//            super scales   16 f16 D, one per row c of the panel; then, with a minimum, 16 f16 M (GGUF's, negated)
//            group          the low bits of the codes, then the high ones, then scales
//              a plane of w bits is w vectors of 64 bytes: byte b of 32-bit lane c of vector j holds in its bits
//              [w * f, w * f + w) those of the code at k = 4 * (j + w * f) + b of row c
//              scales f16     16 f16 d; then, with a minimum, 16 f16 m
//              scales super   groups of 32: 16 int8 c; then, with a minimum, 16 int8 e
//                             groups of 16: 16 int8 c for k < 16, then 16 for the others; with a minimum, bytes of
//                             c in the low and e in the high four bits
//            so panels are independent: the packed bytes of matrices whose N is a multiple of 16 may be concatenated
// Alignment  groups start at multiples of 16 bytes from the first byte, which itself may have any address
// Lossless   pack moves bits only; unpack_row gives what the GGUF reference dequantisation gives, in f32
// Reference  pyengine/reference/block_weights.py; the GGUF block formats of ggml
#pragma once
#include <cstdint>

namespace pe {

enum class BlockScales : uint8_t { f16, super };

// Every format there is: its name in lower case, k of a GGUF block, bytes of a GGUF block, bits of the two planes of a
// code, k of a scale group, scales, whether it has a minimum, whether the code is the index of a book.
#define PE_BLOCK_FORMATS(X)                        \
  X(q4_0, 32, 18, 4, 0, 32, f16, false, false)     \
  X(q4_1, 32, 20, 4, 0, 32, f16, true, false)      \
  X(q5_0, 32, 22, 4, 1, 32, f16, false, false)     \
  X(q5_1, 32, 24, 4, 1, 32, f16, true, false)      \
  X(q8_0, 32, 34, 8, 0, 32, f16, false, false)     \
  X(iq4_nl, 32, 18, 4, 0, 32, f16, false, true)    \
  X(q2_k, 256, 84, 2, 0, 16, super, true, false)   \
  X(q3_k, 256, 110, 2, 1, 16, super, false, false) \
  X(q4_k, 256, 144, 4, 0, 32, super, true, false)  \
  X(q5_k, 256, 176, 4, 1, 32, super, true, false)  \
  X(q6_k, 256, 210, 4, 2, 16, super, false, false) \
  X(iq4_xs, 256, 136, 4, 0, 32, super, false, true)

enum class BlockFormat : uint8_t {
#define PE_NAME(name, ...) name,
  PE_BLOCK_FORMATS(PE_NAME)
#undef PE_NAME
};

struct BlockFormatInfo {
  const char* name;
  int64_t block_size, gguf_block_bytes;
  int low_bits, high_bits, scale_group;
  BlockScales scales;
  bool has_min, has_book;
};

static constexpr BlockFormatInfo kBlockFormats[] = {
#define PE_INFO(name, block, bytes, low, high, group, scales, has_min, has_book) \
  {#name, block, bytes, low, high, group, BlockScales::scales, has_min, has_book},
    PE_BLOCK_FORMATS(PE_INFO)
#undef PE_INFO
};
constexpr int kNumBlockFormats = sizeof(kBlockFormats) / sizeof(kBlockFormats[0]);

static constexpr const BlockFormatInfo& info(BlockFormat format) { return kBlockFormats[static_cast<int>(format)]; }

template <BlockFormat kFormat>
struct FormatConstant {
  static constexpr BlockFormat value = kFormat;
};

// body(FormatConstant<format>{}): from a format known at run time to one known at compile time.
template <class Body>
[[gnu::always_inline]] static inline void with_format(BlockFormat format, const Body& body) {
  switch (format) {
#define PE_CASE(name, ...) \
  case BlockFormat::name:  \
    return body(FormatConstant<BlockFormat::name>{});
    PE_BLOCK_FORMATS(PE_CASE)
#undef PE_CASE
  }
}

constexpr int64_t kGroupSize = 32;   // k of a packed group, and what K is a multiple of in every format
constexpr int64_t kSuperSize = 256;  // k of the largest block
constexpr int64_t kPanelRows = 16;   // rows of the weight per panel
constexpr int64_t kScaleBytes = 32;  // 16 f16

// Values of the codes of a book.
static constexpr int8_t kCodeBook[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

// Bits of a stored code, bits of q, z, and the scale groups of a packed group.
static constexpr int stored_bits(BlockFormat f) { return info(f).low_bits + info(f).high_bits; }
static constexpr int code_bits(BlockFormat f) { return info(f).has_book ? 8 : stored_bits(f); }
static constexpr int32_t middle_code(BlockFormat f) { return 1 << (code_bits(f) - 1); }
static constexpr bool has_min(BlockFormat f) { return info(f).has_min; }
constexpr int kGroupHalves = 2;  // scale groups at most
static constexpr int scale_groups(BlockFormat f) { return static_cast<int>(kGroupSize) / info(f).scale_group; }

static constexpr int64_t block_weights_row_bytes(BlockFormat format, int64_t num_cols) {
  return num_cols / info(format).block_size * info(format).gguf_block_bytes;
}

static constexpr int64_t packed_code_bytes(BlockFormat f) { return kPanelRows * kGroupSize * stored_bits(f) / 8; }
static constexpr int64_t packed_group_bytes(BlockFormat f) {
  const int64_t scales = info(f).scales == BlockScales::f16   ? kScaleBytes * (has_min(f) ? 2 : 1)
                         : has_min(f) || scale_groups(f) == 2 ? 2 * kPanelRows
                                                              : kPanelRows;
  return packed_code_bytes(f) + scales;
}
static constexpr int64_t super_scale_bytes(BlockFormat f) {
  return info(f).scales == BlockScales::f16 ? 0 : kScaleBytes * (has_min(f) ? 2 : 1);
}
static constexpr int64_t packed_block_bytes(BlockFormat f) {
  return super_scale_bytes(f) + info(f).block_size / kGroupSize * packed_group_bytes(f);
}
// From the first byte of a panel to the block of group g, where its super scales lie, and to the group.
static constexpr int64_t block_offset(BlockFormat f, int64_t g) {
  return g / (info(f).block_size / kGroupSize) * packed_block_bytes(f);
}
static constexpr int64_t group_offset(BlockFormat f, int64_t g) {
  return block_offset(f, g) + super_scale_bytes(f) + g % (info(f).block_size / kGroupSize) * packed_group_bytes(f);
}

static constexpr int64_t num_panels(int64_t num_rows) { return (num_rows + kPanelRows - 1) / kPanelRows; }
static constexpr int64_t panel_bytes(BlockFormat format, int64_t num_cols) {
  return num_cols / info(format).block_size * packed_block_bytes(format);
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
