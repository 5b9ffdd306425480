#include "pe/matmul_w4a16.h"

#include "bindings/block_weights.h"
#include "bindings/gil.h"
#include "bindings/tensor.h"

namespace py = pybind11;

namespace pe {
namespace {

constexpr Check kCheck{"matmul_w4a16"};

void matmul(const Tensor& x, const Tensor& packed, const std::string& block_format, const Tensor& y, bool round_x) {
  kCheck.dtype(x, "x", {DType::f32, DType::bf16});
  kCheck.unit_stride(kCheck.shape(x, "x", {-1, -1}), "x");
  if (round_x) kCheck.dtype(x, "x", {DType::f32});
  kCheck.dtype(y, "y", {DType::f32, DType::bf16});
  kCheck.unit_stride(kCheck.shape(y, "y", {x.shape[0], -1}), "y");
  kCheck.writable(y, "y");
  const BlockWeights weight = read_block_weights(kCheck, packed, block_format, y.shape[1], x.shape[1]);
  const GilRelease release;
  matmul_w4a16_cpu({.x = x.data,
                    .weight = weight,
                    .y = y.data,
                    .workspace = nullptr,
                    .num_rows = x.shape[0],
                    .x_row_stride = x.strides[0],
                    .y_row_stride = y.strides[0],
                    .x_dtype = x.dtype,
                    .y_dtype = y.dtype,
                    .round_x = round_x});
}

}  // namespace

void bind_matmul_w4a16(py::module_& m) {
  m.def("matmul_w4a16_cpu", matmul, py::arg("x"), py::arg("packed"), py::arg("block_format"), py::arg("y"),
        py::kw_only(), py::arg("round_x") = false);
}

}  // namespace pe
