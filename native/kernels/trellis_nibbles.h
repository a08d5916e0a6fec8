// Labels without GF2P8AFFINEQB: half a byte at a time, looked up in 16 labels; the linear map of a
// window is the XOR of those of its three to five half bytes. For an instruction set `V` that has
//
//   Vec, kWidth, load      as in trellis_product.h
//   shuffle(table, index)  bytes 0..15 -> table[index]; `table` is 16 bytes in memory
//   low, high              half bytes of bytes
//   bit_xor; pin, which keeps the compiler from computing rows side by side, more than registers
//   hold values(book, labels)   labels 0..63 -> values, raised by V::kOffset
#pragma once

#include "trellis_product.h"

namespace drop {
namespace DROP_ISA {

template <typename V>
struct Nibbles : V {
  typedef typename V::Vec Vec;

  // kTop: half byte, from the newest of the byte on, where the window of row 0 and of row 2 begins.
  template <int kCount, int kTop0, int kTop2, typename Sink>
  DROP_INLINE void walk_as(const QuadBytes& bytes, int64_t first, int64_t last, TrellisAhead& ahead,
                           const Sink& sink) {
    const TrellisQuad& quad = bytes.book->quads[bytes.half];
    for (int64_t line = first; line < last; line += kLine) {
      ahead.step();
      for (int64_t j = line; j < line + kLine; j += V::kWidth) {
        Vec halves[2 * kSpan], values[kQuad];
        DROP_UNROLL
        for (int lag = 0; lag < kSpan; ++lag) {
          const Vec byte = V::load(bytes.rows[lag] + j);
          halves[2 * lag] = V::high(byte);
          halves[2 * lag + 1] = V::low(byte);
        }
        DROP_UNROLL
        for (int i = 0; i < kQuad; ++i) {
          const int top = i < 2 ? kTop0 : kTop2;
          Vec label = V::shuffle(quad.labels[i][0], halves[top]);
          DROP_UNROLL
          for (int h = 1; h < kCount; ++h) {
            label = V::bit_xor(label, V::shuffle(quad.labels[i][h], halves[top + h]));
          }
          V::pin(label);
          values[i] = V::values(*bytes.book, label);
          V::pin(values[i]);
        }
        sink(j, values);
      }
    }
  }

  template <int kCount, typename Sink>
  DROP_INLINE void walk_count(const QuadBytes& bytes, int64_t first, int64_t last,
                              TrellisAhead& ahead, const Sink& sink) {
    if (bytes.book->bits == 2) return walk_as<kCount, 1, 0>(bytes, first, last, ahead, sink);
    if (bytes.half == 0) return walk_as<kCount, 1, 1>(bytes, first, last, ahead, sink);
    return walk_as<kCount, 0, 0>(bytes, first, last, ahead, sink);
  }

  template <typename Sink>
  DROP_INLINE void walk(const QuadBytes& bytes, int64_t first, int64_t last, TrellisAhead& ahead,
                        const Sink& sink) {
    switch (bytes.book->nibbles) {
      case 3: return walk_count<3>(bytes, first, last, ahead, sink);
      case 4: return walk_count<4>(bytes, first, last, ahead, sink);
      default: return walk_count<5>(bytes, first, last, ahead, sink);
    }
  }
};

}  // namespace DROP_ISA
}  // namespace drop
