// libFuzzer target over the C interface: shapes, types and values from the fuzzer's bytes.
//
// The contract (kernels/c_api.h) is that pointers are valid for the shapes given, which the Python
// side checks; codes, codebooks, scales, activations and taps come from a checkpoint or a prompt
// and may be anything. So every buffer has exactly the bytes that its shape demands, each in an
// allocation of its own, and holds what the fuzzer says; AddressSanitizer and UBSan see the rest.
// Two things are asserted beside: packing is undone exactly, and where all values are finite and of
// ordinary size, every kernel gives the bits of the portable one.
//
// Built with clang and -DDROPBYDROP_FUZZ=ON; scripts/fuzz_native.sh does it.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "kernels/c_api.h"
#include "naive.h"
#include "search/c_api.h"
#include "trellis/c_api.h"

namespace {

// The fuzzer's bytes: numbers from the front, contents from all of them, over and over.
class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size) : data_(data), size_(size) {}

  int64_t number(int64_t low, int64_t high) {
    const int64_t value = next() | next() << 8;
    return low + value % (high - low + 1);
  }
  bool flag() { return next() & 1; }
  uint8_t next() { return size_ ? data_[at_++ % size_] : 0; }

  template <typename T>
  Aligned<T> array(int64_t count) {
    Aligned<T> out(count > 0 ? count : 1);
    for (int64_t i = 0; i < count * static_cast<int64_t>(sizeof(T)); ++i) {
      reinterpret_cast<uint8_t*>(out.data())[i] = next() + static_cast<uint8_t>(i / 251);
    }
    return out;
  }
  // Any bit pattern where `wild`, else finite values between 2^-8 and 2^8.
  Aligned<float> floats(int64_t count, bool wild) {
    Aligned<float> out = array<float>(count);
    for (int64_t i = 0; !wild && i < count; ++i) {
      uint32_t bits;
      std::memcpy(&bits, out.data() + i, 4);
      const uint32_t exponent = 119 + (bits >> 23 & 15);
      bits = (bits & 0x807fffffu) | exponent << 23;
      std::memcpy(out.data() + i, &bits, 4);
    }
    return out;
  }

 private:
  const uint8_t* data_;
  size_t size_, at_ = 0;
};

[[noreturn]] void broken(const std::string& what) {
  std::fprintf(stderr, "invariant broken: %s\n", what.c_str());
  std::abort();
}

// Runs `call(kernel, out)` for every kernel; `exact` results must be those of the portable one.
template <typename Call>
void on_kernels(int64_t bytes, bool compare, const char* what, Call call) {
  std::vector<uint8_t> expected;
  for (int kernel = drop_kernel_count() - 1; kernel >= 0; --kernel) {
    if (!drop_kernel_supported(kernel)) continue;
    const std::string name = drop_kernel_name(kernel);
    Aligned<uint8_t> out(bytes);
    std::memset(out.data(), 0, static_cast<size_t>(bytes));
    call(kernel, out.data());
    if (!compare || name.find("-u8") != std::string::npos) continue;
    const std::vector<uint8_t> found(out.data(), out.data() + bytes);
    if (expected.empty()) expected = found;
    if (found != expected) broken(std::string(what) + " of " + name);
  }
}

void pack(Bytes& bytes) {
  const int64_t d_out = bytes.number(1, 200), groups = bytes.number(1, 300);
  Aligned<uint8_t> codes = bytes.array<uint8_t>(d_out * groups);
  Aligned<uint8_t> packed(drop_packed_bytes(d_out, groups)), back(d_out * groups);
  drop_pack(codes.data(), d_out, groups, packed.data());
  drop_unpack(packed.data(), d_out, groups, back.data());
  if (std::memcmp(codes.data(), back.data(), static_cast<size_t>(d_out * groups))) broken("packing");
}

// What products and decoding share: planes, codebooks, scales of one matrix.
struct Matrix {
  int64_t d_out, d_in, prefix, entries;
  bool trellis, wild;
  std::vector<Aligned<uint8_t>> planes, prepared;
  std::vector<const uint8_t*> plane_pointers;
  std::vector<const void*> books;
  Aligned<float> scales, bias;

  Matrix(Bytes& bytes, bool of_trellis)
      : d_out(bytes.number(1, 150)),
        d_in(of_trellis ? bytes.number(1, 200) : 8 * bytes.number(1, 40)),
        prefix(bytes.number(1, 4)),
        entries(bytes.flag() ? 128 : 256),
        trellis(of_trellis),
        wild(bytes.flag()),
        scales(bytes.floats(d_out, wild)),
        bias(bytes.floats(d_out, wild)) {
    const int64_t window = bytes.number(8, 17);
    for (int64_t m = 0; m < prefix; ++m) trellis ? add_trellis(bytes, window) : add_bytes(bytes);
    for (auto& plane : planes) plane_pointers.push_back(plane.data());
    for (auto& book : prepared) books.push_back(book.data());
  }

