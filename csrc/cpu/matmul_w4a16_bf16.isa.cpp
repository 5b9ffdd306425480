// ISA: avx512_bf16
#include "pe/matmul_w4a16.h"
#include "simd/panel_store.h"
#include "simd/unroll.h"
#include "simd/w4a16_group.h"

namespace pe::PE_ISA {
namespace {

// Bytes between the group in work and the one being fetched.
constexpr int64_t kPrefetchBytes = 6 * 1024;
// Running totals of a row block take 6 KB of L1.
constexpr int64_t kRowBlock = 96;
// Rows whose chains run side by side: two for each.
constexpr int kTileRows = 4;
constexpr int kHalf = kBlockSize / 2, kPairs = kHalf / 2;  // of one half of a group

// --- activations ----------------------------------------------------------------------------------------------------

// x of a group: its pairs in the order in which they are added.
__m512i pair_up(__m512i x) {
  const __m256i order = _mm256_setr_epi16(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
  return _mm512_permutexvar_epi16(
      _mm512_inserti64x4(_mm512_castsi256_si512(order), _mm256_add_epi16(order, _mm256_set1_epi16(16)), 1), x);
}

bf16* paired_row(const MatmulW4A16& a, int64_t row) {
  return reinterpret_cast<bf16*>(a.workspace) + row * a.weight.num_cols;
}

// --- codes ----------------------------------------------------------------------------------------------------------

// q - 8 in bf16 for every q; a second time, so that an index of five bits may hold one bit more than q.
__m512i bf16_of_nibbles() {
  alignas(64) static constexpr uint16_t kTable[32] = {0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80,
                                                      0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
                                                      0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80,
                                                      0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};
  return _mm512_load_si512(kTable);
}

// Byte i (0 or 1) of each lane, less 128, in f32: in the fraction of 2^(23 - 8 i) its bits weigh 1, 2, ... 128.
template <int i>
__m512i low_byte(__m512i codes) {
  constexpr float kBase = 1 << (23 - 8 * i);
  const __m512i fraction = _mm512_ternarylogic_epi32(codes, _mm512_set1_epi32(255 << (8 * i)),
                                                     _mm512_castps_si512(_mm512_set1_ps(kBase)), 0xea);
  return _mm512_castps_si512(_mm512_sub_ps(_mm512_castsi512_ps(fraction), _mm512_set1_ps(kBase + 128.0f)));
}

// Small integers have nothing in the lower half of their f32.
__m512i pair(__m512i first, __m512i second) { return _mm512_or_si512(_mm512_srli_epi32(first, 16), second); }

// The pairs of one half of a group, for the 16 rows of the panel: bf16 codes k and k + 2 in a lane.
template <BlockFormat format, int half>
[[gnu::always_inline]] inline void decode_half(const uint8_t* group, __m512i (&pairs)[kPairs]) {
  PE_UNROLL for (int j = 0; j < kPairs / 2; ++j) {
    if constexpr (format == BlockFormat::q8_0) {
      const __m512i codes = load_codes(group + (half * 4 + j) * 64), high = _mm512_srli_epi32(codes, 16);
      pairs[2 * j] = pair(low_byte<0>(codes), low_byte<0>(high));
      pairs[2 * j + 1] = pair(low_byte<1>(codes), low_byte<1>(high));
    } else {
      const __m512i codes = load_codes(group + j * 64), table = bf16_of_nibbles();
      const __m512i even = half ? _mm512_srli_epi16(codes, 4) : codes;
      pairs[2 * j] = _mm512_permutexvar_epi16(even, table);
      pairs[2 * j + 1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 8 + 4 * half), table);
    }
  }
}

struct GroupCodes {
  __m512i half[2][kPairs];
};

template <BlockFormat format>
[[gnu::always_inline]] inline GroupCodes decode(const uint8_t* group) {
  GroupCodes codes;
  decode_half<format, 0>(group, codes.half[0]);
  decode_half<format, 1>(group, codes.half[1]);
  return codes;
}

// --- products -------------------------------------------------------------------------------------------------------

[[gnu::always_inline]] inline __m512 add_pair(__m512 sum, __m512i codes, const bf16* x) {
  int32_t both;
  memcpy(&both, x, sizeof both);
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(codes), reinterpret_cast<__m512bh>(_mm512_set1_epi32(both)));
}

// s[r]: the group in work of rows x, x + x_row_stride, ...: the only place where codes meet activations.
template <int num_rows>
[[gnu::always_inline]] inline void dot_group(const GroupCodes& codes, const bf16* x, int64_t x_row_stride,
                                             PanelF (&s)[num_rows]) {
  __m512 sum[num_rows][2];
  PE_UNROLL for (int r = 0; r < num_rows; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
  PE_UNROLL for (int i = 0; i < kPairs; ++i) {
    PE_UNROLL for (int r = 0; r < num_rows; ++r) {
      PE_UNROLL for (int half = 0; half < 2; ++half) {
        sum[r][half] = add_pair(sum[r][half], codes.half[half][i], x + r * x_row_stride + half * kHalf + i * 2);
      }
    }
  }
  PE_UNROLL for (int r = 0; r < num_rows; ++r) s[r].part[0].v = _mm512_add_ps(sum[r][0], sum[r][1]);
}

// --- one row: weights go from the stream to the sums, one panel at a time -------------------------------------------

template <BlockFormat format>
void stream_panel(const MatmulW4A16& a, int64_t row, int64_t panel) {
  constexpr int64_t group_bytes = packed_group_bytes(format);
  const int64_t num_groups = a.weight.num_cols / kBlockSize;
  const GroupSums sum_x = group_sums(a);
  const uint8_t* group = a.weight.packed + panel * num_groups * group_bytes;
  const bf16* x = paired_row(a, row);
  PanelF total = panel_set1(0.0f);
  for (int64_t g = 0; g < num_groups; ++g, group += group_bytes, x += kBlockSize) {
    prefetch<group_bytes>(group + kPrefetchBytes);
    PanelF s[1];
    dot_group(decode<format>(group), x, 0, s);
    total = add_w4a16_group<format>(load_w4a16_scales<format>(group), s[0], sum_x, row, g, total);
  }
  store_panel(a, row, panel, total);
}

// --- several rows: the codes of a group stay in registers for all rows of a block -----------------------------------

template <BlockFormat format>
void block_panel(const MatmulW4A16& a, int64_t row_begin, int64_t row_end, int64_t panel) {
  constexpr int64_t group_bytes = packed_group_bytes(format);
  const int64_t num_groups = a.weight.num_cols / kBlockSize, x_row_stride = a.weight.num_cols;
  const GroupSums sum_x = group_sums(a);
  const uint8_t* group = a.weight.packed + panel * num_groups * group_bytes;
  alignas(64) float totals[kRowBlock][kPanelRows];
  for (int64_t r = 0; r < row_end - row_begin; ++r) panel_store(totals[r], panel_set1(0.0f));

  for (int64_t g = 0; g < num_groups; ++g, group += group_bytes) {
    prefetch<group_bytes>(group + kPrefetchBytes);
    const GroupCodes codes = decode<format>(group);
    const W4A16Scales scales = load_w4a16_scales<format>(group);
    const bf16* x = paired_row(a, row_begin) + g * kBlockSize;
    int64_t row = row_begin;
    const auto add_rows = [&]<int num_rows>(Index<num_rows>) PE_INLINE {
      PanelF s[num_rows];
      dot_group(codes, x, x_row_stride, s);
      PE_UNROLL for (int r = 0; r < num_rows; ++r) {
        float* total = totals[row - row_begin + r];
        panel_store(total, add_w4a16_group<format>(scales, s[r], sum_x, row + r, g, panel_load(total)));
      }
      row += num_rows;
      x += num_rows * x_row_stride;
    };
    while (row + kTileRows <= row_end) add_rows(Index<kTileRows>{});
    while (row < row_end) add_rows(Index<1>{});
  }
  for (int64_t row = row_begin; row < row_end; ++row) store_panel(a, row, panel, panel_load(totals[row - row_begin]));
}

template <BlockFormat format>
void tile_format(const MatmulW4A16& a, int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end) {
  for (int64_t row = row_begin; row < row_end; row += kRowBlock) {
    const int64_t end = row + kRowBlock < row_end ? row + kRowBlock : row_end;
    for (int64_t panel = panel_begin; panel < panel_end; ++panel)
      end - row == 1 ? stream_panel<format>(a, row, panel) : block_panel<format>(a, row, end, panel);
  }
}

// x in bf16 takes the pairs for any number of rows, so that a row has the same bits in every batch.
void tile(const MatmulW4A16& a, int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end) {
  if (!a.x_is_bf16()) return avx512::matmul_w4a16.tile(a, row_begin, row_end, panel_begin, panel_end);
  switch (a.weight.format) {
    case BlockFormat::q4_0:
      return tile_format<BlockFormat::q4_0>(a, row_begin, row_end, panel_begin, panel_end);
    case BlockFormat::q4_1:
      return tile_format<BlockFormat::q4_1>(a, row_begin, row_end, panel_begin, panel_end);
    case BlockFormat::q8_0:
      return tile_format<BlockFormat::q8_0>(a, row_begin, row_end, panel_begin, panel_end);
  }
}

// Pairs take half of the workspace that a copy in f32 would.
void prepare(const MatmulW4A16& a, int64_t row_begin, int64_t row_end) {
  if (!a.x_is_bf16()) return avx512::matmul_w4a16.prepare(a, row_begin, row_end);
  const auto prepare_rows = [&](const auto* x) {
    for (int64_t row = row_begin; row < row_end; ++row) {
      bf16* paired = paired_row(a, row);
      for (int64_t k = 0; k < a.weight.num_cols; k += VecF::size) store(paired + k, load(x + row * a.x_row_stride + k));
      if (a.weight.format == BlockFormat::q4_1) store_group_sums(group_sums(a), row, paired);
      for (int64_t k = 0; k < a.weight.num_cols; k += kBlockSize)
        _mm512_storeu_si512(paired + k, pair_up(_mm512_loadu_si512(paired + k)));
    }
  };
  a.x_dtype == DType::f32 ? prepare_rows(static_cast<const float*>(a.x)) : prepare_rows(static_cast<const bf16*>(a.x));
}

}  // namespace

constinit const MatmulW4A16Isa matmul_w4a16 = {prepare, tile};

}  // namespace pe::PE_ISA
