// Chooses the ISA level and splits the columns and the rows over threads.
#include "pe/matmul.h"

#include <algorithm>
#include <string>
#include <type_traits>

#include "runtime/aligned_buffer.h"
#include "runtime/checked.h"
#include "runtime/dispatch.h"
#include "runtime/error.h"
#include "runtime/parallel.h"

namespace pe {
namespace {

constexpr IsaEntry<MatmulIsa> kIsas[] = {
#if defined(__x86_64__)
    {Isa::amx, &amx::matmul},
    {Isa::avx512_bf16, &avx512_bf16::matmul},
#endif
    PE_ISA_ENTRIES_VECTOR(matmul)};
// Whole tiles of rows at every ISA level.
constexpr int64_t kRowsPerTask = 192;
// A task packs or streams about this many elements: long enough to hide the hand-off, short enough to balance.
constexpr int64_t kElementsPerTask = 64 * 1024;
constexpr int64_t kMaxPanelsPerTask = 8;

size_t element_bytes(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

template <class T>
T* advance(T* pointer, int64_t elements, DType dtype) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return static_cast<Byte*>(pointer) + elements * static_cast<int64_t>(element_bytes(dtype));
}

int64_t panels_per_task(int64_t depth) {
  const int64_t panels = kElementsPerTask / std::max<int64_t>(depth * kMatmulPanel, 1);
  return std::clamp<int64_t>(panels / 4 * 4, 4, kMaxPanelsPerTask);
}

}  // namespace

const MatmulIsa& matmul_isa() { return select(kIsas); }

int64_t matmul_num_panels(int64_t num_rows) { return num_rows / kMatmulPanel + (num_rows % kMatmulPanel != 0); }

size_t matmul_packed_bytes(int64_t num_rows, int64_t num_cols, DType packed_dtype) {
  const Checked bytes = Checked(matmul_num_panels(num_rows)) * kMatmulPanel * num_cols * element_bytes(packed_dtype);
  return static_cast<size_t>(bytes.get_or<int64_t>([&] {
    throw ArgumentError("w: expected a size that fits 63 bits when packed, got " + std::to_string(num_rows) + " x " +
                        std::to_string(num_cols));
  }));
}

void matmul_pack_cpu(const MatmulPack& args) {
  const MatmulIsa& isa = select(kIsas);
  parallel_for(matmul_num_panels(args.num_rows), panels_per_task(args.num_cols),
               [&](int64_t begin, int64_t end) { isa.pack(args, begin, end); });
}

void matmul_cpu(const Matmul& args) {
  const MatmulIsa& isa = select(kIsas);
  const int64_t num_panels = matmul_num_panels(args.num_cols), panels = panels_per_task(args.depth);
  const int64_t row_tasks = (args.num_rows + kRowsPerTask - 1) / kRowsPerTask;
  const int64_t panel_tasks = (num_panels + panels - 1) / panels;
  parallel_for(row_tasks * panel_tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      // Neighbouring tasks share panels.
      const int64_t row = task % row_tasks * kRowsPerTask, panel = task / row_tasks * panels;
      isa.tile(args, row, std::min(row + kRowsPerTask, args.num_rows), panel, std::min(panel + panels, num_panels));
    }
  });
}

void matmul_unpacked_cpu(const Matmul& args, const MatmulPack& w) {
  if (args.num_rows == 0 || args.num_cols == 0) return;
  const size_t panel_bytes = matmul_packed_bytes(1, args.depth, w.packed_dtype);
  const int64_t num_panels = matmul_num_panels(args.num_cols);
  const int64_t panels = std::min(
      num_panels, std::max<int64_t>(1, static_cast<int64_t>(kMatmulScratchBytes / std::max<size_t>(panel_bytes, 1))));
  AlignedBuffer<char> scratch(static_cast<size_t>(panels) * panel_bytes);
  for (int64_t panel = 0; panel < num_panels; panel += panels) {
    const int64_t col = panel * kMatmulPanel, num_cols = std::min(panels * kMatmulPanel, args.num_cols - col);
    MatmulPack part = w;
    part.w = advance(w.w, col * w.w_row_stride, w.w_dtype);
    part.num_rows = num_cols;
    part.packed = scratch.data();
    matmul_pack_cpu(part);
    Matmul product = args;
    product.packed = scratch.data();
    product.y = advance(args.y, col, args.y_dtype);
    product.num_cols = num_cols;
    matmul_cpu(product);
  }
}

}  // namespace pe
