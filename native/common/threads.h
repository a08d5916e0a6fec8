// Threads for one call, shared by the search and the kernels.
//
// Inside a process that runs torch on OpenMP they are torch's own: its workers are awake between
// two torch operators, so a region costs a microsecond, and no second pool competes for the cores.
// GOMP_parallel is looked up at run time (libgomp, and LLVM's and Intel's libraries export it), so
// nothing is linked. Elsewhere a small pool of std::thread serves.
#pragma once

#include <atomic>
#include <cstdint>

namespace drop {

// All workers wait here until the last one has come; usable any number of times.
class Barrier {
 public:
  void wait(int workers);

 private:
  std::atomic<int> arrived_{0};
  std::atomic<unsigned> round_{0};
};

struct Worker {
  int rank, size;
  Barrier* shared;
  void barrier() const {
    if (size > 1) shared->wait(size);
  }
};

// Runs body(context, worker) on up to `threads` workers. They may be fewer than asked for;
// `worker.size` is how many there are. Returns when all are done. `body` must not throw.
void run_threads(int threads, void (*body)(void*, const Worker&), void* context);

// The same for a lambda of a worker.
template <typename Body>
void on_threads(int threads, Body& body) {
  run_threads(
      threads, [](void* context, const Worker& worker) { (*static_cast<Body*>(context))(worker); },
      &body);
}

struct Range {
  int64_t first, last;
};

// A worker's equal share of `total` things.
inline Range share(int64_t total, const Worker& worker) {
  return {total * worker.rank / worker.size, total * (worker.rank + 1) / worker.size};
}

// "openmp" when torch's threads are borrowed, else "std::thread".
const char* thread_pool_kind();

}  // namespace drop
