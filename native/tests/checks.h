// What the files of the test program share.
#pragma once

#include <cstdio>
#include <string>

inline int failures = 0;

inline void check(bool ok, const std::string& what) {
  if (ok) return;
  ++failures;
  std::printf("  FAILED %s\n", what.c_str());
}

// test_trellis.cpp
void check_trellis(int kernel, const std::string& name);
void check_trellis_refusals();

// test_search.cpp
void check_search();
