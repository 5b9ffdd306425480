// ISA level, threads, build facts.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/tensor.h"
#include "runtime/cpu_features.h"
#include "runtime/parallel.h"

namespace py = pybind11;

namespace pe {
namespace {

std::vector<std::string> isa_names() {
  std::vector<std::string> names;
  for (const Isa isa : available_isas()) names.emplace_back(isa_name(isa));
  return names;
}

py::dict build_info() {
  py::dict info;
  info["version"] = PE_VERSION;
  info["compiler"] = "g++ " __VERSION__;
  info["cpu"] = cpu_name();
  info["isa"] = isa_name(active_isa());
  info["available_isas"] = isa_names();
  info["isa_limit_reason"] = isa_limit_reason();
  info["isa_emulation"] = isa_emulation();
  info["num_threads"] = num_threads();
  return info;
}

// What the caster makes of an object; for tests of its rules.
py::dict describe(const Tensor& t) {
  py::dict d;
  d["dtype"] = dtype_name(t.dtype);
  d["shape"] = py::tuple(py::cast(std::vector<int64_t>(t.shape, t.shape + t.ndim)));
  d["strides"] = py::tuple(py::cast(std::vector<int64_t>(t.strides, t.strides + t.ndim)));
  d["address"] = reinterpret_cast<uintptr_t>(t.data);
  d["read_only"] = t.read_only;
  return d;
}

}  // namespace

void bind_runtime(py::module_& m) {
  m.def("available_isas", isa_names);
  m.def("active_isa", [] { return isa_name(active_isa()); });
  m.def("set_active_isa", [](const std::string& name) { return isa_name(set_active_isa(name)); }, py::arg("name"));
  m.def("num_threads", num_threads);
  m.def("set_num_threads", set_num_threads, py::arg("count"));
  m.def("available_cpus", available_cpus, py::arg("cgroup_root") = "/sys/fs/cgroup");
  m.def("build_info", build_info);
  m.def("describe_tensor", describe, py::arg("tensor"));
}

}  // namespace pe
