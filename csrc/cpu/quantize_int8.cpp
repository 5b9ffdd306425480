// Chooses the ISA level and splits the rows over threads.
#include "pe/quantize_int8.h"

#include <algorithm>

#include "runtime/dispatch.h"
#include "runtime/parallel.h"

namespace pe {
namespace {

constexpr IsaEntry<QuantizeInt8Isa> kIsas[] = {PE_ISA_ENTRIES_VECTOR(quantize_int8)};
// A task moves about 64 KiB: long enough to hide the hand-off, short enough to balance.
constexpr int64_t kElementsPerTask = 16 * 1024;

int64_t rows_per_task(int64_t num_cols) { return 1 + kElementsPerTask / std::max<int64_t>(num_cols, 1); }

}  // namespace

const QuantizeInt8Isa& quantize_int8_isa() { return select(kIsas); }

void quantize_int8_cpu(const QuantizeInt8& args) {
  const QuantizeInt8Isa& isa = select(kIsas);
  parallel_for(args.num_rows, rows_per_task(args.num_cols),
               [&](int64_t begin, int64_t end) { isa.quantize(args, begin, end); });
}

void dequantize_int8_cpu(const DequantizeInt8& args) {
  const QuantizeInt8Isa& isa = select(kIsas);
  parallel_for(args.num_rows, rows_per_task(args.num_cols),
               [&](int64_t begin, int64_t end) { isa.dequantize(args, begin, end); });
}

}  // namespace pe
