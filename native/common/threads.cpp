#include "threads.h"

#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

#ifndef _WIN32
#include <dlfcn.h>
#include <pthread.h>
#endif
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace drop {
namespace {

void relax() {
#if defined(__x86_64__) || defined(__i386__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Spins, then yields: on a machine with fewer idle cores than workers, giving up the core is what
// lets the others arrive.
template <typename Ready>
void spin_until(Ready ready) {
  for (int spins = 0; !ready(); ++spins) {
    if (spins < 2000) {
      relax();
    } else {
      std::this_thread::yield();
    }
  }
}

struct Call {
  void (*body)(void*, const Worker&);
  void* context;
  Barrier barrier;
};

struct OpenMp {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  int (*thread_num)() = nullptr;
  int (*num_threads)() = nullptr;

  OpenMp() {
#ifndef _WIN32
    const char* off = std::getenv("DROPBYDROP_OPENMP");
    if (off && off[0] == '0') return;
    parallel = reinterpret_cast<decltype(parallel)>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    thread_num = reinterpret_cast<decltype(thread_num)>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
    num_threads =
        reinterpret_cast<decltype(num_threads)>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"));
#endif
  }
  bool usable() const { return parallel && thread_num && num_threads; }
};

const OpenMp& openmp() {
  static const OpenMp found;
  return found;
}

void openmp_entry(void* data) {
  Call& call = *static_cast<Call*>(data);
  const Worker worker{openmp().thread_num(), openmp().num_threads(), &call.barrier};
  call.body(call.context, worker);
}

// Workers sleep between calls; the pool lives as long as its process. A call that finds the pool busy (another thread is inside) runs
// alone instead of waiting.
class ThreadPool {
 public:
  void run(int threads, Call& call) {
    std::unique_lock<std::mutex> busy(busy_, std::try_to_lock);
    if (threads < 2 || !busy.owns_lock()) {
      call.body(call.context, Worker{0, 1, &call.barrier});
      return;
    }
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (static_cast<int>(workers_.size()) < threads - 1) {
        const int rank = static_cast<int>(workers_.size()) + 1;
        workers_.emplace_back([this, rank, seen = generation_] { work(rank, seen); });
      }
      call_ = &call;
      size_ = threads;
      left_.store(threads - 1);
      ++generation_;
    }
    wake_.notify_all();
    call.body(call.context, Worker{0, threads, &call.barrier});
    spin_until([this] { return left_.load() == 0; });
  }

 private:
  void work(int rank, unsigned seen) {
    for (;;) {
      Call* call;
      int size;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_ != seen; });
        seen = generation_;
        call = call_;
        size = size_;
      }
      if (rank >= size) continue;
      call->body(call->context, Worker{rank, size, &call->barrier});
      left_.fetch_sub(1);
    }
  }

  std::mutex busy_, mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> workers_;
  std::atomic<int> left_{0};
  Call* call_ = nullptr;
  int size_ = 0;
  unsigned generation_ = 0;
};

// A forked child has none of its parent's threads: OpenMP and the parent's pool would wait for them
// for ever. It gets a pool of its own.
std::atomic<bool> forked{false};
std::atomic<ThreadPool*> own_pool{nullptr};
#ifndef _WIN32
const int registered = pthread_atfork(nullptr, nullptr, [] {
  forked.store(true);
  own_pool.store(nullptr);
});
#endif

ThreadPool& pool() {
  ThreadPool* found = own_pool.load();
  if (found) return *found;
  ThreadPool* made = new ThreadPool;
  if (own_pool.compare_exchange_strong(found, made)) return *made;
  delete made;  // another thread was faster
  return *found;
}

}  // namespace

void Barrier::wait(int workers) {
  const unsigned round = round_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == workers - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    round_.store(round + 1, std::memory_order_release);
  } else {
    spin_until([&] { return round_.load(std::memory_order_acquire) != round; });
  }
}

void run_threads(int threads, void (*body)(void*, const Worker&), void* context) {
  Call call{body, context, {}};
  if (threads <= 1) {
    body(context, Worker{0, 1, &call.barrier});
  } else if (openmp().usable() && !forked.load()) {
    openmp().parallel(openmp_entry, &call, static_cast<unsigned>(threads), 0);
  } else {
    pool().run(threads, call);
  }
}

const char* thread_pool_kind() { return openmp().usable() ? "openmp" : "std::thread"; }

}  // namespace drop
