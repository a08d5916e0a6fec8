// What search.cpp and the files of the instruction sets share.
#pragma once

#include "c_api.h"
#include "common/constants.h"
#include "common/cpu_features.h"

namespace drop {

constexpr int kMaxCodebooks = DROP_SEARCH_MAX_CODEBOOKS;  // largest M
constexpr int kMaxBeam = 32;                              // largest B

using Metric = DropMetric;
using Problem = DropSearch;

struct SearchBackend {
  const char* name;
  uint32_t features;  // what the file was compiled with (cpu_features.h)
  // Rows [first, last) of the problem. Rows are independent of each other.
  void (*run)(const Problem&, int64_t first, int64_t last, int64_t* changed);
};

extern const SearchBackend portable_search;
#if defined(__x86_64__)
extern const SearchBackend avx2_search, avx512_search;
#endif

}  // namespace drop
