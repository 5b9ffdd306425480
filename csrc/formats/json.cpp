#include "formats/json.h"

#include "formats/utf8.h"
#include "runtime/checked.h"
#include "runtime/error.h"

namespace pe {

JsonReader::JsonReader(std::string_view text, std::string_view path, std::string_view field, uint64_t base_offset)
    : text_(text), path_(path), field_(field), base_offset_(base_offset) {
  if (!is_valid_utf8(text_)) {
    throw ModelFileError(std::string(path_), base_offset_, std::string(field_), "expected UTF-8, got other bytes");
  }
}

void JsonReader::fail(const std::string& expected) const {
  const std::string got =
      position_ < text_.size() ? "'" + printable(text_.substr(position_, 1)) + "'" : "the end of the text";
  throw ModelFileError(std::string(path_), offset(), std::string(field_), "expected " + expected + ", got " + got);
}

void JsonReader::skip_space() noexcept {
  while (position_ < text_.size()) {
    const char c = text_[position_];
    if (c != ' ' && c != '\n' && c != '\r' && c != '\t') return;
    ++position_;
  }
}

bool JsonReader::accept(char c) noexcept {
  skip_space();
  if (position_ == text_.size() || text_[position_] != c) return false;
  ++position_;
  return true;
}

void JsonReader::enter(char bracket, const char* expected) {
  skip_space();
  if (depth_ == kMaxJsonDepth) fail("at most " + std::to_string(kMaxJsonDepth) + " levels of nesting");
  if (!accept(bracket)) fail(expected);
  has_items_[depth_++] = false;
}

bool JsonReader::next_item(char close, const char* expected) {
  if (accept(close)) {
    --depth_;
    return false;
  }
  if (has_items_[depth_ - 1] && !accept(',')) fail(expected);
  has_items_[depth_ - 1] = true;
  skip_space();
  return true;
}

void JsonReader::enter_object() { enter('{', "an object"); }

void JsonReader::enter_array() { enter('[', "an array"); }

bool JsonReader::next_key(std::string& key) {
  if (!next_item('}', "',' or '}'")) return false;
  key = read_string();
  if (!accept(':')) fail("':'");
  skip_space();
  return true;
}

bool JsonReader::next_element() { return next_item(']', "',' or ']'"); }

std::string JsonReader::read_string() {
  if (!accept('"')) fail("a string");
  std::string result;
  for (;;) {
    const size_t begin = position_;
    while (position_ < text_.size() && text_[position_] != '"' && text_[position_] != '\\' &&
           static_cast<unsigned char>(text_[position_]) >= 0x20) {
      ++position_;
    }
    result += text_.substr(begin, position_ - begin);
    if (position_ == text_.size()) fail("the end of a string");
    if (text_[position_] == '"') {
      ++position_;
      return result;
    }
    if (text_[position_] != '\\') fail("no control character in a string");
    ++position_;
    read_escape(result);
  }
}

void JsonReader::read_escape(std::string& result) {
  constexpr std::string_view kNames = "\"\\/bfnrt";
  constexpr std::string_view kValues = "\"\\/\b\f\n\r\t";
  if (position_ == text_.size()) fail("an escape");
  const char name = text_[position_];
  if (const size_t i = kNames.find(name); i != std::string_view::npos) {
    ++position_;
    result += kValues[i];
    return;
  }
  if (name != 'u') fail("an escape");
  ++position_;
  uint32_t code = read_hex4();
  if (code >= 0xdc00 && code <= 0xdfff) fail("a high surrogate before a low one");
  if (code >= 0xd800 && code <= 0xdbff) {
    if (text_.substr(position_, 2) != "\\u") fail("a low surrogate after a high one");
    position_ += 2;
    const uint32_t low = read_hex4();
    if (low < 0xdc00 || low > 0xdfff) fail("a low surrogate after a high one");
    code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
  }
  append_utf8(code, result);
}

uint32_t JsonReader::read_hex4() {
  uint32_t code = 0;
  for (int i = 0; i < 4; ++i) {
    const char c = position_ < text_.size() ? text_[position_] : '\0';
    uint32_t digit = 0;
    if (c >= '0' && c <= '9') {
      digit = static_cast<uint32_t>(c - '0');
    } else if (c >= 'a' && c <= 'f') {
      digit = static_cast<uint32_t>(c - 'a' + 10);
    } else if (c >= 'A' && c <= 'F') {
      digit = static_cast<uint32_t>(c - 'A' + 10);
    } else {
      fail("four hexadecimal digits");
    }
    code = code * 16 + digit;
    ++position_;
  }
  return code;
}

uint64_t JsonReader::read_uint64() {
  skip_space();
  const size_t begin = position_;
  Checked value = 0;
  while (position_ < text_.size() && text_[position_] >= '0' && text_[position_] <= '9') {
    value = value * 10 + (text_[position_] - '0');
    ++position_;
  }
  const size_t num_digits = position_ - begin;
  if (num_digits == 0) fail("an integer >= 0");
  if (num_digits > 1 && text_[begin] == '0') fail("an integer without leading zeros");
  const char next = position_ < text_.size() ? text_[position_] : ' ';
  if (next == '.' || next == 'e' || next == 'E') fail("an integer");
  return value.get_or([&] { fail("an integer below 2^64 before this"); });
}

void JsonReader::finish() {
  skip_space();
  if (position_ != text_.size()) fail("the end of the text");
}

}  // namespace pe
