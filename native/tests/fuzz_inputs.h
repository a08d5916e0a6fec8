// What the libFuzzer target (fuzz.cpp) feeds the C interface with, made of the fuzzer's bytes: every
// buffer has exactly the bytes that its shape demands, in an allocation of its own.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "kernels/c_api.h"
#include "naive.h"

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

[[noreturn]] inline void broken(const std::string& what) {
  std::fprintf(stderr, "invariant broken: %s\n", what.c_str());
  std::abort();
}

// Codebooks of the matrices of one input, as prepared for the kernels.
struct Codebooks {
  bool trellis;
  int64_t prefix, entries;
  std::vector<int> bits;  // of a trellis plane
  std::vector<Aligned<uint8_t>> prepared;
  std::vector<const void*> pointers;

  Codebooks(Bytes& bytes, bool of_trellis, int64_t planes, int64_t entries_of_each)
      : trellis(of_trellis), prefix(planes), entries(entries_of_each) {
    const int64_t window = bytes.number(8, 17);
    for (int64_t m = 0; m < prefix; ++m) trellis ? add_trellis(bytes, window) : add_bytes(bytes);
    for (auto& book : prepared) pointers.push_back(book.data());
  }

  void add_bytes(Bytes& bytes) {
    Aligned<float> values = bytes.floats(entries * 8, false);  // finite: checked when it is read
    prepared.emplace_back(drop_codebook_bytes(entries));
    drop_prepare_codebook(values.data(), entries, prepared.back().data());
  }

  void add_trellis(Bytes& bytes, int64_t window) {
    bits.push_back(bytes.flag() ? 2 : 1);
    Aligned<uint8_t> taps = bytes.array<uint8_t>(window);
    Aligned<int8_t> values = bytes.array<int8_t>(64);
    prepared.emplace_back(drop_trellis_bytes());
    const auto prepare = [&] {
      return drop_prepare_trellis(bits.back(), static_cast<int>(window), taps.data(), values.data(),
                                  0.5f, prepared.back().data());
    };
    if (prepare() == 0) return;  // else a tap or a value out of bounds was refused
    for (int64_t i = 0; i < window; ++i) taps.data()[i] &= 63;
    for (int i = 0; i < 64; ++i) values.data()[i] = static_cast<int8_t>(values.data()[i] / 3);
    if (prepare()) broken("a trellis within bounds is refused");
  }
};

// Planes, scales and bias of one matrix.
struct Matrix {
  int64_t d_out, d_in;
  std::vector<Aligned<uint8_t>> planes;
  std::vector<const uint8_t*> plane_pointers;
  Aligned<float> scales, bias;

  Matrix(Bytes& bytes, const Codebooks& books, int64_t rows, int64_t width, bool wild)
      : d_out(rows),
        d_in(width),
        scales(bytes.floats(rows, wild)),
        bias(bytes.floats(rows, wild)) {
    for (int64_t m = 0; m < books.prefix; ++m) {
      if (books.trellis) {
        const int64_t height = std::max<int64_t>(3, (books.bits[m] * d_out + 7) / 8);
        planes.push_back(bytes.array<uint8_t>(height * ((d_in + 63) / 64 * 64)));
      } else {
        Aligned<uint8_t> codes = bytes.array<uint8_t>(d_out * d_in / 8);
        planes.emplace_back(drop_packed_bytes(d_out, d_in / 8));
        drop_pack(codes.data(), d_out, d_in / 8, planes.back().data());
      }
    }
    for (auto& plane : planes) plane_pointers.push_back(plane.data());
  }
};

// Matrices of one input, with its rotation or without one.
struct Input {
  Codebooks books;
  std::vector<std::unique_ptr<Matrix>> owned;
  std::vector<DropMatrix> matrices;
  Aligned<float> signs, odd;
  DropInputGroup group;

