// attention -- softmax(q k^T) v over packed sequences, causal or full, with grouped query heads
//
// Math       g = h / (H / K); s[t,h,j] = scale * sum_d(q[t,h,d] * k[j,g,d]) for the keys j that t sees
//            lse[t,h]      = log(sum_j(exp(s[t,h,j])))
//            y[t,h,d]      = sum_j(exp(s[t,h,j] - lse[t,h]) * v[j,g,d])
// Backward   p             = exp(s - lse);  delta[t,h] = sum_d(grad_y[t,h,d] * y[t,h,d])
//            ds[t,h,j]     = p[t,h,j] * (sum_d(grad_y[t,h,d] * v[j,g,d]) - delta[t,h])
//            grad_q[t,h,d] = scale * sum_j(ds[t,h,j] * k[j,g,d])
//            grad_k[j,g,d] = scale * sum_{h in g, t}(ds[t,h,j] * q[t,h,d])
//            grad_v[j,g,d] = sum_{h in g, t}(p[t,h,j] * grad_y[t,h,d])
// Visible    rows of one segment only; position i, counted from its start, sees j <= i if causal, all of them if not,
//            and only j > i - sliding_window with a window. What is not visible is never multiplied
// Shapes     q, y, grad_y, grad_q [T, H, D]; k, v, grad_k, grad_v [T, K, D]: last dimension contiguous, other strides
//            in elements; H % K == 0, 1 <= D <= 256; lse [T, H] f32 contiguous
//            segment_offsets [num_segments + 1] ascend from 0 to T
// Numerics   f32 | bf16 in and out; all arithmetic in f32; one rounding, at the store. Levels avx512_bf16 and above,
//            forward in bf16: the weights of values, exp(s - max), are rounded to bf16 too, not so their sum; subnormal
//            operands and sums count as zero
// Writes     outputs are overwritten (=), never accumulated (+=), and may not overlap an input
// Order      keys are cut at multiples of kAttentionPartKeys, and what the parts give is added in ascending order.
//            On one ISA level a row of y depends on its q, on the keys and values that it sees and on their positions,
//            and on nothing else; attention_decode gives the same bits (simd/attention_rows.h is the arithmetic of
//            both). A row of grad_q sums over keys in ascending order; a row of grad_k or grad_v over query heads, then
//            over positions, in ascending order. No atomics
// Cost       compute bound: forward 4*D, backward 14*D flops per visible (query, key, head); the backward computes p
//            twice, so that neither of its two halves needs a sum over threads
// Reference  pyengine/reference/attention.py; Dao et al. 2022, arXiv:2205.14135; Ainslie et al. 2023, arXiv:2305.13245
#pragma once
#include <cstdint>

#include "pe/dtype.h"
#include "pe/isa.h"

