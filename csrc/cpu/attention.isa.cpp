// ISA: scalar avx2 avx512 avx512_bf16
#include "pe/attention.h"

#include "simd/attention_rows.h"

namespace pe::PE_ISA {
namespace {

struct Segment {
  int64_t begin, num_tokens, index;

  Segment(const int32_t* offsets, int64_t segment)
      : begin(offsets[segment]), num_tokens(offsets[segment + 1] - begin), index(segment) {}

  // First lane block of the segment. Blocks needed by all segments before it are at most begin / 16 + index.
  int64_t lane_block() const { return begin / kLaneKeys + index; }
};

// Of a [T, heads, D] tensor, the rows of one head from one segment on.
template <class T>
T* rows_of(T* p, int64_t row_stride, int64_t head_stride, const Segment& segment, int64_t head) {
  return p + segment.begin * row_stride + head * head_stride;
}

// Of its lane blocks, those of one head from one segment on.
template <class T>
const T* lanes_of(const void* lanes, const AttentionFwd& a, const AttentionWork& work, const Segment& segment,
                  int64_t head) {
  return static_cast<const T*>(lanes) + (head * work.num_lane_blocks + segment.lane_block()) * kLaneKeys * a.head_dim;
}

template <class T>
void pack_tiles(const AttentionPack& a, int64_t item_begin, int64_t item_end) {
  const T zero{};
  for (int64_t item = item_begin; item < item_end; ++item) {
    const AttentionTile& tile = a.tiles[item];
    const Segment segment(a.segment_offsets, tile.segment);
    for (int64_t head = 0; head < a.num_heads; ++head) {
      const T* rows = rows_of(static_cast<const T*>(a.rows), a.row_stride, a.head_stride, segment, head);
      T* lanes = static_cast<T*>(a.lanes) +
                 (head * a.num_lane_blocks + segment.lane_block() + tile.begin / kLaneKeys) * kLaneKeys * a.head_dim;
      for (int64_t base = tile.begin; base < tile.end; base += kLaneKeys, lanes += kLaneKeys * a.head_dim) {
        const int64_t count = min_of(tile.end - base, kLaneKeys);
        for (int64_t d = 0; d < a.head_dim; ++d)
          for (int64_t lane = 0; lane < kLaneKeys; ++lane)
            lanes[d * kLaneKeys + lane] = lane < count ? rows[(base + lane) * a.row_stride + d] : zero;
      }
    }
  }
}

// The keys that a query at `position` sees.
struct Visible {
  int64_t begin, end;

