// The arithmetic of attention, shared by all ops that compute it, so that their rows have equal bits.
//
// One row walks the keys that it sees in blocks of 64 by absolute index. Within a block:
//   scores   one fma chain over 64 d ascending per key, lanes = keys; the chains of a longer head added in order
//   softmax  block maximum, rescaling factor of what is summed so far, exp, lane sums in a fixed tree
//   values   one fma chain over j ascending per d, from zero; then acc[d] = fma(acc[d], factor, chain[d])
// A part of 256 keys by absolute index begins anew, and the states of the parts are added in ascending order: several
// threads may share the keys of one row.
// Rows are taken up to six at a time so that loads of K and V are shared; each keeps its own chain, so the tile it
// falls into cannot change its bits. The same two products serve the backward with the roles of keys and queries
// exchanged.
#pragma once
#include <math.h>
#include <stdint.h>

#include "pe/attention.h"
#include "simd/int8.h"
#include "simd/unroll.h"

// Loops over the rows and vectors of a tile must vanish for the tile to live in registers.
#define PE_UNROLL _Pragma("GCC unroll 8")

namespace pe::PE_ISA {

constexpr int kTileRows = 6;
constexpr int kBlockKeys = kAttentionBlockKeys;
constexpr int kLaneKeys = kAttentionLaneKeys;
constexpr int kDotChain = 64;
constexpr int kLaneBlocks = kBlockKeys / kLaneKeys;
constexpr int kVecsPerLaneBlock = kLaneKeys / VecF::size;
// 6 rows x 4 vectors of 32 registers, or 6 x 2 of 16.
constexpr int kTileVecs = VecF::size == 16 ? 4 : 2;

static constexpr int64_t padded(int64_t head_dim) { return (head_dim + kLaneKeys - 1) / kLaneKeys * kLaneKeys; }
static inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

static inline VecF load(const int8_t* p) { return load_int8(p); }
static inline VecF load(const int8_t* p, int64_t n) { return load_int8(p, n); }

static inline void fill_zero(float* p, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = 0.0f;
}

// Rows of one walk: row r sees keys [begin[r], end[r]). The union of the ranges has no gap.
struct RowRanges {
  int64_t num_rows;
  int64_t* begin;
  int64_t* end;
};

// Some of those rows, in one block: row[i] sees keys [lo[i], hi[i]) of the block, at least one.
struct RowTile {
  int count = 0;
  int64_t row[kTileRows];
  int lo[kTileRows], hi[kTileRows];

