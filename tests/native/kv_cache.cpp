// The paged cache: where blocks lie.
#include "engine/kv_cache.h"

#include <cstdint>
#include <limits>
#include <vector>

#include "check.h"
#include "runtime/error.h"

using pe::CapacityError;
using pe::DType;
using pe::KvCache;
using pe::KvCacheConfig;

namespace {

constexpr KvCacheConfig kConfig{
    .num_layers = 3, .num_kv_heads = 2, .head_dim = 6, .page_size = 16, .num_pages = 12, .dtype = DType::f32};

// Blocks do not overlap, fill the cache, and those of one page lie together.
void test_layout(DType dtype) {
  KvCacheConfig config = kConfig;
  config.dtype = dtype;
  const KvCache cache(config);
  const int64_t element_bytes = dtype == DType::f32 ? 4 : 2;
  const int64_t block_bytes = config.num_kv_heads * config.page_size * config.head_dim * element_bytes;
  const int64_t page_bytes = 2 * config.num_layers * block_bytes;
  CHECK(cache.num_bytes() == static_cast<size_t>(config.num_pages * page_bytes));
  const auto* base = static_cast<const uint8_t*>(cache.k_pages(0));
  std::vector<bool> taken(static_cast<size_t>(config.num_pages * 2 * config.num_layers));
  for (int64_t page = 0; page < config.num_pages; ++page)
    for (int64_t layer = 0; layer < config.num_layers; ++layer)
      for (const void* blocks : {cache.k_pages(layer), cache.v_pages(layer)}) {
        const int64_t begin = static_cast<const uint8_t*>(blocks) - base + page * cache.page_stride() * element_bytes;
        CHECK(begin % 64 == 0 && begin % block_bytes == 0);
        CHECK(begin / page_bytes == page);
        CHECK(!taken[static_cast<size_t>(begin / block_bytes)]);
        taken[static_cast<size_t>(begin / block_bytes)] = true;
      }
}

void test_sizes_that_wrap() {
  KvCacheConfig config = kConfig;
  config.num_layers = config.num_kv_heads = config.num_pages = int64_t{1} << 31;
  CHECK(throws<CapacityError>([&] { KvCache cache(config); }));
}

}  // namespace

int main() {
  test_layout(DType::f32);
  test_layout(DType::bf16);
  test_sizes_that_wrap();
  return g_failures != 0;
}
