// Checks every kernel this processor supports against naive loops, through the C interface only.
// Runs anywhere the library builds: natively, under sanitizers, and under an emulator, where it is
// how the NEON kernels are tested. Prints one line a kernel; exits with the number of failures.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "drop_kernels.h"

namespace {

struct Random {
  uint64_t state = 88172645463325252ull;
  uint64_t next() {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
  }
  float gauss() {
    float sum = 0;
    for (int i = 0; i < 12; ++i) sum += static_cast<float>(next() >> 40) / (1 << 24);
    return sum - 6;
  }
};

// Exactly as many bytes as asked for, 64-byte aligned: an overrun is a sanitizer's error.
template <typename T>
class Aligned {
 public:
  explicit Aligned(int64_t count) : count_(count) {
    const size_t bytes = static_cast<size_t>(count) * sizeof(T);
    block_.reset(new char[bytes + 64]);
    void* start = block_.get();
    size_t space = bytes + 64;
    data_ = static_cast<T*>(std::align(64, bytes, start, space));
    // Shift so that the end of the data is the end of the allocation where alignment allows it.
  }
  T* data() { return data_; }
  T& operator[](int64_t i) { return data_[i]; }
  int64_t size() const { return count_; }

 private:
  int64_t count_;
  std::unique_ptr<char[]> block_;
  T* data_;
};

struct Case {
  int64_t rows, groups, prefix, entries, n;
  bool outlier;
};

struct Problem {
  Case shape;
  std::vector<std::vector<uint8_t>> codes;
  std::vector<std::vector<uint8_t>> packed;
  std::vector<std::vector<float>> books;  // [256, 8] each
  std::vector<std::unique_ptr<Aligned<uint8_t>>> prepared;
  std::vector<float> x, scales, bias;
  std::vector<double> y;

  Problem(const Case& c, Random& random) : shape(c) {
    const int64_t d = c.groups * 8;
    float size = 1;
    for (int64_t m = 0; m < c.prefix; ++m, size *= 0.5f) {
      codes.emplace_back(static_cast<size_t>(c.rows * c.groups));
      for (uint8_t& code : codes.back()) code = static_cast<uint8_t>(random.next() >> 30);
      packed.emplace_back(static_cast<size_t>(drop_packed_bytes(c.rows, c.groups)));
      drop_pack(codes.back().data(), c.rows, c.groups, packed.back().data());
      std::vector<float> book(256 * 8);
      for (int64_t i = 0; i < c.entries * 8; ++i)
        book[static_cast<size_t>(i)] = random.gauss() * size;
      if (c.entries == 128) {
        for (size_t i = 0; i < 1024; ++i) book[1024 + i] = -book[i];
      }
      books.push_back(book);
      prepared.emplace_back(new Aligned<uint8_t>(drop_codebook_bytes(c.entries)));
      drop_prepare_codebook(book.data(), c.entries, prepared.back()->data());
    }
    x.resize(static_cast<size_t>(c.n * d));
    for (float& value : x) value = random.gauss();
    if (c.outlier) {
      for (int64_t i = 0; i < c.n; ++i) x[static_cast<size_t>(i * d + random.next() % d)] = 24;
    }
    for (int64_t r = 0; r < c.rows; ++r) {
      scales.push_back(0.5f + static_cast<float>(random.next() % 1000) / 1000);
      bias.push_back(random.gauss());
    }
    y.resize(static_cast<size_t>(c.n * c.rows));
    for (int64_t i = 0; i < c.n; ++i) {
      for (int64_t r = 0; r < c.rows; ++r) {
        double sum = 0;
        for (int64_t m = 0; m < c.prefix; ++m) {
          for (int64_t j = 0; j < c.groups; ++j) {
            const uint8_t code = codes[m][static_cast<size_t>(r * c.groups + j)];
            for (int k = 0; k < 8; ++k) {
              sum += static_cast<double>(books[m][code * 8 + k]) * x[i * d + j * 8 + k];
            }
          }
        }
        y[i * c.rows + r] = sum * scales[r];
      }
    }
  }

