#include "pe/op_name.h"

#include "bindings/gil.h"
#include "bindings/tensor.h"

namespace py = pybind11;

namespace pe {
namespace {

constexpr Check kCheck{"op_name"};

void fwd(const Tensor& x, const Tensor& y) {
  kCheck.dtype(x, "x", {DType::f32, DType::bf16});
  kCheck.unit_stride(kCheck.shape(x, "x", {-1, -1}), "x");
  const int64_t num_rows = x.shape[0], num_cols = x.shape[1];
  kCheck.writable(kCheck.rows(y, "y", x.dtype, num_rows, num_cols), "y");
  const OpNameFwd args{
      .x = x.data,
      .y = y.data,
      .num_rows = num_rows,
      .num_cols = num_cols,
      .x_row_stride = x.strides[0],
      .y_row_stride = y.strides[0],
      .dtype = x.dtype,
  };
  const GilRelease release;
  op_name_fwd_cpu(args);
}

void bwd(const Tensor& grad_y, const Tensor& grad_x) {
  kCheck.dtype(grad_y, "grad_y", {DType::f32, DType::bf16});
  kCheck.unit_stride(kCheck.shape(grad_y, "grad_y", {-1, -1}), "grad_y");
  const int64_t num_rows = grad_y.shape[0], num_cols = grad_y.shape[1];
  kCheck.writable(kCheck.rows(grad_x, "grad_x", grad_y.dtype, num_rows, num_cols), "grad_x");
  const OpNameBwd args{
      .grad_y = grad_y.data,
      .grad_x = grad_x.data,
      .num_rows = num_rows,
      .num_cols = num_cols,
      .grad_y_row_stride = grad_y.strides[0],
      .grad_x_row_stride = grad_x.strides[0],
      .dtype = grad_y.dtype,
  };
  const GilRelease release;
  op_name_bwd_cpu(args);
}

}  // namespace

void bind_op_name(py::module_& m) {
  m.def("op_name_fwd_cpu", fwd, py::arg("x"), py::arg("y"));
  m.def("op_name_bwd_cpu", bwd, py::arg("grad_y"), py::arg("grad_x"));
}

}  // namespace pe
