#include "pe/gelu.h"

#include "bindings/gil.h"
#include "bindings/tensor.h"

namespace py = pybind11;

namespace pe {
namespace {

constexpr Check kCheck{"gelu"};

GeluForm parse_form(const std::string& approximate) {
  if (approximate == "none") return GeluForm::erf;
  if (approximate != "tanh") kCheck.fail("approximate", "'none' or 'tanh'", "'" + approximate + "'");
  return GeluForm::tanh;
}

void fwd(const Tensor& x, const Tensor& y, const std::string& approximate) {
  const GeluForm form = parse_form(approximate);
  kCheck.dtype(x, "x", {DType::f32, DType::bf16});
  kCheck.unit_stride(kCheck.shape(x, "x", {-1, -1}), "x");
  kCheck.writable(kCheck.rows(y, "y", x.dtype, x.shape[0], x.shape[1]), "y");
  const GilRelease release;
  gelu_fwd_cpu({.x = x.data,
                .y = y.data,
                .num_rows = x.shape[0],
                .num_cols = x.shape[1],
                .x_row_stride = x.strides[0],
                .y_row_stride = y.strides[0],
                .form = form,
                .dtype = x.dtype});
}

void bwd(const Tensor& grad_y, const Tensor& x, const Tensor& grad_x, const std::string& approximate) {
  const GeluForm form = parse_form(approximate);
  kCheck.dtype(x, "x", {DType::f32, DType::bf16});
  kCheck.unit_stride(kCheck.shape(x, "x", {-1, -1}), "x");
  kCheck.rows(grad_y, "grad_y", x.dtype, x.shape[0], x.shape[1]);
  kCheck.writable(kCheck.rows(grad_x, "grad_x", x.dtype, x.shape[0], x.shape[1]), "grad_x");
  const GilRelease release;
  gelu_bwd_cpu({.grad_y = grad_y.data,
                .x = x.data,
                .grad_x = grad_x.data,
                .num_rows = x.shape[0],
                .num_cols = x.shape[1],
                .grad_y_row_stride = grad_y.strides[0],
                .x_row_stride = x.strides[0],
                .grad_x_row_stride = grad_x.strides[0],
                .form = form,
                .dtype = x.dtype});
}

}  // namespace

void bind_gelu(py::module_& m) {
  m.def("gelu_fwd_cpu", fwd, py::arg("x"), py::arg("y"), py::arg("approximate") = "none");
  m.def("gelu_bwd_cpu", bwd, py::arg("grad_y"), py::arg("x"), py::arg("grad_x"), py::arg("approximate") = "none");
}

}  // namespace pe
