#include "pe/lora.h"

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "bindings/gil.h"
#include "bindings/tensor.h"
#include "runtime/aligned_buffer.h"

namespace py = pybind11;

namespace pe {
namespace {

constexpr Check kCheck{"lora"};

MatmulPack packing(const Tensor& w) {
  return {.w = w.data,
          .w_row_stride = w.strides[0],
          .w_col_stride = w.strides[1],
          .num_rows = w.shape[0],
          .num_cols = w.shape[1],
          .w_dtype = w.dtype,
          .packed_dtype = w.dtype,
          .packed = nullptr};
}

// The rows of each adapter, ascending; all rows for a single adapter without numbers.
std::vector<std::vector<int32_t>> rows_of_adapters(const std::optional<Tensor>& adapter_of_row, int64_t num_rows,
                                                   size_t num_adapters) {
  std::vector<std::vector<int32_t>> rows(num_adapters);
  if (!adapter_of_row) {
    if (num_adapters != 1) kCheck.fail("adapter_of_row", "a number per row beside several adapters", "None");
    for (int64_t r = 0; r < num_rows; ++r) rows[0].push_back(static_cast<int32_t>(r));
    return rows;
  }
  kCheck.dtype(*adapter_of_row, "adapter_of_row", {DType::i32});
  kCheck.contiguous(kCheck.shape(*adapter_of_row, "adapter_of_row", {num_rows}), "adapter_of_row");
  for (int64_t r = 0; r < num_rows; ++r) {
    const int32_t adapter = adapter_of_row->ptr<int32_t>()[r];
    if (adapter < -1 || adapter >= static_cast<int64_t>(num_adapters))
      kCheck.fail("adapter_of_row", "-1 to " + std::to_string(num_adapters - 1),
                  std::to_string(adapter) + " at row " + std::to_string(r));
    if (adapter >= 0) rows[static_cast<size_t>(adapter)].push_back(static_cast<int32_t>(r));
  }
  return rows;
}

// y += the adapters' products, row by row; u, if given, takes the products with a.
void add(const Tensor& y, const Tensor& x, const std::vector<Tensor>& a, const std::vector<Tensor>& b,
         const std::vector<float>& scales, const std::optional<Tensor>& adapter_of_row,
         const std::optional<Tensor>& u) {
  kCheck.dtype(x, "x", {DType::f32, DType::bf16});
  kCheck.unit_stride(kCheck.shape(x, "x", {-1, -1}), "x");
  const int64_t num_rows = x.shape[0], depth = x.shape[1];
  kCheck.dtype(y, "y", {x.dtype});
  kCheck.writable(kCheck.unit_stride(kCheck.shape(y, "y", {num_rows, -1}), "y"), "y");
  if (num_rows > INT32_MAX) kCheck.fail("x", "at most 2^31 - 1 rows", std::to_string(num_rows));
  if (b.size() != a.size()) kCheck.fail("b", std::to_string(a.size()) + ", one per adapter", std::to_string(b.size()));
  if (scales.size() != a.size())
    kCheck.fail("scales", std::to_string(a.size()) + ", one per adapter", std::to_string(scales.size()));
  const int64_t num_cols = y.shape[1];
  int64_t u_width = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    kCheck.dtype(a[i], "a", {DType::f32, DType::bf16});
    kCheck.shape(a[i], "a", {-1, depth});
    const int64_t rank = a[i].shape[0];
    if (rank < 1 || rank > kLoraMaxRank)
      kCheck.fail("a", "1 to " + std::to_string(kLoraMaxRank) + " rows", std::to_string(rank));
    kCheck.dtype(b[i], "b", {DType::f32, DType::bf16});
    kCheck.shape(b[i], "b", {num_cols, rank});
    u_width = std::max(u_width, matmul_num_panels(rank) * kMatmulPanel);
  }
  if (u) {
    kCheck.dtype(*u, "u", {DType::f32});
    kCheck.writable(kCheck.contiguous(kCheck.shape(*u, "u", {num_rows, u_width}), "u"), "u");
  }
  const auto rows = rows_of_adapters(adapter_of_row, num_rows, a.size());

  const GilRelease release;
  std::vector<Lora> segments;
  std::vector<AlignedBuffer<char>> packed;
  AlignedBuffer<float> scratch(u ? 0 : static_cast<size_t>(num_rows * u_width));
  for (size_t i = 0; i < a.size(); ++i) {
    if (rows[i].empty()) continue;
    MatmulPack halves[] = {packing(a[i]), packing(b[i])};
    for (MatmulPack& half : halves) {
      packed.emplace_back(matmul_packed_bytes(half.num_rows, half.num_cols, half.packed_dtype));
      half.packed = packed.back().data();
      matmul_pack_cpu(half);
    }
    const int64_t rank = a[i].shape[0];
    segments.push_back({.x = x.data,
                        .y = y.data,
                        .rows = rows[i].data(),
                        .a = halves[0].packed,
                        .b = halves[1].packed,
                        .u = u ? u->ptr<float>() : scratch.data(),
                        .num_rows = static_cast<int64_t>(rows[i].size()),
                        .depth = depth,
                        .num_cols = num_cols,
                        .rank = rank,
                        .x_row_stride = x.strides[0],
                        .y_row_stride = y.strides[0],
                        .u_row_stride = u_width,
                        .scale = scales[i],
                        .dtype = x.dtype,
                        .a_dtype = a[i].dtype,
                        .b_dtype = b[i].dtype});
  }
  lora_cpu(segments.data(), static_cast<int64_t>(segments.size()));
}

}  // namespace

void bind_lora(py::module_& m) {
  m.def("lora_cpu", add, py::arg("y"), py::arg("x"), py::arg("a"), py::arg("b"), py::arg("scales"),
        py::arg("adapter_of_row") = py::none(), py::arg("u") = py::none());
}

}  // namespace pe
