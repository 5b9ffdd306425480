#include "pe/swiglu.h"

#include "bindings/gil.h"
#include "bindings/tensor.h"

namespace py = pybind11;

namespace pe {
namespace {

constexpr Check kCheck{"swiglu"};

GateActivation parse_activation(const std::string& name) {
  if (name == "silu") return GateActivation::silu;
  if (name != "gelu_tanh") kCheck.fail("activation", "'silu' or 'gelu_tanh'", "'" + name + "'");
  return GateActivation::gelu_tanh;
}

void fwd(const Tensor& gate, const Tensor& up, const Tensor& y, const std::string& activation_name) {
  const GateActivation activation = parse_activation(activation_name);
  kCheck.dtype(gate, "gate", {DType::f32, DType::bf16});
  kCheck.unit_stride(kCheck.shape(gate, "gate", {-1, -1}), "gate");
  const int64_t num_rows = gate.shape[0], num_cols = gate.shape[1];
  kCheck.rows(up, "up", gate.dtype, num_rows, num_cols);
  kCheck.writable(kCheck.rows(y, "y", gate.dtype, num_rows, num_cols), "y");
  const GilRelease release;
  swiglu_fwd_cpu({.gate = gate.data,
                  .up = up.data,
                  .y = y.data,
                  .num_rows = num_rows,
                  .num_cols = num_cols,
                  .gate_row_stride = gate.strides[0],
                  .up_row_stride = up.strides[0],
                  .y_row_stride = y.strides[0],
                  .activation = activation,
                  .dtype = gate.dtype});
}

void bwd(const Tensor& grad_y, const Tensor& gate, const Tensor& up, const Tensor& grad_gate, const Tensor& grad_up,
         const std::string& activation_name) {
  const GateActivation activation = parse_activation(activation_name);
  kCheck.dtype(gate, "gate", {DType::f32, DType::bf16});
  kCheck.unit_stride(kCheck.shape(gate, "gate", {-1, -1}), "gate");
  const int64_t num_rows = gate.shape[0], num_cols = gate.shape[1];
  kCheck.rows(grad_y, "grad_y", gate.dtype, num_rows, num_cols);
  kCheck.rows(up, "up", gate.dtype, num_rows, num_cols);
  kCheck.writable(kCheck.rows(grad_gate, "grad_gate", gate.dtype, num_rows, num_cols), "grad_gate");
  kCheck.writable(kCheck.rows(grad_up, "grad_up", gate.dtype, num_rows, num_cols), "grad_up");
  const GilRelease release;
  swiglu_bwd_cpu({.grad_y = grad_y.data,
                  .gate = gate.data,
                  .up = up.data,
                  .grad_gate = grad_gate.data,
                  .grad_up = grad_up.data,
                  .num_rows = num_rows,
                  .num_cols = num_cols,
                  .grad_y_row_stride = grad_y.strides[0],
                  .gate_row_stride = gate.strides[0],
                  .up_row_stride = up.strides[0],
                  .grad_gate_row_stride = grad_gate.strides[0],
                  .grad_up_row_stride = grad_up.strides[0],
                  .activation = activation,
                  .dtype = gate.dtype});
}

}  // namespace

void bind_swiglu(py::module_& m) {
  m.def("swiglu_fwd_cpu", fwd, py::arg("gate"), py::arg("up"), py::arg("y"), py::arg("activation") = "silu");
  m.def("swiglu_bwd_cpu", bwd, py::arg("grad_y"), py::arg("gate"), py::arg("up"), py::arg("grad_gate"),
        py::arg("grad_up"), py::arg("activation") = "silu");
}

}  // namespace pe
