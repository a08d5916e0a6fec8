// Entry points of the search library (plain C interface, called through ctypes).
//
// Rows are handed to threads in tiles from a shared counter. Nothing is kept between calls.
#include "search.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace {

struct Backend {
  const char* name;
  drop::SearchRows run;
  bool (*runs_here)();
};

const Backend kBackends[] = {
#if defined(__x86_64__)
    {"avx512", drop::search_rows_avx512,
     [] { return bool(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq")); }},
    {"avx2", drop::search_rows_avx2,
     [] { return bool(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")); }},
#endif
    {"portable", drop::search_rows_portable, [] { return true; }},
};

}  // namespace

#define DROP_EXPORT __attribute__((visibility("default")))

extern "C" {

// Name of the i-th backend that runs on this machine, best first; null past the end.
DROP_EXPORT const char* drop_search_backend(int index) {
  for (const Backend& b : kBackends)
    if (b.runs_here() && index-- == 0) return b.name;
  return nullptr;
}

// Runs the search. 0: done; 1: unknown backend; 2: arguments out of range; 3: out of memory.
DROP_EXPORT int drop_search(const char* backend, const drop::Problem* problem, int threads) {
  const Backend* chosen = nullptr;
  for (const Backend& b : kBackends)
    if (std::strcmp(b.name, backend) == 0 && b.runs_here()) chosen = &b;
  if (!chosen) return 1;
  const drop::Problem& p = *problem;
  const bool power = p.beam > 0 && (p.beam & (p.beam - 1)) == 0;
  if (p.d_in % drop::kGroup || p.planes < 1 || p.planes > drop::kMaxPlanes || !power ||
      p.beam > drop::kMaxBeam || p.levels < 1 || p.level[p.levels - 1] != p.planes)
    return 2;
  constexpr int64_t kRows = 64;
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::mutex lock;
  auto work = [&] {
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
  std::vector<std::thread> pool;
  for (int t = 1; t < threads; t++) pool.emplace_back(work);
  work();
  for (std::thread& t : pool) t.join();
  return failed ? 3 : 0;
}

}  // extern "C"
