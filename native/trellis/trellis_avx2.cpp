// The search with 16 states in a vector; see trellis_core.h.
#define DROP_LANES 16
#include "trellis_core.h"

constexpr drop::TrellisBackend drop::avx2_trellis = {"avx2", kCompiledFeatures, search_matrix};
