#include "product.h"

namespace drop {
namespace {

thread_local Scratch sums_scratch, mix_scratch, own_scratch;

// A plane below this many bytes a member is not worth waking it.
constexpr int64_t kBytesPerMember = 1 << 14;

// Most bytes of codes asked for ahead of a product.
constexpr int64_t kAskedBytes = 384 << 10;

int64_t width_of(int64_t type) { return type == kF32 ? 4 : 2; }

// Strips first .. last of one matrix, for all rows of x.
void multiply_strips(const Products& job, const DropMatrix& matrix, char* out, Range strips) {
  const PlaneShape plane{matrix.rows, job.groups};
  const bool symmetric = job.entries == kHalf;
  const TableShape table{job.groups, job.prefix, job.kernel->group_bytes(symmetric)};
  const int64_t stride = (strips.last - strips.first) * kStrip;
  float* sums = sums_scratch.get<float>(job.n * stride);
  job.kernel->multiply({job.tables, job.n, table, symmetric, matrix.planes, plane, sums, stride},
                       strips.first, strips.last);
  const int64_t row = strips.first * kStrip, end = strips.last * kStrip;
  const int64_t rows = (end < matrix.rows ? end : matrix.rows) - row;
  const char* scales = static_cast<const char*>(matrix.scales) + row * width_of(matrix.scale_type);
  const char* bias = static_cast<const char*>(matrix.bias);
  if (bias) bias += row * width_of(matrix.bias_type);
  for (int64_t k = 0; k < job.n; ++k) {
    const int64_t at = (job.first_row + k) * matrix.rows + row;
    job.kernel->finish(
        {sums + k * stride, scales, static_cast<Scalar>(matrix.scale_type), bias,
         static_cast<Scalar>(matrix.bias_type), job.residual ? job.residual + at : nullptr,
         out + at * width_of(job.out_type), job.out_type},
        0, rows);
  }
}

// A member's strips of matrix i, when its share of all strips is `mine` and `start` came before.
Range own_strips(const Products& job, const Member& member, Range mine, int64_t start,
                 int64_t strips) {
  if (job.aligned) return share(strips, member);
  const Range here{mine.first > start ? mine.first - start : 0, mine.last - start};
  return {here.first, here.last < strips ? here.last : strips};
}

// The codes that multiply_share will read, as far as they fit the second cache beside the tables.
Upcoming upcoming(const Products& job, const Member& member) {
  Upcoming soon{};
  const Range mine = share(job.strips(), member);
  int64_t start = 0, left = kAskedBytes;
  for (int64_t i = 0; i < job.count; ++i) {
    const PlaneShape plane{job.matrices[i].rows, job.groups};
    const Range own = own_strips(job, member, mine, start, plane.strips());
    start += plane.strips();
    for (int64_t m = 0; m < job.prefix && own.first < own.last; ++m) {
      for (int64_t block = 0; block < plane.blocks(); ++block) {
        const int64_t bytes = (own.last - own.first) * kStrip * plane.block_groups(block);
        if (soon.count == kMostParts || left <= 0) return soon;
        soon.parts[soon.count++] = {job.matrices[i].planes[m] + plane.offset(block, own.first),
                                    bytes < left ? bytes : left};
        left -= bytes;
      }
    }
  }
  return soon;
}

}  // namespace

int team_for(int threads, int64_t bytes) {
  const int64_t most = bytes / kBytesPerMember;
  if (threads > most) threads = static_cast<int>(most);
  return threads < 1 ? 1 : threads;
}

int64_t Products::strips() const {
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) total += PlaneShape{matrices[i].rows, groups}.strips();
  return total;
}

void multiply_share(const Products& job, const Member& member) {
  const Range mine = share(job.strips(), member);
  int64_t start = 0;  // first strip of the matrix
  char* out = job.out;
  for (int64_t i = 0; i < job.count; ++i) {
    const int64_t strips = PlaneShape{job.matrices[i].rows, job.groups}.strips();
    const Range here = own_strips(job, member, mine, start, strips);
    if (here.first < here.last) multiply_strips(job, job.matrices[i], out, here);
    start += strips;
    out += job.out_rows * job.matrices[i].rows * width_of(job.out_type);
  }
}

void site_share(const SiteShare& job, Products products, const Member& member) {
  const DropSite& site = *job.site;
  const RotateJob rotation{site.signs, site.d, site.block, site.odd};
  // Few rows: every member rotates them all for itself, which is sooner done than meeting.
  const bool alone = job.n < 2 * member.size;
  float* rotated = alone ? own_scratch.get<float>(job.n * site.d) : job.rotated;
  float* scratch = site.odd ? mix_scratch.get<float>(site.d) : nullptr;
  const Range rows = alone ? Range{0, job.n} : share(job.n, member);
  for (int64_t i = rows.first; i < rows.last; ++i) {
    const char* x = static_cast<const char*>(job.x) + i * job.x_stride * width_of(job.x_type);
    job.kernel->rotate(rotation, x, job.x_type, rotated + i * site.d, scratch);
  }
  if (!alone) member.meet();

  const int64_t groups = site.d / kGroup;
  const TableShape shape{groups, site.prefix, job.kernel->group_bytes(site.entries == kHalf)};
  products.kernel = job.kernel;
  products.tables = job.tables;
  products.n = job.n;
  products.groups = groups;
  products.prefix = site.prefix;
  products.entries = site.entries;
  products.matrices = site.matrices;
  products.count = site.count;
  Upcoming soon = upcoming(products, member);
  const Range units = share(job.n * site.prefix * shape.blocks(), member);
  job.kernel->build({rotated, site.d, reinterpret_cast<const Codebook* const*>(site.codebooks),
                     shape, job.tables, &soon},
                    units.first, units.last);
  member.meet();
  multiply_share(products, member);
}

int64_t site_table_bytes(const Kernel& kernel, const DropSite& site, int64_t n) {
  return n * TableShape{site.d / kGroup, site.prefix, kernel.group_bytes(site.entries == kHalf)}
                 .bytes();
}

}  // namespace drop
