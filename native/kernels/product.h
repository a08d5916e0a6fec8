// Products of one input with several matrices, as the members of a team share them: what drop_site
// and drop_step (step.cpp) have in common.
#pragma once

#include <cstdlib>

#include "drop_kernels.h"
#include "kernel.h"
#include "parallel.h"

namespace drop {

// The kernel of that number, or null when there is none or the processor does not support it.
const Kernel* usable(int kernel);

// Scratch that grows and is reused; one per thread and purpose.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  template <typename T>
  T* get(int64_t count) {
    const size_t bytes = static_cast<size_t>(round_up(count * static_cast<int64_t>(sizeof(T)), 64));
    if (bytes > size_) {
      std::free(data_);
      data_ = std::aligned_alloc(64, bytes);
      if (!data_) std::abort();
      size_ = bytes;
    }
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

struct Range {
  int64_t first, last;
};

inline Range share(int64_t total, const Member& member) {
  return {total * member.rank / member.size, total * (member.rank + 1) / member.size};
}

// Runs a lambda on a team.
template <typename Body>
void on_team(int threads, Body& body) {
  run_team(
      threads, [](void* context, const Member& member) { (*static_cast<Body*>(context))(member); },
      &body);
}

// At most so many threads that each has enough of `bytes` to be worth waking.
int team_for(int threads, int64_t bytes);

struct Products {
  const Kernel* kernel;
  const uint8_t* tables;
  int64_t n, groups, prefix, entries;
  const DropMatrix* matrices;
  int64_t count;
  char* out;  // matrix after matrix, each [out_rows, rows]; this call writes n from first_row on
  int64_t out_rows, first_row;
  Scalar out_type;
  const float* residual;  // null, or added: [out_rows, rows] of the only matrix; may be `out`
  bool aligned;           // a member gets the same rows of all matrices, which have equal heights

  int64_t strips() const;
};

// One member's rows. Without `aligned`, the matrices are shared as one column of strips.
void multiply_share(const Products& job, const Member& member);

// One member's part of everything a site does to n rows of x: rotation, tables, products. `rotated`
// [n, d] and `tables` are common to the team. All members must call it, and x must be complete;
// nothing is complete afterwards until they have met.
struct SiteShare {
  const Kernel* kernel;
  const DropSite* site;
  const void* x;
  Scalar x_type;
  int64_t n, x_stride;
  float* rotated;
  uint8_t* tables;
};
void site_share(const SiteShare& job, Products products, const Member& member);

// Bytes of the tables of n rows for a site.
int64_t site_table_bytes(const Kernel& kernel, const DropSite& site, int64_t n);

// Rows of x whose tables are held together: 16 rows of one block still fit the second cache.
constexpr int64_t kRowsAtOnce = 16;

}  // namespace drop
