// Choice of a backend, and sharing the rows among threads. Nothing is kept between calls.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <mutex>
#include <vector>

#include "common/threads.h"
#include "search.h"

namespace drop {
namespace {

// Best first.
const SearchBackend* const kBackends[] = {
#ifdef DROP_X86
    &avx512_search,
    &avx2_search,
#endif
    &portable_search,
};

const SearchBackend* find_backend(const char* name) {
  for (const SearchBackend* backend : kBackends)
    if (std::strcmp(backend->name, name) == 0 && runs_here(backend->features)) return backend;
  return nullptr;
}

bool in_range(const Problem& p) {
  const bool power = p.beam > 0 && (p.beam & (p.beam - 1)) == 0;
  return p.d_in % kGroup == 0 && p.planes >= 1 && p.planes <= kMaxCodebooks && power &&
         p.beam <= kMaxBeam && p.levels >= 1 && p.level[p.levels - 1] == p.planes;
}

}  // namespace
}  // namespace drop

using namespace drop;

const char* drop_search_backend(int index) {
  for (const SearchBackend* backend : kBackends)
    if (runs_here(backend->features) && index-- == 0) return backend->name;
  return nullptr;
}

int drop_search(const char* backend, const DropSearch* problem, int threads) {
  const SearchBackend* chosen = find_backend(backend);
  if (!chosen) return 1;
  const Problem& p = *problem;
  if (!in_range(p)) return 2;
  // Rows differ in the work they need: workers take tiles from a counter instead of equal shares.
  constexpr int64_t kRows = 64;
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::mutex lock;
  auto body = [&](const Worker&) {
    try {
      std::vector<int64_t> changed(p.sweeps + 1, 0);
      for (int64_t r; (r = next.fetch_add(kRows)) < p.d_out && !failed;)
        chosen->run(p, r, std::min(r + kRows, p.d_out), changed.data());
      std::lock_guard<std::mutex> guard(lock);
      if (p.changed)
        for (int s = 0; s < p.sweeps; s++) p.changed[s] += changed[s];
    } catch (const std::exception&) {
      failed = true;
    }
  };
  on_threads(threads, body);
  return failed ? 3 : 0;
}
