#include "product.h"

namespace drop {
namespace {

thread_local Scratch sums_scratch, mix_scratch, own_scratch, own_tables;

// A plane below this many bytes a worker is not worth waking it.
constexpr int64_t kBytesPerWorker = 1 << 14;

// Most bytes of codes prefetched ahead of a product.
constexpr int64_t kPrefetchedBytes = 384 << 10;

int64_t width_of(int64_t type) { return type == kF32 ? 4 : 2; }

// A worker's units of one matrix.
struct Part {
  const DropMatrix* matrix;  // null: none
  char* out;
  Range units;
};

// For all n rows of x; `next` comes after it.
void gemv_part(const Products& job, const Part& part, const Part& next) {
  const DropMatrix& matrix = *part.matrix;
  const Range units = part.units;
  const int64_t stride = (units.last - units.first) * job.unit();
  float* sums = sums_scratch.get<float>(job.n * stride);
  if (job.trellis) {
    const auto* books = reinterpret_cast<const Trellis* const*>(job.codebooks);
    job.kernel->trellis_gemv(
        {job.x, matrix.planes, books, job.prefix, matrix.d_out, sums, stride,
         next.matrix ? next.matrix->planes : nullptr, next.units.first, next.units.last,
         job.prefixes},
        units.first, units.last);
  } else {
    const PlaneShape plane{matrix.d_out, job.groups};
    const bool symmetric = job.entries == kHalf;
    const LutShape shape{job.groups, job.prefix, job.kernel->group_bytes(symmetric)};
    job.kernel->lut_gemv({job.lut, job.n, shape, symmetric, matrix.planes, plane, sums, stride,
                          job.prefixes},
                         units.first, units.last);
  }
  const int64_t row = units.first * job.unit(), end = units.last * job.unit();
  const int64_t count = (end < matrix.d_out ? end : matrix.d_out) - row;
  const char* scales = static_cast<const char*>(matrix.scales) + row * width_of(matrix.scale_type);
  const char* bias = static_cast<const char*>(matrix.bias);
  if (bias) bias += row * width_of(matrix.bias_type);
  for (int64_t k = 0; k < job.n; ++k) {
    const int64_t at = (job.first_row + k) * matrix.d_out + row;
    job.kernel->epilogue(
        {sums + k * stride, scales, static_cast<Scalar>(matrix.scale_type), bias,
         static_cast<Scalar>(matrix.bias_type), job.residual ? job.residual + at : nullptr,
         part.out + at * width_of(job.out_type), job.out_type},
        0, count);
  }
}

// A worker's units of matrix i, when its share of all units is `mine` and `start` came before.
Range own_units(const Products& job, const Worker& worker, Range mine, int64_t start,
                int64_t units) {
  if (job.aligned) return share(units, worker);
  const Range here{mine.first > start ? mine.first - start : 0, mine.last - start};
  return {here.first, here.last < units ? here.last : units};
}

// The packed codes that gemv_share will read, as far as they fit the second cache beside the LUTs.
Upcoming upcoming(const Products& job, const Worker& worker) {
  Upcoming soon{};
  const Range mine = share(job.units(), worker);
  int64_t start = 0, left = kPrefetchedBytes;
  for (int64_t i = 0; i < job.count; ++i) {
    const PlaneShape plane{job.matrices[i].d_out, job.groups};
    const Range own = own_units(job, worker, mine, start, plane.strips());
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

// Few rows: every worker rotates them all for itself, which is sooner done than a barrier.
bool alone(const InputGroupShare& job, const Worker& worker) { return job.n < 2 * worker.size; }

void rotate_row(const InputGroupShare& job, int64_t row, float* out) {
  const DropInputGroup& input = *job.input;
  float* scratch = input.odd ? mix_scratch.get<float>(input.d_in) : nullptr;
  const char* x = static_cast<const char*>(job.x) + row * job.x_stride * width_of(job.x_type);
  job.kernel->rotate({input.signs, input.d_in, input.block, input.odd}, x, job.x_type, out,
                     scratch);
}

// Rotated rows of x -> LUTs; all of them are there when it returns.
void look_up_tables(const InputGroupShare& job, const Products& products, const Worker& worker) {
  const DropInputGroup& input = *job.input;
  const bool own = alone(job, worker);
  float* rotated = own ? own_scratch.get<float>(job.n * input.d_in) : job.rotated;
  const Range rows = own ? Range{0, job.n} : share(job.n, worker);
  for (int64_t i = rows.first; i < rows.last; ++i) rotate_row(job, i, rotated + i * input.d_in);
  if (!own) worker.barrier();

  const LutShape shape{products.groups, input.prefix,
                       job.kernel->group_bytes(input.entries == kHalf)};
  Upcoming soon = upcoming(products, worker);
  const Range units = share(job.n * input.prefix * shape.blocks(), worker);
  job.kernel->build_lut(
      {rotated, input.d_in, reinterpret_cast<const Codebook* const*>(input.codebooks), shape,
       job.tables, &soon, job.prefixes},
      units.first, units.last);
  worker.barrier();
}

// The first tiles that a worker reads, which no earlier one fetches: while x is rotated.
void fetch_first_tiles(const Products& job, const Worker& worker) {
  const auto* books = reinterpret_cast<const Trellis* const*>(job.codebooks);
  const Range own = own_units(job, worker, share(job.units(), worker), 0,
                              job.count ? job.units(job.matrices[0]) : 0);
  int64_t bits = 0;
  for (int64_t m = 0; m < job.prefix; ++m) bits += books[m]->bits;
  const int64_t tiles = tiles_ahead(bits, job.x.stride);
  const int64_t last = own.first + tiles < own.last ? own.first + tiles : own.last;
  for (int64_t at = 0; at < job.x.stride && own.first < last; at += kLine) {
    for (int64_t m = 0; m < job.prefix; ++m) {
      const int64_t k = books[m]->bits, end = stream_bytes(job.matrices[0].d_out, k);
      for (int64_t row = own.first * k; row < last * k && row < end; ++row) {
        __builtin_prefetch(job.matrices[0].planes[m] + row * job.x.stride + at, 0, 2);
      }
    }
  }
}

// Rotated rows of x -> integers; all of them are there when it returns.
TrellisInputs integers(const InputGroupShare& job, const Worker& worker) {
  const int64_t d_in = job.input->d_in;
  const bool own = alone(job, worker);
  uint8_t* memory = job.tables;
  if (own) memory = own_tables.get<uint8_t>(TrellisInputs::size(job.n, d_in));
  const TrellisInputs x = TrellisInputs::in(memory, job.n, d_in);
  float* rotated = own_scratch.get<float>(d_in);
  const Range rows = own ? Range{0, job.n} : share(job.n, worker);
  for (int64_t i = rows.first; i < rows.last; ++i) {
    rotate_row(job, i, rotated);
    job.kernel->trellis_input(rotated, d_in, x, i);
  }
  if (!own) worker.barrier();
  return x;
}

}  // namespace

int threads_for(int threads, int64_t bytes) {
  const int64_t most = bytes / kBytesPerWorker;
  if (threads > most) threads = static_cast<int>(most);
  return threads < 1 ? 1 : threads;
}

int64_t Products::units() const {
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) total += units(matrices[i]);
  return total;
}

void gemv_share(const Products& job, const Worker& worker) {
  const Range mine = share(job.units(), worker);
  int64_t start = 0;  // first unit of the matrix
  char* out = job.out;
  Part part{};
  for (int64_t i = 0; i < job.count; ++i) {
    const int64_t units = job.units(job.matrices[i]);
    const Part next{job.matrices + i, out, own_units(job, worker, mine, start, units)};
    start += units;
    out += job.out_rows * job.matrices[i].d_out * width_of(job.out_type);
    if (next.units.first >= next.units.last) continue;
    if (part.matrix) gemv_part(job, part, next);
    part = next;
  }
  if (part.matrix) gemv_part(job, part, {});
}

bool sound(const DropInputGroup& input) {
  if (input.magic != DROP_INPUT_GROUP_MAGIC) return false;
  if (input.prefix < 1 || input.prefix > kMaxPlanes || input.d_in < 1) return false;
  if (input.kind == DROP_BYTES) return input.d_in >= kGroup;
  return input.kind == DROP_TRELLIS && trellis_stride(input.d_in) <= kTrellisInputs;
}

void input_group_share(const InputGroupShare& job, Products products, const Worker& worker) {
  const DropInputGroup& input = *job.input;
  products.kernel = job.kernel;
  products.n = job.n;
  products.prefix = input.prefix;
  products.matrices = input.matrices;
  products.count = input.count;
  products.prefixes = job.prefixes;
  if (input.kind == DROP_TRELLIS) {
    products.trellis = true;
    products.codebooks = input.codebooks;
    products.x.stride = trellis_stride(input.d_in);
    fetch_first_tiles(products, worker);
    products.x = integers(job, worker);
  } else {
    products.lut = job.tables;
    products.groups = input.d_in / kGroup;
    products.entries = input.entries;
    look_up_tables(job, products, worker);
  }
  gemv_share(products, worker);
}

int64_t input_group_table_bytes(const Kernel& kernel, const DropInputGroup& input, int64_t n) {
  if (input.kind == DROP_TRELLIS) return TrellisInputs::size(n, input.d_in);
  return n * LutShape{input.d_in / kGroup, input.prefix, kernel.group_bytes(input.entries == kHalf)}
                 .bytes();
}

int64_t input_group_code_bytes(const DropInputGroup& input) {
  int64_t bytes = 0;
  for (int64_t i = 0; i < input.count; ++i) {
    const int64_t d_out = input.matrices[i].d_out;
    for (int64_t m = 0; m < input.prefix; ++m) {
      if (input.kind == DROP_TRELLIS) {
        const int64_t bits = static_cast<const Trellis*>(input.codebooks[m])->bits;
        bytes += stream_bytes(d_out, bits) * input.d_in;
      } else {
        bytes += PlaneShape{d_out, input.d_in / kGroup}.bytes();
      }
    }
  }
  return bytes;
}

}  // namespace drop
