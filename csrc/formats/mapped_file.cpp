#include "formats/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <optional>
#include <system_error>
#include <utility>

#include "runtime/checked.h"
#include "runtime/error.h"

namespace pe {
namespace {

class FileDescriptor {
 public:
  explicit FileDescriptor(int fd) : fd_(fd) {}
  FileDescriptor(const FileDescriptor&) = delete;
  FileDescriptor& operator=(const FileDescriptor&) = delete;
  ~FileDescriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  int get() const { return fd_; }

 private:
  int fd_;
};

[[noreturn]] void fail(const std::string& path, const std::string& message) {
  throw ModelFileError(path, std::nullopt, "", message);
}

std::string system_message(int code) { return std::generic_category().message(code); }

}  // namespace

std::shared_ptr<const MappedFile> MappedFile::open(const std::string& path) {
  // Without O_NONBLOCK, opening a pipe waits for a writer.
  const FileDescriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (file.get() < 0) fail(path, "expected a readable file, got: " + system_message(errno));
  struct stat status = {};
  if (::fstat(file.get(), &status) != 0) fail(path, "expected a readable file, got: " + system_message(errno));
  if (S_ISDIR(status.st_mode)) fail(path, "expected a file, got a directory");
  if (!S_ISREG(status.st_mode)) fail(path, "expected a regular file, got a device, pipe or socket");
  if (status.st_size == 0) fail(path, "expected a model file, got an empty file");
  const auto size = Checked(status.st_size).get_or<size_t>([&] { fail(path, "expected a file size >= 0"); });
  void* const address = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file.get(), 0);
  if (address == MAP_FAILED) {
    fail(path, "expected to map " + std::to_string(size) + " bytes, got: " + system_message(errno));
  }
  return std::shared_ptr<const MappedFile>(new MappedFile(path, {static_cast<const uint8_t*>(address), size}));
}

MappedFile::MappedFile(std::string path, std::span<const uint8_t> bytes) : path_(std::move(path)), bytes_(bytes) {}

MappedFile::~MappedFile() { ::munmap(const_cast<uint8_t*>(bytes_.data()), bytes_.size()); }

}  // namespace pe
