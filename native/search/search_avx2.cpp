// The search with 8 rows in a vector; see search_core.h.
#define DROP_LANES 8
#include "search_core.h"

constexpr drop::SearchBackend drop::avx2_search = {"avx2", kCompiledFeatures, search_rows};
