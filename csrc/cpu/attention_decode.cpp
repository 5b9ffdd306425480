// Chooses the ISA level and splits the work over (run of rows, kv head).
#include "pe/attention_decode.h"

#include "runtime/dispatch.h"
#include "runtime/line_buffer.h"
#include "runtime/parallel.h"

namespace pe {
namespace {

constexpr IsaEntry<AttentionDecodeIsa> kIsas[] = {
#if defined(__x86_64__)
    {Isa::avx512_bf16, &avx512_bf16::attention_decode},
#endif
    PE_ISA_ENTRIES_VECTOR(attention_decode)};
constexpr int64_t kAppendElementsPerTask = 16 * 1024;

}  // namespace

const AttentionDecodeIsa& attention_decode_isa() { return select(kIsas); }

int64_t attention_decode_num_items(const AttentionDecode& args) {
  int64_t num_runs = 0;
  for (int64_t row = 0; row < args.num_rows; row = attention_decode_run_end(args, row)) ++num_runs;
  return num_runs * args.num_kv_heads;
}

int64_t attention_decode_scratch_bytes(const AttentionDecode& args) {
  const int64_t group_size = args.num_heads / args.num_kv_heads;
  return attention_scratch_bytes(attention_item_positions(group_size) * group_size, args.head_dim, false);
}

void attention_decode_cpu(const AttentionDecode& args) {
  const AttentionDecodeIsa& isa = attention_decode_isa();
  const int64_t scratch_bytes = attention_decode_scratch_bytes(args);
  parallel_for(attention_decode_num_items(args), 1, [&](int64_t begin, int64_t end) {
    const LineBuffer scratch(scratch_bytes);
    isa.rows(args, begin, end, scratch.data());
  });
}

void kv_append_cpu(const KvAppend& args) {
  const AttentionDecodeIsa& isa = attention_decode_isa();
  const int64_t rows_per_task = 1 + kAppendElementsPerTask / (2 * args.num_kv_heads * args.head_dim);
  parallel_for(args.num_rows, rows_per_task, [&](int64_t begin, int64_t end) { isa.append(args, begin, end); });
}

}  // namespace pe
