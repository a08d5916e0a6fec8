#include "product.h"

namespace drop {
namespace {

thread_local Scratch sums_scratch, mix_scratch, own_scratch;

// A plane below this many bytes a worker is not worth waking it.
constexpr int64_t kBytesPerWorker = 1 << 14;

// Most bytes of codes prefetched ahead of a product.
constexpr int64_t kPrefetchedBytes = 384 << 10;

int64_t width_of(int64_t type) { return type == kF32 ? 4 : 2; }

// Strips first .. last of one matrix, for all n rows of x.
void gemv_strips(const Products& job, const DropMatrix& matrix, char* out, Range strips) {
  const PlaneShape plane{matrix.d_out, job.groups};
  const bool symmetric = job.entries == kHalf;
  const LutShape shape{job.groups, job.prefix, job.kernel->group_bytes(symmetric)};
  const int64_t stride = (strips.last - strips.first) * kStrip;
  float* sums = sums_scratch.get<float>(job.n * stride);
  job.kernel->lut_gemv({job.lut, job.n, shape, symmetric, matrix.planes, plane, sums, stride},
                       strips.first, strips.last);
  const int64_t row = strips.first * kStrip, end = strips.last * kStrip;
  const int64_t count = (end < matrix.d_out ? end : matrix.d_out) - row;
  const char* scales = static_cast<const char*>(matrix.scales) + row * width_of(matrix.scale_type);
  const char* bias = static_cast<const char*>(matrix.bias);
  if (bias) bias += row * width_of(matrix.bias_type);
  for (int64_t k = 0; k < job.n; ++k) {
    const int64_t at = (job.first_row + k) * matrix.d_out + row;
    job.kernel->epilogue(
        {sums + k * stride, scales, static_cast<Scalar>(matrix.scale_type), bias,
         static_cast<Scalar>(matrix.bias_type), job.residual ? job.residual + at : nullptr,
         out + at * width_of(job.out_type), job.out_type},
        0, count);
  }
}

// A worker's strips of matrix i, when its share of all strips is `mine` and `start` came before.
Range own_strips(const Products& job, const Worker& worker, Range mine, int64_t start,
                 int64_t strips) {
  if (job.aligned) return share(strips, worker);
  const Range here{mine.first > start ? mine.first - start : 0, mine.last - start};
  return {here.first, here.last < strips ? here.last : strips};
}

// The codes that gemv_share will read, as far as they fit the second cache beside the LUTs.
Upcoming upcoming(const Products& job, const Worker& worker) {
  Upcoming soon{};
  const Range mine = share(job.strips(), worker);
  int64_t start = 0, left = kPrefetchedBytes;
  for (int64_t i = 0; i < job.count; ++i) {
    const PlaneShape plane{job.matrices[i].d_out, job.groups};
    const Range own = own_strips(job, worker, mine, start, plane.strips());
    start += plane.strips();
    for (int64_t m = 0; m < job.prefix && own.first < own.last; ++m) {
      for (int64_t block = 0; block < plane.blocks(); ++block) {
        const int64_t bytes = (own.last - own.first) * kStrip * plane.block_groups(block);
        if (soon.count == kMaxParts || left <= 0) return soon;
        soon.parts[soon.count++] = {job.matrices[i].planes[m] + plane.offset(block, own.first),
                                    bytes < left ? bytes : left};
        left -= bytes;
      }
    }
  }
  return soon;
}

}  // namespace

int threads_for(int threads, int64_t bytes) {
  const int64_t most = bytes / kBytesPerWorker;
  if (threads > most) threads = static_cast<int>(most);
  return threads < 1 ? 1 : threads;
}

int64_t Products::strips() const {
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) total += PlaneShape{matrices[i].d_out, groups}.strips();
  return total;
}

void gemv_share(const Products& job, const Worker& worker) {
  const Range mine = share(job.strips(), worker);
  int64_t start = 0;  // first strip of the matrix
  char* out = job.out;
  for (int64_t i = 0; i < job.count; ++i) {
    const int64_t strips = PlaneShape{job.matrices[i].d_out, job.groups}.strips();
    const Range here = own_strips(job, worker, mine, start, strips);
    if (here.first < here.last) gemv_strips(job, job.matrices[i], out, here);
    start += strips;
    out += job.out_rows * job.matrices[i].d_out * width_of(job.out_type);
  }
}

void input_group_share(const InputGroupShare& job, Products products, const Worker& worker) {
  const DropInputGroup& input = *job.input;
  const RotateJob rotation{input.signs, input.d_in, input.block, input.odd};
  // Few rows: every worker rotates them all for itself, which is sooner done than a barrier.
  const bool alone = job.n < 2 * worker.size;
  float* rotated = alone ? own_scratch.get<float>(job.n * input.d_in) : job.rotated;
  float* scratch = input.odd ? mix_scratch.get<float>(input.d_in) : nullptr;
  const Range rows = alone ? Range{0, job.n} : share(job.n, worker);
  for (int64_t i = rows.first; i < rows.last; ++i) {
    const char* x = static_cast<const char*>(job.x) + i * job.x_stride * width_of(job.x_type);
    job.kernel->rotate(rotation, x, job.x_type, rotated + i * input.d_in, scratch);
  }
  if (!alone) worker.barrier();

  const int64_t groups = input.d_in / kGroup;
  const LutShape shape{groups, input.prefix, job.kernel->group_bytes(input.entries == kHalf)};
  products.kernel = job.kernel;
  products.lut = job.lut;
  products.n = job.n;
  products.groups = groups;
  products.prefix = input.prefix;
  products.entries = input.entries;
  products.matrices = input.matrices;
  products.count = input.count;
  Upcoming soon = upcoming(products, worker);
  const Range units = share(job.n * input.prefix * shape.blocks(), worker);
  job.kernel->build_lut(
      {rotated, input.d_in, reinterpret_cast<const Codebook* const*>(input.codebooks), shape,
       job.lut, &soon},
      units.first, units.last);
  worker.barrier();
  gemv_share(products, worker);
}

int64_t input_group_lut_bytes(const Kernel& kernel, const DropInputGroup& input, int64_t n) {
  return n * LutShape{input.d_in / kGroup, input.prefix, kernel.group_bytes(input.entries == kHalf)}
                 .bytes();
}

}  // namespace drop
