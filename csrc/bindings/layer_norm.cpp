#include "pe/layer_norm.h"

#include <optional>

#include "bindings/gil.h"
#include "bindings/tensor.h"

namespace py = pybind11;

namespace pe {
namespace {

constexpr Check kCheck{"layer_norm"};

const Tensor& vector(const Tensor& t, const char* name, DType dtype, int64_t size) {
  kCheck.dtype(t, name, {dtype});
  return kCheck.contiguous(kCheck.shape(t, name, {size}), name);
}

void fwd(const Tensor& x, const std::optional<Tensor>& residual, const Tensor& weight,
         const std::optional<Tensor>& bias, const std::optional<Tensor>& h, const Tensor& y,
         const std::optional<Tensor>& mean, const std::optional<Tensor>& rstd, float eps) {
  kCheck.dtype(x, "x", {DType::f32, DType::bf16});
  kCheck.shape(x, "x", {-1, -1});
  const int64_t num_rows = x.shape[0], num_cols = x.shape[1];
  kCheck.unit_stride(x, "x");
  vector(weight, "weight", x.dtype, num_cols);
  if (bias) vector(*bias, "bias", x.dtype, num_cols);
  kCheck.writable(kCheck.rows(y, "y", x.dtype, num_rows, num_cols), "y");
  if (residual.has_value() != h.has_value())
    kCheck.fail("h", "an output exactly when there is a residual", "the other");
  if (residual) {
    kCheck.rows(*residual, "residual", x.dtype, num_rows, num_cols);
    kCheck.writable(kCheck.rows(*h, "h", x.dtype, num_rows, num_cols), "h");
  }
  if (mean) kCheck.writable(vector(*mean, "mean", DType::f32, num_rows), "mean");
  if (rstd) kCheck.writable(vector(*rstd, "rstd", DType::f32, num_rows), "rstd");
  const GilRelease release;
  layer_norm_fwd_cpu({.x = x.data,
                      .residual = residual ? residual->data : nullptr,
                      .weight = weight.data,
                      .bias = bias ? bias->data : nullptr,
                      .h = h ? h->data : nullptr,
                      .y = y.data,
                      .mean = mean ? mean->ptr<float>() : nullptr,
                      .rstd = rstd ? rstd->ptr<float>() : nullptr,
                      .num_rows = num_rows,
                      .num_cols = num_cols,
                      .x_row_stride = x.strides[0],
                      .residual_row_stride = residual ? residual->strides[0] : 0,
                      .h_row_stride = h ? h->strides[0] : 0,
                      .y_row_stride = y.strides[0],
                      .eps = eps,
                      .dtype = x.dtype});
}

void bwd(const Tensor& grad_y, const std::optional<Tensor>& grad_h_in, const Tensor& h, const Tensor& weight,
         const Tensor& mean, const Tensor& rstd, const Tensor& grad_h, const Tensor& grad_weight,
         const std::optional<Tensor>& grad_bias) {
  kCheck.dtype(h, "h", {DType::f32, DType::bf16});
  kCheck.shape(h, "h", {-1, -1});
  const int64_t num_rows = h.shape[0], num_cols = h.shape[1];
  kCheck.unit_stride(h, "h");
  kCheck.rows(grad_y, "grad_y", h.dtype, num_rows, num_cols);
  if (grad_h_in) kCheck.rows(*grad_h_in, "grad_h_in", h.dtype, num_rows, num_cols);
  vector(weight, "weight", h.dtype, num_cols);
  vector(mean, "mean", DType::f32, num_rows);
  vector(rstd, "rstd", DType::f32, num_rows);
  kCheck.writable(kCheck.rows(grad_h, "grad_h", h.dtype, num_rows, num_cols), "grad_h");
  kCheck.writable(vector(grad_weight, "grad_weight", h.dtype, num_cols), "grad_weight");
  if (grad_bias) kCheck.writable(vector(*grad_bias, "grad_bias", h.dtype, num_cols), "grad_bias");
  const GilRelease release;
  layer_norm_bwd_cpu({.grad_y = grad_y.data,
                      .grad_h_in = grad_h_in ? grad_h_in->data : nullptr,
                      .h = h.data,
                      .weight = weight.data,
                      .mean = mean.ptr<float>(),
                      .rstd = rstd.ptr<float>(),
                      .grad_h = grad_h.data,
                      .grad_weight = grad_weight.data,
                      .grad_bias = grad_bias ? grad_bias->data : nullptr,
                      .num_rows = num_rows,
                      .num_cols = num_cols,
                      .grad_y_row_stride = grad_y.strides[0],
                      .grad_h_in_row_stride = grad_h_in ? grad_h_in->strides[0] : 0,
                      .h_row_stride = h.strides[0],
                      .grad_h_row_stride = grad_h.strides[0],
                      .dtype = h.dtype});
}

}  // namespace

void bind_layer_norm(py::module_& m) {
  m.def("layer_norm_fwd_cpu", fwd, py::arg("x"), py::arg("residual"), py::arg("weight"), py::arg("bias"), py::arg("h"),
        py::arg("y"), py::arg("mean"), py::arg("rstd"), py::arg("eps"));
  m.def("layer_norm_bwd_cpu", bwd, py::arg("grad_y"), py::arg("grad_h_in"), py::arg("h"), py::arg("weight"),
        py::arg("mean"), py::arg("rstd"), py::arg("grad_h"), py::arg("grad_weight"), py::arg("grad_bias"));
}

}  // namespace pe