  std::vector<const void*> book_pointers() const {
    std::vector<const void*> out;
    for (const auto& book : prepared) out.push_back(book->data());
    return out;
  }
  std::vector<const uint8_t*> plane_pointers() const {
    std::vector<const uint8_t*> out;
    for (const auto& plane : packed) out.push_back(plane.data());
    return out;
  }

  // Rows first .. first + n through build and multiply.
  std::vector<float> run(int kernel, int64_t first, int64_t n, int threads) const {
    const int64_t d = shape.groups * 8;
    const int64_t bytes = drop_table_bytes(kernel, shape.groups, shape.prefix, shape.entries);
    Aligned<uint8_t> tables(bytes * n);
    const auto book_list = book_pointers();
    const auto planes = plane_pointers();
    std::vector<float> out(static_cast<size_t>(n * shape.rows));
    if (drop_build(kernel, x.data() + first * d, n, shape.groups, shape.prefix, book_list.data(),
                   tables.data(), threads)) {
      return {};
    }
    const DropMatrix matrix{planes.data(), shape.rows, scales.data(), 0, nullptr, 0};
    drop_multiply(kernel, tables.data(), n, shape.groups, shape.prefix, shape.entries, &matrix, 1,
                  out.data(), 0, threads);
    return out;
  }
};

int failures = 0;

void check(bool ok, const std::string& what) {
  if (ok) return;
  ++failures;
  std::printf("  FAILED %s\n", what.c_str());
}

double relative_error(const std::vector<float>& a, const std::vector<double>& b) {
  double error = 0, size = 0;
  for (size_t i = 0; i < b.size(); ++i) {
    error += (a[i] - b[i]) * (a[i] - b[i]);
    size += b[i] * b[i];
  }
  return std::sqrt(error / size);
}

void check_products(int kernel, const std::string& name, const Problem& problem,
                    std::vector<std::vector<float>>* exact, size_t index) {
  const Case& c = problem.shape;
  const std::string where = name + " rows " + std::to_string(c.rows) + " groups " +
                            std::to_string(c.groups) + " P " + std::to_string(c.prefix) + " K " +
                            std::to_string(c.entries);
  const bool eight = name.find("-u8") != std::string::npos;
  const std::vector<float> all = problem.run(kernel, 0, c.n, 1);
  const double error = relative_error(all, problem.y);
  check(error < (eight ? (c.outlier ? 8e-2 : 2e-2) : 1e-3),
        where + ": error " + std::to_string(error));
  check(problem.run(kernel, 0, c.n, 3) == all, where + ": threads change the result");
  for (int64_t i = 0; i < c.n; ++i) {
    const std::vector<float> one = problem.run(kernel, i, 1, 1);
    check(std::memcmp(one.data(), all.data() + i * c.rows, one.size() * 4) == 0,
          where + ": other rows change the result");
  }
  std::vector<float>& expected = (*exact)[index * 2 + eight];
  if (expected.empty()) expected = all;
  check(all == expected, where + ": differs from another kernel");
}

void check_site(int kernel, const std::string& name, Random& random) {
  // d = 24 = 8 * 3: a Hadamard of 8 and an odd factor; two matrices, one with a bias.
  Problem first({70, 3, 2, 128, 2, false}, random), second({5, 3, 2, 128, 2, false}, random);
  second.prepared.swap(first.prepared);
  const int64_t d = 24;
  std::vector<float> signs, odd, rotated(static_cast<size_t>(2 * d));
  for (int64_t i = 0; i < d; ++i) signs.push_back(random.next() & 1024 ? 1.f : -1.f);
  for (int i = 0; i < 9; ++i) odd.push_back(random.gauss());
  for (int64_t i = 0; i < 2; ++i) {  // naive rotation
    for (int64_t a = 0; a < 3; ++a) {
      for (int64_t b = 0; b < 8; ++b) {
        double sum = 0;
        for (int64_t k = 0; k < 3; ++k) {
          for (int64_t l = 0; l < 8; ++l) {
            const double sign = __builtin_popcountll(static_cast<uint64_t>(b & l)) % 2 ? -1 : 1;
            sum += odd[a * 3 + k] * sign * signs[k * 8 + l] * first.x[i * d + k * 8 + l];
          }
        }
        rotated[i * d + a * 8 + b] = static_cast<float>(sum / std::sqrt(8.0));
      }
    }
  }
  std::vector<float> out(static_cast<size_t>(2 * d));
  drop_rotate(kernel, first.x.data(), 0, 2, d, d, 8, signs.data(), odd.data(), out.data(), 2);
  double worst = 0;
  for (size_t i = 0; i < out.size(); ++i) worst = std::fmax(worst, std::fabs(out[i] - rotated[i]));
  check(worst < 1e-4, name + ": rotation off by " + std::to_string(worst));

  const auto planes1 = first.plane_pointers(), planes2 = second.plane_pointers();
  const auto books = second.book_pointers();
  const DropMatrix matrices[2] = {
      {planes1.data(), 70, first.scales.data(), 0, nullptr, 0},
      {planes2.data(), 5, second.scales.data(), 0, second.bias.data(), 0}};
  const DropSite site{DROP_SITE_MAGIC, d,        8, signs.data(), odd.data(), 2, 128,
                      books.data(),    matrices, 2};
  std::vector<float> y(150), parts(150);
  check(drop_site(kernel, &site, first.x.data(), 0, 2, d, y.data(), 0, 2) == 0, name + ": site");
  Aligned<uint8_t> tables(2 * drop_table_bytes(kernel, 3, 2, 128));
  drop_build(kernel, out.data(), 2, 3, 2, books.data(), tables.data(), 1);
  drop_multiply(kernel, tables.data(), 2, 3, 2, 128, matrices, 2, parts.data(), 0, 1);
  check(y == parts, name + ": site differs from its steps");
}

void check_decode(int kernel, const std::string& name, const Problem& problem) {
  const Case& c = problem.shape;
  const int64_t d = c.groups * 8;
  const auto books = problem.book_pointers();
  std::vector<const uint8_t*> canonical;
  for (const auto& plane : problem.codes) canonical.push_back(plane.data());
  const auto packed = problem.plane_pointers();
  const int64_t first = c.rows / 3;
  std::vector<float> expected, out(static_cast<size_t>((c.rows - first) * d)), other(out);
  for (int64_t r = first; r < c.rows; ++r) {
    for (int64_t i = 0; i < d; ++i) {
      float sum = 0;
      for (int64_t m = 0; m < c.prefix; ++m) {
        sum += problem.books[m][problem.codes[m][r * c.groups + i / 8] * 8 + i % 8];
      }
      expected.push_back(sum * problem.scales[r]);
    }
  }
  drop_decode(kernel, canonical.data(), 0, c.rows, c.groups, c.prefix, books.data(),
              problem.scales.data(), 0, first, c.rows, out.data(), 0, 2);
  drop_decode(kernel, packed.data(), 1, c.rows, c.groups, c.prefix, books.data(),
              problem.scales.data(), 0, first, c.rows, other.data(), 0, 1);
  check(out == expected && other == expected, name + ": decode");
}

void check_rows(int kernel, const std::string& name, Random& random) {
  for (int64_t d : {1, 15, 33, 576, 600}) {
    const int64_t count = 7, n = 2;
    std::vector<int8_t> rows(static_cast<size_t>(count * d));
    std::vector<float> x(static_cast<size_t>(n * d)), scales(7), out(14);
    std::vector<double> expected;
    for (int8_t& row : rows) row = static_cast<int8_t>(random.next() >> 40);
    for (float& value : x) value = random.gauss();
    for (float& scale : scales) scale = 0.5f + static_cast<float>(random.next() % 100) / 100;
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t r = 0; r < count; ++r) {
        double sum = 0;
        for (int64_t k = 0; k < d; ++k) sum += rows[r * d + k] * static_cast<double>(x[i * d + k]);
        expected.push_back(sum * scales[r]);
      }
    }
    drop_rows(kernel, rows.data(), count, d, scales.data(), 0, x.data(), 0, n, out.data(), 0, 1);
    check(relative_error(out, expected) < 2e-4, name + ": eight-bit rows of " + std::to_string(d));
  }
}

