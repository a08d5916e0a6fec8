// A team of threads for one call.
//
// Inside a process that runs torch on OpenMP the team is torch's own: its workers are awake between
// two torch operators, so a region costs a microsecond, and no second pool competes for the cores.
// GOMP_parallel is looked up at run time (libgomp, and LLVM's and Intel's libraries export it), so
// nothing is linked. Elsewhere a small pool of std::thread serves.
#pragma once

#include <atomic>

namespace drop {

// Meets all members of a team; usable any number of times.
class Barrier {
 public:
  void wait(int members);

 private:
  std::atomic<int> arrived_{0};
  std::atomic<unsigned> round_{0};
};

struct Member {
  int rank, size;
  Barrier* barrier;
  void meet() const {
    if (size > 1) barrier->wait(size);
  }
};

// Runs body(context, member) on up to `threads` members. The team may be smaller than asked for;
// `member.size` is what it is. Returns when all are done.
void run_team(int threads, void (*body)(void*, const Member&), void* context);

// "openmp" when torch's team is borrowed, else "std::thread".
const char* team_kind();

}  // namespace drop
