// Lookup and duplicate search by sorting. A sort costs n log n on every input, where a hash table with a known hash
// function can be driven to n^2 by chosen names.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <optional>
#include <string_view>
#include <vector>

namespace pe {

// The positions of `items` in the order of `name(item)`, equal names in the order of `items`.
template <class Item, class Name>
std::vector<uint32_t> sort_by_name(const std::vector<Item>& items, Name name) {
  std::vector<uint32_t> order(items.size());
  std::iota(order.begin(), order.end(), uint32_t{0});
  std::sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) {
    const int comparison = std::string_view(name(items[a])).compare(std::string_view(name(items[b])));
    return comparison < 0 || (comparison == 0 && a < b);
  });
  return order;
}

// The position of the second of two items of one name, if there are such.
template <class Item, class Name>
std::optional<uint32_t> find_duplicate(const std::vector<Item>& items, const std::vector<uint32_t>& order, Name name) {
  for (size_t i = 1; i < order.size(); ++i) {
    if (name(items[order[i - 1]]) == name(items[order[i]])) return order[i];
  }
  return std::nullopt;
}

// The item called `wanted`, or null.
template <class Item, class Name>
const Item* find_by_name(const std::vector<Item>& items, const std::vector<uint32_t>& order, std::string_view wanted,
                         Name name) {
  const auto found = std::lower_bound(order.begin(), order.end(), wanted, [&](uint32_t position, std::string_view key) {
    return std::string_view(name(items[position])) < key;
  });
  if (found == order.end() || std::string_view(name(items[*found])) != wanted) return nullptr;
  return &items[*found];
}

}  // namespace pe
