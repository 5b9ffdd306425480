// Chooses the ISA level and splits the segments over threads.
#include "pe/lora.h"

#include <algorithm>
#include <vector>

#include "runtime/dispatch.h"
#include "runtime/parallel.h"

namespace pe {
namespace {

constexpr IsaEntry<LoraIsa> kIsas[] = {PE_ISA_ENTRIES_VECTOR(lora)};

// A tile multiplies about this many weights per row: long enough to hide the hand-off, short enough to balance.
constexpr int64_t kWeightsPerTile = 16 * 1024;
constexpr int64_t kRowsPerTile = 32;

// How a product of a segment is cut; rows run fastest, so that neighbouring tiles share panels.
struct Cut {
  int64_t num_panels, panels, row_tiles;

  Cut(const Lora& args, LoraProduct product) {
    const bool shrinks = product == LoraProduct::shrink;
    num_panels = matmul_num_panels(shrinks ? args.rank : args.num_cols);
    const int64_t panel_weights = std::max<int64_t>((shrinks ? args.depth : args.rank) * kMatmulPanel, 1);
    panels = std::max<int64_t>(kWeightsPerTile / panel_weights / 8 * 8, shrinks ? 1 : 8);
    row_tiles = (args.num_rows + kRowsPerTile - 1) / kRowsPerTile;
  }
  int64_t num_tiles() const { return row_tiles * ((num_panels + panels - 1) / panels); }
  LoraTile tile(int64_t i, int64_t num_rows) const {
    const int64_t row = i % row_tiles * kRowsPerTile, panel = i / row_tiles * panels;
    return {row, std::min(row + kRowsPerTile, num_rows), panel, std::min(panel + panels, num_panels)};
  }
};

}  // namespace

const LoraIsa& lora_isa() { return select(kIsas); }

void lora_number_tiles(const Lora* segments, int64_t num_segments, LoraProduct product, int64_t* first) {
  first[0] = 0;
  for (int64_t s = 0; s < num_segments; ++s) first[s + 1] = first[s] + Cut(segments[s], product).num_tiles();
}

void lora_run_tiles(const Lora* segments, int64_t num_segments, LoraProduct product, const int64_t* first,
                    int64_t tile_begin, int64_t tile_end) {
  const auto compute = product == LoraProduct::shrink ? lora_isa().shrink : lora_isa().expand;
  int64_t s = std::upper_bound(first, first + num_segments, tile_begin) - first - 1;
  for (int64_t i = tile_begin; i < tile_end; ++i) {
    while (first[s + 1] <= i) ++s;
    compute(segments[s], Cut(segments[s], product).tile(i - first[s], segments[s].num_rows));
  }
}

void lora_cpu(const Lora* segments, int64_t num_segments) {
  std::vector<int64_t> first(static_cast<size_t>(num_segments) + 1);
  for (const LoraProduct product : {LoraProduct::shrink, LoraProduct::expand}) {
    lora_number_tiles(segments, num_segments, product, first.data());
    parallel_for(first.back(), 1, [&](int64_t begin, int64_t end) {
      lora_run_tiles(segments, num_segments, product, first.data(), begin, end);
    });
  }
}

}  // namespace pe
