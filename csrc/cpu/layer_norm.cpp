// Chooses the ISA level and splits the rows over threads.
#include "pe/layer_norm.h"

#include <algorithm>
#include <vector>

#include "runtime/dispatch.h"
#include "runtime/parallel.h"

namespace pe {
namespace {

constexpr IsaEntry<LayerNormIsa> kIsas[] = {PE_ISA_ENTRIES_VECTOR(layer_norm)};
// A task moves about 64 KiB: long enough to hide the hand-off, short enough to balance.
constexpr int64_t kElementsPerTask = 16 * 1024;

}  // namespace

const LayerNormIsa& layer_norm_isa() { return select(kIsas); }

void layer_norm_fwd_cpu(const LayerNormFwd& args) {
  const LayerNormIsa& isa = layer_norm_isa();
  const int64_t rows_per_task = 1 + kElementsPerTask / std::max<int64_t>(args.num_cols, 1);
  parallel_for(args.num_rows, rows_per_task, [&](int64_t begin, int64_t end) { isa.fwd(args, begin, end); });
}

void layer_norm_bwd_cpu(const LayerNormBwd& args) {
  const LayerNormIsa& isa = layer_norm_isa();
  const int64_t num_blocks = (args.num_rows + kLayerNormRowBlock - 1) / kLayerNormRowBlock;
  std::vector<float> blocks(static_cast<size_t>(num_blocks * 2 * args.num_cols));
  parallel_for(num_blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      isa.bwd(args, b * kLayerNormRowBlock, std::min((b + 1) * kLayerNormRowBlock, args.num_rows),
              blocks.data() + b * 2 * args.num_cols);
  });
  isa.bwd_finish(args, blocks.data(), num_blocks);
}

}  // namespace pe