  void add_bytes(Bytes& bytes) {
    const int64_t groups = d_in / 8;
    Aligned<uint8_t> codes = bytes.array<uint8_t>(d_out * groups);
    planes.emplace_back(drop_packed_bytes(d_out, groups));
    drop_pack(codes.data(), d_out, groups, planes.back().data());
    Aligned<float> values = bytes.floats(entries * 8, false);  // finite: checked when it is read
    prepared.emplace_back(drop_codebook_bytes(entries));
    drop_prepare_codebook(values.data(), entries, prepared.back().data());
  }

  void add_trellis(Bytes& bytes, int64_t window) {
    const int bits = bytes.flag() ? 2 : 1;
    const int64_t rows = std::max<int64_t>(3, (bits * d_out + 7) / 8);
    planes.push_back(bytes.array<uint8_t>(rows * ((d_in + 63) / 64 * 64)));
    Aligned<uint8_t> taps = bytes.array<uint8_t>(window);
    Aligned<int8_t> values = bytes.array<int8_t>(64);
    prepared.emplace_back(drop_trellis_bytes());
    const auto prepare = [&] {
      return drop_prepare_trellis(bits, static_cast<int>(window), taps.data(), values.data(), 0.5f,
                                  prepared.back().data());
    };
    if (prepare() == 0) return;  // else a tap or a value out of bounds was refused
    for (int64_t i = 0; i < window; ++i) taps.data()[i] &= 63;
    for (int i = 0; i < 64; ++i) values.data()[i] = static_cast<int8_t>(values.data()[i] / 3);
    if (prepare()) broken("a trellis within bounds is refused");
  }
};

void products(Bytes& bytes, bool trellis) {
  Matrix matrix(bytes, trellis);
  const int64_t n = bytes.number(1, 18), stride = matrix.d_in + bytes.number(0, 5);
  const bool x_wild = bytes.flag(), biased = bytes.flag(), rotated = bytes.flag();
  int64_t block = 1;
  while (rotated && matrix.d_in % (2 * block) == 0 && block < 64) block *= 2;
  const int64_t rest = matrix.d_in / block;
  Aligned<float> x = bytes.floats((n - 1) * stride + matrix.d_in, x_wild);
  Aligned<float> signs(matrix.d_in), odd = bytes.floats(rest * rest, false);
  for (int64_t i = 0; i < matrix.d_in; ++i) signs.data()[i] = bytes.flag() ? 1.f : -1.f;
  const DropMatrix part{matrix.plane_pointers.data(), matrix.d_out, matrix.scales.data(), 0,
                        biased ? matrix.bias.data() : nullptr, 0};
  const DropInputGroup input{DROP_INPUT_GROUP_MAGIC,
                             trellis ? DROP_TRELLIS : DROP_BYTES,
                             matrix.d_in,
                             block,
                             rotated ? signs.data() : nullptr,
                             rotated && rest > 1 ? odd.data() : nullptr,
                             matrix.prefix,
                             matrix.entries,
                             matrix.books.data(),
                             &part,
                             1};
  const int threads = static_cast<int>(bytes.number(1, 3));
  const bool compare = !matrix.wild && !x_wild;
  on_kernels(n * matrix.d_out * 4, compare, "product", [&](int kernel, void* out) {
    if (drop_input_group(kernel, &input, x.data(), 0, n, stride, out, 0, threads)) {
      broken("a product is refused");
    }
  });
}

void decode(Bytes& bytes, bool trellis) {
  Matrix matrix(bytes, trellis);
  const int64_t first = bytes.number(0, matrix.d_out - 1);
  const int64_t last = bytes.number(first + 1, matrix.d_out);
  const int threads = static_cast<int>(bytes.number(1, 3)), type = bytes.flag() ? 2 : 0;
  const int64_t size = (last - first) * matrix.d_in * (type ? 2 : 4);
  on_kernels(size, !matrix.wild, "decoding", [&](int kernel, void* out) {
    const auto* planes = matrix.plane_pointers.data();
    const auto* books = matrix.books.data();
    if (trellis) {
      drop_trellis_decode(kernel, planes, matrix.d_out, matrix.d_in, matrix.prefix, books,
                          matrix.scales.data(), 0, first, last, out, type, threads);
    } else {
      drop_decode(kernel, planes, 1, matrix.d_out, matrix.d_in / 8, matrix.prefix, books,
                  matrix.scales.data(), 0, first, last, out, type, threads);
    }
  });
}

