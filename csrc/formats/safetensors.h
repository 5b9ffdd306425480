// The safetensors format: u64 header size, a JSON header, the tensors' bytes. Rules and their reasons:
// https://github.com/huggingface/safetensors (README, "Format").
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "formats/mapped_file.h"

namespace pe {

// The format's own limit, so that a small file cannot ask for a large parse.
inline constexpr uint64_t kMaxSafetensorsHeaderBytes = 100'000'000;
// Ten times the largest published models. With the next two it bounds the heap at 400 MB whatever the header says.
inline constexpr uint64_t kMaxSafetensorsTensors = uint64_t{1} << 20;
inline constexpr uint64_t kMaxSafetensorsMetadata = uint64_t{1} << 16;
// Weights have at most 5 (a 3-D convolution).
inline constexpr uint64_t kMaxSafetensorsDims = 8;

struct SafetensorsTensor {
  std::string name;
  std::string_view dtype;       // one of the format's names: "F32", "BF16", ...
  std::vector<uint64_t> shape;  // slowest dimension first; may be empty or hold zeros
  uint64_t offset;              // of the first byte, in the file
  uint64_t num_bytes;
  uint64_t header_offset;  // of the tensor's entry in the header, for messages
};

struct SafetensorsIndex {
  std::vector<SafetensorsTensor> tensors;                     // in the order of their bytes
  std::vector<std::pair<std::string, std::string>> metadata;  // in the order of the header
};

// Reads the header of `bytes`, a whole file. Every tensor lies inside the file, they do not overlap and leave no hole.
// Throws ModelFileError naming `path`. Time: n log n in the size of the header.
SafetensorsIndex parse_safetensors(std::span<const uint8_t> bytes, const std::string& path);

class SafetensorsFile {
 public:
  explicit SafetensorsFile(const std::string& path);

  const std::shared_ptr<const MappedFile>& file() const noexcept { return file_; }
  const SafetensorsIndex& index() const noexcept { return index_; }

  // The tensor's description, or null.
  const SafetensorsTensor* find(std::string_view name) const;
  std::span<const uint8_t> data(const SafetensorsTensor& tensor) const;

 private:
  std::shared_ptr<const MappedFile> file_;
  SafetensorsIndex index_;
  std::vector<uint32_t> by_name_;
};

}  // namespace pe
