// The table of kernels and the C interface: what is the same for every instruction set.
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "drop_kernels.h"
#include "kernel.h"
#include "parallel.h"

namespace drop {

#if defined(__x86_64__) || defined(_M_X64)
extern const Kernel avx512vbmi_kernel, avx512vbmi_u8_kernel, avx512bw_kernel, avx2_kernel,
    avx2_u8_kernel;
#endif
#if defined(__aarch64__)
extern const Kernel neon_kernel, neon_u8_kernel;
#endif
extern const Kernel portable_kernel, portable_u8_kernel;

namespace {

// Best first. Exact ("16-bit") tables come before 8-bit ones, which are only used when named.
const Kernel* const kKernels[] = {
#if defined(__x86_64__) || defined(_M_X64)
    &avx512vbmi_kernel, &avx512bw_kernel,      &avx2_kernel,
#endif
#if defined(__aarch64__)
    &neon_kernel,
#endif
    &portable_kernel,
#if defined(__x86_64__) || defined(_M_X64)
    &avx512vbmi_u8_kernel, &avx2_u8_kernel,
#endif
#if defined(__aarch64__)
    &neon_u8_kernel,
#endif
    &portable_u8_kernel,
};
constexpr int kCount = sizeof kKernels / sizeof kKernels[0];

const Kernel* usable(int kernel) {
  if (kernel < 0 || kernel >= kCount || !kKernels[kernel]->supported()) return nullptr;
  return kKernels[kernel];
}

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

thread_local Scratch rotated_scratch, table_scratch, sums_scratch, mix_scratch;

struct Range {
  int64_t first, last;
};

Range share(int64_t total, const Member& member) {
  return {total * member.rank / member.size, total * (member.rank + 1) / member.size};
}

// Runs a lambda on a team.
template <typename Body>
void on_team(int threads, Body& body) {
  run_team(
      threads, [](void* context, const Member& member) { (*static_cast<Body*>(context))(member); },
      &body);
}

struct Products {
  const Kernel* kernel;
  const uint8_t* tables;
  int64_t n, groups, prefix, entries;
  const DropMatrix* matrices;
  int64_t count;
  char* out;          // of all rows; a matrix has out_rows of them, these are from first_row on
  int64_t out_rows, first_row;
  Scalar out_type;

