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
// Row i of the tile holds, for each of the 16 rows of the panel, the codes 2i and 2i + 1 as bf16.
template <BlockFormat format>
void unpack(const uint8_t* group, uint8_t* tile) {
  const auto row = [tile](int i) { return tile + i * kTileRowBytes; };
  if constexpr (info(format).low_bits == 4 && info(format).high_bits == 0 && !info(format).has_book) {
    const __m512i table = bf16_of_nibbles();
    PE_UNROLL for (int j = 0; j < 4; ++j) {
      const Codes codes = load_codes(group + j * 64);
      const __m512i first = byte_pair<0>(codes), second = byte_pair<1>(codes);
      _mm512_storeu_si512(row(2 * j), _mm512_permutexvar_epi16(first, table));
      _mm512_storeu_si512(row(2 * j + 1), _mm512_permutexvar_epi16(second, table));
      _mm512_storeu_si512(row(8 + 2 * j), _mm512_permutexvar_epi16(_mm512_srli_epi16(first, 4), table));
      _mm512_storeu_si512(row(9 + 2 * j), _mm512_permutexvar_epi16(_mm512_srli_epi16(second, 4), table));
    }
  } else {
    unroll<kGroupQuads>([&](auto j) PE_INLINE {
      const CodeRun<4> run = code_run<format, j>(group);
      _mm512_storeu_si512(row(2 * j), bf16_pair(run.code[0], run.code[1]));
      _mm512_storeu_si512(row(2 * j + 1), bf16_pair(run.code[2], run.code[3]));
    });
  }
}

template <BlockFormat format>
struct Product {
  static constexpr BlockFormat kFormat = format;
  static constexpr TileDot kDot = TileDot::bf16;
  static constexpr int64_t kElementBytes = 2;
  static constexpr int kParts = scale_groups(format);
  using Raw = float;
  using Scales = W4A16Scales;

  const MatmulW4A16& a;
  const BlockWeights& weights = a.weight;
  const GroupSums sum_x = group_sums(a);

  const bf16* x(int64_t row) const { return static_cast<const bf16*>(a.x) + row * a.x_row_stride; }
  int64_t x_row_bytes() const { return a.x_row_stride * 2; }

  const uint8_t* codes(const uint8_t* group, uint8_t* tile) const {
    unpack<format>(group, tile);
    return tile;
  }
  Scales scales(const uint8_t* panel, int64_t g, int part) const { return load_w4a16_scales<format>(panel, g, part); }
  PanelF add(const Scales& scales, const float* s, int64_t row, int64_t g, int part, const PanelF& total) const {
    return add_w4a16_group<has_min(format)>(scales, panel_load(s), sum_x, row, g * kParts + part, total);
  }
  void store(int64_t row, int64_t panel, const PanelF& total) const { store_panel(a, row, panel, total); }
};

// x in bf16 takes the tiles for any number of rows, so that a row has the same bits in every batch.
void tile(const MatmulW4A16& a, int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end) {
  if (a.x_dtype == DType::f32) return avx512::matmul_w4a16.tile(a, row_begin, row_end, panel_begin, panel_end);
  with_format(a.weight.format,
              [&](auto format) { group_tiles(Product<format.value>{a}, row_begin, row_end, panel_begin, panel_end); });
}

// Tiles read x as it is; the f32 copy in the workspace stays unused.
void prepare(const MatmulW4A16& a, int64_t row_begin, int64_t row_end) {
  if (a.x_dtype == DType::f32) return avx512::matmul_w4a16.prepare(a, row_begin, row_end);
  if (!has_min(a.weight.format)) return;
  for (int64_t row = row_begin; row < row_end; ++row)
    store_group_sums(a, row, static_cast<const bf16*>(a.x) + row * a.x_row_stride);
}

}  // namespace

constinit const MatmulW4A16Isa matmul_w4a16 = {prepare, tile};

}  // namespace pe::PE_ISA
