// linear_cross_entropy -- negative log likelihood of target tokens under the logits of a linear head, which never exist
// as a whole.
//
// Math       logits[t,v]    = sum_c(x[t,c] * w[v,c])             in f32, the bits of matmul
//            lse[t]         = log(sum_v(exp(logits[t,v])))       the bits of row_lse
//            nll[t]         = lse[t] - logits[t,targets[t]]      0 where targets[t] == ignore_index
// Backward   grad_logits    = (exp(logits[t,v] - lse[t]) - (v == targets[t])) * grad_nll[t]
//            grad_x[t,c]    = sum_v(grad_logits[t,v] * w[v,c])   the bits of matmul
//            grad_w[v,c]    = sum_t(grad_logits[t,v] * x[t,c])   the bits of matmul
//            a row of grad_logits is 0 where targets[t] == ignore_index or grad_nll[t] == 0
// Shapes     x, grad_x [T, C] and w, grad_w [V, C]: unit column stride, row strides in elements
//            targets [T] i64; nll, lse, grad_nll [T] f32
// Numerics   f32 | bf16 for x, w and their gradients; logits and grad_logits in f32, not rounded; one rounding, at the
//            store. Infinite logits: as torch.logsumexp
// Writes     outputs are overwritten (=), never accumulated (+=); they may not overlap an input
// Order      same bits for any number of threads and rows on one ISA level: sums over C, V and T as in matmul; lse is
//            merged from blocks of kLseBlock logits in ascending order
// Cost       forward 2*T*V*C flops, backward 6*T*V*C. Scratch memory of the forward: one part of packed w (see
//            kMatmulScratchBytes, at least kLseBlock rows), 96 KiB per thread, 36 bytes per token. The backward adds a
//            second part of w, one packed copy of x, for bf16 grad_x in f32, and kGradLogitsBytes or 2 KiB per token
// Reference  pyengine/reference/linear_cross_entropy.py; Wijmans et al. 2024, arXiv:2411.09009
#pragma once
#include <cstddef>
#include <cstdint>

#include "pe/dtype.h"
#include "pe/isa.h"

namespace pe {

constexpr int64_t kLseBlock = 512;
constexpr size_t kGradLogitsBytes = size_t{16} << 20;

struct LinearCrossEntropyFwd {
  const void* x;
  const void* w;
  const int64_t* targets;
  float* nll;
  float* lse;
  int64_t num_tokens, num_channels, vocab_size;  // T, C, V
  int64_t x_row_stride, w_row_stride;
  int64_t ignore_index;
  DType dtype;  // of x and w
};

struct LinearCrossEntropyBwd {
  const float* grad_nll;
  const void* x;
  const void* w;
  const int64_t* targets;
  const float* lse;
  void* grad_x;  // nullptr: not needed
  void* grad_w;  // nullptr: not needed
  int64_t num_tokens, num_channels, vocab_size;
  int64_t x_row_stride, w_row_stride, grad_x_row_stride, grad_w_row_stride;
  int64_t ignore_index;
  DType dtype;  // of x, w, grad_x and grad_w
};

// Both throw ArgumentError at the first target that is neither in [0, V) nor ignore_index.
void linear_cross_entropy_fwd_cpu(const LinearCrossEntropyFwd& args);
void linear_cross_entropy_bwd_cpu(const LinearCrossEntropyBwd& args);

// log(sum(exp(logits))) of one row, with the bits of `lse` above.
float row_lse_cpu(const float* logits, int64_t num_logits);

// exp(max) * sum is a sum of exponentials; max is -inf and sum 0 for an empty one.
struct LogSumExp {
  float max, sum;
};

// What one ISA level provides. Threads are the caller's business.
struct LinearCrossEntropyIsa {
  float (*row_lse)(const float* logits, int64_t num_logits);
  // out[r] = the sum over row r of one block; num_cols <= kLseBlock.
  void (*reduce_block)(const float* logits, int64_t row_stride, int64_t num_rows, int64_t num_cols, LogSumExp* out);
  // total[r] += next[r].
  void (*merge)(LogSumExp* total, const LogSumExp* next, int64_t num_rows);
  void (*finish)(const LogSumExp* total, float* lse, int64_t num_rows);
  // Overwrites logits with grad_logits. target_cols[r] is the column of the target or -1; grad_nll is 0 where ignored.
  void (*grad_logits)(float* logits, int64_t row_stride, int64_t num_rows, int64_t num_cols, const float* lse,
                      const float* grad_nll, const int64_t* target_cols);
  void (*narrow)(const float* from, bf16* to, int64_t num);
};
PE_DECLARE_ISA_TABLE(LinearCrossEntropyIsa, linear_cross_entropy);
const LinearCrossEntropyIsa& linear_cross_entropy_isa();  // of the level in use

}  // namespace pe
