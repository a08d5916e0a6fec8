// Products of one input with several matrices, as workers share them: what drop_input_group and
// drop_step (step.cpp) have in common.
#pragma once

#include <cstdlib>

#include "c_api.h"
#include "common/threads.h"
#include "kernel.h"

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

// At most so many threads that each has enough of `bytes` to be worth waking.
int threads_for(int threads, int64_t bytes);

struct Products {
  const Kernel* kernel;
  const uint8_t* lut;  // [n, LutShape::bytes()]
  int64_t n, groups, prefix, entries;
  const DropMatrix* matrices;
  int64_t count;
  char* out;  // matrix after matrix, each [out_rows, d_out]; this call writes n from first_row on
  int64_t out_rows, first_row;
  Scalar out_type;
  const float* residual;  // null, or added: [out_rows, d_out] of the only matrix; may be `out`
  bool aligned;           // a worker gets the same rows of all matrices, which have equal heights

  int64_t strips() const;
};

// One worker's rows. Without `aligned`, the matrices are shared as one column of strips.
void gemv_share(const Products& job, const Worker& worker);

// One worker's part of everything that an input group does to n rows of x: rotation, LUT, products.
// `rotated` [n, d_in] and `lut` are common to the workers. All of them must call it, and x must be
// complete; nothing is complete afterwards until the next barrier.
struct InputGroupShare {
  const Kernel* kernel;
  const DropInputGroup* input;
  const void* x;
  Scalar x_type;
  int64_t n, x_stride;
  float* rotated;
  uint8_t* lut;
};
void input_group_share(const InputGroupShare& job, Products products, const Worker& worker);

// Bytes of the LUTs of n rows of x for an input group.
int64_t input_group_lut_bytes(const Kernel& kernel, const DropInputGroup& input, int64_t n);

// Rows of x whose LUTs are held together: 16 rows of one block still fit the second cache.
constexpr int64_t kRowsAtOnce = 16;

}  // namespace drop
