#pragma once

#include <string>
#include <string_view>

namespace pe {

// Whether `text` is UTF-8 as Unicode defines it: no overlong forms, no surrogates, nothing above U+10FFFF.
bool is_valid_utf8(std::string_view text) noexcept;

// Appends one Unicode scalar value.
void append_utf8(char32_t code_point, std::string& text);

}  // namespace pe
