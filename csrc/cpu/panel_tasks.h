// How products with packed block weights split their work: rows and panels, never K.
#pragma once
#include <algorithm>
#include <cstdint>

#include "runtime/parallel.h"

namespace pe {

constexpr int64_t kRowsPerTask = 96;                    // what one decoded group serves
constexpr int64_t kPreparedElementsPerTask = 8 * 1024;  // of x, about a microsecond

// Calls tile(row_begin, row_end, panel_begin, panel_end) so that each pair of a row and a panel is covered once.
template <class Tile>
void parallel_for_tiles(int64_t num_rows, int64_t num_panels, int64_t panel_bytes, const Tile& tile) {
  // A few panels go through the registers together. More in one task keep the stream going; fewer balance.
  constexpr int64_t kTogether = 4, kTaskBytes = 128 * 1024, kTasksPerThread = 6;
  const int64_t streamed = kTaskBytes / std::max<int64_t>(panel_bytes, 1);
  const int64_t balanced = num_panels / (kTasksPerThread * num_threads());
  const int64_t panels = std::max<int64_t>(1, std::min(streamed, balanced) / kTogether) * kTogether;
  const int64_t row_tasks = (num_rows + kRowsPerTask - 1) / kRowsPerTask;
  const int64_t panel_tasks = (num_panels + panels - 1) / panels;
  parallel_for(row_tasks * panel_tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / panel_tasks * kRowsPerTask, panel = task % panel_tasks * panels;
      tile(row, std::min(row + kRowsPerTask, num_rows), panel, std::min(panel + panels, num_panels));
    }
  });
}

}  // namespace pe
