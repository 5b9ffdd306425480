// Chooses the ISA level and splits the rows over threads.
#include "pe/swiglu.h"

#include <algorithm>

#include "runtime/dispatch.h"
#include "runtime/parallel.h"

namespace pe {
namespace {

constexpr IsaEntry<SwigluIsa> kIsas[] = {PE_ISA_ENTRIES_VECTOR(swiglu)};
// A task moves about 100 KiB: long enough to hide the hand-off, short enough to balance.
constexpr int64_t kElementsPerTask = 8 * 1024;

int64_t rows_per_task(int64_t num_cols) { return 1 + kElementsPerTask / std::max<int64_t>(num_cols, 1); }

}  // namespace

const SwigluIsa& swiglu_isa() { return select(kIsas); }

void swiglu_fwd_cpu(const SwigluFwd& args) {
  const SwigluIsa& isa = select(kIsas);
  parallel_for(args.num_rows, rows_per_task(args.num_cols),
               [&](int64_t begin, int64_t end) { isa.fwd(args, begin, end); });
}

void swiglu_bwd_cpu(const SwigluBwd& args) {
  const SwigluIsa& isa = select(kIsas);
  parallel_for(args.num_rows, rows_per_task(args.num_cols),
               [&](int64_t begin, int64_t end) { isa.bwd(args, begin, end); });
}

}  // namespace pe