  int lane_block_begin() const {
    int first = lo[0];
    for (int i = 1; i < count; ++i) first = lo[i] < first ? lo[i] : first;
    return first / kLaneKeys;
  }
  int lane_block_end() const {
    int last = hi[0];
    for (int i = 1; i < count; ++i) last = hi[i] > last ? hi[i] : last;
    return (last + kLaneKeys - 1) / kLaneKeys;
  }
};

struct KeyRange {
  int64_t begin, end;
};

// What some row sees.
static inline KeyRange all_keys(const RowRanges& rows) {
  KeyRange keys = {rows.begin[0], rows.end[0]};
  for (int64_t r = 1; r < rows.num_rows; ++r) keys = {min_of(keys.begin, rows.begin[r]), max_of(keys.end, rows.end[r])};
  return keys;
}

// Calls body(base, key_begin, key_end, visit) for each block of `keys`, which are all_keys() cut at whole blocks: it begins
// at key `base`, and keys [key_begin, key_end) of it are seen; visit(tile_body) calls tile_body(tile) for its rows.
template <class Body>
static inline void for_each_block(const RowRanges& rows, const KeyRange& keys, const Body& body) {
  const auto [first, last] = keys;
  for (int64_t base = first / kBlockKeys * kBlockKeys; base < last; base += kBlockKeys) {
    body(base, max_of(first, base), min_of(last, base + kBlockKeys), [&rows, base](const auto& tile_body) {
      RowTile tile;
      for (int64_t r = 0; r < rows.num_rows; ++r) {
        const int64_t lo = max_of(rows.begin[r] - base, 0), hi = min_of(rows.end[r] - base, kBlockKeys);
        if (lo < hi) {
          tile.row[tile.count] = r;
          tile.lo[tile.count] = static_cast<int>(lo);
          tile.hi[tile.count++] = static_cast<int>(hi);
        }
        if (tile.count == kTileRows || (r + 1 == rows.num_rows && tile.count > 0)) {
          tile_body(tile);
          tile.count = 0;
        }
      }
    });
  }
}

// Calls body(Index<count>) with 1 <= count <= kTileRows.
template <class Body>
static inline void with_count(int count, const Body& body) {
  static_assert(kTileRows == 6);
  switch (count) {
    case 1:
      return body(Index<1>{});
    case 2:
      return body(Index<2>{});
    case 3:
      return body(Index<3>{});
    case 4:
      return body(Index<4>{});
    case 5:
      return body(Index<5>{});
    default:
      return body(Index<6>{});
  }
}

// --- products --------------------------------------------------------------------------------------------------------

// scores[r][n * size + lane] = sum_d(rows[r][d] * lanes[n][d * 16 + lane]) over d in [begin, end), added to what is
// there unless begin is 0. Fetches the same elements of `next`.
template <int R, int N, class T>
static inline void dot_vecs(const float* const* rows, const T* const* lanes, const T* const* next, int64_t begin,
                            int64_t end, float* const* scores) {
  VecF acc[R][N];
  PE_UNROLL for (int r = 0; r < R; ++r) { PE_UNROLL for (int n = 0; n < N; ++n) acc[r][n] = set1(0.0f); }
  for (int64_t d = begin; d < end; ++d) {
    VecF key[N];
    PE_UNROLL for (int n = 0; n < N; ++n) {
      key[n] = load(lanes[n] + d * kLaneKeys);
      __builtin_prefetch(next[n] + d * kLaneKeys, 0, 2);
    }
    PE_UNROLL for (int r = 0; r < R; ++r) {
      const VecF query = set1(rows[r][d]);
      PE_UNROLL for (int n = 0; n < N; ++n) acc[r][n] = fma(query, key[n], acc[r][n]);
    }
  }
  PE_UNROLL for (int r = 0; r < R; ++r) {
    PE_UNROLL for (int n = 0; n < N; ++n) {
      float* score = scores[r] + n * VecF::size;
      store(score, begin == 0 ? acc[r][n] : add(load(score), acc[r][n]));
    }
  }
}

}  // namespace pe::PE_ISA

#include "simd/attention_pairs.h"

