// The part of the DLPack 1.x C ABI that the tensor caster reads (github.com/dmlc/dlpack, Apache-2.0): DLTensor and the
// exchange table that a tensor type offers as `__dlpack_c_exchange_api__`.
#pragma once
#include <cstdint>

namespace pe::dlpack {

constexpr uint32_t kMajorVersion = 1;

struct Version {
  uint32_t major, minor;
};

enum DeviceType : int32_t { kCpu = 1, kCuda = 2, kCudaHost = 3, kCudaManaged = 13 };

struct Device {
  DeviceType type;
  int32_t id;
};

enum TypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kComplex = 5, kBool = 6 };

struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; nullptr: row major and compact
  uint64_t byte_offset;
};

struct ManagedTensor {
  Tensor tensor;
  void* manager;
  void (*deleter)(ManagedTensor*);
};

struct ExchangeApi {
  Version version;
  ExchangeApi* previous;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object;
  void* managed_tensor_to_py_object;
  int (*tensor_from_py_object)(void* py_object, Tensor* out);
  int (*current_work_stream)(DeviceType type, int32_t id, void** stream);
};

}  // namespace pe::dlpack
