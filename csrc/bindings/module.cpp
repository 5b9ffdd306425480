// The Python module. It only lists the bindings; the build writes the list from the names of the files beside this one.
#include <pybind11/pybind11.h>

namespace pe {
#include "bind_declarations.inc"
}

// Kernels hold no Python state and the registries are filled at import, so the module needs no GIL of its own.
PYBIND11_MODULE(_C, m, pybind11::mod_gil_not_used()) {
  using namespace pe;
#include "bind_calls.inc"
}
