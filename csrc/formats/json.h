// A pull parser for JSON from untrusted files. It builds no tree: the caller says what it expects next, anything else
// is a ModelFileError at the byte where it stands. Memory: one string at a time. Time: linear in the text.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace pe {

// Objects and arrays inside each other. A safetensors header needs 3.
inline constexpr size_t kMaxJsonDepth = 8;

class JsonReader {
 public:
  // `text` is checked to be UTF-8. Errors carry `path`, `field` and `base_offset` + the position in `text`.
  // `text` and `path` must outlive the reader.
  JsonReader(std::string_view text, std::string_view path, std::string_view field, uint64_t base_offset);

  // enter_object, then next_key until it is false, reading one value after each true. Arrays likewise. The reader does
  // not look for repeated keys: the caller, who knows the schema, must.
  void enter_object();
  bool next_key(std::string& key);
  void enter_array();
  bool next_element();

  // A string; \u escapes are decoded, lone surrogates refused.
  std::string read_string();

  // A number without sign, fraction or exponent that fits 64 bits.
  uint64_t read_uint64();

  // Refuses anything but white space after the value.
  void finish();

  // The file offset of the next byte.
  uint64_t offset() const noexcept { return base_offset_ + position_; }

  [[noreturn]] void fail(const std::string& expected) const;

 private:
  void enter(char bracket, const char* expected);
  bool next_item(char close, const char* expected);
  void skip_space() noexcept;
  bool accept(char c) noexcept;
  void read_escape(std::string& result);
  uint32_t read_hex4();

  std::string_view text_;
  std::string_view path_;
  std::string_view field_;
  uint64_t base_offset_;
  size_t position_ = 0;
  size_t depth_ = 0;
  std::array<bool, kMaxJsonDepth> has_items_ = {};
};

}  // namespace pe
