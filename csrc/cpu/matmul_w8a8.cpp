// Packs weights, chooses the ISA level, splits rows and panels over threads; never K.
#include "pe/matmul_w8a8.h"

#include <algorithm>
#include <atomic>
#include <string>
#include <vector>

#include "runtime/dispatch.h"
#include "runtime/error.h"
#include "runtime/parallel.h"

namespace pe {
namespace {

#if defined(__x86_64__)
constexpr IsaEntry<MatmulW8A8Isa> kIsas[] = {
    {Isa::amx, &amx::matmul_w8a8}, {Isa::avx512_vnni, &avx512_vnni::matmul_w8a8}, PE_ISA_ENTRIES_VECTOR(matmul_w8a8)};
#else
constexpr IsaEntry<MatmulW8A8Isa> kIsas[] = {PE_ISA_ENTRIES_VECTOR(matmul_w8a8)};
#endif

// A task holds at most 256 KiB of weights, a quarter of L2, and runs these rows over them.
constexpr int64_t kTaskWeightBytes = 256 * 1024;
constexpr int64_t kTaskRows = 96;
constexpr int64_t kTaskPanels = 4;  // and a multiple of these panels: one register tile
constexpr int64_t kTasksPerThread = 4;
constexpr int64_t kSumElementsPerTask = 256 * 1024;

}  // namespace

const MatmulW8A8Isa& matmul_w8a8_isa() { return select(kIsas); }

void matmul_w8a8_cpu(const MatmulW8A8& args) {
  const MatmulW8A8Isa& isa = select(kIsas);
  std::vector<int32_t> x_sum(static_cast<size_t>(args.m));
  parallel_for(args.m, 1 + kSumElementsPerTask / std::max<int64_t>(args.k, 1), [&](int64_t begin, int64_t end) {
    isa.x_sum(args.x, args.x_row_stride, args.k, begin, end, x_sum.data());
  });
  MatmulW8A8 run = args;
  run.x_sum = x_sum.data();

  const int64_t num_panels = matmul_w8a8_num_panels(args.n);
  const int64_t panel_bytes = std::max<int64_t>(matmul_w8a8_num_steps(args.k) * 64, 1);
  const int64_t fair_panels = num_panels / (num_threads() * kTasksPerThread);
  const int64_t task_panels =
      std::max(std::min(kTaskWeightBytes / panel_bytes, fair_panels) / kTaskPanels, int64_t{1}) * kTaskPanels;
  const int64_t num_row_blocks = (args.m + kTaskRows - 1) / kTaskRows;
  const int64_t num_panel_blocks = (num_panels + task_panels - 1) / task_panels;
  parallel_for(num_panel_blocks * num_row_blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task % num_row_blocks * kTaskRows, panel = task / num_row_blocks * task_panels;
      isa.tile(run, row, std::min(row + kTaskRows, args.m), panel, std::min(panel + task_panels, num_panels));
    }
  });
}

void matmul_w8a8_pack_cpu(const int8_t* w, int64_t n, int64_t k, uint8_t* packed) {
  const int64_t num_steps = matmul_w8a8_num_steps(k);
  std::atomic<int64_t> bad{-1};
  parallel_for(matmul_w8a8_num_panels(n), 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      uint8_t* out = packed + panel * num_steps * 64;
      for (int64_t s = 0; s < num_steps; ++s) {
        for (int64_t c = 0; c < kMatmulW8A8PanelRows; ++c) {
          for (int64_t j = 0; j < kMatmulW8A8Step; ++j) {
            const int64_t row = panel * kMatmulW8A8PanelRows + c, col = s * kMatmulW8A8Step + j;
            const int value = row < n && col < k ? w[row * k + col] : 0;
            if (value == -128) bad.store(row, std::memory_order_relaxed);
            *out++ = static_cast<uint8_t>(value + 128);
          }
        }
      }
    }
  });
  if (bad.load() >= 0)
    throw ArgumentError("[matmul_w8a8] w: expected values from -127 to 127, got -128 in row " +
                        std::to_string(bad.load()));
}

}  // namespace pe