namespace pe {

constexpr int64_t kAttentionBlockKeys = 64;  // keys per step of the online softmax, by absolute index
constexpr int64_t kAttentionPartKeys = 256;  // keys whose softmax is one sum, by absolute index; parts may be split
constexpr int64_t kAttentionLaneKeys = 16;   // keys side by side in a transposed block of K, [D][16]
constexpr int64_t kAttentionMaxHeadDim = 256;
constexpr int64_t kAttentionItemRows = 48;  // query rows that share a walk over the keys, where a group has no more

struct AttentionFwd {
  const void* q;
  const void* k;
  const void* v;
  void* y;
  float* lse;                      // nullptr when no backward will follow
  const int32_t* segment_offsets;  // nullptr: one segment of all T
  int64_t num_tokens, num_segments, num_heads, num_kv_heads, head_dim;
  int64_t q_row_stride, k_row_stride, v_row_stride, y_row_stride;
  int64_t q_head_stride, k_head_stride, v_head_stride, y_head_stride;
  int64_t sliding_window;  // 0: none; only with causal
  float scale;
  bool causal;
  DType dtype;  // of q, k, v and y
};

struct AttentionBwd {
  AttentionFwd fwd;  // its y and lse are inputs here
  const void* grad_y;
  void* grad_q;
  void* grad_k;
  void* grad_v;
  int64_t grad_y_row_stride, grad_q_row_stride, grad_k_row_stride, grad_v_row_stride;
  int64_t grad_y_head_stride, grad_q_head_stride, grad_k_head_stride, grad_v_head_stride;
};

void attention_fwd_cpu(const AttentionFwd& args);
void attention_bwd_cpu(const AttentionBwd& args);
void attention_fwd_cuda(const AttentionFwd& args, void* stream);
void attention_bwd_cuda(const AttentionBwd& args, void* stream);

// Positions [begin, end) of one segment.
struct AttentionTile {
  int64_t segment, begin, end;
};

// One [T, num_heads, D] tensor to be transposed into lane blocks [num_heads][T / 16 + num_segments][D][16].
struct AttentionPack {
  const void* rows;
  void* lanes;
  const int32_t* segment_offsets;
  const AttentionTile* tiles;  // begin at multiples of 16
  int64_t num_heads, head_dim, num_lane_blocks;
  int64_t row_stride, head_stride;
  DType dtype;
};

// What the inner loops read beside their arguments. Tiles hold kAttentionItemRows rows at most, or one position.
struct AttentionWork {
  const AttentionTile* query_tiles;
  const AttentionTile* key_tiles;
  int64_t num_query_tiles, num_key_tiles, num_lane_blocks;
  const void* k_lanes;
  const void* v_lanes;  // this and below: backward only
  const void* q_lanes;
  const void* grad_y_lanes;
  float* lse;    // [H][T + kAttentionBlockKeys]
  float* delta;  // the same
};

// What one ISA level provides. Threads are the caller's business.
struct AttentionIsa {
  // Items are tiles.
  void (*pack)(const AttentionPack& args, int64_t item_begin, int64_t item_end);
  // Items are (query tile, kv head); the last tile is item 0, so that the longest rows start first.
  void (*fwd)(const AttentionFwd& args, const AttentionWork& work, int64_t item_begin, int64_t item_end, void* scratch);
  // Rows of work.lse and work.delta for tokens.
  void (*bwd_delta)(const AttentionBwd& args, const AttentionWork& work, int64_t token_begin, int64_t token_end);
  // Items as in fwd; writes grad_q.
  void (*bwd_query)(const AttentionBwd& args, const AttentionWork& work, int64_t item_begin, int64_t item_end,
                    void* scratch);
  // Items are (key tile, kv head); writes grad_k and grad_v.
  void (*bwd_key)(const AttentionBwd& args, const AttentionWork& work, int64_t item_begin, int64_t item_end,
                  void* scratch);
};
PE_DECLARE_ISA_TABLE(AttentionIsa, attention);
const AttentionIsa& attention_isa();

// Positions that one work item takes, given the query heads per kv head.
static constexpr int64_t attention_item_positions(int64_t group_size) {
  return group_size < kAttentionItemRows ? kAttentionItemRows / group_size : 1;
}
// Floats of the state of one row of forward: the sum over values [D], padded to 16, 16 sums of weights, and the maximum
// of the scores with 15 to fill its line.
static constexpr int64_t attention_state_floats(int64_t head_dim) { return (head_dim + 15) / 16 * 16 + 32; }
// Bytes, 64-byte aligned, that `num_rows` rows in flight need: q and two states of forward, or two rows and two gradients
// of backward; bounds.
static constexpr int64_t attention_scratch_bytes(int64_t num_rows, int64_t head_dim, bool backward) {
  const int64_t padded_dim = (head_dim + 15) / 16 * 16;
  const int64_t floats = backward ? 4 * padded_dim : padded_dim + 2 * attention_state_floats(head_dim);
  return num_rows * (floats * 4 + 16) + 64 * 8;
}

}  // namespace pe