// A site that owns what it points to.
struct OwnedSite {
  std::vector<std::unique_ptr<Problem>> problems;
  std::vector<std::vector<const uint8_t*>> planes;
  std::vector<DropMatrix> matrices;
  std::vector<const void*> books;
  DropSite site;

  OwnedSite(const std::vector<int64_t>& heights, int64_t d, Random& random) {
    planes.reserve(heights.size());
    for (int64_t rows : heights) {
      problems.emplace_back(new Problem({rows, d / 8, 2, 128, 1, false}, random));
      for (float& scale : problems.back()->scales) scale *= 0.02f;
      planes.push_back(problems.back()->plane_pointers());
      matrices.push_back(
          {planes.back().data(), rows, problems.back()->scales.data(), 0, nullptr, 0});
    }
    books = problems.front()->book_pointers();
    site = {DROP_SITE_MAGIC,
            d,
            8,
            nullptr,
            nullptr,
            2,
            128,
            books.data(),
            matrices.data(),
            static_cast<int64_t>(matrices.size())};
  }
};

// A decoder of two blocks: neither pieces of a sequence nor threads change a bit. (Its values are
// compared with transformers in tests/test_step.py.)
void check_step(int kernel, const std::string& name, Random& random) {
  const int64_t hidden = 24, heads = 3, d = 8, size = 72, length = 9, capacity = 10;
  std::vector<std::unique_ptr<OwnedSite>> sites;
  std::vector<DropBlock> blocks;
  std::vector<float> ones(static_cast<size_t>(hidden), 1.0f), cosines, sines, x;
  const auto site = [&](const std::vector<int64_t>& heights, int64_t width) {
    sites.emplace_back(new OwnedSite(heights, width, random));
    return sites.back()->site;
  };
  for (int i = 0; i < 2; ++i) {
    blocks.push_back({ones.data(), ones.data(), i ? ones.data() : nullptr, nullptr,
                      site({heads * d, d, d}, hidden), site({hidden}, heads * d),
                      site({size, size}, hidden), site({hidden}, size)});
  }
  for (int64_t i = 0; i < capacity * d; ++i) {
    cosines.push_back(static_cast<float>(std::cos(0.1 * (i / d) * (i % (d / 2) + 1))));
    sines.push_back(static_cast<float>(std::sin(0.1 * (i / d) * (i % (d / 2) + 1))));
  }
  for (int64_t i = 0; i < length * hidden; ++i) x.push_back(random.gauss());
  const DropDecoder decoder{DROP_DECODER_MAGIC,
                            hidden,
                            heads,
                            1,
                            d,
                            size,
                            capacity,
                            1e-5,
                            0.35,
                            ones.data(),
                            cosines.data(),
                            sines.data(),
                            blocks.data(),
                            2};
  std::vector<float> expected;
  const std::vector<std::vector<int64_t>> pieces = {{1, 1, 1, 1, 1, 1, 1, 1, 1}, {4, 1, 4}, {9}};
  for (int threads = 1; threads <= 3; ++threads) {
    for (const auto& parts : pieces) {
      std::vector<std::vector<float>> memory(4,
                                             std::vector<float>(static_cast<size_t>(capacity * d)));
      const DropCache caches[2] = {{memory[0].data(), memory[1].data()},
                                   {memory[2].data(), memory[3].data()}};
      std::vector<float> out(x.size());
      int64_t at = 0;
      for (int64_t n : parts) {
        const DropTokens tokens{
            x.data() + at * hidden, out.data() + at * hidden, n, at, caches, 0, capacity};
        check(drop_step(kernel, &decoder, &tokens, threads) == 0, name + ": step");
        at += n;
      }
      for (float value : out) check(std::isfinite(value), name + ": step is not finite");
      if (expected.empty()) expected = out;
      check(out == expected, name + ": step depends on pieces or threads");
    }
  }
  const DropTokens late{x.data(), expected.data(), 2, capacity - 1, nullptr, 0, capacity};
  check(drop_step(kernel, &decoder, &late, 1) == -1, name + ": step past the cache");
}