namespace pe::PE_ISA {

// scores[i][j] for the keys of lane blocks [begin, end) of one 64-key block; lane_blocks[b] is [D][16]. Meanwhile those
// of next_blocks come into the cache.
template <int R, class Q, class T>
static void dot_tile(const Q* const* rows, const T* const* lane_blocks, const T* const* next_blocks, int begin, int end,
                     int64_t head_dim, float (*scores)[kBlockKeys]) {
  const auto step = [&]<int N>(int n, Index<N>) {
    const T *lanes[N], *next[N];
    float* out[R];
    for (int i = 0; i < N; ++i) {
      const int block = (n + i) / kVecsPerLaneBlock, offset = (n + i) % kVecsPerLaneBlock * VecF::size;
      lanes[i] = lane_blocks[block] + offset;
      next[i] = next_blocks[block] + offset;
    }
    for (int r = 0; r < R; ++r) out[r] = scores[r] + n * VecF::size;
    for (int64_t d = 0; d < head_dim; d += kDotChain)
      dot_vecs<R, N>(rows, lanes, next, d, min_of(d + kDotChain, head_dim), out);
  };
  int n = begin * kVecsPerLaneBlock;
  const int last = end * kVecsPerLaneBlock;
  for (; last - n >= kTileVecs; n += kTileVecs) step(n, Index<kTileVecs>{});
  if constexpr (kTileVecs > 2) {
    if (last - n >= 2) {
      step(n, Index<2>{});
      n += 2;
    }
    if (last - n >= 1) step(n, Index<1>{});
  }
}

// sums[r][d0 ...] += sum_j(weights[r][j] * values[j][d0 ...]) over j in [lo, hi), N vectors; with kPartial the one
// vector has `tail` elements. Fetches the same elements of next_values.
template <int R, int N, bool kPartial, class T>
static inline void accumulate_vecs(const float* const* weights, int lo, int hi, const T* const* values,
                                   const T* const* next_values, int64_t row_stride, int64_t d0, int64_t tail,
                                   float* const* sums) {
  VecF sum[R][N];
  PE_UNROLL for (int r = 0; r < R; ++r) {
    PE_UNROLL for (int n = 0; n < N; ++n) sum[r][n] = load(sums[r] + d0 + n * VecF::size);
  }
  for (int begin = lo; begin < hi;) {
    const int lane_block = begin / kLaneKeys;
    const int end = hi < (lane_block + 1) * kLaneKeys ? hi : (lane_block + 1) * kLaneKeys;
    const int64_t first = (begin - lane_block * kLaneKeys) * row_stride + d0;
    const T *row = values[lane_block] + first, *next = next_values[lane_block] + first;
    for (int j = begin; j < end; ++j, row += row_stride, next += row_stride) {
      VecF value[N];
      PE_UNROLL for (int n = 0; n < N; ++n) {
        value[n] = kPartial ? load(row, tail) : load(row + n * VecF::size);
        __builtin_prefetch(next + n * VecF::size, 0, 2);
      }
      PE_UNROLL for (int r = 0; r < R; ++r) {
        const VecF weight = set1(weights[r][j]);
        PE_UNROLL for (int n = 0; n < N; ++n) sum[r][n] = fma(weight, value[n], sum[r][n]);
      }
    }
    begin = end;
  }
  PE_UNROLL for (int r = 0; r < R; ++r) {
    PE_UNROLL for (int n = 0; n < N; ++n) store(sums[r] + d0 + n * VecF::size, sum[r][n]);
  }
}

// The same over the whole head.
template <int R, class T>
static void accumulate_range(const float* const* weights, int lo, int hi, const T* const* values, const T* const* next,
                             int64_t row_stride, int64_t head_dim, float* const* sums) {
  int64_t d = 0;
  for (; head_dim - d >= kTileVecs * VecF::size; d += kTileVecs * VecF::size)
    accumulate_vecs<R, kTileVecs, false>(weights, lo, hi, values, next, row_stride, d, 0, sums);
  if constexpr (kTileVecs > 2) {
    if (head_dim - d >= 2 * VecF::size) {
      accumulate_vecs<R, 2, false>(weights, lo, hi, values, next, row_stride, d, 0, sums);
      d += 2 * VecF::size;
    }
  }
  if (head_dim - d >= VecF::size) {
    accumulate_vecs<R, 1, false>(weights, lo, hi, values, next, row_stride, d, 0, sums);
    d += VecF::size;
  }
  if (head_dim > d) accumulate_vecs<R, 1, true>(weights, lo, hi, values, next, row_stride, d, head_dim - d, sums);
}

// acc[r] = acc[r] * factor[r] + sum_j(weights[r][j] * values[j]) over the range of each row: what all rows see in one
// tile, the rest row by row, so that j ascends in each.
template <int R, class T>
static inline void accumulate_tile(const RowTile& tile, const float (*weights)[kBlockKeys], const T* const* values,
                                   const T* const* next, int64_t row_stride, int64_t head_dim, const float* factor,
                                   float* const* acc) {
  alignas(64) float block_sums[R][kAttentionMaxHeadDim];
  const float* w[R];
  float* sums[R];
  int lo = tile.lo[0], hi = tile.hi[0];
  for (int r = 0; r < R; ++r) {
    w[r] = weights[r];
    sums[r] = block_sums[r];
    fill_zero(sums[r], padded(head_dim));
    lo = tile.lo[r] > lo ? tile.lo[r] : lo;
    hi = tile.hi[r] < hi ? tile.hi[r] : hi;
  }
  if (lo >= hi) lo = hi = kBlockKeys;  // nothing in common: each row is its own first part
  for (int r = 0; r < R; ++r) {
    const int end = tile.hi[r] < lo ? tile.hi[r] : lo;
    if (tile.lo[r] < end) accumulate_range<1>(w + r, tile.lo[r], end, values, next, row_stride, head_dim, sums + r);
  }
  if (lo < hi) accumulate_range<R>(w, lo, hi, values, next, row_stride, head_dim, sums);
  for (int r = 0; r < R; ++r) {
    if (hi < tile.hi[r]) accumulate_range<1>(w + r, hi, tile.hi[r], values, next, row_stride, head_dim, sums + r);
    const VecF scale = set1(factor[r]);
    for (int64_t d = 0; d < padded(head_dim); d += VecF::size)
      store(acc[r] + d, fma(load(acc[r] + d), scale, load(sums[r] + d)));
  }
}

// --- rows ------------------------------------------------------------------------------------------------------------

template <class T>
static inline void load_row(const T* row, int64_t head_dim, float* out) {
  int64_t d = 0;
  for (; d + VecF::size <= head_dim; d += VecF::size) store(out + d, load(row + d));
  if (d < head_dim) store(out + d, load(row + d, head_dim - d));
}

// row[d] = op(values[d]).
template <class T, class From, class Op>
static inline void store_row(T* row, int64_t head_dim, const From* values, const Op& op) {
  int64_t d = 0;
  for (; d + VecF::size <= head_dim; d += VecF::size) store(row + d, op(load(values + d)));
  if (d < head_dim) store(row + d, op(load(values + d, head_dim - d)), head_dim - d);
}

// Cuts scratch into pieces of whole cache lines.
struct ScratchCursor {
  char* next;
  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(next);
    next += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return piece;
  }
};

