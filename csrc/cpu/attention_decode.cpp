// Chooses the ISA level and splits the work over (run of rows, kv head).
#include "pe/attention_decode.h"

#include <algorithm>
#include <vector>

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

int64_t run_end(const AttentionDecode& args, int64_t row_begin) {
  const int64_t limit = row_begin + attention_item_positions(args.num_heads / args.num_kv_heads);
  int64_t end = row_begin + 1;
  while (end < args.num_rows && end < limit && args.seq[end] == args.seq[end - 1] &&
         args.position[end] == args.position[end - 1] + 1)
    ++end;
  return end;
}

// Calls body(item) for each run, with all but its head.
template <class Body>
void for_each_run(const AttentionDecode& args, const Body& body) {
  for (int64_t begin = 0, end; begin < args.num_rows; begin = end) {
    end = run_end(args, begin);
    const int64_t first = int64_t{args.position[begin]} + 1 - args.sliding_window;
    const int64_t first_key = args.sliding_window > 0 ? std::max<int64_t>(first, 0) : 0;
    body(AttentionDecodeItem{begin, end, 0, first_key / kAttentionPartKeys * kAttentionPartKeys,
                             int64_t{args.position[end - 1]} + 1, 0});
  }
}

int64_t num_parts_of(const AttentionDecodeItem& item) {
  return (item.key_end - item.key_begin + kAttentionPartKeys - 1) / kAttentionPartKeys;
}

}  // namespace

const AttentionDecodeIsa& attention_decode_isa() { return select(kIsas); }

int64_t attention_decode_items(const AttentionDecode& args, AttentionDecodeItem* items) {
  int64_t num_items = 0, first_part = 0;
  for_each_run(args, [&](AttentionDecodeItem item) {
    for (item.kv_head = 0; item.kv_head < args.num_kv_heads; ++item.kv_head, ++num_items) {
      item.first_part = first_part + item.kv_head;
      if (items) items[num_items] = item;
    }
    first_part += num_parts_of(item) * args.num_kv_heads;
  });
  return num_items;
}

// The heads of a part follow each other, as they do in a page.
int64_t attention_decode_parts(const AttentionDecode& args, AttentionDecodeItem* parts) {
  int64_t num_parts = 0;
  for_each_run(args, [&](const AttentionDecodeItem& item) {
    if (!parts) {
      num_parts += num_parts_of(item) * args.num_kv_heads;
      return;
    }
    for (int64_t key = item.key_begin; key < item.key_end; key += kAttentionPartKeys)
      for (int64_t kv_head = 0; kv_head < args.num_kv_heads; ++kv_head)
        parts[num_parts++] = {
            item.row_begin, item.row_end, kv_head, key, std::min(key + kAttentionPartKeys, item.key_end), 0};
  });
  return num_parts;
}

bool attention_decode_splits(int64_t num_items, int64_t num_parts, int num_workers) {
  constexpr int64_t kItemsPerWorker = 4;
  return num_workers > 1 && num_parts > num_items && num_items < kItemsPerWorker * num_workers;
}

int64_t attention_decode_scratch_bytes(const AttentionDecode& args) {
  const int64_t group_size = args.num_heads / args.num_kv_heads;
  return attention_scratch_bytes(attention_item_positions(group_size) * group_size, args.head_dim, false);
}

void attention_decode_cpu(const AttentionDecode& args) {
  const AttentionDecodeIsa& isa = attention_decode_isa();
  const int64_t scratch_bytes = attention_decode_scratch_bytes(args), part_floats = attention_decode_part_floats(args);
  std::vector<AttentionDecodeItem> items(static_cast<size_t>(attention_decode_items(args, nullptr)));
  attention_decode_items(args, items.data());
  const auto each = [&](const std::vector<AttentionDecodeItem>& list, const auto& body) {
    parallel_for(std::ssize(list), 1, [&](int64_t begin, int64_t end) {
      const LineBuffer scratch(scratch_bytes);
      for (int64_t i = begin; i < end; ++i) body(i, list[static_cast<size_t>(i)], scratch.data());
    });
  };
  const int64_t num_parts = attention_decode_parts(args, nullptr);
  if (!attention_decode_splits(std::ssize(items), num_parts, region_size()))
    return each(items, [&](int64_t, const auto& item, void* scratch) { isa.rows(args, item, scratch); });
  std::vector<AttentionDecodeItem> parts(static_cast<size_t>(num_parts));
  attention_decode_parts(args, parts.data());
  const LineBuffer states(num_parts * part_floats * static_cast<int64_t>(sizeof(float)));
  float* first = static_cast<float*>(states.data());
  each(parts,
       [&](int64_t i, const auto& part, void* scratch) { isa.part(args, part, first + i * part_floats, scratch); });
  each(items, [&](int64_t, const auto& item, void* scratch) {
    isa.merge(args, item, first + item.first_part * part_floats, scratch);
  });
}

void kv_append_cpu(const KvAppend& args) {
  const AttentionDecodeIsa& isa = attention_decode_isa();
  const int64_t rows_per_task = 1 + kAppendElementsPerTask / (2 * args.num_kv_heads * args.head_dim);
  parallel_for(args.num_rows, rows_per_task, [&](int64_t begin, int64_t end) { isa.append(args, begin, end); });
}

}  // namespace pe
