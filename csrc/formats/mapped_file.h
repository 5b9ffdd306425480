// A whole file, mapped read-only.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>

namespace pe {

// The bytes stay valid as long as the object. A file that another process cuts short while it is mapped raises SIGBUS
// on access, as with every mapping; writers that publish by rename, as ours do, leave the mapped file whole.
class MappedFile {
 public:
  // Throws ModelFileError where `path` is missing, unreadable, not a regular file (a pipe would block) or empty.
  static std::shared_ptr<const MappedFile> open(const std::string& path);

  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  ~MappedFile();

  const std::string& path() const noexcept { return path_; }
  std::span<const uint8_t> bytes() const noexcept { return bytes_; }

 private:
  MappedFile(std::string path, std::span<const uint8_t> bytes);

  std::string path_;
  std::span<const uint8_t> bytes_;
};

}  // namespace pe
