// Work without the GIL.
#pragma once
#include <Python.h>

namespace pe {

// Like pybind11::gil_scoped_release, but a daemon thread that comes back while the interpreter ends may leave through the
// destructor: CPython ends such a thread by unwinding its stack, and a noexcept destructor would end the process instead.
class GilRelease {
 public:
  GilRelease() : state_(PyEval_SaveThread()) {}
  ~GilRelease() noexcept(false) { PyEval_RestoreThread(state_); }
  GilRelease(const GilRelease&) = delete;
  GilRelease& operator=(const GilRelease&) = delete;

 private:
  PyThreadState* state_;
};

}  // namespace pe
