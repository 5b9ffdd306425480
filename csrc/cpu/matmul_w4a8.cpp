// Chooses the ISA level and splits rows and panels over threads.
#include "pe/matmul_w4a8.h"

#include <algorithm>
#include <memory>

#include "cpu/panel_tasks.h"
#include "runtime/dispatch.h"
#include "runtime/parallel.h"

namespace pe {
namespace {

constexpr IsaEntry<MatmulW4A8Isa> kIsas[] = {
#if defined(__x86_64__)
    {Isa::amx, &amx::matmul_w4a8},
    {Isa::avx512_vnni, &avx512_vnni::matmul_w4a8},
#endif
    PE_ISA_ENTRIES_VECTOR(matmul_w4a8)};

}  // namespace

const MatmulW4A8Isa& matmul_w4a8_isa() { return select(kIsas); }

void matmul_w4a8_cpu(const MatmulW4A8& original) {
  const MatmulW4A8Isa& isa = select(kIsas);
  MatmulW4A8 args = original;
  const BlockWeights& w = args.weight;
  const int64_t num_bytes = args.num_rows * quantized_row_bytes(w.num_cols);
  // operator new aligns for every scalar type, so the f32 and int32 parts are aligned too.
  const auto quantized = std::make_unique_for_overwrite<uint8_t[]>(static_cast<size_t>(num_bytes));
  args.quantized = quantized.get();
  parallel_for(args.num_rows, 1 + kPreparedElementsPerTask / std::max<int64_t>(w.num_cols, 1),
               [&](int64_t begin, int64_t end) { isa.quantize_rows(args, begin, end); });
  parallel_for_tiles(args.num_rows, num_panels(w.num_rows), panel_bytes(w.format, w.num_cols),
                     [&](int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end) {
                       isa.tile(args, row_begin, row_end, panel_begin, panel_end);
                     });
}

}  // namespace pe