void check_odd_inputs(int kernel, const std::string& name, Random& random) {
  Problem problem({64, 130, 1, 128, 1, false}, random);
  for (float& value : problem.x) value = 0;
  for (float y : problem.run(kernel, 0, 1, 1)) check(y == 0, name + ": zero input");
  problem.x[5] = 1e-30f;
  for (float y : problem.run(kernel, 0, 1, 1)) check(std::fabs(y) < 1e-25f, name + ": tiny input");
  problem.x[5] = std::nanf("");
  check(std::isnan(problem.run(kernel, 0, 1, 1)[0]), name + ": NaN is lost");
  problem.x[5] = INFINITY;
  check(!std::isfinite(problem.run(kernel, 0, 1, 1)[0]), name + ": infinity is lost");
}

void check_packing(Random& random) {
  for (int64_t rows : {1, 63, 64, 65, 300}) {
    for (int64_t groups : {1, 127, 128, 129, 300}) {
      std::vector<uint8_t> codes(static_cast<size_t>(rows * groups)), back(codes.size());
      for (uint8_t& code : codes) code = static_cast<uint8_t>(random.next() >> 20);
      std::vector<uint8_t> packed(static_cast<size_t>(drop_packed_bytes(rows, groups)));
      drop_pack(codes.data(), rows, groups, packed.data());
      drop_unpack(packed.data(), rows, groups, back.data());
      check(back == codes, "packing " + std::to_string(rows) + " x " + std::to_string(groups));
    }
  }
}

}  // namespace

