// Chooses the ISA level and splits rows and panels over threads.
#include "pe/matmul_w4a16.h"

#include <algorithm>
#include <memory>

#include "cpu/panel_tasks.h"
#include "runtime/dispatch.h"
#include "runtime/parallel.h"

namespace pe {
namespace {

constexpr IsaEntry<MatmulW4A16Isa> kIsas[] = {
#if defined(__x86_64__)
    {Isa::amx, &amx::matmul_w4a16},
    {Isa::avx512_bf16, &avx512_bf16::matmul_w4a16},
#endif
    PE_ISA_ENTRIES_VECTOR(matmul_w4a16)};

}  // namespace

const MatmulW4A16Isa& matmul_w4a16_isa() { return select(kIsas); }

void matmul_w4a16_cpu(const MatmulW4A16& original) {
  const MatmulW4A16Isa& isa = select(kIsas);
  MatmulW4A16 args = original;
  const BlockWeights& w = args.weight;
  const int64_t floats = matmul_w4a16_workspace_floats(w.format, args.x_is_bf16(), args.num_rows, w.num_cols);
  const auto workspace = std::make_unique_for_overwrite<float[]>(static_cast<size_t>(floats));
  args.workspace = workspace.get();
  if (floats > 0)
    parallel_for(args.num_rows, 1 + kPreparedElementsPerTask / std::max<int64_t>(w.num_cols, 1),
                 [&](int64_t begin, int64_t end) { isa.prepare(args, begin, end); });
  parallel_for_tiles(args.num_rows, num_panels(w.num_rows), panel_bytes(w.format, w.num_cols),
                     [&](int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end) {
                       isa.tile(args, row_begin, row_end, panel_begin, panel_end);
                     });
}

}  // namespace pe
