#include "pe/matmul.h"

#include "bindings/gil.h"
#include "bindings/tensor.h"

namespace py = pybind11;

namespace pe {
namespace {

constexpr Check kCheck{"matmul"};

const Tensor& matrix(const Tensor& t, const char* name) {
  kCheck.dtype(t, name, {DType::f32, DType::bf16});
  return kCheck.shape(t, name, {-1, -1});
}

Matmul product(const Tensor& x, const Tensor& y, int64_t num_cols, DType w_dtype) {
  matrix(x, "x");
  kCheck.dtype(y, "y", {DType::f32, DType::bf16});
  kCheck.shape(y, "y", {x.shape[0], num_cols});
  kCheck.writable(kCheck.unit_stride(y, "y"), "y");
  return {.x = x.data,
          .packed = nullptr,
          .y = y.data,
          .num_rows = x.shape[0],
          .num_cols = num_cols,
          .depth = x.shape[1],
          .x_row_stride = x.strides[0],
          .y_row_stride = y.strides[0],
          .x_dtype = x.dtype,
          .w_dtype = w_dtype,
          .y_dtype = y.dtype,
          .x_col_stride = x.strides[1]};
}

MatmulPack packing(const Tensor& w, DType packed_dtype) {
  matrix(w, "w");
  return {.w = w.data,
          .w_row_stride = w.strides[0],
          .w_col_stride = w.strides[1],
          .num_rows = w.shape[0],
          .num_cols = w.shape[1],
          .w_dtype = w.dtype,
          .packed_dtype = packed_dtype,
          .packed = nullptr};
}

void unpacked(const Tensor& x, const Tensor& w, const Tensor& y) {
  const MatmulPack pack = packing(w, w.dtype);
  const Matmul args = product(x, y, w.shape[0], w.dtype);
  kCheck.shape(w, "w", {-1, x.shape[1]});
  const GilRelease release;
  matmul_unpacked_cpu(args, pack);
}

void pack(const Tensor& w, const Tensor& packed) {
  matrix(w, "w");
  kCheck.dtype(packed, "packed", {DType::f32, DType::bf16});
  kCheck.shape(packed, "packed", {matmul_num_panels(w.shape[0]), w.shape[1], kMatmulPanel});
  kCheck.writable(kCheck.contiguous(packed, "packed"), "packed");
  MatmulPack args = packing(w, packed.dtype);
  args.packed = packed.data;
  const GilRelease release;
  matmul_pack_cpu(args);
}

void packed_product(const Tensor& x, const Tensor& packed, const Tensor& y, bool accumulate) {
  kCheck.dtype(packed, "packed", {DType::f32, DType::bf16});
  kCheck.shape(y, "y", {-1, -1});
  Matmul args = product(x, y, y.shape[1], packed.dtype);
  kCheck.shape(packed, "packed", {matmul_num_panels(args.num_cols), args.depth, kMatmulPanel});
  kCheck.contiguous(packed, "packed");
  if (accumulate) kCheck.dtype(y, "y", {DType::f32});
  args.packed = packed.data;
  args.accumulate = accumulate;
  const GilRelease release;
  matmul_cpu(args);
}

}  // namespace

void bind_matmul(py::module_& m) {
  m.def("matmul_unpacked_cpu", unpacked, py::arg("x"), py::arg("w"), py::arg("y"));
  m.def("matmul_pack_cpu", pack, py::arg("w"), py::arg("packed"));
  m.def("matmul_cpu", packed_product, py::arg("x"), py::arg("packed"), py::arg("y"), py::arg("accumulate") = false);
  m.attr("MATMUL_PANEL") = kMatmulPanel;
}

}  // namespace pe
