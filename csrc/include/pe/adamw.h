// adamw -- one step of Adam with decoupled weight decay, fused into one pass; and the sum of squares for clipping.
//
// Math       g = grad[i] * grad_scale,  p = master[i], or param[i] without a master
//            p             = p * (1 - lr * weight_decay)
//            exp_avg[i]    = beta1 * exp_avg[i] + (1 - beta1) * g
//            exp_avg_sq[i] = beta2 * exp_avg_sq[i] + (1 - beta2) * g^2
//            d             = sqrt(exp_avg_sq[i]) / sqrt(1 - beta2^step) + eps
//            p             = p - lr / (1 - beta1^step) * exp_avg[i] / d
//            master[i]     = p,  param[i] = p
//            sum_of_squares: sum_i x[i]^2
// Shapes     every tensor has n elements, contiguous; step >= 1
// Numerics   param f32 | bf16; master f32, only with a bf16 param; grad f32 | bf16; exp_avg and exp_avg_sq both f32
//            or both bf16. f32 arithmetic on unrounded moments, no fused multiply-add; the factors of a step in
//            double, rounded once to f32; each tensor is rounded once, at its store. A bf16 param without a master
//            loses updates below half its last bit. A non-finite gradient makes its element NaN
//            sum_of_squares: blocks of kSumOfSquaresBlock in f32 (infinite above 1.8e19), blocks added in double
// Writes     param, exp_avg, exp_avg_sq and master in place; no two arguments may overlap
// Order      adamw: elementwise, same bits for any number of threads and on every ISA level. sum_of_squares: one tree
//            per block, blocks in ascending order; same bits for any number of threads on one ISA level
// Cost       memory bound; reads every tensor once and writes all but grad once
// Reference  pyengine/reference/adamw.py; Loshchilov & Hutter 2019, arXiv:1711.05101
#pragma once
#include <cstdint>

#include "pe/dtype.h"
#include "pe/isa.h"

namespace pe {

constexpr int64_t kSumOfSquaresBlock = 4096;

struct Adamw {
  void* param;
  float* master;  // nullptr: none
  const void* grad;
  void* exp_avg;
  void* exp_avg_sq;
  int64_t n;
  double lr, beta1, beta2, eps, weight_decay, grad_scale;
  int64_t step;  // from 1
  DType param_dtype, grad_dtype, state_dtype;
};

struct SumOfSquares {
  const void* x;
  int64_t n;
  DType dtype;
};

void adamw_cpu(const Adamw& args);
double sum_of_squares_cpu(const SumOfSquares& args);
void adamw_cuda(const Adamw& args, void* stream);

// The factors of one step, as the kernels use them.
struct AdamwFactors {
  float decay;         // 1 - lr * weight_decay
  float beta1, rest1;  // beta1, 1 - beta1
  float beta2, rest2;  // beta2, 1 - beta2
  float step_size;     // lr / (1 - beta1^step)
  float correction2;   // 1 / sqrt(1 - beta2^step)
  float eps, grad_scale;
};

// What one ISA level provides. Threads are the caller's business.
struct AdamwIsa {
  void (*update)(const Adamw& args, const AdamwFactors& factors, int64_t begin, int64_t end);
  // The f32 sum of the squares of elements [begin, end), at most one block.
  float (*sum_of_squares)(const SumOfSquares& args, int64_t begin, int64_t end);
};
PE_DECLARE_ISA_TABLE(AdamwIsa, adamw);
const AdamwIsa& adamw_isa();  // of the level in use

}  // namespace pe
