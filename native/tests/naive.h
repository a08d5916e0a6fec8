// Random products, and what they should give: computed by naive loops in double precision.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "kernels/c_api.h"

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
  explicit Aligned(int64_t count) {
    void* start = nullptr;
    if (posix_memalign(&start, 64, static_cast<size_t>(count) * sizeof(T))) std::abort();
    data_.reset(static_cast<T*>(start));
  }
  T* data() const { return data_.get(); }

 private:
  struct Free {
    void operator()(void* data) const { std::free(data); }
  };
  std::unique_ptr<T, Free> data_;
};

struct Case {
  int64_t d_out, groups, prefix, entries, n;
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
      codes.emplace_back(static_cast<size_t>(c.d_out * c.groups));
      for (uint8_t& code : codes.back()) code = static_cast<uint8_t>(random.next() >> 30);
      packed.emplace_back(static_cast<size_t>(drop_packed_bytes(c.d_out, c.groups)));
      drop_pack(codes.back().data(), c.d_out, c.groups, packed.back().data());
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
    for (int64_t r = 0; r < c.d_out; ++r) {
      scales.push_back(0.5f + static_cast<float>(random.next() % 1000) / 1000);
      bias.push_back(random.gauss());
    }
    y.resize(static_cast<size_t>(c.n * c.d_out));
    for (int64_t i = 0; i < c.n; ++i) {
      for (int64_t r = 0; r < c.d_out; ++r) {
        double sum = 0;
        for (int64_t m = 0; m < c.prefix; ++m) {
          for (int64_t j = 0; j < c.groups; ++j) {
            const uint8_t code = codes[m][static_cast<size_t>(r * c.groups + j)];
            for (int k = 0; k < 8; ++k) {
              sum += static_cast<double>(books[m][code * 8 + k]) * x[i * d + j * 8 + k];
            }
          }
        }
        y[i * c.d_out + r] = sum * scales[r];
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

  // Rows first .. first + n through drop_build_lut and drop_lut_gemv.
  std::vector<float> run(int kernel, int64_t first, int64_t n, int threads) const {
    const int64_t d = shape.groups * 8;
    const int64_t bytes = drop_lut_bytes(kernel, shape.groups, shape.prefix, shape.entries);
    Aligned<uint8_t> lut(bytes * n);
    const auto book_list = book_pointers();
    const auto planes = plane_pointers();
    std::vector<float> out(static_cast<size_t>(n * shape.d_out));
    if (drop_build_lut(kernel, x.data() + first * d, n, shape.groups, shape.prefix,
                       book_list.data(), lut.data(), threads)) {
      return {};
    }
    const DropMatrix matrix{planes.data(), shape.d_out, scales.data(), 0, nullptr, 0};
    drop_lut_gemv(kernel, lut.data(), n, shape.groups, shape.prefix, shape.entries, &matrix, 1,
                  out.data(), 0, threads);
    return out;
  }
};