  static Visible keys_of(const AttentionFwd& a, int64_t num_tokens, int64_t position) {
    if (!a.causal) return {0, num_tokens};
    return {a.sliding_window > 0 ? max_of(position + 1 - a.sliding_window, 0) : 0, position + 1};
  }
  // The queries that see the key at `position`.
  static Visible queries_of(const AttentionFwd& a, int64_t num_tokens, int64_t position) {
    if (!a.causal) return {0, num_tokens};
    const int64_t left = num_tokens - position;
    return {position, position + (a.sliding_window > 0 ? min_of(a.sliding_window, left) : left)};
  }
};

// Calls body(position, head, r) for the rows of a walk: positions of the tile, heads of the group.
template <class Body>
void for_each_row(const AttentionTile& tile, int64_t head_begin, int64_t group_size, const Body& body) {
  for (int64_t position = tile.begin, r = 0; position < tile.end; ++position)
    for (int64_t head = head_begin; head < head_begin + group_size; ++head, ++r) body(position, head, r);
}

template <class T>
void fwd_items(const AttentionFwd& a, const AttentionWork& work, int64_t item_begin, int64_t item_end, void* scratch) {
  constexpr bool kPairs = kBf16Pairs && sizeof(T) == sizeof(bf16);
  const int64_t group_size = a.num_heads / a.num_kv_heads;
  for (int64_t item = item_begin; item < item_end; ++item) {
    const AttentionTile& tile = work.query_tiles[work.num_query_tiles - 1 - item / a.num_kv_heads];
    const Segment segment(a.segment_offsets, tile.segment);
    const int64_t kv_head = item % a.num_kv_heads, head_begin = kv_head * group_size;
    const ForwardRows rows((tile.end - tile.begin) * group_size, a.head_dim, scratch);
    for_each_row(tile, head_begin, group_size, [&](int64_t position, int64_t head, int64_t r) {
      const Visible keys = Visible::keys_of(a, segment.num_tokens, position);
      rows.ranges.begin[r] = keys.begin;
      rows.ranges.end[r] = keys.end;
      const T* q = rows_of(static_cast<const T*>(a.q), a.q_row_stride, a.q_head_stride, segment, head);
      rows.template set_q<kPairs>(r, q + position * a.q_row_stride);
    });

    const T* k = lanes_of<T>(work.k_lanes, a, work, segment, kv_head);
    const T* v = rows_of(static_cast<const T*>(a.v), a.v_row_stride, a.v_head_stride, segment, kv_head);
    attend<T, kPairs>(rows, a.scale, [&](int64_t base, int64_t key_begin, int64_t key_end) {
      KvBlock<T> kv{};
      kv.v_row_stride = a.v_row_stride;
      for (int64_t b = (key_begin - base) / kLaneKeys; base + b * kLaneKeys < key_end; ++b) {
        kv.k[b] = kv.next_k[b] = k + (base + b * kLaneKeys) * a.head_dim;
        kv.v[b] = kv.next_v[b] = v + (base + b * kLaneKeys) * a.v_row_stride;
      }
      return kv;
    });

    for_each_row(tile, head_begin, group_size, [&](int64_t position, int64_t head, int64_t r) {
      T* y = rows_of(static_cast<T*>(a.y), a.y_row_stride, a.y_head_stride, segment, head);
      float* lse = a.lse ? a.lse + (segment.begin + position) * a.num_heads + head : nullptr;
      rows.finish_row(r, y + position * a.y_row_stride, lse);
    });
  }
}

// --- backward --------------------------------------------------------------------------------------------------------

// The state of one backward walk: rows are queries that meet keys, or keys that meet queries.
// attention_scratch_bytes(num_rows, head_dim, true) holds it.
struct BackwardRows {
  RowRanges ranges;
  int64_t stride;
  float* score_rows;   // [num_rows][padded]: q, or k
  float* weight_rows;  // [num_rows][padded]: grad_y, or v
  float* grad_score;   // [num_rows][padded]: sum for grad_q, or grad_k
  float* grad_weight;  // [num_rows][padded]: sum for grad_v

