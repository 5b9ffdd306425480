// Chooses the ISA level and splits the rows over threads.
#include "pe/op_name.h"

#include <algorithm>

#include "runtime/dispatch.h"
#include "runtime/parallel.h"

namespace pe {
namespace {

constexpr IsaEntry<OpNameIsa> kIsas[] = {PE_ISA_ENTRIES_VECTOR(op_name)};
// A task moves about 64 KiB: long enough to hide the hand-off, short enough to balance.
constexpr int64_t kElementsPerTask = 8 * 1024;

int64_t rows_per_task(int64_t num_cols) { return 1 + kElementsPerTask / std::max<int64_t>(num_cols, 1); }

}  // namespace

const OpNameIsa& op_name_isa() { return select(kIsas); }

void op_name_fwd_cpu(const OpNameFwd& args) {
  const OpNameIsa& isa = op_name_isa();
  const auto body = [&](int64_t begin, int64_t end) { isa.fwd(args, begin, end); };
  parallel_for(args.num_rows, rows_per_task(args.num_cols), body);
}

void op_name_bwd_cpu(const OpNameBwd& args) {
  const OpNameIsa& isa = op_name_isa();
  const auto body = [&](int64_t begin, int64_t end) { isa.bwd(args, begin, end); };
  parallel_for(args.num_rows, rows_per_task(args.num_cols), body);
}

}  // namespace pe
