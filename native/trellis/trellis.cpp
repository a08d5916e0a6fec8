// Choice of a backend. Nothing is kept between calls.
#include "trellis.h"

#include <cstring>
#include <new>

namespace drop {
namespace {

// Best first.
const TrellisBackend* const kBackends[] = {
#ifdef DROP_X86
    &avx512_trellis,
    &avx2_trellis,
#endif
    &portable_trellis,
};

const TrellisBackend* find_backend(const char* name) {
  for (const TrellisBackend* backend : kBackends)
    if (std::strcmp(backend->name, name) == 0 && runs_here(backend->features)) return backend;
  return nullptr;
}

// Blocks of rows: whole cycles, two at least, and the first of them apart from what it sees before it.
bool blocks_fit(const Problem& p) {
  if (!p.lower || p.sweeps || p.row_block < 1 || p.d_out < 2 * p.row_block) return false;
  for (int m = 0; m < p.planes; m++)
    if (p.row_block % cycle_of(p.plane[m]) || p.d_out < p.row_block + beyond_of(p, m)) return false;
  return true;
}

bool in_range(const Problem& p) {
  if (p.planes < 1 || p.planes > kMaxPlanes || p.levels < 1 || p.levels > p.planes) return false;
  for (int m = 0; m < p.planes; m++) {
    const DropTrellisPlane& plane = p.plane[m];
    if (plane.bits < 1 || plane.bits > 2) return false;
    if (plane.window < 8 || plane.window > DROP_TRELLIS_MAX_WINDOW) return false;
  }
  for (int l = 0; l < p.levels; l++)
    if (p.prefix[l] <= (l ? p.prefix[l - 1] : 0)) return false;
  if (p.d_out < 1 || p.d_in < 1 || p.prefix[p.levels - 1] != p.planes) return false;
  return !p.row_feedback || blocks_fit(p);
}

}  // namespace
}  // namespace drop

using namespace drop;

const char* drop_trellis_backend(int index) {
  for (const TrellisBackend* backend : kBackends)
    if (runs_here(backend->features) && index-- == 0) return backend->name;
  return nullptr;
}

int drop_trellis_search(const char* backend, const DropTrellis* problem, int threads) {
  const TrellisBackend* chosen = find_backend(backend);
  if (!chosen) return 1;
  if (!in_range(*problem)) return 2;
  try {
    chosen->run(*problem, threads);
  } catch (const std::bad_alloc&) {
    return 3;
  }
  return 0;
}
