#include "runtime/error.h"

#include <utility>

namespace pe {
namespace {

std::string model_file_text(const std::string& path, const std::optional<uint64_t>& offset, const std::string& field,
                            const std::string& message) {
  std::string text = path + ": ";
  if (offset) text += "at byte " + std::to_string(*offset) + (field.empty() ? ": " : ", ");
  if (!field.empty()) text += "field '" + field + "': ";
  return text + message;
}

}  // namespace

Error::Error(std::string message) : message_(std::move(message)) {}

const char* Error::what() const noexcept { return message_.c_str(); }

ArgumentError::ArgumentError(std::string_view argument, std::string_view message)
    : Error(std::string(argument) + ": " + std::string(message)) {}

ModelFileError::ModelFileError(std::string path, std::optional<uint64_t> offset, std::string field, std::string message)
    : Error(model_file_text(path, offset, field, message)),
      path_(std::move(path)),
      offset_(offset),
      field_(std::move(field)),
      message_(std::move(message)) {}

std::string printable(std::string_view bytes, size_t max_bytes) {
  constexpr char kHex[] = "0123456789abcdef";
  std::string text;
  for (const char c : bytes.substr(0, max_bytes)) {
    const auto code = static_cast<unsigned char>(c);
    if (code >= 0x20 && code < 0x7f) {
      text += c;
    } else {
      text += {'\\', 'x', kHex[code >> 4], kHex[code & 15]};
    }
  }
  if (bytes.size() > max_bytes) text += "...";
  return text;
}

}  // namespace pe
