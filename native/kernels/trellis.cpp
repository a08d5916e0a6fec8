// Preparing the codebook of a trellis plane, and the C interface of trellis planes.
#include "trellis.h"

#include <cstring>

#include "c_api.h"
#include "common/threads.h"
#include "product.h"

namespace drop {
namespace {

// Contribution to the label of the bits of `mask` in the byte that lies `lag` before that of the
// newest bits; `end` is the place in its byte of a row's newest bit.
uint8_t label_of(int mask, int lag, int end, int window, const uint8_t* taps) {
  uint8_t label = 0;
  for (int bit = 0; bit < 8; ++bit) {
    const int age = end - bit + 8 * lag;
    if ((mask >> bit & 1) && age >= 0 && age < window) label ^= taps[age];
  }
  return label;
}

// GF2P8AFFINEQB: bit o of a result is the parity of the byte and byte 7 - o of the matrix.
uint64_t affine_matrix(int lag, int end, int window, const uint8_t* taps) {
  uint64_t matrix = 0;
  for (int bit = 0; bit < 8; ++bit) {
    const uint8_t label = label_of(1 << bit, lag, end, window, taps);
    for (int o = 0; o < 8; ++o) {
      if (label >> o & 1) matrix |= uint64_t{1} << (8 * (7 - o) + bit);
    }
  }
  return matrix;
}

void fill_quad(int half, const uint8_t* taps, Trellis* book) {
  TrellisQuad& quad = book->quads[half];
  int32_t& oldest = half ? book->oldest_high : book->oldest;
  for (int i = 0; i < kQuad; ++i) {
    const int row = book->bits == 2 ? i : 4 * half + i;  // of the byte
    const int end = book->bits * (row + 1) - 1;
    for (int lag = 0; lag < kSpan; ++lag) {
      quad.matrix[lag][i] = affine_matrix(lag, end, book->window, taps);
    }
    if (end - (book->window - 1) < -8) oldest = i + 1;
    for (int h = 0; h < kNibbles; ++h) {
      const int nibble = end / 4 - h;  // of the stream, from the byte of the newest bits
      const int lag = nibble < 0 ? (1 - nibble) / 2 : 0;
      const int shift = 4 * (nibble + 2 * lag);
      if (end - 4 * (end / 4 - h) - 3 < book->window && h + 1 > book->nibbles)
        book->nibbles = h + 1;
      for (int v = 0; v < 16; ++v) {
        quad.labels[i][h][v] = label_of(v << shift, lag, end, book->window, taps);
      }
    }
  }
}

}  // namespace
}  // namespace drop

using namespace drop;

int64_t drop_trellis_bytes(void) { return sizeof(Trellis); }

int drop_prepare_trellis(int bits, int window, const uint8_t* taps, const int8_t* values,
                         float scale, void* out) {
  if (bits < 1 || bits > 2 || window < kMinWindow || window > kMaxWindow) return -1;
  Trellis book{};
  book.bits = bits;
  book.window = window;
  book.scale = scale;
  for (int label = 0; label < kLabels; ++label) {
    if (values[label] < -kValueMax || values[label] > kValueMax) return -1;
    book.values[label] = values[label];
    book.raised[label] = static_cast<uint8_t>(values[label] + 64);
    const int before = label < 16 ? 0 : book.raised[label - 16];
    book.steps[label / 16][label % 16] = static_cast<uint8_t>(book.raised[label] ^ before);
  }
  for (int age = 0; age < window; ++age) {
    if (taps[age] >= kLabels) return -1;
  }
  for (int half = 0; half < 2; ++half) fill_quad(half, taps, &book);
  std::memcpy(out, &book, sizeof book);
  return 0;
}

int drop_trellis_decode(int kernel, const uint8_t* const* planes, int64_t d_out, int64_t d_in,
                        int64_t prefix, const void* const* codebooks, const void* scales,
                        int scale_type, int64_t first_row, int64_t last_row, void* out,
                        int out_type, int threads) {
  const Kernel* chosen = usable(kernel);
  if (!chosen || prefix > kMaxPlanes) return -1;
  const TrellisDecodeJob job{planes,
                             reinterpret_cast<const Trellis* const*>(codebooks),
                             prefix,
                             d_out,
                             d_in,
                             scales,
                             static_cast<Scalar>(scale_type),
                             out,
                             static_cast<Scalar>(out_type),
                             first_row};
  // Workers share quads, so that none decodes a quad of another.
  const int64_t start = first_row / kQuad, quads = (last_row + kQuad - 1) / kQuad - start;
  auto body = [&](const Worker& worker) {
    const Range mine = share(quads, worker);
    const int64_t first = (start + mine.first) * kQuad, last = (start + mine.last) * kQuad;
    chosen->trellis_decode(job, first < first_row ? first_row : first,
                           last > last_row ? last_row : last);
  };
  on_threads(threads_for(threads, (last_row - first_row) * d_in), body);
  return 0;
}
