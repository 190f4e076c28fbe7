// Errors for Python, whose texts are made without iostreams: torch's libraries answer for parts of
// them with C++ runtimes of their own, and a stream put together from several of those can crash.
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>

namespace gplws {

inline void append_to(std::string& text, const char* part) { text += part; }
inline void append_to(std::string& text, const std::string& part) { text += part; }
template <class Number>
  requires std::is_integral_v<Number>
void append_to(std::string& text, Number part) {
  text += std::to_string(part);
}

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::string text;
  (append_to(text, parts), ...);
  throw std::runtime_error(text);
}

// A RuntimeError of the joined parts, unless the condition holds.
template <class... Parts>
void check(bool holds, const Parts&... parts) {
  if (!holds) [[unlikely]]
    fail(parts...);
}

}  // namespace gplws
