#include "bindings/tensor.h"

#include <cstring>
#include <unordered_map>

#include "bindings/dlpack_abi.h"
#include "runtime/error.h"

namespace py = pybind11;

namespace pe {
namespace {

std::string type_name(py::handle object) { return Py_TYPE(object.ptr())->tp_name; }

[[noreturn]] void reject(py::handle object, const std::string& why) {
  throw ArgumentError("tensor: expected a dense tensor or array in memory, got " + type_name(object) + ": " + why);
}

DType dtype_from_dlpack(py::handle object, dlpack::DataType type) {
  if (type.lanes == 1) {
    switch (type.code << 8 | type.bits) {
      case dlpack::kFloat << 8 | 32:
        return DType::f32;
      case dlpack::kFloat << 8 | 64:
        return DType::f64;
      case dlpack::kFloat << 8 | 16:
        return DType::f16;
      case dlpack::kBfloat << 8 | 16:
        return DType::bf16;
      case dlpack::kUInt << 8 | 8:
        return DType::u8;
      case dlpack::kInt << 8 | 8:
        return DType::i8;
      case dlpack::kUInt << 8 | 16:
        return DType::u16;
      case dlpack::kInt << 8 | 32:
        return DType::i32;
      case dlpack::kUInt << 8 | 32:
        return DType::u32;
      case dlpack::kInt << 8 | 64:
        return DType::i64;
      case dlpack::kBool << 8 | 8:
        return DType::boolean;
      default:
        break;
    }
  }
  // Complex types end here too: a conjugate view would hand out data without the conjugation.
  reject(object, "dtype with DLPack code " + std::to_string(type.code) + " and " + std::to_string(type.bits) + " bits");
}

Tensor from_dlpack(py::handle object, const dlpack::Tensor& source) {
  Tensor t;
  if (source.ndim < 0 || source.ndim > kMaxDims) reject(object, std::to_string(source.ndim) + " dimensions, at most 8");
  t.dtype = dtype_from_dlpack(object, source.dtype);
  t.ndim = source.ndim;
  int64_t compact = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    t.shape[i] = source.shape[i];
    t.strides[i] = source.strides ? source.strides[i] : compact;
    compact *= t.shape[i];
  }
  switch (source.device.type) {
    case dlpack::kCpu:
    case dlpack::kCudaHost:
      break;
    case dlpack::kCuda:
    case dlpack::kCudaManaged:
      t.is_cuda = true;
      break;
    default:
      reject(object, "device type " + std::to_string(source.device.type));
  }
  t.device_id = source.device.id;
  t.data = source.data ? static_cast<char*>(source.data) + source.byte_offset : nullptr;
  // Fake and meta tensors describe a shape without memory.
  if (!t.data && t.numel() > 0) reject(object, "it has a shape but no memory (a fake or meta tensor)");
  return t;
}

// The table is looked up on the type, so nn.Parameter and Tensor have an entry each. Types live as long as their
// module; the reference keeps a heap type from being freed and its address reused.
const dlpack::ExchangeApi* exchange_api(PyTypeObject* type) {
  static auto& cache = *new std::unordered_map<PyTypeObject*, const dlpack::ExchangeApi*>();
  if (const auto found = cache.find(type); found != cache.end()) return found->second;
  const dlpack::ExchangeApi* api = nullptr;
  if (PyObject* capsule = PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__")) {
    if (PyCapsule_CheckExact(capsule))
      api = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
    Py_DECREF(capsule);
  }
  PyErr_Clear();
  while (api && api->version.major != dlpack::kMajorVersion) api = api->previous;
  if (api && !api->tensor_from_py_object) api = nullptr;
  Py_INCREF(type);
  cache.emplace(type, api);
  return api;
}

// Class and first line of a Python error.
std::string one_line(const py::error_already_set& error) {
  std::string text = py::str(error.type().attr("__name__"));
  try {
    text += ": " + std::string(py::str(error.value()));
  } catch (const py::error_already_set&) {  // an exception whose str() raises
  }
  return text.substr(0, text.find('\n'));
}

std::string take_python_error() { return one_line(py::error_already_set()); }

DType dtype_from_buffer(py::handle object, const Py_buffer& view) {
  const char* format = view.format ? view.format : "B";
  if (*format == '@' || *format == '=' || *format == '<') ++format;
  if (format[0] != '\0' && format[1] == '\0') {
    switch (format[0]) {
      case 'f':
        return DType::f32;
      case 'd':
        return DType::f64;
      case 'e':
        return DType::f16;
      case 'B':
        return DType::u8;
      case 'b':
        return DType::i8;
      case 'H':
        return DType::u16;
      case 'i':
        return DType::i32;
      case 'I':
        return DType::u32;
      case 'l':
      case 'q':
        return DType::i64;
      case '?':
        return DType::boolean;
      default:
        break;
    }
  }
  reject(object, "buffer format '" + std::string(format) + "'");
}

Tensor from_buffer(py::handle object) {
  struct Release {
    Py_buffer view{};
    ~Release() { PyBuffer_Release(&view); }
  } buffer;
  Py_buffer& view = buffer.view;
  if (PyObject_GetBuffer(object.ptr(), &view, PyBUF_STRIDED_RO | PyBUF_FORMAT) != 0)
    reject(object, take_python_error());
  if (view.ndim > kMaxDims) reject(object, std::to_string(view.ndim) + " dimensions, at most 8");
  Tensor t;
  t.dtype = dtype_from_buffer(object, view);
  t.ndim = view.ndim;
  t.read_only = view.readonly != 0;
  // '<l' may mean 4 bytes where 'l' means 8.
  if (view.itemsize != static_cast<Py_ssize_t>(dtype_bytes(t.dtype)))
    reject(object, std::string(dtype_name(t.dtype)) + " in elements of " + std::to_string(view.itemsize) + " bytes");
  Py_ssize_t compact = view.itemsize;
  for (int i = t.ndim - 1; i >= 0; --i) {
    t.shape[i] = view.shape[i];
    const Py_ssize_t stride = view.strides ? view.strides[i] : compact;  // arrays of ctypes come without
    if (stride % view.itemsize != 0) reject(object, "a stride that is no multiple of the element size");
    t.strides[i] = stride / view.itemsize;
    compact *= view.shape[i];
  }
  t.data = view.buf;
  return t;  // the caller's reference to the object keeps the memory alive during the call
}

Tensor from_capsule(py::handle object) {
  const py::object capsule = object.attr("__dlpack__")();
  auto* managed = static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
  if (!managed) throw py::error_already_set();
  // The capsule keeps its memory; the object it came from lives through the call and shares it.
  return from_dlpack(object, managed->tensor);
}

}  // namespace

