// What trellis.cpp and the files of the instruction sets share.
#pragma once

#include "c_api.h"
#include "common/cpu_features.h"
#include "common/threads.h"

namespace drop {

constexpr int kMaxPlanes = DROP_TRELLIS_MAX_PLANES;
constexpr int kLabels = DROP_TRELLIS_LABELS;

constexpr int kAhead = 8;  // cycles that a block of rows sees beyond its end, for each plane

using Problem = DropTrellis;

// Rows until every bit of a plane's state is replaced: the bits of a window, an even number when a row
// has two, by those of a row.
inline int64_t cycle_of(const DropTrellisPlane& plane) {
  return (plane.window + (plane.bits == 2 ? plane.window % 2 : 0)) / plane.bits;
}

struct TrellisBackend {
  const char* name;
  uint32_t features;  // what the file was compiled with (cpu_features.h)
  // The whole problem on up to `threads` threads. Throws std::bad_alloc before they start.
  void (*run)(const Problem&, int threads);
};

extern const TrellisBackend portable_trellis;
#if defined(__x86_64__)
extern const TrellisBackend avx2_trellis, avx512_trellis;
#endif

// Rows that a block sees beyond its end in plane m: whole cycles of it, kAhead for itself and for every
// later plane. The first block begins as many rows before row 0.
inline int64_t beyond_of(const Problem& p, int m) {
  const int64_t cycle = cycle_of(p.plane[m]);
  int64_t rows = 0;
  for (int i = m; i < p.planes; i++) rows += kAhead * cycle_of(p.plane[i]);
  return (rows + cycle - 1) / cycle * cycle;
}

}  // namespace drop
