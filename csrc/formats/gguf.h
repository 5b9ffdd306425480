// The GGUF format, versions 2 and 3: header, typed metadata, tensor descriptions, aligned tensor data.
// Specification: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "formats/gguf_blocks.h"
#include "formats/mapped_file.h"

namespace pe {

// The limits below keep the heap under 200 MB, and the Python objects made of names and metadata under 700 MB, whatever
// a file says. Counts are also bounded by the bytes that are left, before anything is allocated.

// A thousand times what published models hold.
inline constexpr uint64_t kMaxGgufEntries = uint64_t{1} << 17;
// Ten times what the largest published models hold.
inline constexpr uint64_t kMaxGgufTensors = uint64_t{1} << 20;
// The specification's.
inline constexpr uint64_t kMaxGgufKeyBytes = 65535;
// ggml's: names are arrays of 64 characters with a final NUL, tensors have at most 4 dimensions.
inline constexpr uint64_t kMaxGgufTensorNameBytes = 63;
inline constexpr uint32_t kMaxGgufDims = 4;
// Chat templates, the longest strings, stay under 1 MiB.
inline constexpr uint64_t kMaxGgufStringBytes = uint64_t{64} << 20;
// Of all arrays of one file together: vocabulary and merges of the largest tokenizers make 1 Mi.
inline constexpr uint64_t kMaxGgufArrayStrings = uint64_t{4} << 20;
// Common files use 32; a page of the largest page size in use is the most that a mapping can need.
inline constexpr uint64_t kMaxGgufAlignment = uint64_t{64} << 10;
inline constexpr uint64_t kDefaultGgufAlignment = 32;

enum class GgufValueType : uint32_t {
  kUint8 = 0,
  kInt8 = 1,
  kUint16 = 2,
  kInt16 = 3,
  kUint32 = 4,
  kInt32 = 5,
  kFloat32 = 6,
  kBool = 7,
  kString = 8,
  kArray = 9,
  kUint64 = 10,
  kInt64 = 11,
  kFloat64 = 12,
};

// "uint32", "string", ...
std::string_view gguf_value_type_name(GgufValueType type) noexcept;

// One metadata value. `bytes` points into the file: the scalar, the text of a string, or the elements of an array
// (strings each with their u64 length before them). Numbers may lie at any address.
struct GgufValue {
  GgufValueType type;  // of the value or, for an array, of its elements; never kArray
  bool is_array;
  uint64_t num_elements;  // 1 for a scalar
  std::span<const uint8_t> bytes;

  // The scalar as a T, or nothing where the file holds another type.
  template <class T>
  std::optional<T> scalar(GgufValueType wanted) const {
    if (is_array || type != wanted || bytes.size() != sizeof(T)) return std::nullopt;
    T value;
    std::memcpy(&value, bytes.data(), sizeof(T));
    return value;
  }

  // Calls `visit` with each string of an array of strings. Lengths are checked again: the file may have changed.
  void for_each_string(const std::string& path, const std::function<void(std::string_view)>& visit) const;
};

struct GgufEntry {
  std::string_view key;
  GgufValue value;
};

struct GgufTensor {
  std::string_view name;
  const GgmlType* type;
  uint32_t num_dims;
  std::array<uint64_t, kMaxGgufDims> shape;  // slowest dimension first, the reverse of the file's order
  uint64_t offset;                           // of the first byte, in the file
  uint64_t num_bytes;
};

// Views into the bytes that were parsed.
struct GgufIndex {
  uint32_t version = 0;
  uint64_t alignment = kDefaultGgufAlignment;
  std::vector<GgufEntry> metadata;  // in the order of the file
  std::vector<GgufTensor> tensors;  // in the order of the file, which is the order of their bytes
};

// Whether the strings of this array may be any bytes: pieces of a vocabulary can split a character. All other strings,
// keys and names are UTF-8.
bool gguf_allows_raw_bytes(std::string_view key) noexcept;

// Reads everything before the tensor data of `bytes`, a whole file. Tensor data is contiguous as ggml demands: each
// tensor starts at the aligned end of the one before. Padding after the last tensor may be absent; bytes after it are
// ignored. Throws ModelFileError naming `path`. Time: n log n in the bytes before the data.
GgufIndex parse_gguf(std::span<const uint8_t> bytes, const std::string& path);

class GgufFile {
 public:
  explicit GgufFile(const std::string& path);

  const std::shared_ptr<const MappedFile>& file() const noexcept { return file_; }
  const GgufIndex& index() const noexcept { return index_; }

  // The tensor's description, or null.
  const GgufTensor* find_tensor(std::string_view name) const;
  std::span<const uint8_t> data(const GgufTensor& tensor) const;

 private:
  std::shared_ptr<const MappedFile> file_;
  GgufIndex index_;
  std::vector<uint32_t> by_name_;
};

}  // namespace pe
