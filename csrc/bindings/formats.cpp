// Model files in Python. Tensor data and number arrays are read-only views of the mapping, which lives as long as they.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <span>
#include <string>
#include <utility>

#include "bindings/gil.h"
#include "formats/gguf.h"
#include "formats/gguf_blocks.h"
#include "formats/mapped_file.h"
#include "formats/safetensors.h"
#include "runtime/checked.h"
#include "runtime/error.h"

namespace pe {
namespace {

namespace py = pybind11;

// The owner behind each memoryview.
struct MappedBytes {
  std::shared_ptr<const MappedFile> file;
  std::span<const uint8_t> bytes;
};

py::object view_of(const std::shared_ptr<const MappedFile>& file, std::span<const uint8_t> bytes) {
  const py::object owner = py::cast(MappedBytes{file, bytes});
  return py::reinterpret_steal<py::object>(PyMemoryView_FromObject(owner.ptr()));
}

std::string file_system_path(const py::object& path) {
  PyObject* encoded = nullptr;
  if (PyUnicode_FSConverter(path.ptr(), &encoded) == 0) throw py::error_already_set();
  return py::reinterpret_steal<py::bytes>(encoded);
}

py::object decode(const std::string& path, std::string_view text, const char* errors) {
  PyObject* const decoded = PyUnicode_DecodeUTF8(text.data(), static_cast<Py_ssize_t>(text.size()), errors);
  if (decoded == nullptr) {
    PyErr_Clear();
    throw ModelFileError(path, std::nullopt, "", "expected the text that was read before, got a file that changed");
  }
  return py::reinterpret_steal<py::object>(decoded);
}

py::tuple shape_tuple(std::span<const uint64_t> shape) {
  py::tuple result(shape.size());
  for (size_t i = 0; i < shape.size(); ++i) result[i] = py::int_(shape[i]);
  return result;
}

template <class Tensor>
const Tensor& found(const Tensor* tensor, const std::string& name, const std::string& path) {
  if (tensor == nullptr)
    throw ArgumentError("name", "expected a tensor of " + path + ", got '" + printable(name) + "'");
  return *tensor;
}

// The code of the type in Python's struct and memoryview.
const char* struct_format(GgufValueType type) {
  switch (type) {
    case GgufValueType::kUint8:
      return "B";
    case GgufValueType::kInt8:
      return "b";
    case GgufValueType::kUint16:
      return "H";
    case GgufValueType::kInt16:
      return "h";
    case GgufValueType::kUint32:
      return "I";
    case GgufValueType::kInt32:
      return "i";
    case GgufValueType::kFloat32:
      return "f";
    case GgufValueType::kBool:
      return "?";
    case GgufValueType::kUint64:
      return "Q";
    case GgufValueType::kInt64:
      return "q";
    case GgufValueType::kFloat64:
      return "d";
    default:
      throw Error("expected a number type, got " + std::string(gguf_value_type_name(type)));
  }
}

py::object python_value(const GgufFile& file, const GgufEntry& entry) {
  const GgufValue& value = entry.value;
  const std::string& path = file.file()->path();
  if (value.type != GgufValueType::kString) {
    // An element of a memoryview is a Python number, whatever the address.
    const py::object numbers = view_of(file.file(), value.bytes).attr("cast")(struct_format(value.type));
    return value.is_array ? numbers : py::object(numbers[py::int_(0)]);
  }
  if (!value.is_array) {
    return decode(path, {reinterpret_cast<const char*>(value.bytes.data()), value.bytes.size()}, "strict");
  }
  const char* const errors = gguf_allows_raw_bytes(entry.key) ? "surrogateescape" : "strict";
  py::list strings;
  value.for_each_string(path, [&](std::string_view text) { strings.append(decode(path, text, errors)); });
  return strings;
}

py::dict gguf_metadata(const GgufFile& file) {
  py::dict result;
  for (const GgufEntry& entry : file.index().metadata) {
    result[decode(file.file()->path(), entry.key, "strict")] = python_value(file, entry);
  }
  return result;
}

py::dict gguf_metadata_types(const GgufFile& file) {
  py::dict result;
  for (const GgufEntry& entry : file.index().metadata) {
    std::string type(gguf_value_type_name(entry.value.type));
    if (entry.value.is_array) type = "array[" + type + "]";
    result[decode(file.file()->path(), entry.key, "strict")] = py::str(type);
  }
  return result;
}

py::dict safetensors_metadata(const SafetensorsFile& file) {
  py::dict result;
  for (const auto& [key, value] : file.index().metadata) {
    result[decode(file.file()->path(), key, "strict")] = decode(file.file()->path(), value, "strict");
  }
  return result;
}

py::array_t<float> gguf_dequantize(const std::string& type_name, const py::buffer& data, uint64_t num_elements) {
  const GgmlType* const type = find_ggml_type(type_name);
  if (type == nullptr) throw ArgumentError("type", "expected a ggml type, got '" + printable(type_name) + "'");
  Py_buffer view = {};
  if (PyObject_GetBuffer(data.ptr(), &view, PyBUF_SIMPLE) != 0) {
    PyErr_Clear();
    throw ArgumentError("data", "expected a C-contiguous buffer, got another");
  }
  const std::unique_ptr<Py_buffer, void (*)(Py_buffer*)> release(&view, &PyBuffer_Release);
  const std::span<const uint8_t> input(static_cast<const uint8_t*>(view.buf), static_cast<size_t>(view.len));
  // No type packs more than 8 elements into a byte, so that a wrong count is refused before memory is asked for.
  if (!(Checked(input.size()) * 8 - num_elements).at_most(UINT64_MAX)) {
    throw ArgumentError("num_elements", "expected what " + std::to_string(input.size()) + " bytes hold, got " +
                                            std::to_string(num_elements));
  }
  py::array_t<float> result(static_cast<py::ssize_t>(num_elements));
  const std::span<float> output(result.mutable_data(), num_elements);
  {
    const GilRelease release;
    dequantize_blocks(*type, input, output);
  }
  return result;
}

void bind_safetensors(py::module_& m) {
  py::class_<SafetensorsFile>(m, "SafetensorsFile", "A safetensors file, mapped and checked whole.")
      .def(py::init([](const py::object& path) {
             const std::string name = file_system_path(path);
             const GilRelease release;
             return std::make_unique<SafetensorsFile>(name);
           }),
           py::arg("path"))
      .def(
          "names",
          [](const SafetensorsFile& file) {
            py::list names;
            for (const SafetensorsTensor& tensor : file.index().tensors) names.append(py::str(tensor.name));
            return names;
          },
          "Tensor names in the order of their bytes.")
      .def(
          "info",
          [](const SafetensorsFile& file, const std::string& name) {
            const SafetensorsTensor& tensor = found(file.find(name), name, file.file()->path());
            return py::make_tuple(py::str(tensor.dtype.data(), tensor.dtype.size()), shape_tuple(tensor.shape),
                                  tensor.offset, tensor.num_bytes);
          },
          py::arg("name"), "(dtype, shape, file offset, number of bytes) of a tensor.")
      .def(
          "data",
          [](const SafetensorsFile& file, const std::string& name) {
            return view_of(file.file(), file.data(found(file.find(name), name, file.file()->path())));
          },
          py::arg("name"), "The bytes of a tensor, read-only, without a copy.")
      .def_property_readonly("metadata", &safetensors_metadata, "The __metadata__ entry: str -> str.");
}

void bind_gguf(py::module_& m) {
  py::class_<GgufFile>(m, "GgufFile", "A GGUF file, mapped and checked whole.")
      .def(py::init([](const py::object& path) {
             const std::string name = file_system_path(path);
             const GilRelease release;
             return std::make_unique<GgufFile>(name);
           }),
           py::arg("path"))
      .def(
          "names",
          [](const GgufFile& file) {
            py::list names;
            for (const GgufTensor& tensor : file.index().tensors) {
              names.append(decode(file.file()->path(), tensor.name, "strict"));
            }
            return names;
          },
          "Tensor names in the order of the file.")
      .def(
          "info",
          [](const GgufFile& file, const std::string& name) {
            const GgufTensor& tensor = found(file.find_tensor(name), name, file.file()->path());
            return py::make_tuple(py::str(tensor.type->name.data(), tensor.type->name.size()),
                                  shape_tuple({tensor.shape.data(), tensor.num_dims}), tensor.offset, tensor.num_bytes);
          },
          py::arg("name"), "(type, shape in elements with rows first, file offset, number of bytes) of a tensor.")
      .def(
          "data",
          [](const GgufFile& file, const std::string& name) {
            return view_of(file.file(), file.data(found(file.find_tensor(name), name, file.file()->path())));
          },
          py::arg("name"), "The bytes of a tensor, read-only, without a copy.")
      .def_property_readonly("version", [](const GgufFile& file) { return file.index().version; })
      .def_property_readonly("alignment", [](const GgufFile& file) { return file.index().alignment; })
      .def_property_readonly("metadata", &gguf_metadata,
                             "key -> int, float, bool, str, list[str] or, for arrays of numbers, a memoryview.")
      .def_property_readonly("metadata_types", &gguf_metadata_types, "key -> 'uint32', 'array[string]', ...");
  m.def("gguf_dequantize", &gguf_dequantize, py::arg("type"), py::arg("data"), py::arg("num_elements"),
        "Blocks of a ggml type to float32.");
  m.def(
      "gguf_type_geometry",
      [](const std::string& name) {
        const GgmlType* const type = find_ggml_type(name);
        if (type == nullptr) throw ArgumentError("type", "expected a ggml type, got '" + printable(name) + "'");
        return py::make_tuple(type->id, type->block_elements, type->block_bytes);
      },
      py::arg("type"), "(id, elements per block, bytes per block) of a ggml type.");
}

}  // namespace

void bind_formats(py::module_& m) {
  py::class_<MappedBytes>(m, "MappedBytes", py::buffer_protocol(), "Keeps a file mapped for the views of its bytes.")
      .def_buffer([](const MappedBytes& mapped) {
        return py::buffer_info(const_cast<uint8_t*>(mapped.bytes.data()), sizeof(uint8_t),
                               py::format_descriptor<uint8_t>::format(), 1,
                               {static_cast<py::ssize_t>(mapped.bytes.size())}, {py::ssize_t{1}}, /*readonly=*/true);
      });
  bind_safetensors(m);
  bind_gguf(m);
}

}  // namespace pe
