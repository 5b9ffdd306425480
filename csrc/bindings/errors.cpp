// Translates pe::Error and its kinds into the classes of pyengine.errors.
#include <pybind11/pybind11.h>

#include <exception>

#include "runtime/error.h"

namespace pe {
namespace {

namespace py = pybind11;

// Paths are bytes of the file system, and messages may quote them.
py::object decode(const std::string& text) {
  return py::reinterpret_steal<py::object>(
      PyUnicode_DecodeFSDefaultAndSize(text.data(), static_cast<Py_ssize_t>(text.size())));
}

void raise(const char* class_name, const py::tuple& arguments) {
  const py::object error_class = py::module_::import("pyengine.errors").attr(class_name);
  PyErr_SetObject(error_class.ptr(), error_class(*arguments).ptr());
}

void translate(std::exception_ptr exception) {
  try {
    if (exception) std::rethrow_exception(exception);
  } catch (const ModelFileError& error) {
    const py::object offset = error.offset() ? py::object(py::int_(*error.offset())) : py::object(py::none());
    const py::object field = error.field().empty() ? py::object(py::none()) : decode(error.field());
    raise("ModelFileError", py::make_tuple(decode(error.path()), offset, field, decode(error.message())));
  } catch (const ArgumentError& error) {
    raise("ArgumentError", py::make_tuple(decode(error.what())));
  } catch (const CapacityError& error) {
    raise("CapacityError", py::make_tuple(decode(error.what())));
  } catch (const BackendUnavailable& error) {
    raise("BackendUnavailable", py::make_tuple(decode(error.what())));
  } catch (const Error& error) {
    raise("PyEngineError", py::make_tuple(decode(error.what())));
  }
}

}  // namespace

void bind_errors(py::module_&) { py::register_local_exception_translator(&translate); }

}  // namespace pe
