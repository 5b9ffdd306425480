#include "pe/matmul_w8a8.h"

#include "bindings/tensor.h"

namespace py = pybind11;

namespace pe {
namespace {

constexpr Check kCheck{"matmul_w8a8"};

void check_packed(const Tensor& packed, int64_t n, int64_t k) {
  if (k > kMatmulW8A8MaxK) kCheck.fail("x", "at most 131072 columns", std::to_string(k));
  kCheck.dtype(packed, "packed", {DType::u8});
  kCheck.shape(packed, "packed",
               {matmul_w8a8_num_panels(n), matmul_w8a8_num_steps(k), kMatmulW8A8PanelRows, kMatmulW8A8Step});
  kCheck.contiguous(packed, "packed");
}

void pack(const Tensor& w, const Tensor& packed) {
  kCheck.dtype(w, "w", {DType::i8});
  kCheck.contiguous(kCheck.shape(w, "w", {-1, -1}), "w");
  check_packed(packed, w.shape[0], w.shape[1]);
  kCheck.writable(packed, "packed");
  const py::gil_scoped_release release;
  matmul_w8a8_pack_cpu(w.ptr<int8_t>(), w.shape[0], w.shape[1], packed.ptr<uint8_t>());
}

void matmul(const Tensor& x, const Tensor& x_scale, const Tensor& packed, const Tensor& w_scale, const Tensor& y) {
  kCheck.dtype(x, "x", {DType::i8});
  kCheck.unit_stride(kCheck.shape(x, "x", {-1, -1}), "x");
  kCheck.dtype(w_scale, "w_scale", {DType::f32});
  kCheck.contiguous(kCheck.shape(w_scale, "w_scale", {-1}), "w_scale");
  const int64_t m = x.shape[0], k = x.shape[1], n = w_scale.shape[0];
  kCheck.dtype(x_scale, "x_scale", {DType::f32});
  kCheck.contiguous(kCheck.shape(x_scale, "x_scale", {m}), "x_scale");
  check_packed(packed, n, k);
  kCheck.dtype(y, "y", {DType::f32, DType::bf16});
  kCheck.writable(kCheck.rows(y, "y", y.dtype, m, n), "y");
  const py::gil_scoped_release release;
  matmul_w8a8_cpu({.x = x.ptr<int8_t>(),
                   .x_scale = x_scale.ptr<float>(),
                   .x_sum = nullptr,
                   .packed = packed.ptr<uint8_t>(),
                   .w_scale = w_scale.ptr<float>(),
                   .y = y.data,
                   .m = m,
                   .n = n,
                   .k = k,
                   .x_row_stride = x.strides[0],
                   .y_row_stride = y.strides[0],
                   .dtype = y.dtype});
}

}  // namespace

void bind_matmul_w8a8(py::module_& m) {
  m.def("matmul_w8a8_pack_cpu", pack, py::arg("w"), py::arg("packed"));
  m.def("matmul_w8a8_cpu", matmul, py::arg("x"), py::arg("x_scale"), py::arg("packed"), py::arg("w_scale"),
        py::arg("y"));
}

}  // namespace pe
