// Chooses the ISA level, cuts the segments into tiles and splits the work over (tile, kv head).
#include "pe/attention.h"

#include <algorithm>
#include <vector>

#include "runtime/dispatch.h"
#include "runtime/line_buffer.h"
#include "runtime/parallel.h"

namespace pe {
namespace {

constexpr IsaEntry<AttentionIsa> kIsas[] = {
#if defined(__x86_64__)
    {Isa::avx512_bf16, &avx512_bf16::attention},
#endif
    PE_ISA_ENTRIES_VECTOR(attention)};
constexpr int64_t kDeltaTokensPerTask = 64;

std::vector<AttentionTile> cut(const int32_t* segment_offsets, int64_t num_segments, int64_t positions_per_tile) {
  std::vector<AttentionTile> tiles;
  for (int64_t segment = 0; segment < num_segments; ++segment) {
    const int64_t num_tokens = segment_offsets[segment + 1] - segment_offsets[segment];
    for (int64_t begin = 0; begin < num_tokens; begin += positions_per_tile)
      tiles.push_back({segment, begin, std::min(begin + positions_per_tile, num_tokens)});
  }
  return tiles;
}

// `args` with its segments written out, the tiles, and the lane blocks.
class Plan {
 public:
  explicit Plan(const AttentionFwd& args)
      : fwd_(args), whole_{0, static_cast<int32_t>(args.num_tokens)}, group_size_(args.num_heads / args.num_kv_heads) {
    if (!fwd_.segment_offsets) {
      fwd_.segment_offsets = whole_;
      fwd_.num_segments = 1;
    }
    num_lane_blocks_ = fwd_.num_tokens / kAttentionLaneKeys + fwd_.num_segments;
    query_tiles_ = tiles(attention_item_positions(group_size_));
    pack_tiles_ = tiles(kAttentionBlockKeys);
  }
  Plan(const Plan&) = delete;

  const AttentionFwd& fwd() const { return fwd_; }
  int64_t group_size() const { return group_size_; }
  int64_t num_lane_blocks() const { return num_lane_blocks_; }
  const std::vector<AttentionTile>& query_tiles() const { return query_tiles_; }
  std::vector<AttentionTile> tiles(int64_t positions) const {
    return cut(fwd_.segment_offsets, fwd_.num_segments, positions);
  }

  LineBuffer pack(const AttentionIsa& isa, const void* rows, int64_t num_heads, int64_t row_stride,
                  int64_t head_stride) const {
    const int64_t element_bytes = fwd_.dtype == DType::f32 ? 4 : 2;
    LineBuffer lanes(num_heads * num_lane_blocks_ * kAttentionLaneKeys * fwd_.head_dim * element_bytes);
    const AttentionPack args{.rows = rows,
                             .lanes = lanes.data(),
                             .segment_offsets = fwd_.segment_offsets,
                             .tiles = pack_tiles_.data(),
                             .num_heads = num_heads,
                             .head_dim = fwd_.head_dim,
                             .num_lane_blocks = num_lane_blocks_,
                             .row_stride = row_stride,
                             .head_stride = head_stride,
                             .dtype = fwd_.dtype};
    parallel_for(std::ssize(pack_tiles_), 1, [&](int64_t begin, int64_t end) { isa.pack(args, begin, end); });
    return lanes;
  }

 private:
  AttentionFwd fwd_;
  int32_t whole_[2];
  int64_t group_size_, num_lane_blocks_;
  std::vector<AttentionTile> query_tiles_, pack_tiles_;
};

}  // namespace

const AttentionIsa& attention_isa() { return select(kIsas); }

void attention_fwd_cpu(const AttentionFwd& args) {
  const AttentionIsa& isa = attention_isa();
  const Plan plan(args);
  const LineBuffer k_lanes = plan.pack(isa, args.k, args.num_kv_heads, args.k_row_stride, args.k_head_stride);
  AttentionWork work{};
  work.query_tiles = plan.query_tiles().data();
  work.num_query_tiles = std::ssize(plan.query_tiles());
  work.num_lane_blocks = plan.num_lane_blocks();
  work.k_lanes = k_lanes.data();
  const int64_t num_rows = attention_item_positions(plan.group_size()) * plan.group_size();
  const int64_t scratch_bytes = attention_scratch_bytes(num_rows, args.head_dim, false);
  parallel_for(work.num_query_tiles * args.num_kv_heads, 1, [&](int64_t begin, int64_t end) {
    const LineBuffer scratch(scratch_bytes);
    isa.fwd(plan.fwd(), work, begin, end, scratch.data());
  });
}

void attention_bwd_cpu(const AttentionBwd& args) {
  const AttentionIsa& isa = attention_isa();
  const AttentionFwd& f = args.fwd;
  const Plan plan(f);
  AttentionBwd bwd = args;
  bwd.fwd = plan.fwd();
  const LineBuffer k_lanes = plan.pack(isa, f.k, f.num_kv_heads, f.k_row_stride, f.k_head_stride);
  const LineBuffer v_lanes = plan.pack(isa, f.v, f.num_kv_heads, f.v_row_stride, f.v_head_stride);
  const LineBuffer q_lanes = plan.pack(isa, f.q, f.num_heads, f.q_row_stride, f.q_head_stride);
  const LineBuffer grad_y_lanes =
      plan.pack(isa, args.grad_y, f.num_heads, args.grad_y_row_stride, args.grad_y_head_stride);
  std::vector<float> lse(static_cast<size_t>(f.num_heads * (f.num_tokens + kAttentionBlockKeys))), delta(lse.size());
  const std::vector<AttentionTile> key_tiles = plan.tiles(kAttentionItemRows);
  const AttentionWork work{.query_tiles = plan.query_tiles().data(),
                           .key_tiles = key_tiles.data(),
                           .num_query_tiles = std::ssize(plan.query_tiles()),
                           .num_key_tiles = std::ssize(key_tiles),
                           .num_lane_blocks = plan.num_lane_blocks(),
                           .k_lanes = k_lanes.data(),
                           .v_lanes = v_lanes.data(),
                           .q_lanes = q_lanes.data(),
                           .grad_y_lanes = grad_y_lanes.data(),
                           .lse = lse.data(),
                           .delta = delta.data()};
  parallel_for(f.num_tokens, kDeltaTokensPerTask,
               [&](int64_t begin, int64_t end) { isa.bwd_delta(bwd, work, begin, end); });

  // Neither half needs the other: key items, the longer ones, then query items.
  const int64_t num_key_items = work.num_key_tiles * f.num_kv_heads;
  const int64_t num_query_items = work.num_query_tiles * f.num_kv_heads;
  const int64_t num_rows =
      std::max(attention_item_positions(plan.group_size()) * plan.group_size(), kAttentionItemRows);
  const int64_t scratch_bytes = attention_scratch_bytes(num_rows, f.head_dim, true);
  parallel_for(num_key_items + num_query_items, 1, [&](int64_t begin, int64_t end) {
    const LineBuffer scratch(scratch_bytes);
    if (begin < num_key_items) isa.bwd_key(bwd, work, begin, std::min(end, num_key_items), scratch.data());
    if (end > num_key_items)
      isa.bwd_query(bwd, work, std::max(begin - num_key_items, int64_t{0}), end - num_key_items, scratch.data());
  });
}

}  // namespace pe
