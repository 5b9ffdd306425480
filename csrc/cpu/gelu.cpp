// Chooses the ISA level and splits the rows over threads.
#include "pe/gelu.h"

#include <algorithm>

#include "runtime/dispatch.h"
#include "runtime/parallel.h"

namespace pe {
namespace {

constexpr IsaEntry<GeluIsa> kIsas[] = {PE_ISA_ENTRIES_VECTOR(gelu)};
// A task moves about 64 KiB: long enough to hide the hand-off, short enough to balance.
constexpr int64_t kElementsPerTask = 8 * 1024;

int64_t rows_per_task(int64_t num_cols) { return 1 + kElementsPerTask / std::max<int64_t>(num_cols, 1); }

}  // namespace

const GeluIsa& gelu_isa() { return select(kIsas); }

void gelu_fwd_cpu(const GeluFwd& args) {
  const GeluIsa& isa = gelu_isa();
  parallel_for(args.num_rows, rows_per_task(args.num_cols),
               [&](int64_t begin, int64_t end) { isa.fwd(args, begin, end); });
}

void gelu_bwd_cpu(const GeluBwd& args) {
  const GeluIsa& isa = gelu_isa();
  parallel_for(args.num_rows, rows_per_task(args.num_cols),
               [&](int64_t begin, int64_t end) { isa.bwd(args, begin, end); });
}

}  // namespace pe
