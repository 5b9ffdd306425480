// The least that a test executable needs: CHECK prints where and what, and counts.
#pragma once
#include <cstdio>

inline int g_failures = 0;

#define CHECK(condition)                                                   \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
      ++g_failures;                                                        \
    }                                                                      \
  } while (0)

// Whether calling `body` throws an Exception.
template <class Exception, class Body>
bool throws(const Body& body) {
  try {
    body();
  } catch (const Exception&) {
    return true;
  }
  return false;
}
