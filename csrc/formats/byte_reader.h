// A bounded cursor over the bytes of a file. Every read is checked against what is left and fails with a typed error.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>

#include "runtime/error.h"

namespace pe {

static_assert(std::endian::native == std::endian::little, "model files are little-endian and are read in place");

// Names a place in a file for error messages; it becomes text only when something fails.
// {"metadata", 3, "key"} reads "metadata[3].key", {"general.alignment"} as it stands.
struct FieldName {
  std::string_view text;
  std::optional<uint64_t> index = std::nullopt;
  std::string_view part = {};

  std::string str() const {
    std::string name = printable(text);
    if (index) name += "[" + std::to_string(*index) + "]";
    if (!part.empty()) name += "." + std::string(part);
    return name;
  }
};

class ByteReader {
 public:
  ByteReader(std::span<const uint8_t> bytes, std::string_view path, uint64_t offset = 0)
      : bytes_(bytes), path_(path), offset_(offset) {}

  uint64_t offset() const noexcept { return offset_; }
  uint64_t remaining() const noexcept { return bytes_.size() - offset_; }

  template <class T>
    requires std::is_arithmetic_v<T>
  T read(const FieldName& field) {
    const std::span<const uint8_t> raw = read_bytes(sizeof(T), field);
    T value;
    std::memcpy(&value, raw.data(), sizeof(T));
    return value;
  }

  std::span<const uint8_t> read_bytes(uint64_t num_bytes, const FieldName& field) {
    if (num_bytes > remaining()) {
      fail(field, "expected " + std::to_string(num_bytes) + " bytes, got a file with " + std::to_string(remaining()) +
                      " left");
    }
    const std::span<const uint8_t> result = bytes_.subspan(offset_, num_bytes);
    offset_ += num_bytes;
    return result;
  }

  [[noreturn]] void fail(const FieldName& field, const std::string& message) const { fail_at(offset_, field, message); }

  [[noreturn]] void fail_at(uint64_t offset, const FieldName& field, const std::string& message) const {
    throw ModelFileError(std::string(path_), offset, field.str(), message);
  }

 private:
  std::span<const uint8_t> bytes_;
  std::string_view path_;
  uint64_t offset_;
};

}  // namespace pe
