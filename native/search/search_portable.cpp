// The search with 4 rows in a vector; see search_core.h.
#define DROP_LANES 4
#include "search_core.h"

constexpr drop::SearchBackend drop::portable_search = {"portable", kCompiledFeatures, search_rows};
