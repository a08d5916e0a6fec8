// What an instruction set provides, and the jobs it is given. One Kernel is one line of the list
// in dispatch.cpp; everything above it (threads, validation, the C interface) is written once.
#pragma once

#include "geometry.h"
#include "trellis.h"

namespace drop {

enum Scalar : int { kF32 = 0, kF16 = 1, kBF16 = 2 };

// A prepared codebook: this header; the entries of all 256 codes in float32, for decoding; and
// int16 pairs [4][entries][2] for building a LUT, pair p of entry k being its coordinates 2p and
// 2p + 1 times `scale`, rounded. 64-byte aligned.
struct alignas(64) Codebook {
  float scale;      // int16 = round(value * scale)
  float largest;    // max |coordinate|
  float norm;       // max Euclidean norm of an int16 entry, rounded up
  int32_t entries;  // kHalf (sign-symmetric) or kEntries
  const float* values() const { return reinterpret_cast<const float*>(this + 1); }
  const int16_t* pairs() const {
    return reinterpret_cast<const int16_t*>(values() + kEntries * kGroup);
  }
};

static inline int64_t codebook_bytes(int64_t entries) {
  return static_cast<int64_t>(sizeof(Codebook)) + kEntries * kGroup * 4 + entries * kGroup * 2;
}

// The look-up table (LUT) of one activation row: entries [P][G][group_bytes] as the kernel wants
// them, then float32 half_steps [P][blocks].
struct LutShape {
  int64_t groups, prefix, group_bytes;

