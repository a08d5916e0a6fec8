// The list of kernels and the C interface: what is the same for every instruction set.
#include <atomic>
#include <cmath>
#include <cstring>

#include "common/cpu_features.h"
#include "product.h"

namespace drop {

#ifdef DROP_X86
extern const Kernel avx512vbmi_kernel, avx512vbmi_u8_kernel, avx512bw_kernel;
namespace avx2 {
extern const Kernel kernel, u8_kernel;
}
#ifdef DROP_AVX2_GFNI
namespace avx2_gfni {
extern const Kernel kernel, u8_kernel;
}
#endif
#endif
#ifdef DROP_ARM64
namespace neon {
extern const Kernel kernel, u8_kernel;
}
#ifdef DROP_NEON_DOTPROD
namespace neon_dotprod {
extern const Kernel kernel, u8_kernel;
}
#endif
#endif
extern const Kernel portable_kernel, portable_u8_kernel;

namespace {

// Best first. Exact ("16-bit") LUTs come before 8-bit ones, which are only used when named.
const Kernel* const kKernels[] = {
#ifdef DROP_X86
    &avx512vbmi_kernel,    &avx512bw_kernel, &avx2::kernel,
#endif
#ifdef DROP_ARM64
    &neon::kernel,
#endif
    &portable_kernel,
#ifdef DROP_X86
    &avx512vbmi_u8_kernel, &avx2::u8_kernel,
#endif
#ifdef DROP_ARM64
    &neon::u8_kernel,
#endif
    &portable_u8_kernel,
};
constexpr int kCount = sizeof kKernels / sizeof kKernels[0];

// The same files compiled for more than their name says: same numbers, faster where they run.
// DROPBYDROP_FASTER=0 in the environment leaves them out, so that a test reaches the others.
const Kernel* const kFaster[][2] = {
#ifdef DROP_AVX2_GFNI
    {&avx2::kernel, &avx2_gfni::kernel},
    {&avx2::u8_kernel, &avx2_gfni::u8_kernel},
#endif
#ifdef DROP_NEON_DOTPROD
    {&neon::kernel, &neon_dotprod::kernel},
    {&neon::u8_kernel, &neon_dotprod::u8_kernel},
#endif
    {nullptr, nullptr},
};

thread_local Scratch rotated_scratch, table_scratch;

template <bool kPack>
void copy_packed(uint8_t* codes, int64_t d_out, int64_t groups, uint8_t* packed) {
  const PlaneShape plane{d_out, groups};
  for (int64_t block = 0; block < plane.blocks(); ++block) {
    for (int64_t strip = 0; strip < plane.strips(); ++strip) {
      uint8_t* base = packed + plane.offset(block, strip);
      for (int64_t r = 0; r < kStrip; ++r) {
        const int64_t row = strip * kStrip + r;
        uint8_t* to = base + row_byte(r);
        uint8_t* from = codes + row * groups + block * kBlock;
        for (int64_t j = 0; j < plane.block_groups(block); ++j) {
          if (kPack) {
            to[j * kStrip] = row < d_out ? from[j] : 0;
          } else if (row < d_out) {
            from[j] = to[j * kStrip];
          }
        }
      }
    }
  }
}

}  // namespace

const Kernel* usable(int kernel) {
  if (kernel < 0 || kernel >= kCount || !runs_here(kKernels[kernel]->features)) return nullptr;
  static const bool faster = [] {
    const char* off = std::getenv("DROPBYDROP_FASTER");
    return !off || off[0] != '0';
  }();
  for (const auto& pair : kFaster) {
    if (!faster) break;
    if (pair[0] == kKernels[kernel] && runs_here(pair[1]->features)) return pair[1];
  }
  return kKernels[kernel];
}

}  // namespace drop

using namespace drop;

int drop_kernel_count(void) { return kCount; }
const char* drop_kernel_name(int kernel) {
  return kernel >= 0 && kernel < kCount ? kKernels[kernel]->name : nullptr;
}
const char* drop_kernel_summary(int kernel) {
  return kernel >= 0 && kernel < kCount ? kKernels[kernel]->summary : nullptr;
}
int drop_kernel_supported(int kernel) { return usable(kernel) != nullptr; }