int64_t Tensor::numel() const {
  int64_t count = 1;
  for (int i = 0; i < ndim; ++i) count *= shape[i];
  return count;
}

const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return "float32";
    case DType::bf16:
      return "bfloat16";
    case DType::f16:
      return "float16";
    case DType::f64:
      return "float64";
    case DType::u8:
      return "uint8";
    case DType::i8:
      return "int8";
    case DType::u16:
      return "uint16";
    case DType::i32:
      return "int32";
    case DType::u32:
      return "uint32";
    case DType::i64:
      return "int64";
    case DType::boolean:
      return "bool";
  }
  return "unknown";
}

size_t dtype_bytes(DType dtype) {
  switch (dtype) {
    case DType::u8:
    case DType::i8:
    case DType::boolean:
      return 1;
    case DType::bf16:
    case DType::f16:
    case DType::u16:
      return 2;
    case DType::f32:
    case DType::i32:
    case DType::u32:
      return 4;
    case DType::f64:
    case DType::i64:
      return 8;
  }
  return 0;
}

Tensor read_tensor(py::handle object) {
  if (const dlpack::ExchangeApi* api = exchange_api(Py_TYPE(object.ptr()))) {
    dlpack::Tensor source{};
    if (api->tensor_from_py_object(object.ptr(), &source) != 0) reject(object, take_python_error());
    return from_dlpack(object, source);
  }
  if (PyObject_CheckBuffer(object.ptr())) return from_buffer(object);
  if (py::hasattr(object, "__dlpack__")) {
    try {
      return from_capsule(object);
    } catch (const py::error_already_set& error) {
      reject(object, one_line(error));
    }
  }
  reject(object, "it offers neither DLPack nor the buffer protocol");
}

void Check::fail(const char* name, const std::string& expected, const std::string& got) const {
  throw ArgumentError("[" + std::string(op) + "] " + name + ": expected " + expected + ", got " + got);
}

const Tensor& Check::dtype(const Tensor& t, const char* name, std::initializer_list<DType> allowed) const {
  if (t.is_cuda) fail(name, "a tensor on the CPU", "one on cuda:" + std::to_string(t.device_id));
  std::string names;
  for (const DType d : allowed) {
    if (t.dtype == d) return t;
    names += (names.empty() ? "" : " or ") + std::string(dtype_name(d));
  }
  fail(name, names, dtype_name(t.dtype));
}

namespace {
std::string shape_text(const int64_t* shape, int ndim) {
  std::string text = "(";
  for (int i = 0; i < ndim; ++i) text += (i ? ", " : "") + (shape[i] < 0 ? "*" : std::to_string(shape[i]));
  return text + (ndim == 1 ? ",)" : ")");
}
}  // namespace

const Tensor& Check::shape(const Tensor& t, const char* name, std::initializer_list<int64_t> expected) const {
  bool same = t.ndim == static_cast<int>(expected.size());
  for (int i = 0; same && i < t.ndim; ++i) same = expected.begin()[i] < 0 || expected.begin()[i] == t.shape[i];
  if (!same)
    fail(name, "shape " + shape_text(expected.begin(), static_cast<int>(expected.size())),
         "shape " + shape_text(t.shape, t.ndim));
  return t;
}

const Tensor& Check::contiguous(const Tensor& t, const char* name) const {
  if (t.numel() == 0) return t;
  int64_t compact = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    if (t.shape[i] > 1 && t.strides[i] != compact) fail(name, "a contiguous tensor", "other strides");
    compact *= t.shape[i];
  }
  return t;
}

const Tensor& Check::unit_stride(const Tensor& t, const char* name) const {
  if (t.numel() > 0 && t.ndim > 0 && t.shape[t.ndim - 1] > 1 && t.strides[t.ndim - 1] != 1)
    fail(name, "unit stride in the last dimension", "stride " + std::to_string(t.strides[t.ndim - 1]));
  return t;
}

const Tensor& Check::writable(const Tensor& t, const char* name) const {
  if (t.read_only) fail(name, "writable memory", "read-only memory");
  return t;
}

const Tensor& Check::rows(const Tensor& t, const char* name, DType dtype_expected, int64_t rows, int64_t cols) const {
  dtype(t, name, {dtype_expected});
  shape(t, name, {rows, cols});
  return unit_stride(t, name);
}

}  // namespace pe