  BackwardRows(int64_t num_rows, int64_t head_dim, void* scratch) : stride(padded(head_dim)) {
    ScratchCursor cursor{static_cast<char*>(scratch)};
    score_rows = cursor.take<float>(num_rows * stride);
    weight_rows = cursor.take<float>(num_rows * stride);
    grad_score = cursor.take<float>(num_rows * stride);
    grad_weight = cursor.take<float>(num_rows * stride);
    fill_zero(grad_score, num_rows * stride);
    fill_zero(grad_weight, num_rows * stride);
    ranges = {num_rows, cursor.take<int64_t>(num_rows), cursor.take<int64_t>(num_rows)};
  }
};

// What the rows meet: one head of one segment, from its first position on.
template <class T>
struct Opposite {
  const T* score_lanes;   // k, or q
  const T* weight_lanes;  // v, or grad_y
  const T* score_rows;
  const T* weight_rows;  // nullptr where grad_weight is not wanted
  int64_t score_row_stride, weight_row_stride;
};

// Adds what `opposite` gives to the sums of all rows. statistics(row, position) are those of the queries in one vector
// of pairs, which begins at that position of the opposite side.
template <class T, class StatisticsFn>
void walk_backward(const BackwardRows& rows, const Opposite<T>& opposite, int64_t head_dim, VecF scale,
                   const StatisticsFn& statistics) {
  alignas(64) float p[kTileRows][kBlockKeys], ds[kTileRows][kBlockKeys];
  const float ones[kTileRows] = {1, 1, 1, 1, 1, 1};
  for_each_block(rows.ranges, all_keys(rows.ranges), [&](int64_t base, int64_t begin, int64_t end, const auto& visit) {
    const T *score_lanes[kLaneBlocks] = {}, *weight_lanes[kLaneBlocks] = {};
    const T *score_rows[kLaneBlocks] = {}, *weight_rows[kLaneBlocks] = {};
    for (int64_t b = (begin - base) / kLaneKeys; base + b * kLaneKeys < end; ++b) {
      const int64_t position = base + b * kLaneKeys;
      score_lanes[b] = opposite.score_lanes + position * head_dim;
      weight_lanes[b] = opposite.weight_lanes + position * head_dim;
      score_rows[b] = opposite.score_rows + position * opposite.score_row_stride;
      if (opposite.weight_rows) weight_rows[b] = opposite.weight_rows + position * opposite.weight_row_stride;
    }
    visit([&](const RowTile& tile) {
      with_count(tile.count, [&]<int R>(Index<R>) {
        const float *left[R], *right[R];
        float *grad_score[R], *grad_weight[R];
        for (int i = 0; i < R; ++i) {
          const int64_t offset = tile.row[i] * rows.stride;
          left[i] = rows.score_rows + offset;
          right[i] = rows.weight_rows + offset;
          grad_score[i] = rows.grad_score + offset;
          grad_weight[i] = rows.grad_weight + offset;
        }
        const int first = tile.lane_block_begin(), last = tile.lane_block_end();
        dot_tile<R>(left, score_lanes, score_lanes, first, last, head_dim, p);
        dot_tile<R>(right, weight_lanes, weight_lanes, first, last, head_dim, ds);
        for (int i = 0; i < R; ++i) {
          for (int j = first * kLaneKeys; j < last * kLaneKeys; j += VecF::size) {
            const auto [lse, delta] = statistics(tile.row[i], base + j);
            const VecF weight = exp(sub(mul(load(p[i] + j), scale), lse));
            store(p[i] + j, weight);
            store(ds[i] + j, mul(weight, sub(load(ds[i] + j), delta)));
          }
        }
        if (opposite.weight_rows)
          accumulate_tile<R>(tile, p, weight_rows, weight_rows, opposite.weight_row_stride, head_dim, ones,
                             grad_weight);
        accumulate_tile<R>(tile, ds, score_rows, score_rows, opposite.score_row_stride, head_dim, ones, grad_score);
      });
    });
  });
}

struct Statistics {
  VecF lse, delta;
};

// Where the statistics of one head begin, from one segment on.
int64_t statistics_offset(const AttentionFwd& a, const Segment& segment, int64_t head) {
  return head * (a.num_tokens + kBlockKeys) + segment.begin;
}

// The chains of dot_tile, so that a row of one key, where grad_y * v and delta cancel, has no gradient of its scores.
template <class T>
void delta_rows(const AttentionBwd& b, const AttentionWork& work, int64_t token_begin, int64_t token_end) {
  const AttentionFwd& a = b.fwd;
  for (int64_t t = token_begin; t < token_end; ++t) {
    for (int64_t head_begin = 0; head_begin < a.num_heads; head_begin += kTileRows) {
      const int count = static_cast<int>(min_of(a.num_heads - head_begin, kTileRows));
      with_count(count, [&]<int R>(Index<R>) {
        float y[R][kAttentionMaxHeadDim], grad_y[R][kAttentionMaxHeadDim];
        VecF total[R];
        for (int r = 0; r < R; ++r) {
          const int64_t head = head_begin + r;
          load_row(static_cast<const T*>(a.y) + t * a.y_row_stride + head * a.y_head_stride, a.head_dim, y[r]);
          load_row(static_cast<const T*>(b.grad_y) + t * b.grad_y_row_stride + head * b.grad_y_head_stride, a.head_dim,
                   grad_y[r]);
        }
        for (int64_t d0 = 0; d0 < a.head_dim; d0 += kDotChain) {
          VecF chain[R];
          for (int r = 0; r < R; ++r) chain[r] = set1(0.0f);
          for (int64_t d = d0; d < min_of(d0 + kDotChain, a.head_dim); ++d)
            PE_UNROLL for (int r = 0; r < R; ++r) chain[r] = fma(set1(grad_y[r][d]), set1(y[r][d]), chain[r]);
          for (int r = 0; r < R; ++r) total[r] = d0 == 0 ? chain[r] : add(total[r], chain[r]);
        }
        for (int r = 0; r < R; ++r) {
          alignas(64) float delta[VecF::size];
          store(delta, total[r]);
          const int64_t i = (head_begin + r) * (a.num_tokens + kBlockKeys) + t;
          work.delta[i] = delta[0];
          work.lse[i] = a.lse[t * a.num_heads + head_begin + r];
        }
      });
    }
  }
}

template <class T>
void query_items(const AttentionBwd& b, const AttentionWork& work, int64_t item_begin, int64_t item_end,
                 void* scratch) {
  const AttentionFwd& a = b.fwd;
  const int64_t group_size = a.num_heads / a.num_kv_heads;
  for (int64_t item = item_begin; item < item_end; ++item) {
    const AttentionTile& tile = work.query_tiles[work.num_query_tiles - 1 - item / a.num_kv_heads];
    const Segment segment(a.segment_offsets, tile.segment);
    const int64_t kv_head = item % a.num_kv_heads, head_begin = kv_head * group_size;
    const BackwardRows rows((tile.end - tile.begin) * group_size, a.head_dim, scratch);
    for_each_row(tile, head_begin, group_size, [&](int64_t position, int64_t head, int64_t r) {
      const Visible keys = Visible::keys_of(a, segment.num_tokens, position);
      rows.ranges.begin[r] = keys.begin;
      rows.ranges.end[r] = keys.end;
      const T* q = rows_of(static_cast<const T*>(a.q), a.q_row_stride, a.q_head_stride, segment, head);
      load_row(q + position * a.q_row_stride, a.head_dim, rows.score_rows + r * rows.stride);
      const T* grad_y =
          rows_of(static_cast<const T*>(b.grad_y), b.grad_y_row_stride, b.grad_y_head_stride, segment, head);
      load_row(grad_y + position * b.grad_y_row_stride, a.head_dim, rows.weight_rows + r * rows.stride);
    });

    const Opposite<T> keys{
        .score_lanes = lanes_of<T>(work.k_lanes, a, work, segment, kv_head),
        .weight_lanes = lanes_of<T>(work.v_lanes, a, work, segment, kv_head),
        .score_rows = rows_of(static_cast<const T*>(a.k), a.k_row_stride, a.k_head_stride, segment, kv_head),
        .weight_rows = nullptr,
        .score_row_stride = a.k_row_stride,
        .weight_row_stride = 0};
    walk_backward(rows, keys, a.head_dim, set1(a.scale), [&](int64_t r, int64_t) {
      const int64_t i = statistics_offset(a, segment, head_begin + r % group_size) + tile.begin + r / group_size;
      return Statistics{set1(work.lse[i]), set1(work.delta[i])};
    });

    const VecF scale = set1(a.scale);
    for_each_row(tile, head_begin, group_size, [&](int64_t position, int64_t head, int64_t r) {
      T* grad_q = rows_of(static_cast<T*>(b.grad_q), b.grad_q_row_stride, b.grad_q_head_stride, segment, head);
      store_row(grad_q + position * b.grad_q_row_stride, a.head_dim, rows.grad_score + r * rows.stride,
                [scale](VecF v) { return mul(v, scale); });
    });
  }
}

template <class T>
void key_items(const AttentionBwd& b, const AttentionWork& work, int64_t item_begin, int64_t item_end, void* scratch) {
  const AttentionFwd& a = b.fwd;
  const int64_t group_size = a.num_heads / a.num_kv_heads;
  for (int64_t item = item_begin; item < item_end; ++item) {
    const AttentionTile& tile = work.key_tiles[item / a.num_kv_heads];
    const Segment segment(a.segment_offsets, tile.segment);
    const int64_t kv_head = item % a.num_kv_heads;
    const BackwardRows rows(tile.end - tile.begin, a.head_dim, scratch);
    for_each_row(tile, kv_head, 1, [&](int64_t position, int64_t, int64_t r) {
      const Visible queries = Visible::queries_of(a, segment.num_tokens, position);
      rows.ranges.begin[r] = queries.begin;
      rows.ranges.end[r] = queries.end;
      const T* k = rows_of(static_cast<const T*>(a.k), a.k_row_stride, a.k_head_stride, segment, kv_head);
      load_row(k + position * a.k_row_stride, a.head_dim, rows.score_rows + r * rows.stride);
      const T* v = rows_of(static_cast<const T*>(a.v), a.v_row_stride, a.v_head_stride, segment, kv_head);
      load_row(v + position * a.v_row_stride, a.head_dim, rows.weight_rows + r * rows.stride);
    });

    for (int64_t head = kv_head * group_size; head < (kv_head + 1) * group_size; ++head) {
      const Opposite<T> queries{
          .score_lanes = lanes_of<T>(work.q_lanes, a, work, segment, head),
          .weight_lanes = lanes_of<T>(work.grad_y_lanes, a, work, segment, head),
          .score_rows = rows_of(static_cast<const T*>(a.q), a.q_row_stride, a.q_head_stride, segment, head),
          .weight_rows =
              rows_of(static_cast<const T*>(b.grad_y), b.grad_y_row_stride, b.grad_y_head_stride, segment, head),
          .score_row_stride = a.q_row_stride,
          .weight_row_stride = b.grad_y_row_stride};
      const int64_t offset = statistics_offset(a, segment, head);
      walk_backward(rows, queries, a.head_dim, set1(a.scale), [&](int64_t, int64_t position) {
        return Statistics{load(work.lse + offset + position), load(work.delta + offset + position)};
      });
    }

    const VecF scale = set1(a.scale);
    for_each_row(tile, kv_head, 1, [&](int64_t position, int64_t, int64_t r) {
      T* grad_k = rows_of(static_cast<T*>(b.grad_k), b.grad_k_row_stride, b.grad_k_head_stride, segment, kv_head);
      store_row(grad_k + position * b.grad_k_row_stride, a.head_dim, rows.grad_score + r * rows.stride,
                [scale](VecF v) { return mul(v, scale); });
      T* grad_v = rows_of(static_cast<T*>(b.grad_v), b.grad_v_row_stride, b.grad_v_head_stride, segment, kv_head);
      store_row(grad_v + position * b.grad_v_row_stride, a.head_dim, rows.grad_weight + r * rows.stride,
                [](VecF v) { return v; });
    });
  }
}

void pack(const AttentionPack& a, int64_t begin, int64_t end) {
  a.dtype == DType::f32 ? pack_tiles<float>(a, begin, end) : pack_tiles<bf16>(a, begin, end);
}
void fwd(const AttentionFwd& a, const AttentionWork& work, int64_t begin, int64_t end, void* scratch) {
  a.dtype == DType::f32 ? fwd_items<float>(a, work, begin, end, scratch)
                        : fwd_items<bf16>(a, work, begin, end, scratch);
}
void bwd_delta(const AttentionBwd& b, const AttentionWork& work, int64_t begin, int64_t end) {
  b.fwd.dtype == DType::f32 ? delta_rows<float>(b, work, begin, end) : delta_rows<bf16>(b, work, begin, end);
}
void bwd_query(const AttentionBwd& b, const AttentionWork& work, int64_t begin, int64_t end, void* scratch) {
  b.fwd.dtype == DType::f32 ? query_items<float>(b, work, begin, end, scratch)
                            : query_items<bf16>(b, work, begin, end, scratch);
}
void bwd_key(const AttentionBwd& b, const AttentionWork& work, int64_t begin, int64_t end, void* scratch) {
  b.fwd.dtype == DType::f32 ? key_items<float>(b, work, begin, end, scratch)
                            : key_items<bf16>(b, work, begin, end, scratch);
}

}  // namespace

constinit const AttentionIsa attention = {pack, fwd, bwd_delta, bwd_query, bwd_key};

}  // namespace pe::PE_ISA