int64_t drop_packed_bytes(int64_t d_out, int64_t groups) {
  return PlaneShape{d_out, groups}.bytes();
}

void drop_pack(const uint8_t* codes, int64_t d_out, int64_t groups, uint8_t* packed) {
  copy_packed<true>(const_cast<uint8_t*>(codes), d_out, groups, packed);
}

void drop_unpack(const uint8_t* packed, int64_t d_out, int64_t groups, uint8_t* codes) {
  copy_packed<false>(codes, d_out, groups, const_cast<uint8_t*>(packed));
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
  float* expanded = const_cast<float*>(book->values());
  for (int64_t k = 0; k < kEntries; ++k) {
    const float sign = k < entries ? 1.0f : -1.0f;
    for (int i = 0; i < kGroup; ++i) {
      expanded[k * kGroup + i] = sign * values[k % entries * kGroup + i];
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

int64_t drop_lut_bytes(int kernel, int64_t groups, int64_t prefix, int64_t entries) {
  if (kernel < 0 || kernel >= kCount) return -1;
  return LutShape{groups, prefix, kKernels[kernel]->group_bytes(entries == kHalf)}.bytes();
}

int drop_rotate(int kernel, const void* x, int x_type, int64_t n, int64_t x_stride, int64_t d_in,
                int64_t block, const float* signs, const float* odd, float* out, int threads) {
  const Kernel* chosen = usable(kernel);
  if (!chosen) return -1;
  const RotateJob job{signs, d_in, block, odd};
  const int64_t width = x_type == kF32 ? 4 : 2;
  auto body = [&](const Worker& worker) {
    thread_local Scratch mix;
    const Range mine = share(n, worker);
    for (int64_t i = mine.first; i < mine.last; ++i) {
      chosen->rotate(job, static_cast<const char*>(x) + i * x_stride * width,
                     static_cast<Scalar>(x_type), out + i * d_in, mix.get<float>(d_in));
    }
  };
  on_threads(n < threads ? static_cast<int>(n) : threads, body);
  return 0;
}

int drop_build_lut(int kernel, const float* x, int64_t n, int64_t groups, int64_t prefix,
                   const void* const* codebooks, uint8_t* lut, int threads) {
  const Kernel* chosen = usable(kernel);
  if (!chosen) return -1;
  const auto* books = reinterpret_cast<const Codebook* const*>(codebooks);
  const LutShape shape{groups, prefix, chosen->group_bytes(books[0]->entries == kHalf)};
  const BuildLutJob job{x, groups * kGroup, books, shape, lut, nullptr, nullptr};
  // The padding at the end is part of the value.
  const int64_t used = shape.steps_offset() + prefix * shape.blocks() * 4;
  for (int64_t i = 0; i < n; ++i) {
    std::memset(lut + i * shape.bytes() + used, 0, static_cast<size_t>(shape.bytes() - used));
  }
  auto body = [&](const Worker& worker) {
    const Range mine = share(n * prefix * shape.blocks(), worker);
    chosen->build_lut(job, mine.first, mine.last);
  };
  on_threads(threads_for(threads, n * prefix * groups * kHalf), body);
  return 0;
}

int drop_lut_gemv(int kernel, const uint8_t* lut, int64_t n, int64_t groups, int64_t prefix,
                  int64_t entries, const DropMatrix* matrices, int64_t count, void* out,
                  int out_type, int threads) {
  const Kernel* chosen = usable(kernel);
  if (!chosen) return -1;
  Products job{};
  job.kernel = chosen;
  job.lut = lut;
  job.n = n;
  job.groups = groups;
  job.prefix = prefix;
  job.entries = entries;
  job.matrices = matrices;
  job.count = count;
  job.out = static_cast<char*>(out);
  job.out_rows = n;
  job.out_type = static_cast<Scalar>(out_type);
  auto body = [&](const Worker& worker) { gemv_share(job, worker); };
  on_threads(threads_for(threads, job.units() * kStrip * groups * prefix * n), body);
  return 0;
}

int drop_input_group(int kernel, const DropInputGroup* input, const void* x, int x_type, int64_t n,
                     int64_t x_stride, void* out, int out_type, int threads) {
  const Kernel* chosen = usable(kernel);
  if (!chosen || !sound(*input)) return -1;
  const int64_t x_width = x_type == kF32 ? 4 : 2;
  const int64_t chunk = n < kRowsAtOnce ? n : kRowsAtOnce;
  float* rotated = rotated_scratch.get<float>(chunk * input->d_in);
  uint8_t* tables = table_scratch.get<uint8_t>(input_group_table_bytes(*chosen, *input, chunk));
  auto body = [&](const Worker& worker) {
    for (int64_t first = 0; first < n; first += chunk) {
      if (first) worker.barrier();  // the scratch memory is used again
      Products products{};
      products.out = static_cast<char*>(out);
      products.out_rows = n;
      products.first_row = first;
      products.out_type = static_cast<Scalar>(out_type);
      input_group_share({chosen, input, static_cast<const char*>(x) + first * x_stride * x_width,
                         static_cast<Scalar>(x_type), n - first < chunk ? n - first : chunk,
                         x_stride, rotated, tables, nullptr},
                        products, worker);
    }
  };
  on_threads(threads_for(threads, input_group_code_bytes(*input) * n), body);
  return 0;
}

int drop_decode(int kernel, const uint8_t* const* planes, int packed, int64_t d_out, int64_t groups,
                int64_t prefix, const void* const* codebooks, const void* scales, int scale_type,
                int64_t first_row, int64_t last_row, void* out, int out_type, int threads) {
  const Kernel* chosen = usable(kernel);
  if (!chosen || prefix > kMaxPlanes) return -1;
  const DecodeJob job{planes,
                      packed != 0,
                      {d_out, groups},
                      prefix,
                      reinterpret_cast<const Codebook* const*>(codebooks),
                      scales,
                      static_cast<Scalar>(scale_type),
                      out,
                      static_cast<Scalar>(out_type),
                      first_row,
                      groups * kGroup};
  auto body = [&](const Worker& worker) {
    const Range mine = share(last_row - first_row, worker);
    chosen->decode(job, first_row + mine.first, first_row + mine.last);
  };
  on_threads(threads_for(threads, (last_row - first_row) * groups), body);
  return 0;
}

int drop_int8_rows(int kernel, const int8_t* rows, int64_t d_out, int64_t d_in, const void* scales,
                   int scale_type, const void* x, int x_type, int64_t n, void* out, int out_type,
                   int threads) {
  const Kernel* chosen = usable(kernel);
  if (!chosen) return -1;
  int16_t* rounded = table_scratch.get<int16_t>(n * d_in);
  float* steps = rotated_scratch.get<float>(n);
  const int64_t width = x_type == kF32 ? 4 : 2;
  for (int64_t i = 0; i < n; ++i) {
    steps[i] = chosen->quantize_row(static_cast<const char*>(x) + i * d_in * width,
                                    static_cast<Scalar>(x_type), d_in, rounded + i * d_in);
  }
  const Int8RowsJob job{rows,  d_in, scales, static_cast<Scalar>(scale_type), rounded,
                        steps, n,    out,    static_cast<Scalar>(out_type),   d_out};
  auto body = [&](const Worker& worker) {
    const Range mine = share((d_out + 3) / 4, worker);
    chosen->int8_rows(job, mine.first * 4, mine.last * 4 < d_out ? mine.last * 4 : d_out);
  };
  on_threads(threads_for(threads, d_out * d_in), body);
  return 0;
}

uint64_t drop_stream_read(int kernel, const uint8_t* data, int64_t bytes, int threads) {
  const Kernel* chosen = usable(kernel);
  if (!chosen) return 0;
  std::atomic<uint64_t> total{0};
  auto body = [&](const Worker& worker) {
    const Range mine = share(bytes / 4096, worker);
    total += chosen->stream(data + mine.first * 4096, (mine.last - mine.first) * 4096);
  };
  on_threads(threads, body);
  return total;
}