// --- forward ---------------------------------------------------------------------------------------------------------

// Of the keys that a row has met: sum of weight * value, sums of weights, and the largest score, which the weights are
// relative to. attention_state_floats() of them lie side by side.
struct RowState {
  float* acc;
  int64_t padded_dim;
  float* lane_sums() const { return acc + padded_dim; }  // [16], the first VecF::size used
  float& max() const { return acc[padded_dim + kLaneKeys]; }

  void clear() const {
    fill_zero(acc, padded_dim + kLaneKeys);
    max() = -INFINITY;
  }
  // Where every score is -inf, nothing is subtracted from them: the weights are exp(-inf), not NaN.
  static float base_of(float max) { return max == -INFINITY ? 0.0f : max; }

  // The state of these keys and of those of `part`, which come behind them.
  void add(const RowState& part) const {
    const float new_max = part.max() > max() ? part.max() : max();
    const VecF base = set1(base_of(new_max));
    const VecF before = exp(sub(set1(max()), base)), behind = exp(sub(set1(part.max()), base));
    for (int64_t i = 0; i < padded_dim + kLaneKeys; i += VecF::size)
      store(acc + i, fma(load(acc + i), before, mul(load(part.acc + i), behind)));
    max() = new_max;
  }
};

// The state of one forward walk. attention_scratch_bytes(num_rows, head_dim, false) holds it.
struct ForwardRows {
  RowRanges ranges;
  int64_t head_dim;
  float* q;  // [num_rows][padded]
  float* part_states;
  float* states;

  ForwardRows(int64_t num_rows, int64_t head_dim_, void* scratch) : head_dim(head_dim_) {
    ScratchCursor cursor{static_cast<char*>(scratch)};
    q = cursor.take<float>(num_rows * padded(head_dim));
    part_states = cursor.take<float>(num_rows * attention_state_floats(head_dim));
    states = cursor.take<float>(num_rows * attention_state_floats(head_dim));
    ranges = {num_rows, cursor.take<int64_t>(num_rows), cursor.take<int64_t>(num_rows)};
  }
  template <bool kPairs>
  auto q_row(int64_t r) const {
    float* row = q + r * padded(head_dim);
    if constexpr (kPairs)
      return reinterpret_cast<bf16*>(row);
    else
      return row;
  }
  RowState row_state(float* first, int64_t r) const {
    return {first + r * attention_state_floats(head_dim), padded(head_dim)};
  }
  RowState part(int64_t r) const { return row_state(part_states, r); }
  RowState state(int64_t r) const { return row_state(states, r); }

