// ISA: amx
#include "pe/matmul_w4a8.h"
#include "simd/group_tiles.h"
#include "simd/panel_store.h"
#include "simd/w4a8_group.h"

namespace pe::PE_ISA {
namespace {

// Fewer rows go through the vector unit, straight from the stream: the sums are integers, so the bits are the same.
constexpr int64_t kMinTileRows = 8;

template <BlockFormat format>
struct Product {
  static constexpr BlockFormat kFormat = format;
  static constexpr TileDot kDot = TileDot::s8u8;
  static constexpr int64_t kElementBytes = 1;
  static constexpr int kParts = scale_groups(format);
  using Raw = int32_t;
  using Scales = W4A8Scales;

  const MatmulW4A8& a;
  const BlockWeights& weights = a.weight;

  const int8_t* x(int64_t row) const { return quantized_row(a, row).values; }
  int64_t x_row_bytes() const { return quantized_row_bytes(weights.num_cols); }

  const uint8_t* codes(const uint8_t* group, uint8_t* tile) const {
    if constexpr (format == BlockFormat::q8_0) return group;
    unroll<kGroupQuads>([&](auto i)
                            PE_INLINE { _mm512_storeu_si512(tile + i * kTileRowBytes, quad<format, i>(group)); });
    return tile;
  }
  Scales scales(const uint8_t* panel, int64_t g, int part) const { return load_group_scales<format>(panel, g, part); }

  PanelF add(const Scales& scales, const int32_t* sums, int64_t row, int64_t g, int part, const PanelF& total) const {
    const QuantizedRow x = quantized_row(a, row);
    const int32_t sum = x.sum<kParts>(g, part);
    const PanelI i = _mm512_add_epi32(_mm512_loadu_si512(sums), panel_int(-zero_code(format) * sum));
    return add_w4a8_group<has_min(format)>(scales, i, x.scales[g], sum, total);
  }
  void store(int64_t row, int64_t panel, const PanelF& total) const { store_panel(a, row, panel, total); }
};

void tile(const MatmulW4A8& a, int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end) {
  if (row_end - row_begin < kMinTileRows)
    return avx512_vnni::matmul_w4a8.tile(a, row_begin, row_end, panel_begin, panel_end);
  with_format(a.weight.format,
              [&](auto format) { group_tiles(Product<format.value>{a}, row_begin, row_end, panel_begin, panel_end); });
}

void quantize_rows(const MatmulW4A8& a, int64_t row_begin, int64_t row_end) {
  avx512_vnni::matmul_w4a8.quantize_rows(a, row_begin, row_end);
}

}  // namespace

constinit const MatmulW4A8Isa matmul_w4a8 = {quantize_rows, tile};

}  // namespace pe::PE_ISA
