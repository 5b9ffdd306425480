#include "engine/adapters.h"

#include <algorithm>
#include <atomic>
#include <utility>

#include "runtime/error.h"

namespace pe {
namespace {

constexpr const char* kSlotNames[] = {"qkv", "o", "gate_up", "down"};

uint64_t next_id() {
  static std::atomic<uint64_t> last{0};
  return ++last;
}

struct Extent {
  int64_t num_rows, num_cols;
};

Extent slot_extent(const ModelConfig& c, AdapterSlot slot) {
  switch (slot) {
    case AdapterSlot::qkv:
      return {c.qkv_size(), c.hidden_size};
    case AdapterSlot::o:
      return {c.hidden_size, c.q_size()};
    case AdapterSlot::gate_up:
      return {c.gate_up_size(), c.hidden_size};
    case AdapterSlot::down:
      break;
  }
  return {c.hidden_size, c.intermediate_size};
}

AlignedBuffer<char> packed(MatmulPack args) {
  AlignedBuffer<char> buffer(matmul_packed_bytes(args.num_rows, args.num_cols, args.packed_dtype));
  args.packed = buffer.data();
  matmul_pack_cpu(args);
  return buffer;
}

int64_t u_width(int64_t rank) { return matmul_num_panels(rank) * kMatmulPanel; }

int64_t widest_u(std::span<const Adapter* const> adapters) {
  int64_t widest = 0;
  for (const Adapter* adapter : adapters)
    if (adapter) widest = std::max(widest, adapter->u_width());
  return widest;
}

}  // namespace

AdapterSlot parse_adapter_slot(const std::string& name) {
  for (int i = 0; i < kNumAdapterSlots; ++i)
    if (name == kSlotNames[i]) return static_cast<AdapterSlot>(i);
  throw ArgumentError("slot: expected qkv, o, gate_up or down, got '" + name + "'");
}

Adapter::Adapter(const ModelConfig& config)
    : config_(config), id_(next_id()), parts_(static_cast<size_t>(config.num_layers * kNumAdapterSlots)) {}

void Adapter::add(int64_t layer, AdapterSlot slot, int64_t offset, const MatmulPack& a, const MatmulPack& b,
                  float scale) {
  const auto wrong = [](const char* name, const std::string& expected, int64_t got) {
    throw ArgumentError(std::string(name) + ": expected " + expected + ", got " + std::to_string(got));
  };
  if (is_frozen_) throw ArgumentError("adapter: expected one that no sequence has been computed with");
  if (layer < 0 || layer >= config_.num_layers) wrong("layer", "0 to " + std::to_string(config_.num_layers - 1), layer);
  const Extent extent = slot_extent(config_, slot);
  if (a.num_rows < 1 || a.num_rows > kLoraMaxRank)
    wrong("a", "1 to " + std::to_string(kLoraMaxRank) + " rows", a.num_rows);
  if (a.num_cols != extent.num_cols) wrong("a", std::to_string(extent.num_cols) + " columns", a.num_cols);
  if (b.num_cols != a.num_rows) wrong("b", std::to_string(a.num_rows) + " columns, the rank", b.num_cols);
  if (b.num_rows < 1 || b.num_rows > extent.num_rows)
    wrong("b", "1 to " + std::to_string(extent.num_rows) + " rows", b.num_rows);
  if (offset < 0 || offset > extent.num_rows - b.num_rows)
    wrong("offset", "0 to " + std::to_string(extent.num_rows - b.num_rows), offset);
  std::vector<Part>& parts = parts_[static_cast<size_t>(layer * kNumAdapterSlots + static_cast<int64_t>(slot))];
  const auto next = std::find_if(parts.begin(), parts.end(), [&](const Part& part) { return part.offset >= offset; });
  if ((next != parts.end() && next->offset < offset + b.num_rows) ||
      (next != parts.begin() && std::prev(next)->offset + std::prev(next)->num_cols > offset))
    wrong("offset", "columns that no other part adds to", offset);
  const auto num_bytes = matmul_packed_bytes(a.num_rows, a.num_cols, a.packed_dtype) +
                         matmul_packed_bytes(b.num_rows, b.num_cols, b.packed_dtype);
  parts.insert(next, Part{.offset = offset,
                          .num_cols = b.num_rows,
                          .depth = a.num_cols,
                          .rank = a.num_rows,
                          .scale = scale,
                          .a_dtype = a.packed_dtype,
                          .b_dtype = b.packed_dtype,
                          .a = packed(a),
                          .b = packed(b)});
  num_bytes_ += static_cast<int64_t>(num_bytes);
  int64_t width = 0;
  for (const Part& part : parts) width += pe::u_width(part.rank);
  u_width_ = std::max(u_width_, width);
}

void AdapterPlan::update(std::span<const Adapter* const> adapters, std::span<const AdapterBuffers> buffers,
                         DType dtype) {
  std::vector<uint64_t> ids;
  for (const Adapter* adapter : adapters) ids.push_back(adapter ? adapter->id() : 0);
  if (ids == ids_) return;
  ids_.clear();  // until the plan is whole
  products_.clear();

  // Rows in the order of their adapters' ids, each adapter's ascending.
  rows_.clear();
  for (size_t r = 0; r < ids.size(); ++r)
    if (adapters[r]) rows_.push_back(static_cast<int32_t>(r));
  const auto id_of = [&](int32_t row) { return ids[static_cast<size_t>(row)]; };
  std::stable_sort(rows_.begin(), rows_.end(), [&](int32_t i, int32_t j) { return id_of(i) < id_of(j); });
  if (!rows_.empty()) products_.resize(buffers.size());

  // Products follow each other, so they share one u: a row of it holds the parts of the row's adapter side by side.
  const int64_t u_row_stride = widest_u(adapters);
  if (const size_t size = adapters.size() * static_cast<size_t>(u_row_stride); size > u_size_) {
    u_ = AlignedBuffer<float>(size);
    u_size_ = size;
  }
  for (size_t p = 0; p < products_.size(); ++p) {
    Product& product = products_[p];
    const auto layer = static_cast<int64_t>(p) / kNumAdapterSlots;
    const auto slot = static_cast<AdapterSlot>(p % kNumAdapterSlots);
    const AdapterBuffers& at = buffers[p];
    for (size_t begin = 0, end; begin < rows_.size(); begin = end) {
      for (end = begin; end < rows_.size() && id_of(rows_[end]) == id_of(rows_[begin]);) ++end;
      float* u = u_.data();
      for (const Adapter::Part& part : adapters[static_cast<size_t>(rows_[begin])]->parts(layer, slot)) {
        product.segments.push_back({.x = at.x,
                                    .y = static_cast<char*>(at.y) + part.offset * (dtype == DType::f32 ? 4 : 2),
                                    .rows = rows_.data() + begin,
                                    .a = part.a.data(),
                                    .b = part.b.data(),
                                    .u = u,
                                    .num_rows = static_cast<int64_t>(end - begin),
                                    .depth = part.depth,
                                    .num_cols = part.num_cols,
                                    .rank = part.rank,
                                    .x_row_stride = at.x_row_stride,
                                    .y_row_stride = at.y_row_stride,
                                    .u_row_stride = u_row_stride,
                                    .scale = part.scale,
                                    .dtype = dtype,
                                    .a_dtype = part.a_dtype,
                                    .b_dtype = part.b_dtype});
        u += u_width(part.rank);
      }
    }
    const auto num_segments = static_cast<int64_t>(product.segments.size());
    product.first_shrink.resize(product.segments.size() + 1);
    product.first_expand.resize(product.segments.size() + 1);
    lora_number_tiles(product.segments.data(), num_segments, LoraProduct::shrink, product.first_shrink.data());
    lora_number_tiles(product.segments.data(), num_segments, LoraProduct::expand, product.first_expand.data());
  }
  ids_ = std::move(ids);
}

}  // namespace pe
