#include "pe/linear_cross_entropy.h"

#include <optional>

#include "bindings/gil.h"
#include "bindings/tensor.h"

namespace py = pybind11;

namespace pe {
namespace {

constexpr Check kCheck{"linear_cross_entropy"};

void check_inputs(const Tensor& x, const Tensor& w, const Tensor& targets) {
  kCheck.dtype(x, "x", {DType::f32, DType::bf16});
  kCheck.unit_stride(kCheck.shape(x, "x", {-1, -1}), "x");
  kCheck.dtype(w, "w", {x.dtype});
  kCheck.unit_stride(kCheck.shape(w, "w", {-1, x.shape[1]}), "w");
  kCheck.dtype(targets, "targets", {DType::i64});
  kCheck.contiguous(kCheck.shape(targets, "targets", {x.shape[0]}), "targets");
}

const Tensor& per_token(const Tensor& t, const char* name, int64_t num_tokens) {
  kCheck.dtype(t, name, {DType::f32});
  return kCheck.contiguous(kCheck.shape(t, name, {num_tokens}), name);
}

void fwd(const Tensor& x, const Tensor& w, const Tensor& targets, const Tensor& nll, const Tensor& lse,
         int64_t ignore_index) {
  check_inputs(x, w, targets);
  kCheck.writable(per_token(nll, "nll", x.shape[0]), "nll");
  kCheck.writable(per_token(lse, "lse", x.shape[0]), "lse");
  const GilRelease release;
  linear_cross_entropy_fwd_cpu({.x = x.data,
                                .w = w.data,
                                .targets = targets.ptr<int64_t>(),
                                .nll = nll.ptr<float>(),
                                .lse = lse.ptr<float>(),
                                .num_tokens = x.shape[0],
                                .num_channels = x.shape[1],
                                .vocab_size = w.shape[0],
                                .x_row_stride = x.strides[0],
                                .w_row_stride = w.strides[0],
                                .ignore_index = ignore_index,
                                .dtype = x.dtype});
}

void bwd(const Tensor& grad_nll, const Tensor& x, const Tensor& w, const Tensor& targets, const Tensor& lse,
         const std::optional<Tensor>& grad_x, const std::optional<Tensor>& grad_w, int64_t ignore_index) {
  check_inputs(x, w, targets);
  per_token(grad_nll, "grad_nll", x.shape[0]);
  per_token(lse, "lse", x.shape[0]);
  if (grad_x) kCheck.writable(kCheck.rows(*grad_x, "grad_x", x.dtype, x.shape[0], x.shape[1]), "grad_x");
  if (grad_w) kCheck.writable(kCheck.rows(*grad_w, "grad_w", x.dtype, w.shape[0], w.shape[1]), "grad_w");
  const GilRelease release;
  linear_cross_entropy_bwd_cpu({.grad_nll = grad_nll.ptr<float>(),
                                .x = x.data,
                                .w = w.data,
                                .targets = targets.ptr<int64_t>(),
                                .lse = lse.ptr<float>(),
                                .grad_x = grad_x ? grad_x->data : nullptr,
                                .grad_w = grad_w ? grad_w->data : nullptr,
                                .num_tokens = x.shape[0],
                                .num_channels = x.shape[1],
                                .vocab_size = w.shape[0],
                                .x_row_stride = x.strides[0],
                                .w_row_stride = w.strides[0],
                                .grad_x_row_stride = grad_x ? grad_x->strides[0] : 0,
                                .grad_w_row_stride = grad_w ? grad_w->strides[0] : 0,
                                .ignore_index = ignore_index,
                                .dtype = x.dtype});
}

float lse_of_row(const Tensor& logits) {
  kCheck.dtype(logits, "logits", {DType::f32});
  kCheck.contiguous(kCheck.shape(logits, "logits", {-1}), "logits");
  return row_lse_cpu(logits.ptr<float>(), logits.shape[0]);
}

}  // namespace

void bind_linear_cross_entropy(py::module_& m) {
  m.def("linear_cross_entropy_fwd_cpu", fwd, py::arg("x"), py::arg("w"), py::arg("targets"), py::arg("nll"),
        py::arg("lse"), py::arg("ignore_index"));
  m.def("linear_cross_entropy_bwd_cpu", bwd, py::arg("grad_nll"), py::arg("x"), py::arg("w"), py::arg("targets"),
        py::arg("lse"), py::arg("grad_x"), py::arg("grad_w"), py::arg("ignore_index"));
  m.def("row_lse_cpu", lse_of_row, py::arg("logits"));
}

}  // namespace pe