  // For attend<..., kPairs>: in bf16, or in f32.
  template <bool kPairs, class T>
  void set_q(int64_t r, const T* row) const {
    if constexpr (kPairs) {
      fill_zero(q_row<false>(r), padded(head_dim) / 2);
      store_row(q_row<true>(r), head_dim, row, [](VecF v) { return v; });
    } else {
      load_row(row, head_dim, q_row<false>(r));
    }
  }

  // Adds the states `parts` of the rows that see a key of the part at `part_begin`.
  void add_part(float* parts, int64_t part_begin) const {
    for (int64_t r = 0; r < ranges.num_rows; ++r) {
      if (ranges.end[r] <= part_begin || ranges.begin[r] >= part_begin + kAttentionPartKeys) continue;
      if (ranges.begin[r] >= part_begin)
        for (int64_t i = 0; i < attention_state_floats(head_dim); ++i) state(r).acc[i] = row_state(parts, r).acc[i];
      else
        state(r).add(row_state(parts, r));
    }
  }

  // lse is nullptr or the place of the row's log-sum-exp.
  template <class T>
  void finish_row(int64_t r, T* y, float* lse) const {
    const float total = sum(load(state(r).lane_sums()));
    const VecF divisor = set1(total);
    store_row(y, head_dim, state(r).acc, [divisor](VecF v) { return div(v, divisor); });
    if (lse) *lse = state(r).max() + logf(total);
  }
};

// Where a 64-key block lies, lane block by lane block; only those that some row sees are set. The next ones lie anywhere
// too: no hardware foresees them.
template <class T>
struct KvBlock {
  const T *k[kLaneBlocks], *next_k[kLaneBlocks];  // [D][16]
  const T *v[kLaneBlocks], *next_v[kLaneBlocks];  // 16 rows
  int64_t v_row_stride;
};
template <>
struct KvBlock<int8_t> {
  const int8_t *k[kLaneBlocks], *next_k[kLaneBlocks];
  const int8_t *v[kLaneBlocks], *next_v[kLaneBlocks];
  int64_t v_row_stride;
  const float* k_scales[kLaneBlocks];  // 16 of the lane block's keys
  const float* v_scales[kLaneBlocks];
};

// rows[r][j] *= scales[j] for the keys of lane blocks [begin, end).
template <int R>
static inline void scale_keys(const float* const* scales, int begin, int end, float (*rows)[kBlockKeys]) {
  for (int b = begin; b < end; ++b) PE_UNROLL for (int i = 0; i < kLaneKeys; i += VecF::size) {
      const VecF scale = load(scales[b] + i);
      PE_UNROLL for (int r = 0; r < R; ++r) {
        float* p = rows[r] + b * kLaneKeys + i;
        store(p, mul(load(p), scale));
      }
    }
}

// v[0] op v[1] op ... op v[N - 1], lane by lane, in halves.
template <int N, class Op>
static inline VecF tree(const VecF* v, const Op& op) {
  if constexpr (N == 1)
    return v[0];
  else
    return op(tree<N / 2>(v, op), tree<N / 2>(v + N / 2, op));
}

// One block of one row: turns scores into weights in place and brings maximum and lane sums up to date. Returns the
// factor for what acc holds.
static inline float softmax_row(const RowState& state, int lo, int hi, VecF scale, float* scores) {
  constexpr int kVecs = kBlockKeys / VecF::size;
  const VecF lowest = set1(-INFINITY);
  VecF s[kVecs];
  if (lo == 0 && hi == kBlockKeys) {
    PE_UNROLL for (int i = 0; i < kVecs; ++i) s[i] = mul(load(scores + i * VecF::size), scale);
  } else {
    alignas(64) float lane_index[VecF::size];
    for (int i = 0; i < VecF::size; ++i) lane_index[i] = static_cast<float>(i);
    const VecF before = set1(static_cast<float>(lo) - 1.0f), after = set1(static_cast<float>(hi));
    VecF index = load(lane_index);
    for (int i = 0; i < kVecs; ++i, index = add(index, set1(static_cast<float>(VecF::size)))) {
      const VecF score = mul(load(scores + i * VecF::size), scale);
      s[i] = select_gt(index, before, select_gt(after, index, score, lowest), lowest);
    }
  }
  const float block_max = max_lane(tree<kVecs>(s, [](VecF a, VecF b) { return max(a, b); })), old_max = state.max();
  const float new_max = block_max > old_max ? block_max : old_max;
  const float base = RowState::base_of(new_max);

  PE_UNROLL for (int i = 0; i < kVecs; ++i) {
    s[i] = exp(sub(s[i], set1(base)));
    store(scores + i * VecF::size, s[i]);
  }

  const VecF total = tree<kVecs>(s, [](VecF a, VecF b) { return add(a, b); });
  alignas(64) float factor[VecF::size];
  store(factor, exp(set1(old_max - base)));
  store(state.lane_sums(), fma(load(state.lane_sums()), load(factor), total));
  state.max() = new_max;
  return factor[0];
}