  int64_t blocks() const { return (groups + kBlock - 1) / kBlock; }
  int64_t steps_offset() const { return prefix * groups * group_bytes; }
  int64_t bytes() const { return round_up(steps_offset() + prefix * blocks() * 4, 64); }
};

// What a worker reads next, in that order. While it builds a LUT it prefetches these lines, because
// memory would otherwise be idle then and the product finds them in the second cache.
constexpr int64_t kMaxParts = 32;
struct Upcoming {
  struct Part {
    const uint8_t* data;
    int64_t bytes;
  };
  Part parts[kMaxParts];
  int64_t count, at, offset;  // of parts; how far prefetching has come
};

struct BuildLutJob {
  const float* x;  // [n, d_in], rotated
  int64_t x_stride;
  const Codebook* const* codebooks;  // [P]
  LutShape shape;
  uint8_t* lut;        // [n, shape.bytes()]
  Upcoming* upcoming;  // or null
  const int64_t* prefixes;  // [n], planes that each row reads, or null: all of the shape's
};

// Several matrices that share one input; their rows are accumulated one after the other.
struct LutGemvJob {
  const uint8_t* lut;  // [n, lut_shape.bytes()]
  int64_t n;
  LutShape lut_shape;
  bool symmetric;
  const uint8_t* const* planes;  // [P], packed
  PlaneShape plane;
  float* sums;  // [n, sums_stride]: unscaled result of the given strips, from their first row
  int64_t sums_stride;
  const int64_t* prefixes;  // [n] or null, as in BuildLutJob
};

// y = sums * scales (+ bias) (+ residual), cast to the type of the output.
struct EpilogueJob {
  const float* sums;  // one row
  const void* scales;
  Scalar scale_type;
  const void* bias;  // or null
  Scalar bias_type;
  const float* residual;  // or null
  void* out;
  Scalar out_type;
};

struct DecodeJob {
  const uint8_t* const* planes;  // [P], packed or row major
  bool packed;
  PlaneShape plane;
  int64_t prefix;
  const Codebook* const* codebooks;  // [P]
  const void* scales;                // [d_out]
  Scalar scale_type;
  void* out;  // out_type, rows from first_row on, out_stride apart
  Scalar out_type;
  int64_t first_row, out_stride;
};

// Products of a matrix of trellis planes (trellis.h), tiles of kTile rows.
constexpr int64_t kTrellisRows = 16;  // of x at once, at most
struct TrellisGemvJob {
  TrellisInputs x;
  const uint8_t* const* planes;  // [P], held
  const Trellis* const* books;   // [P]
  int64_t prefix, d_out;
  float* sums;  // [n, sums_stride]: unscaled result of the given tiles, from their first row
  int64_t sums_stride;
  const uint8_t* const* next_planes;  // read after these from the first of the tiles next_first ..
  int64_t next_first, next_last;      // next_last on, for prefetching; or null
  const int64_t* prefixes;            // [n] or null, as in BuildLutJob
};

struct TrellisDecodeJob {
  const uint8_t* const* planes;  // [P], held
  const Trellis* const* books;   // [P]
  int64_t prefix, d_out, d_in;
  const void* scales;  // [d_out]
  Scalar scale_type;
  void* out;  // [.., d_in] of out_type (float32 or bfloat16), from first_row on
  Scalar out_type;
  int64_t first_row;
};

struct RotateJob {
  const float* signs;   // [d_in], +-1 or +-factor, or null: no rotation, only a conversion
  int64_t d_in, block;  // Hadamard over consecutive blocks
  const float* odd;     // [d_in / block, d_in / block], or null
};

// Eight-bit rows (embeddings and head): y = (rows x) * scales, x as int16 with one factor a row.
struct Int8RowsJob {
  const int8_t* rows;  // [d_out, d_in]
  int64_t d_in;
  const void* scales;  // [d_out]
  Scalar scale_type;
  const int16_t* x;     // [n, d_in]
  const float* x_step;  // [n]: x = int16 * step
  int64_t n;
  void* out;  // [n, out_stride]
  Scalar out_type;
  int64_t out_stride;
};

// Attention of one head and one token over cached keys and values [length, d].
struct AttentionJob {
  const float* query;  // [d]
  const void *keys, *values;
  Scalar cache_type;
  int64_t d, length;
  float scale;
  float* scores;  // scratch [length]
  float* out;     // [d]
};

struct Kernel {
  const char* name;
  const char* summary;
  int64_t group_bytes_symmetric, group_bytes_full;
  uint32_t features;  // what the file was compiled with (cpu_features.h)
  // One unit is one block of one plane of one row; units are numbered row, plane, block.
  void (*build_lut)(const BuildLutJob&, int64_t first_unit, int64_t last_unit);
  void (*lut_gemv)(const LutGemvJob&, int64_t first_strip, int64_t last_strip);
  void (*epilogue)(const EpilogueJob&, int64_t first_row, int64_t last_row);
  void (*decode)(const DecodeJob&, int64_t first_row, int64_t last_row);
  void (*trellis_input)(const float* x, int64_t d_in, const TrellisInputs& out, int64_t row);
  void (*trellis_gemv)(const TrellisGemvJob&, int64_t first_tile, int64_t last_tile);
  void (*trellis_decode)(const TrellisDecodeJob&, int64_t first_row, int64_t last_row);
  // One row: x of any type -> out float32 [d_in]; scratch [d_in].
  void (*rotate)(const RotateJob&, const void* x, Scalar x_type, float* out, float* scratch);
  float (*quantize_row)(const void* x, Scalar x_type, int64_t d_in, int16_t* out);  // its step
  void (*int8_rows)(const Int8RowsJob&, int64_t first_row, int64_t last_row);
  // Between products (block.h).
  void (*norm)(const float* x, const float* weight, int64_t d, float eps, float* out);
  void (*apply_rope)(const float* cosine, const float* sine, int64_t d, float* x);
  void (*store)(const float* x, int64_t count, Scalar type, void* out, int64_t index);
  void (*attention)(const AttentionJob&);
  void (*silu_mul)(const float* gates, const float* ups, int64_t count, float* out);
  uint64_t (*stream)(const uint8_t* data, int64_t bytes);

  int64_t group_bytes(bool symmetric) const {
    return symmetric ? group_bytes_symmetric : group_bytes_full;
  }
};

}  // namespace drop