void int8_rows(Bytes& bytes) {
  const int64_t d_out = bytes.number(1, 70), d_in = bytes.number(1, 300), n = bytes.number(1, 5);
  const bool wild = bytes.flag();
  Aligned<int8_t> rows = bytes.array<int8_t>(d_out * d_in);
  Aligned<float> x = bytes.floats(n * d_in, wild), scales = bytes.floats(d_out, wild);
  on_kernels(n * d_out * 4, !wild, "eight-bit rows", [&](int kernel, void* out) {
    drop_int8_rows(kernel, rows.data(), d_out, d_in, scales.data(), 0, x.data(), 0, n, out, 0, 2);
  });
}

void search(Bytes& bytes) {
  const int64_t d_out = bytes.number(1, 12), groups = bytes.number(1, 6), d_in = groups * 8;
  const bool wild = bytes.flag();
  DropSearch problem{};
  problem.d_out = d_out;
  problem.d_in = d_in;
  problem.planes = static_cast<int>(bytes.number(1, 4));
  problem.beam = 1 << bytes.number(0, 4);
  for (int p = 1; p <= problem.planes; ++p) {
    if (p < problem.planes && bytes.flag()) continue;
    problem.level[problem.levels] = p;
    problem.lambda[problem.levels++] = 1.0f / static_cast<float>(p);
  }
  problem.lookahead = 0.25f;
  Aligned<float> w = bytes.floats(d_out * d_in, wild);
  Aligned<float> books = bytes.floats(problem.planes * 128 * 8, false);
  Aligned<float> coupling = bytes.floats(groups * d_in * 8, wild);
  Aligned<float> factor = bytes.floats(groups * 64, wild);
  Aligned<uint8_t> codes = bytes.array<uint8_t>(problem.planes * d_out * groups);
  problem.w = w.data();
  problem.codebooks = books.data();
  problem.feedback = problem.descent = {coupling.data(), factor.data()};
  problem.start = bytes.flag();
  problem.sweeps = static_cast<int>(bytes.number(0, 2));
  Aligned<int64_t> changed(problem.sweeps + 1);
  problem.codes = codes.data();
  problem.changed = changed.data();
  for (int i = 0; const char* name = drop_search_backend(i); ++i) {
    if (drop_search(name, &problem, 2)) broken("a search is refused");
  }
}

void trellis_search(Bytes& bytes) {
  const int64_t d_out = bytes.number(1, 40), d_in = bytes.number(1, 6);
  const bool wild = bytes.flag();
  DropTrellis problem{};
  problem.d_out = d_out;
  problem.d_in = d_in;
  problem.planes = static_cast<int>(bytes.number(1, 3));
  std::vector<Aligned<uint8_t>> codes;
  for (int m = 0; m < problem.planes; ++m) {
    DropTrellisPlane& plane = problem.plane[m];
    plane.bits = bytes.flag() ? 2 : 1;
    plane.window = static_cast<int>(bytes.number(8, 9));
    for (float& value : plane.values) value = static_cast<float>(bytes.next()) / 64 - 2;
    for (uint8_t& tap : plane.taps) tap = bytes.next() & 63;
    codes.push_back(bytes.array<uint8_t>(d_in * std::max<int64_t>(3, (plane.bits * d_out + 7) / 8)));
    problem.codes[m] = codes.back().data();
    if (m + 1 < problem.planes && bytes.flag()) continue;
    problem.prefix[problem.levels] = m + 1;
    problem.lambda[problem.levels++] = 1.0f / static_cast<float>(m + 1);
  }
  Aligned<float> w = bytes.floats(d_in * d_out, wild), weights = bytes.floats(d_out, wild);
  Aligned<float> lower = bytes.floats(d_in * d_in, wild), h = bytes.floats(d_in * d_in, wild);
  problem.w = w.data();
  problem.row_weights = weights.data();
  problem.lower = bytes.flag() ? lower.data() : nullptr;
  problem.h = h.data();
  problem.sweeps = static_cast<int>(bytes.number(0, 1));
  Aligned<int64_t> changed(problem.sweeps + 1);
  problem.changed = changed.data();
  for (int i = 0; const char* name = drop_trellis_backend(i); ++i) {
    const int status = drop_trellis_search(name, &problem, 1);
    if (status == 1 || status == 3) broken("a trellis search is refused");
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Bytes bytes(data, size);
  switch (bytes.next() % 8) {
    case 0: pack(bytes); break;
    case 1: products(bytes, false); break;
    case 2: products(bytes, true); break;
    case 3: decode(bytes, false); break;
    case 4: decode(bytes, true); break;
    case 5: int8_rows(bytes); break;
    case 6: search(bytes); break;
    default: trellis_search(bytes);
  }
  return 0;
}
