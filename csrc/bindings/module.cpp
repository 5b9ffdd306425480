// The Python module. It only lists the bindings; the build writes the list from the names of the files beside this one.
#include <pybind11/pybind11.h>

namespace pe {
#include "bind_declarations.inc"
}

PYBIND11_MODULE(_C, m) {
  using namespace pe;
#include "bind_calls.inc"
}
