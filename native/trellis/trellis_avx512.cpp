// The search with 32 states in a vector; see trellis_core.h.
#define DROP_LANES 32
#include "trellis_core.h"

constexpr drop::TrellisBackend drop::avx512_trellis = {"avx512", kCompiledFeatures, search_matrix};
