// Low-rank adapters of a loaded model, in the form that the kernels read, and the products of one step.
#pragma once
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "engine/model.h"
#include "pe/lora.h"
#include "runtime/aligned_buffer.h"

namespace pe {

// The stacked matrices of a layer that adapters add to.
enum class AdapterSlot : uint8_t { qkv, o, gate_up, down };
constexpr int kNumAdapterSlots = 4;
AdapterSlot parse_adapter_slot(const std::string& name);  // throws ArgumentError

class Adapter {
 public:
  // What it adds to columns [offset, offset + num_cols) of a slot.
  struct Part {
    int64_t offset, num_cols, depth, rank;
    float scale;
    DType a_dtype, b_dtype;
    AlignedBuffer<char> a, b;  // packed
  };

  explicit Adapter(const ModelConfig& config);

  // a [rank, depth] and b [num_cols, rank], copied; their `packed` is not used. Throws ArgumentError for a shape that the
  // slot does not take, columns that another part has, or a frozen adapter.
  void add(int64_t layer, AdapterSlot slot, int64_t offset, const MatmulPack& a, const MatmulPack& b, float scale);

  // Called before a sequence is computed with it: from then on nothing is added.
  void freeze() { is_frozen_ = true; }

  // Ascending in offset.
  const std::vector<Part>& parts(int64_t layer, AdapterSlot slot) const {
    return parts_[static_cast<size_t>(layer * kNumAdapterSlots + static_cast<int64_t>(slot))];
  }
  // Of this adapter alone as long as the process lives: two loads of one file differ.
  uint64_t id() const { return id_; }
  int64_t num_bytes() const { return num_bytes_; }
  // Floats that the products with a of one row of one slot take, at most.
  int64_t u_width() const { return u_width_; }

 private:
  const ModelConfig config_;
  const uint64_t id_;
  int64_t num_bytes_ = 0, u_width_ = 0;
  bool is_frozen_ = false;
  std::vector<std::vector<Part>> parts_;  // [num_layers * kNumAdapterSlots]
};

// Where the input and the output of a slot's product lie in a step.
struct AdapterBuffers {
  const void* x;
  void* y;
  int64_t x_row_stride, y_row_stride;
};

// Which rows of a step take part in which product of which adapter. Rows of one adapter make one segment per part.
class AdapterPlan {
 public:
  // adapters: of each row, nullptr for none; buffers [num_layers * kNumAdapterSlots]. Keeps what an equal call made.
  void update(std::span<const Adapter* const> adapters, std::span<const AdapterBuffers> buffers, DType dtype);

  struct Product {
    std::vector<Lora> segments;
    std::vector<int64_t> first_shrink, first_expand;  // numbers of tiles, see lora_number_tiles

    int64_t num_tiles(LoraProduct product) const { return first(product).back(); }
    void run(LoraProduct product, int64_t tile_begin, int64_t tile_end) const {
      lora_run_tiles(segments.data(), static_cast<int64_t>(segments.size()), product, first(product).data(), tile_begin,
                     tile_end);
    }

   private:
    const std::vector<int64_t>& first(LoraProduct product) const {
      return product == LoraProduct::shrink ? first_shrink : first_expand;
    }
  };
  // nullptr where no row has an adapter of this slot.
  const Product* product(int64_t layer, AdapterSlot slot) const {
    const size_t i = static_cast<size_t>(layer * kNumAdapterSlots + static_cast<int64_t>(slot));
    return i < products_.size() && !products_[i].segments.empty() ? &products_[i] : nullptr;
  }

 private:
  std::vector<uint64_t> ids_;  // of the adapter of each row; 0: none
  std::vector<int32_t> rows_;  // of one adapter after the other
  std::vector<Product> products_;
  AlignedBuffer<float> u_;
  size_t u_size_ = 0;
};

}  // namespace pe