  Input(Bytes& bytes, bool trellis, const std::vector<int64_t>& heights, int64_t d_in,
        int64_t prefix, int64_t entries, bool wild)
      : books(bytes, trellis, prefix, entries), signs(d_in), odd(1) {
    for (int64_t rows : heights) {
      const bool biased = bytes.flag();
      const Matrix& one = *owned.emplace_back(new Matrix(bytes, books, rows, d_in, wild));
      matrices.push_back({one.plane_pointers.data(), rows, one.scales.data(), 0,
                          biased ? one.bias.data() : nullptr, 0});
    }
    const bool rotated = bytes.flag();
    int64_t block = 1;
    while (rotated && d_in % (2 * block) == 0 && block < 64) block *= 2;
    const int64_t rest = d_in / block;
    for (int64_t i = 0; i < d_in; ++i) signs.data()[i] = bytes.flag() ? 1.f : -1.f;
    if (rotated && rest > 1) odd = bytes.floats(rest * rest, false);
    group = {DROP_INPUT_GROUP_MAGIC,
             trellis ? DROP_TRELLIS : DROP_BYTES,
             d_in,
             block,
             rotated ? signs.data() : nullptr,
             rotated && rest > 1 ? odd.data() : nullptr,
             prefix,
             entries,
             books.pointers.data(),
             matrices.data(),
             static_cast<int64_t>(matrices.size())};
  }
};

inline int64_t width_of(Bytes& bytes, bool trellis) {
  return trellis ? bytes.number(1, 200) : 8 * bytes.number(1, 40);
}

// A decoder of one or two blocks, and the same at its first plane.
struct Decoder {
  int64_t kv_heads, heads, head_dim, hidden, intermediate, positions;
  std::vector<std::unique_ptr<Input>> inputs;
  std::vector<Aligned<float>> norms;
  std::vector<DropBlock> blocks, first_planes;
  Aligned<float> cosines, sines;
  DropDecoder whole, low;

  Decoder(Bytes& bytes, bool wild)
      : kv_heads(bytes.number(1, 3)),
        heads(kv_heads * bytes.number(1, 3)),
        head_dim(8 * bytes.number(1, 3)),
        hidden(8 * bytes.number(1, 4)),
        intermediate(8 * bytes.number(1, 5)),
        positions(bytes.number(1, 9)),
        cosines(bytes.floats(positions * head_dim, wild)),
        sines(bytes.floats(positions * head_dim, wild)) {
    const bool trellis = bytes.flag();
    const int64_t prefix = bytes.number(1, 3), entries = bytes.flag() ? 128 : 256;
    const int64_t q_size = heads * head_dim, kv_size = kv_heads * head_dim;
    const auto input = [&](const std::vector<int64_t>& heights, int64_t d_in) {
      inputs.emplace_back(new Input(bytes, trellis, heights, d_in, prefix, entries, wild));
      return inputs.back()->group;
    };
    const auto norm = [&](int64_t size) {
      norms.push_back(bytes.floats(size, wild));
      return norms.back().data();
    };
    for (int64_t i = bytes.number(1, 2); i > 0; --i) {
      const bool of_heads = bytes.flag();
      blocks.push_back({norm(hidden), norm(hidden), of_heads ? norm(head_dim) : nullptr,
                        of_heads ? norm(head_dim) : nullptr,
                        input({q_size, kv_size, kv_size}, hidden), input({hidden}, q_size),
                        input({intermediate, intermediate}, hidden), input({hidden}, intermediate)});
    }
    first_planes = blocks;
    for (DropBlock& block : first_planes) {
      for (auto* one : {&block.qkv, &block.output, &block.gate_up, &block.down}) one->prefix = 1;
    }
    whole = {DROP_DECODER_MAGIC, hidden,         heads,          kv_heads,
             head_dim,           intermediate,   positions,      1e-5,
             0.35,               norm(hidden),   cosines.data(), sines.data(),
             blocks.data(),      static_cast<int64_t>(blocks.size())};
    low = whole;
    low.blocks = first_planes.data();
  }
};

// Keys and values of a sequence in every block: whatever was in that memory, until they are written.
struct Sequence {
  std::vector<Aligned<uint8_t>> memory;
  std::vector<DropCache> caches;

  Sequence(Bytes bytes, const Decoder& decoder, int64_t capacity, int64_t cache_type) {
    const int64_t size = decoder.kv_heads * capacity * decoder.head_dim * (cache_type ? 2 : 4);
    for (size_t i = 0; i < 2 * decoder.blocks.size(); ++i) {
      memory.push_back(bytes.array<uint8_t>(size));
    }
    for (size_t i = 0; i < memory.size(); i += 2) {
      caches.push_back({memory[i].data(), memory[i + 1].data()});
    }
  }
};
