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

// Rows that one worker computes together: a strip, or a tile.
inline int64_t unit_rows(bool trellis) { return trellis ? kTile : kStrip; }

struct Products {
  const Kernel* kernel;
  bool trellis;        // else planes of bytes
  const uint8_t* lut;  // [n, LutShape::bytes()] of planes of bytes
  TrellisInputs x;     // of trellis planes
  int64_t n, groups, prefix, entries;
  const void* const* codebooks;  // [prefix] of trellis planes
  const DropMatrix* matrices;
  int64_t count;
  char* out;  // matrix after matrix, each [out_rows, d_out]; this call writes n from first_row on
  int64_t out_rows, first_row;
  Scalar out_type;
  const int64_t* prefixes;  // [n], planes that each row reads, at most `prefix`; null: all
  const float* residual;    // null, or added: [out_rows, d_out] of the only matrix; may be `out`
  bool aligned;           // a worker gets the same rows of all matrices, which have equal heights

  int64_t unit() const { return unit_rows(trellis); }
  int64_t units(const DropMatrix& matrix) const { return (matrix.d_out + unit() - 1) / unit(); }
  int64_t units() const;  // of all matrices
};

// One worker's rows. Without `aligned`, the matrices are shared as one column of units.
void gemv_share(const Products& job, const Worker& worker);

// Whether the library can compute this input group.
bool sound(const DropInputGroup& input);

// One worker's part of everything that an input group does to n rows of x: rotation, LUTs or
// integers, products. `rotated` [n, d_in] and `tables` are common to the workers. All of them must
// call it, and x must be complete; nothing is complete afterwards until the next barrier.
struct InputGroupShare {
  const Kernel* kernel;
  const DropInputGroup* input;
  const void* x;
  Scalar x_type;
  int64_t n, x_stride;
  float* rotated;
  uint8_t* tables;
  const int64_t* prefixes;  // as in Products
};
void input_group_share(const InputGroupShare& job, Products products, const Worker& worker);

// Bytes of the LUTs, or of the integers, of n rows of x for an input group.
int64_t input_group_table_bytes(const Kernel& kernel, const DropInputGroup& input, int64_t n);

// Bytes of the codes that a product with an input group reads.
int64_t input_group_code_bytes(const DropInputGroup& input);

// Rows of x whose LUTs are held together: 16 rows of one block still fit the second cache.
constexpr int64_t kRowsAtOnce = 16;
static_assert(kRowsAtOnce <= kTrellisRows, "rows of one product");

}  // namespace drop
