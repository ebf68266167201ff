// The smallest test harness: CHECK counts and reports, CHECK_THROWS wants an exception.
#pragma once

#include <cstdio>

inline int& failures() {
  static int count = 0;
  return count;
}

#define CHECK(condition)                                                   \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
      ++failures();                                                        \
    }                                                                      \
  } while (0)

#define CHECK_THROWS(type, expression)                                                    \
  do {                                                                                    \
    bool thrown = false;                                                                  \
    try {                                                                                 \
      (void)(expression);                                                                 \
    } catch (const type&) {                                                               \
      thrown = true;                                                                      \
    }                                                                                     \
    if (!thrown) {                                                                        \
      std::fprintf(stderr, "%s:%d: no %s: %s\n", __FILE__, __LINE__, #type, #expression); \
      ++failures();                                                                       \
    }                                                                                     \
  } while (0)
