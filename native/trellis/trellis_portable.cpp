// The search with 8 states in a vector; see trellis_core.h.
#define DROP_LANES 8
#include "trellis_core.h"

constexpr drop::TrellisBackend drop::portable_trellis = {"portable", kCompiledFeatures, search_matrix};
