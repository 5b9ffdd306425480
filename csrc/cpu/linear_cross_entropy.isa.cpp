// ISA: scalar avx2 avx512
#include "pe/linear_cross_entropy.h"

#include "simd/log_softmax.h"

namespace pe::PE_ISA {
namespace {

float row_lse(const float* logits, int64_t num_logits) { return lse_row(logits, num_logits); }

void reduce_block(const float* logits, int64_t row_stride, int64_t num_rows, int64_t num_cols, LogSumExp* out) {
  for (int64_t r = 0; r < num_rows; ++r) out[r] = lse_block(logits + r * row_stride, num_cols);
}

void merge(LogSumExp* total, const LogSumExp* next, int64_t num_rows) {
  for (int64_t r = 0; r < num_rows; ++r) total[r] = lse_merge(total[r], next[r]);
}

void finish(const LogSumExp* total, float* lse, int64_t num_rows) {
  for (int64_t r = 0; r < num_rows; ++r) lse[r] = lse_finish(total[r]);
}

void grad_logits(float* logits, int64_t row_stride, int64_t num_rows, int64_t num_cols, const float* lse,
                 const float* grad_nll, const int64_t* target_cols) {
  const int64_t tail = num_cols % VecF::size, full = num_cols - tail;
  for (int64_t r = 0; r < num_rows; ++r) {
    float* row = logits + r * row_stride;
    const float target = target_cols[r] >= 0 ? row[target_cols[r]] : 0.0f;
    const VecF shift = set1(lse[r]), scale = set1(grad_nll[r]);
    if (grad_nll[r] == 0.0f) {
      for (int64_t c = 0; c < full; c += VecF::size) store(row + c, scale);
      if (tail) store(row + full, scale, tail);
      continue;
    }
    for (int64_t c = 0; c < full; c += VecF::size) store(row + c, mul(exp(sub(load(row + c), shift)), scale));
    if (tail) store(row + full, mul(exp(sub(load(row + full, tail), shift)), scale), tail);
    if (target_cols[r] >= 0) row[target_cols[r]] = (exp_of(target - lse[r]) - 1.0f) * grad_nll[r];
  }
}

void narrow(const float* from, bf16* to, int64_t num) {
  const int64_t tail = num % VecF::size, full = num - tail;
  for (int64_t i = 0; i < full; i += VecF::size) store(to + i, load(from + i));
  if (tail) store(to + full, load(from + full, tail), tail);
}

}  // namespace

constinit const LinearCrossEntropyIsa linear_cross_entropy = {row_lse, reduce_block, merge,
                                                              finish,  grad_logits,  narrow};

}  // namespace pe::PE_ISA