// Walks the keys of all rows that lie in the part at `part_begin`, into their part states: kv_block(base, key_begin,
// key_end) is the KvBlock<T> at key `base` (a multiple of 64), of which keys [key_begin, key_end) are seen. q and ranges are
// filled in. kPairs: q is bf16, as K and V are, and the products are those of simd/attention_pairs.h.
template <class T, bool kPairs, class KvBlockFn>
static inline void attend_part(const ForwardRows& rows, int64_t part_begin, float scale, const KvBlockFn& kv_block) {
  for (int64_t r = 0; r < rows.ranges.num_rows; ++r) rows.part(r).clear();
  alignas(64) float scores[kTileRows][kBlockKeys];
  fill_zero(scores[0], kTileRows * kBlockKeys);
  const KeyRange all = all_keys(rows.ranges);
  const KeyRange keys = {max_of(all.begin, part_begin), min_of(all.end, part_begin + kAttentionPartKeys)};

  for_each_block(rows.ranges, keys, [&](int64_t base, int64_t key_begin, int64_t key_end, const auto& visit) {
    const KvBlock<T> kv = kv_block(base, key_begin, key_end);
    visit([&](const RowTile& tile) {
      with_count(tile.count, [&]<int R>(Index<R>) {
        decltype(rows.template q_row<kPairs>(0)) q[R];
        float* acc[R];
        float factor[R];
        for (int i = 0; i < R; ++i) {
          q[i] = rows.template q_row<kPairs>(tile.row[i]);
          acc[i] = rows.part(tile.row[i]).acc;
        }
        const int begin = tile.lane_block_begin(), end = tile.lane_block_end();
        dot_tile<R>(q, kv.k, kv.next_k, begin, end, rows.head_dim, scores);
        if constexpr (sizeof(T) == 1) scale_keys<R>(kv.k_scales, begin, end, scores);
        for (int i = 0; i < R; ++i)
          factor[i] = softmax_row(rows.part(tile.row[i]), tile.lo[i], tile.hi[i], set1(scale), scores[i]);
        if constexpr (sizeof(T) == 1) scale_keys<R>(kv.v_scales, begin, end, scores);
        if constexpr (kPairs) {
          alignas(64) bf16 weights[R][kBlockKeys];
          for (int i = 0; i < R; ++i) store_row(weights[i], kBlockKeys, scores[i], [](VecF v) { return v; });
          accumulate_tile<R>(tile, weights, kv.v, kv.next_v, kv.v_row_stride, rows.head_dim, factor, acc);
        } else {
          accumulate_tile<R>(tile, scores, kv.v, kv.next_v, kv.v_row_stride, rows.head_dim, factor, acc);
        }
      });
    });
  });
}

// All parts, one after another; finish_row follows.
template <class T, bool kPairs, class KvBlockFn>
static inline void attend(const ForwardRows& rows, float scale, const KvBlockFn& kv_block) {
  const KeyRange keys = all_keys(rows.ranges);
  for (int64_t part = keys.begin / kAttentionPartKeys * kAttentionPartKeys; part < keys.end;
       part += kAttentionPartKeys) {
    attend_part<T, kPairs>(rows, part, scale, kv_block);
    rows.add_part(rows.part_states, part);
  }
}

}  // namespace pe::PE_ISA