  int64_t strips() const {
    int64_t total = 0;
    for (int64_t i = 0; i < count; ++i) total += PlaneShape{matrices[i].rows, groups}.strips();
    return total;
  }
};

// One member's strips of all matrices, the matrices taken as one column of strips.
void multiply_share(const Products& job, const Member& member) {
  const Range mine = share(job.strips(), member);
  const int64_t width = job.out_type == kF32 ? 4 : 2;
  const bool symmetric = job.entries == kHalf;
  const TableShape table{job.groups, job.prefix, job.kernel->group_bytes(symmetric)};
  int64_t start = 0;  // first strip of the matrix
  char* out = job.out;
  for (int64_t i = 0; i < job.count; ++i) {
    const DropMatrix& matrix = job.matrices[i];
    const PlaneShape plane{matrix.rows, job.groups};
    const int64_t first = mine.first > start ? mine.first - start : 0;
    int64_t last = mine.last - start;
    if (last > plane.strips()) last = plane.strips();
    if (first < last) {
      const int64_t stride = (last - first) * kStrip;
      float* sums = sums_scratch.get<float>(job.n * stride);
      job.kernel->multiply(
          {job.tables, job.n, table, symmetric, matrix.planes, plane, sums, stride}, first, last);
      const int64_t row = first * kStrip;
      const int64_t rows = (last * kStrip < matrix.rows ? last * kStrip : matrix.rows) - row;
      const int64_t scale_width = matrix.scale_type == kF32 ? 4 : 2;
      const int64_t bias_width = matrix.bias_type == kF32 ? 4 : 2;
      for (int64_t k = 0; k < job.n; ++k) {
        const char* bias = static_cast<const char*>(matrix.bias);
        job.kernel->finish({sums + k * stride,
                            static_cast<const char*>(matrix.scales) + row * scale_width,
                            static_cast<Scalar>(matrix.scale_type),
                            bias ? bias + row * bias_width : nullptr,
                            static_cast<Scalar>(matrix.bias_type),
                            out + ((job.first_row + k) * matrix.rows + row) * width,
                            job.out_type},
                           0, rows);
      }
    }
    start += plane.strips();
    out += job.out_rows * matrix.rows * width;
  }
}

void rotate_share(const Kernel& kernel, const RotateJob& job, const void* x, Scalar type,
                  int64_t n, int64_t stride, float* out, const Member& member) {
  const Range mine = share(n, member);
  const int64_t width = type == kF32 ? 4 : 2;
  float* scratch = job.odd ? mix_scratch.get<float>(job.d) : nullptr;
  for (int64_t i = mine.first; i < mine.last; ++i) {
    kernel.rotate(job, static_cast<const char*>(x) + i * stride * width, type, out + i * job.d,
                  scratch);
  }
}

// Rows of x whose tables are held together: 16 rows of one block still fit the second cache.
constexpr int64_t kRowsAtOnce = 16;

// A plane below this many bytes a member is not worth waking it.
constexpr int64_t kBytesPerMember = 1 << 14;

int team_for(int threads, int64_t bytes) {
  const int64_t most = bytes / kBytesPerMember;
  if (threads > most) threads = static_cast<int>(most);
  return threads < 1 ? 1 : threads;
}

template <bool kPack>
void copy_packed(uint8_t* codes, int64_t rows, int64_t groups, uint8_t* packed) {
  const PlaneShape plane{rows, groups};
  for (int64_t block = 0; block < plane.blocks(); ++block) {
    for (int64_t strip = 0; strip < plane.strips(); ++strip) {
      uint8_t* base = packed + plane.offset(block, strip);
      for (int64_t r = 0; r < kStrip; ++r) {
        const int64_t row = strip * kStrip + r;
        uint8_t* to = base + row_byte(r);
        uint8_t* from = codes + row * groups + block * kBlock;
        for (int64_t j = 0; j < plane.block_groups(block); ++j) {
          if (kPack) {
            to[j * kStrip] = row < rows ? from[j] : 0;
          } else if (row < rows) {
            from[j] = to[j * kStrip];
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace drop

using namespace drop;

int drop_kernels_version(void) { return 1; }
int drop_kernel_count(void) { return kCount; }
const char* drop_kernel_name(int kernel) {
  return kernel >= 0 && kernel < kCount ? kKernels[kernel]->name : nullptr;
}
const char* drop_kernel_summary(int kernel) {
  return kernel >= 0 && kernel < kCount ? kKernels[kernel]->summary : nullptr;
}
int drop_kernel_supported(int kernel) { return usable(kernel) != nullptr; }
const char* drop_team_kind(void) { return team_kind(); }

int64_t drop_packed_bytes(int64_t rows, int64_t groups) {
  return PlaneShape{rows, groups}.bytes();
}

void drop_pack(const uint8_t* codes, int64_t rows, int64_t groups, uint8_t* packed) {
  copy_packed<true>(const_cast<uint8_t*>(codes), rows, groups, packed);
}

void drop_unpack(const uint8_t* packed, int64_t rows, int64_t groups, uint8_t* codes) {
  copy_packed<false>(codes, rows, groups, const_cast<uint8_t*>(packed));
}

int64_t drop_codebook_bytes(int64_t entries) { return codebook_bytes(entries); }

void drop_prepare_codebook(const float* values, int64_t entries, void* prepared) {
  Codebook header{};
  header.entries = static_cast<int32_t>(entries);
  for (int64_t i = 0; i < entries * kGroup; ++i) {
    header.largest = std::fmax(header.largest, std::fabs(values[i]));
  }
  header.scale = header.largest > 0 ? 32767.0f / header.largest : 1.0f;
  std::memcpy(prepared, &header, sizeof header);
  const Codebook* book = static_cast<const Codebook*>(prepared);
  float* table = const_cast<float*>(book->values());
  for (int64_t k = 0; k < kEntries; ++k) {
    const float sign = k < entries ? 1.0f : -1.0f;
    for (int i = 0; i < kGroup; ++i) {
      table[k * kGroup + i] = sign * values[k % entries * kGroup + i];
    }
  }
  int16_t* pairs = const_cast<int16_t*>(book->pairs());
  double most = 0;
  for (int64_t k = 0; k < entries; ++k) {
    double squares = 0;
    for (int i = 0; i < kGroup; ++i) {
      const long value = std::lrint(values[k * kGroup + i] * header.scale);
      squares += static_cast<double>(value * value);
      pairs[(i / 2 * entries + k) * 2 + i % 2] = static_cast<int16_t>(value);
    }
    most = std::fmax(most, squares);
  }
  header.norm = static_cast<float>(std::sqrt(most) * 1.0001);
  std::memcpy(prepared, &header, sizeof header);
}

int64_t drop_table_bytes(int kernel, int64_t groups, int64_t prefix, int64_t entries) {
  if (kernel < 0 || kernel >= kCount) return -1;
  return TableShape{groups, prefix, kKernels[kernel]->group_bytes(entries == kHalf)}.bytes();
}

int drop_rotate(int kernel, const void* x, int x_type, int64_t n, int64_t x_stride, int64_t d,
                int64_t block, const float* signs, const float* odd, float* out, int threads) {
  const Kernel* chosen = usable(kernel);
  if (!chosen) return -1;
  const RotateJob job{signs, d, block, odd};
  auto body = [&](const Member& member) {
    rotate_share(*chosen, job, x, static_cast<Scalar>(x_type), n, x_stride, out, member);
  };
  on_team(n < threads ? static_cast<int>(n) : threads, body);
  return 0;
}

int drop_build(int kernel, const float* x, int64_t n, int64_t groups, int64_t prefix,
               const void* const* codebooks, uint8_t* tables, int threads) {
  const Kernel* chosen = usable(kernel);
  if (!chosen) return -1;
  const auto* books = reinterpret_cast<const Codebook* const*>(codebooks);
  const TableShape shape{groups, prefix, chosen->group_bytes(books[0]->entries == kHalf)};
  const BuildJob job{x, groups * kGroup, books, shape, tables};
  // The padding at the end is part of the value.
  const int64_t used = shape.steps_offset() + prefix * shape.blocks() * 4;
  for (int64_t i = 0; i < n; ++i) {
    std::memset(tables + i * shape.bytes() + used, 0, static_cast<size_t>(shape.bytes() - used));
  }
  auto body = [&](const Member& member) {
    const Range mine = share(n * prefix * shape.blocks(), member);
    chosen->build(job, mine.first, mine.last);
  };
  on_team(team_for(threads, n * prefix * groups * kHalf), body);
  return 0;
}

int drop_multiply(int kernel, const uint8_t* tables, int64_t n, int64_t groups, int64_t prefix,
                  int64_t entries, const DropMatrix* matrices, int64_t count, void* out,
                  int out_type, int threads) {
  const Kernel* chosen = usable(kernel);
  if (!chosen) return -1;
  const Products job{chosen,   tables, n,     groups, prefix,
                     entries, matrices, count,  static_cast<char*>(out),
                     n,       0,        static_cast<Scalar>(out_type)};
  auto body = [&](const Member& member) { multiply_share(job, member); };
  on_team(team_for(threads, job.strips() * kStrip * groups * prefix * n), body);
  return 0;
}

int drop_site(int kernel, const DropSite* site, const void* x, int x_type, int64_t n,
              int64_t x_stride, void* out, int out_type, int threads) {
  const Kernel* chosen = usable(kernel);
  if (!chosen || site->magic != DROP_SITE_MAGIC) return -1;
  const int64_t groups = site->d / kGroup;
  const int64_t x_width = x_type == kF32 ? 4 : 2;
  const TableShape shape{groups, site->prefix, chosen->group_bytes(site->entries == kHalf)};
  const int64_t chunk = n < kRowsAtOnce ? n : kRowsAtOnce;
  float* rotated = rotated_scratch.get<float>(chunk * site->d);
  uint8_t* tables = table_scratch.get<uint8_t>(chunk * shape.bytes());
  const RotateJob rotation{site->signs, site->d, site->block, site->odd};
  const BuildJob build{rotated, site->d,
                       reinterpret_cast<const Codebook* const*>(site->codebooks), shape, tables};
  const auto run = [&](int64_t first, int64_t rows, const Member& member) {
    const char* from = static_cast<const char*>(x) + first * x_stride * x_width;
    rotate_share(*chosen, rotation, from, static_cast<Scalar>(x_type), rows, x_stride, rotated,
                 member);
    member.meet();
    const Range mine = share(rows * site->prefix * shape.blocks(), member);
    chosen->build(build, mine.first, mine.last);
    member.meet();
    multiply_share({chosen, tables, rows, groups, site->prefix, site->entries, site->matrices,
                    site->count, static_cast<char*>(out), n, first, static_cast<Scalar>(out_type)},
                   member);
  };
  auto body = [&](const Member& member) {
    for (int64_t first = 0; first < n; first += chunk) {
      if (first) member.meet();  // the scratch memory is used again
      run(first, n - first < chunk ? n - first : chunk, member);
    }
  };
  int64_t strips = 0;
  for (int64_t i = 0; i < site->count; ++i) {
    strips += PlaneShape{site->matrices[i].rows, groups}.strips();
  }
  on_team(team_for(threads, strips * kStrip * groups * site->prefix * n), body);
  return 0;
}

int drop_decode(int kernel, const uint8_t* const* planes, int packed, int64_t rows, int64_t groups,
                int64_t prefix, const void* const* codebooks, const void* scales, int scale_type,
                int64_t first_row, int64_t last_row, void* out, int out_type, int threads) {
  const Kernel* chosen = usable(kernel);
  if (!chosen || prefix > kMostPlanes) return -1;
  const DecodeJob job{planes,
                      packed != 0,
                      {rows, groups},
                      prefix,
                      reinterpret_cast<const Codebook* const*>(codebooks),
                      scales,
                      static_cast<Scalar>(scale_type),
                      out,
                      static_cast<Scalar>(out_type),
                      first_row,
                      groups * kGroup};
  auto body = [&](const Member& member) {
    const Range mine = share(last_row - first_row, member);
    chosen->decode(job, first_row + mine.first, first_row + mine.last);
  };
  on_team(team_for(threads, (last_row - first_row) * groups), body);
  return 0;
}

int drop_rows(int kernel, const int8_t* rows, int64_t count, int64_t d, const void* scales,
              int scale_type, const void* x, int x_type, int64_t n, void* out, int out_type,
              int threads) {
  const Kernel* chosen = usable(kernel);
  if (!chosen) return -1;
  int16_t* rounded = table_scratch.get<int16_t>(n * d);
  float* steps = rotated_scratch.get<float>(n);
  const int64_t width = x_type == kF32 ? 4 : 2;
  for (int64_t i = 0; i < n; ++i) {
    steps[i] = chosen->quantize_row(static_cast<const char*>(x) + i * d * width,
                                    static_cast<Scalar>(x_type), d, rounded + i * d);
  }
  const RowsJob job{rows,    d,     scales, static_cast<Scalar>(scale_type),
                    rounded, steps, n,      out,
                    static_cast<Scalar>(out_type), count};
  auto body = [&](const Member& member) {
    const Range mine = share((count + 3) / 4, member);
    chosen->rows(job, mine.first * 4, mine.last * 4 < count ? mine.last * 4 : count);
  };
  on_team(team_for(threads, count * d), body);
  return 0;
}

uint64_t drop_stream_read(int kernel, const uint8_t* data, int64_t bytes, int threads) {
  const Kernel* chosen = usable(kernel);
  if (!chosen) return 0;
  std::atomic<uint64_t> total{0};
  auto body = [&](const Member& member) {
    const Range mine = share(bytes / 4096, member);
    total += chosen->stream(data + mine.first * 4096, (mine.last - mine.first) * 4096);
  };
  on_team(threads, body);
  return total;
}
