// What trellis.cpp and the files of the instruction sets share.
#pragma once

#include "c_api.h"
#include "common/cpu_features.h"
#include "common/threads.h"

namespace drop {

constexpr int kMaxPlanes = DROP_TRELLIS_MAX_PLANES;
constexpr int kLabels = DROP_TRELLIS_LABELS;

using Problem = DropTrellis;

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

}  // namespace drop
