// Computes the factors of a step, chooses the ISA level and splits the elements over threads.
#include "pe/adamw.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "runtime/dispatch.h"
#include "runtime/parallel.h"

namespace pe {
namespace {

constexpr IsaEntry<AdamwIsa> kIsas[] = {PE_ISA_ENTRIES_VECTOR(adamw)};
// A task moves about 200 KiB: long enough to hide the hand-off, short enough to balance.
constexpr int64_t kElementsPerTask = 8 * 1024;
constexpr int64_t kBlocksPerTask = 8;

AdamwFactors factors_of(const Adamw& a) {
  const double correction1 = 1.0 - std::pow(a.beta1, static_cast<double>(a.step));
  const double correction2 = 1.0 - std::pow(a.beta2, static_cast<double>(a.step));
  return {.decay = static_cast<float>(1.0 - a.lr * a.weight_decay),
          .beta1 = static_cast<float>(a.beta1),
          .rest1 = static_cast<float>(1.0 - a.beta1),
          .beta2 = static_cast<float>(a.beta2),
          .rest2 = static_cast<float>(1.0 - a.beta2),
          .step_size = static_cast<float>(a.lr / correction1),
          .correction2 = static_cast<float>(1.0 / std::sqrt(correction2)),
          .eps = static_cast<float>(a.eps),
          .grad_scale = static_cast<float>(a.grad_scale)};
}

}  // namespace

const AdamwIsa& adamw_isa() { return select(kIsas); }

void adamw_cpu(const Adamw& args) {
  const AdamwIsa& isa = select(kIsas);
  const AdamwFactors factors = factors_of(args);
  parallel_for(args.n, kElementsPerTask, [&](int64_t begin, int64_t end) { isa.update(args, factors, begin, end); });
}

double sum_of_squares_cpu(const SumOfSquares& args) {
  const AdamwIsa& isa = select(kIsas);
  const int64_t num_blocks = (args.n + kSumOfSquaresBlock - 1) / kSumOfSquaresBlock;
  std::vector<float> blocks(static_cast<size_t>(num_blocks));
  parallel_for(num_blocks, kBlocksPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      blocks[static_cast<size_t>(b)] =
          isa.sum_of_squares(args, b * kSumOfSquaresBlock, std::min((b + 1) * kSumOfSquaresBlock, args.n));
  });
  double total = 0.0;
  for (const float block : blocks) total += static_cast<double>(block);
  return total;
}

}  // namespace pe
