// The part of the DLPack 1.x C exchange interface that reads a tensor's description without touching Python attributes.
// Layout as specified by https://dmlc.github.io/dlpack/latest/c_api.html, which keeps it stable within a major version.
#pragma once

#include <cstdint>

namespace pysteep::dlpack {

constexpr uint32_t major_version = 1;
constexpr const char* capsule_name = "dlpack_exchange_api";

enum DeviceType : int32_t { cpu = 1, cuda = 2 };
enum TypeCode : uint8_t { integer = 0, floating = 2, brain_floating = 4 };

struct Device {
  DeviceType type;
  int32_t index;

  bool operator==(const Device&) const = default;
};

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
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};

struct ExchangeApi {
  uint32_t major, minor;
  ExchangeApi* previous;
  void* managed_tensor_allocator;
  void* managed_tensor_from_object;
  void* managed_tensor_to_object;
  int (*tensor_from_object)(void* object, Tensor* out);  // borrowed: valid while the object and its storage are untouched
  void* current_work_stream;
};

}  // namespace pysteep::dlpack
