// Low-rank adapters of the native decoder.
#include "engine/adapters.h"

#include <memory>

#include "bindings/gil.h"
#include "bindings/tensor.h"

namespace py = pybind11;

namespace pe {
namespace {

constexpr Check kCheck{"adapter"};

// numpy has no bfloat16: uint16 holds its bits.
MatmulPack packing(const Tensor& w, const char* name) {
  kCheck.dtype(w, name, {DType::f32, DType::bf16, DType::u16});
  kCheck.shape(w, name, {-1, -1});
  const DType dtype = w.dtype == DType::f32 ? DType::f32 : DType::bf16;
  return {.w = w.data,
          .w_row_stride = w.strides[0],
          .w_col_stride = w.strides[1],
          .num_rows = w.shape[0],
          .num_cols = w.shape[1],
          .w_dtype = dtype,
          .packed_dtype = dtype,
          .packed = nullptr};
}

void add(Adapter& adapter, int64_t layer, const std::string& slot, int64_t offset, const Tensor& a, const Tensor& b,
         float scale) {
  const MatmulPack pack_a = packing(a, "a"), pack_b = packing(b, "b");
  const GilRelease release;
  adapter.add(layer, parse_adapter_slot(slot), offset, pack_a, pack_b, scale);
}

}  // namespace

void bind_adapters(py::module_& m) {
  py::class_<Adapter, std::shared_ptr<Adapter>>(m, "Adapter")
      .def(py::init([](const Model& model) { return std::make_shared<Adapter>(model.config()); }), py::arg("model"))
      .def("add", add, py::arg("layer"), py::arg("slot"), py::arg("offset"), py::arg("a"), py::arg("b"),
           py::arg("scale"))
      .def_property_readonly("id", &Adapter::id)
      .def_property_readonly("num_bytes", &Adapter::num_bytes)
      .def_property_readonly(
          "num_holders", [](const std::shared_ptr<Adapter>& adapter) { return adapter.use_count(); },
          "How many keep it alive, native sequences among them.");
}

}  // namespace pe
