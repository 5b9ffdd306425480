// Tensor: a checked, non-owning view of a tensor argument. Every binding takes these; no address ever comes from
// Python.
//
// Sources, in this order: the DLPack C exchange table of the object's type (torch), the buffer protocol (numpy,
// memoryview), a `__dlpack__` capsule (anything else). What cannot be described is an ArgumentError that names the
// argument.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <initializer_list>
#include <string>

#include "pe/dtype.h"

namespace pe {

constexpr int kMaxDims = 8;

// An argument that is not read until a binding checks it: holds the object and the name used in errors.
class Tensor {
 public:
  void* data = nullptr;
  DType dtype = DType::f32;
  int ndim = 0;
  int64_t shape[kMaxDims] = {};
  int64_t strides[kMaxDims] = {};  // in elements
  bool is_cuda = false;
  int device_id = 0;
  bool read_only = false;

  int64_t numel() const;
  template <class T>
  T* ptr() const {
    return static_cast<T*>(data);
  }
};

const char* dtype_name(DType dtype);
size_t dtype_bytes(DType dtype);

// Reads `object` or throws ArgumentError / BackendUnavailable.
Tensor read_tensor(pybind11::handle object);

// Checks that throw ArgumentError "[op] name: expected ..., got ...". -1 in `shape` matches any extent.
struct Check {
  const char* op;
  const Tensor& dtype(const Tensor& t, const char* name, std::initializer_list<DType> allowed) const;
  const Tensor& shape(const Tensor& t, const char* name, std::initializer_list<int64_t> expected) const;
  const Tensor& contiguous(const Tensor& t, const char* name) const;
  const Tensor& unit_stride(const Tensor& t, const char* name) const;  // of the last dimension
  const Tensor& writable(const Tensor& t, const char* name) const;
  // The usual row-wise operand: [rows, cols] of one dtype with unit column stride.
  const Tensor& rows(const Tensor& t, const char* name, DType dtype, int64_t rows, int64_t cols) const;
  [[noreturn]] void fail(const char* name, const std::string& expected, const std::string& got) const;
};

}  // namespace pe

namespace pybind11::detail {
template <>
struct type_caster<pe::Tensor> {
  PYBIND11_TYPE_CASTER(pe::Tensor, const_name("Tensor"));
  bool load(handle source, bool) {
    value = pe::read_tensor(source);
    return true;
  }
};
}  // namespace pybind11::detail
