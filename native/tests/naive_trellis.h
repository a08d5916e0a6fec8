// Random trellis planes, and what they should give: windows read bit by bit, integers summed one by
// one. Same formula as kernels/trellis.h, so results must agree bit for bit.
#pragma once

#include <cmath>
#include <string>

#include "naive.h"

struct TrellisCase {
  int64_t d_out, d_in;
  std::vector<int> bits;  // of the planes
  int window;
  int64_t n;
};

struct TrellisProblem {
  TrellisCase shape;
  int64_t stride;
  std::vector<std::vector<uint8_t>> planes, taps;
  std::vector<std::vector<int8_t>> values;
  std::vector<float> plane_scales, scales, bias, x;
  std::vector<std::unique_ptr<Aligned<uint8_t>>> prepared;
  std::vector<std::vector<int8_t>> matrices;     // of values [d_out, d_in]
  std::vector<float> decoded, products, biased;  // expected

  TrellisProblem(const TrellisCase& c, Random& random) : shape(c), stride((c.d_in + 63) / 64 * 64) {
    for (int bits : c.bits) {
      planes.emplace_back(static_cast<size_t>(stream_bytes(bits) * stride));
      for (uint8_t& code : planes.back()) code = static_cast<uint8_t>(random.next() >> 30);
      taps.emplace_back(static_cast<size_t>(c.window));
      for (uint8_t& tap : taps.back()) tap = random.next() >> 20 & 63;
      values.emplace_back(64);
      for (int8_t& value : values.back()) {
        value = static_cast<int8_t>(static_cast<int>(random.next() >> 20 & 0xffff) % 127 - 63);
      }
      plane_scales.push_back(0.01f + 0.01f * std::fabs(random.gauss()));
      prepare(bits);
    }
    for (size_t m = 0; m < planes.size(); ++m) {
      matrices.emplace_back();
      for (int64_t r = 0; r < c.d_out; ++r) {
        for (int64_t j = 0; j < c.d_in; ++j) matrices[m].push_back(value(m, r, j));
      }
    }
    x.resize(static_cast<size_t>(c.n * c.d_in));
    for (float& value : x) value = random.gauss();
    for (int64_t r = 0; r < c.d_out; ++r) {
      scales.push_back(0.5f + static_cast<float>(random.next() % 1000) / 1000);
      bias.push_back(random.gauss());
    }
    decode();
    multiply();
  }

  int64_t stream_bytes(int bits) const {
    const int64_t bytes = (bits * shape.d_out + 7) / 8;
    return bytes < 3 ? 3 : bytes;
  }
  void prepare(int bits) {
    prepared.emplace_back(new Aligned<uint8_t>(drop_trellis_bytes()));
    if (drop_prepare_trellis(bits, shape.window, taps.back().data(), values.back().data(),
                             plane_scales.back(), prepared.back()->data())) {
      std::abort();
    }
  }

  // Value of plane m in row r for input j.
  int8_t value(size_t m, int64_t r, int64_t j) const {
    const int64_t length = 8 * stream_bytes(shape.bits[m]);
    int label = 0;
    for (int age = 0; age < shape.window; ++age) {
      const int64_t at = (shape.bits[m] * (r + 1) - 1 - age + length) % length;
      if (planes[m][static_cast<size_t>(at / 8 * stride + j)] >> (at % 8) & 1) {
        label ^= taps[m][static_cast<size_t>(age)];
      }
    }
    return values[m][static_cast<size_t>(label)];
  }

  void decode() {
    for (size_t i = 0; i < static_cast<size_t>(shape.d_out * shape.d_in); ++i) {
      float sum = static_cast<float>(matrices[0][i]) * plane_scales[0];
      for (size_t m = 1; m < planes.size(); ++m) {
        sum += static_cast<float>(matrices[m][i]) * plane_scales[m];
      }
      decoded.push_back(sum * scales[i / static_cast<size_t>(shape.d_in)]);
    }
  }

  void multiply() {
    products.clear();
    biased.clear();
    for (int64_t i = 0; i < shape.n; ++i) {
      const float* row = x.data() + i * shape.d_in;
      float largest = 0;
      for (int64_t j = 0; j < shape.d_in; ++j) largest = std::fmax(largest, std::fabs(row[j]));
      const float factor = 32639.0f / largest;
      std::vector<int64_t> integers;
      for (int64_t j = 0; j < shape.d_in; ++j) integers.push_back(std::lrint(row[j] * factor));
      for (int64_t r = 0; r < shape.d_out; ++r) {
        float total = 0;
        for (size_t m = 0; m < planes.size(); ++m) {
          const int8_t* weights = matrices[m].data() + r * shape.d_in;
          int64_t sum = 0;
          for (int64_t j = 0; j < shape.d_in; ++j) {
            sum += weights[j] * integers[static_cast<size_t>(j)];
          }
          total += static_cast<float>(sum) * plane_scales[m];
        }
        products.push_back(total * (1 / factor) * scales[static_cast<size_t>(r)]);
        biased.push_back(products.back() + bias[static_cast<size_t>(r)]);
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
    for (const auto& plane : planes) out.push_back(plane.data());
    return out;
  }

  // The matrix twice, the second time with a bias; rows first .. first + n of x.
  int run(int kernel, int64_t first, int64_t n, int threads, std::vector<float>* out) const {
    const auto books = book_pointers();
    const auto pointers = plane_pointers();
    const DropMatrix matrices[2] = {
        {pointers.data(), shape.d_out, scales.data(), 0, nullptr, 0},
        {pointers.data(), shape.d_out, scales.data(), 0, bias.data(), 0}};
    const DropInputGroup input{DROP_INPUT_GROUP_MAGIC,
                               DROP_TRELLIS,
                               shape.d_in,
                               1,
                               nullptr,
                               nullptr,
                               static_cast<int64_t>(planes.size()),
                               0,
                               books.data(),
                               matrices,
                               2};
    out->assign(static_cast<size_t>(2 * n * shape.d_out), 0.0f);
    return drop_input_group(kernel, &input, x.data() + first * shape.d_in, 0, n, shape.d_in,
                            out->data(), 0, threads);
  }
};