int main() {
  Random random;
  std::vector<Problem> problems;
  for (const Case& c :
       {Case{64, 1, 1, 128, 1, false}, Case{1, 2, 2, 128, 3, false}, Case{65, 8, 3, 128, 2, false},
        Case{200, 72, 4, 128, 3, true}, Case{320, 129, 2, 128, 2, true},
        Case{131, 257, 1, 128, 2, true}, Case{100, 33, 8, 128, 2, false},
        Case{257, 130, 2, 256, 2, false}, Case{30, 3, 3, 256, 16, false}}) {
    problems.emplace_back(c, random);
  }
  check_packing(random);
  std::vector<std::vector<float>> exact(problems.size() * 2);
  for (int kernel = 0; kernel < drop_kernel_count(); ++kernel) {
    const std::string name = drop_kernel_name(kernel);
    if (!drop_kernel_supported(kernel)) {
      std::printf("%-16s not supported here\n", name.c_str());
      continue;
    }
    const int before = failures;
    for (size_t i = 0; i < problems.size(); ++i) {
      check_products(kernel, name, problems[i], &exact, i);
      check_decode(kernel, name, problems[i]);
    }
    check_site(kernel, name, random);
    check_rows(kernel, name, random);
    check_step(kernel, name, random);
    check_odd_inputs(kernel, name, random);
    std::printf("%-16s %s\n", name.c_str(), failures == before ? "ok" : "FAILED");
  }
  std::printf("team: %s\n%s\n", drop_team_kind(), failures ? "FAILED" : "all kernels ok");
  return failures > 99 ? 99 : failures;
}
