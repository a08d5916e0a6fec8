// The search with 16 rows in a vector; see search_core.h.
#define DROP_LANES 16
#include "search_core.h"

constexpr drop::SearchBackend drop::avx512_search = {"avx512", kCompiledFeatures, search_rows};
