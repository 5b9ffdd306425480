// Typed errors. Every failure that a user or a file can cause is one of these; nothing aborts.
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <optional>
#include <string>
#include <string_view>

namespace pe {

class Error : public std::exception {
 public:
  explicit Error(std::string message);
  const char* what() const noexcept override;

 private:
  std::string message_;
};

// A caller passed something the function does not take. Text: "<argument>: expected ..., got ...".
class ArgumentError : public Error {
 public:
  using Error::Error;
  ArgumentError(std::string_view argument, std::string_view message);
};

// A model file breaks its format. Text: "<path>: at byte <offset>, field '<field>': expected ..., got ...".
// `field` is printable (see below), or empty where no field applies.
class ModelFileError : public Error {
 public:
  ModelFileError(std::string path, std::optional<uint64_t> offset, std::string field, std::string message);

  const std::string& path() const noexcept { return path_; }
  const std::optional<uint64_t>& offset() const noexcept { return offset_; }
  const std::string& field() const noexcept { return field_; }
  const std::string& message() const noexcept { return message_; }

 private:
  std::string path_;
  std::optional<uint64_t> offset_;
  std::string field_;
  std::string message_;
};

// A stated limit of memory, sequence length or queue is reached.
class CapacityError : public Error {
 public:
  using Error::Error;
};

// No kernel or library on this machine can do what was asked.
class BackendUnavailable : public Error {
 public:
  using Error::Error;
};

// Bytes from a file made safe for a message: ASCII stays, the rest is \xNN, long text is cut.
std::string printable(std::string_view bytes, size_t max_bytes = 80);

}  // namespace pe
