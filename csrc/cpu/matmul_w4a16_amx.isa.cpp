// ISA: amx
#include "pe/matmul_w4a16.h"
#include "simd/group_tiles.h"
#include "simd/panel_store.h"
#include "simd/w4a16_group.h"

namespace pe::PE_ISA {
namespace {

// The bytes 2i and 2i + 1 of every four, as words.
template <int i>
__m512i byte_pair(const Codes& codes) {
  constexpr int kZero = 0x80 << 24 | 0x80 << 8, kFirst = kZero | (2 * i + 1) << 16 | 2 * i, kStep = 4 << 16 | 4;
  const __m128i order = _mm_setr_epi32(kFirst, kFirst + kStep, kFirst + 2 * kStep, kFirst + 3 * kStep);
  return _mm512_shuffle_epi8(codes, _mm512_broadcast_i32x4(order));
}

// q - 8 in bf16 for every q; a second time, so that an index of five bits may hold one bit more than q.
__m512i bf16_of_nibbles() {
  alignas(64) static constexpr uint16_t kTable[32] = {0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80,
                                                      0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
                                                      0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80,
                                                      0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};
  return _mm512_load_si512(kTable);
}

// Small integers have nothing in the lower half of their f32.
__m512i bf16_pair(const PanelF& even, const PanelF& odd) {
  return _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(even.part[0].v), 16),
                         _mm512_castps_si512(odd.part[0].v));
}

// Row i of the tile holds, for each of the 16 rows of the panel, the codes 2i and 2i + 1 as bf16.
template <BlockFormat format>
void unpack(const uint8_t* group, uint8_t* tile) {
  const auto row = [tile](int i) { return tile + i * kTileRowBytes; };
  if constexpr (format == BlockFormat::q8_0) {
    PE_UNROLL for (int j = 0; j < 8; ++j) {
      const Codes codes = load_codes(group + j * 64);
      _mm512_storeu_si512(row(2 * j), bf16_pair(byte<0>(codes), byte<1>(codes)));
      _mm512_storeu_si512(row(2 * j + 1), bf16_pair(byte<2>(codes), byte<3>(codes)));
    }
  } else {
    const __m512i table = bf16_of_nibbles();
    PE_UNROLL for (int j = 0; j < 4; ++j) {
      const Codes codes = load_codes(group + j * 64);
      const __m512i first = byte_pair<0>(codes), second = byte_pair<1>(codes);
      _mm512_storeu_si512(row(2 * j), _mm512_permutexvar_epi16(first, table));
      _mm512_storeu_si512(row(2 * j + 1), _mm512_permutexvar_epi16(second, table));
      _mm512_storeu_si512(row(8 + 2 * j), _mm512_permutexvar_epi16(_mm512_srli_epi16(first, 4), table));
      _mm512_storeu_si512(row(9 + 2 * j), _mm512_permutexvar_epi16(_mm512_srli_epi16(second, 4), table));
    }
  }
}

struct BF16Rows {
  const bf16* first;
  int64_t stride;
};

// Tiles read x as it is, or what `prepare` has rounded.
BF16Rows bf16_rows(const MatmulW4A16& a) {
  if (a.x_dtype == DType::bf16) return {static_cast<const bf16*>(a.x), a.x_row_stride};
  return {reinterpret_cast<const bf16*>(a.workspace), a.weight.num_cols};
}

template <BlockFormat format>
struct Product {
  static constexpr TileDot kDot = TileDot::bf16;
  static constexpr int64_t kDepthBytes = kBlockSize * 2;
  static constexpr int64_t kGroupBytes = packed_group_bytes(format);
  using Raw = float;
  using Scales = W4A16Scales;

  const MatmulW4A16& a;
  const BlockWeights& weights = a.weight;
  const GroupSums sum_x = group_sums(a);

  const BF16Rows rows = bf16_rows(a);
  const void* x(int64_t row, int64_t g) const { return rows.first + row * rows.stride + g * kBlockSize; }
  int64_t x_row_bytes() const { return rows.stride * 2; }

  const uint8_t* codes(const uint8_t* group, uint8_t* tile) const {
    unpack<format>(group, tile);
    return tile;
  }
  Scales scales(const uint8_t* group) const { return load_w4a16_scales<format>(group); }
  PanelF add(const Scales& scales, const float* s, int64_t row, int64_t g, const PanelF& total) const {
    return add_w4a16_group<format>(scales, panel_load(s), sum_x, row, g, total);
  }
  void store(int64_t row, int64_t panel, const PanelF& total) const { store_panel(a, row, panel, total); }
};

// x in bf16 takes the tiles for any number of rows, so that a row has the same bits in every batch.
void tile(const MatmulW4A16& a, int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end) {
  if (!a.x_is_bf16()) return avx512::matmul_w4a16.tile(a, row_begin, row_end, panel_begin, panel_end);
  switch (a.weight.format) {
    case BlockFormat::q4_0:
      return group_tiles(Product<BlockFormat::q4_0>{a}, row_begin, row_end, panel_begin, panel_end);
    case BlockFormat::q4_1:
      return group_tiles(Product<BlockFormat::q4_1>{a}, row_begin, row_end, panel_begin, panel_end);
    case BlockFormat::q8_0:
      return group_tiles(Product<BlockFormat::q8_0>{a}, row_begin, row_end, panel_begin, panel_end);
  }
}

void prepare(const MatmulW4A16& a, int64_t row_begin, int64_t row_end) {
  if (!a.x_is_bf16()) return avx512::matmul_w4a16.prepare(a, row_begin, row_end);
  const BF16Rows rows = bf16_rows(a);
  for (int64_t row = row_begin; row < row_end; ++row) {
    if (a.round_x) {
      const float* x = static_cast<const float*>(a.x) + row * a.x_row_stride;
      bf16* rounded = reinterpret_cast<bf16*>(a.workspace) + row * rows.stride;
      for (int64_t k = 0; k < a.weight.num_cols; k += VecF::size) store(rounded + k, load(x + k));
    }
    if (a.weight.format == BlockFormat::q4_1) store_group_sums(group_sums(a), row, rows.first + row * rows.stride);
  }
}

}  // namespace

constinit const MatmulW4A16Isa matmul_w4a16 = {prepare, tile};

}  // namespace pe::PE_ISA
