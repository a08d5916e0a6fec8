// What an instruction set provides, and the jobs it is given. One Kernel is one row of the table
// in dispatch.cpp; everything above it (threads, validation, the C interface) is written once.
#pragma once

#include "geometry.h"

namespace drop {

enum Scalar : int { kF32 = 0, kF16 = 1, kBF16 = 2 };

// A prepared codebook: this header; the entries of all 256 codes in float32, for decoding; and
// int16 pairs [4][entries][2] for building tables, pair p of entry k being its coordinates 2p and
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

// The tables of one activation row: entries [P][groups][group_bytes] as the kernel wants them,
// then float32 half_steps [P][blocks].
struct TableShape {
  int64_t groups, prefix, group_bytes;

  int64_t blocks() const { return (groups + kBlock - 1) / kBlock; }
  int64_t steps_offset() const { return prefix * groups * group_bytes; }
  int64_t bytes() const { return round_up(steps_offset() + prefix * blocks() * 4, 64); }
};

// What a member of a team reads next, in that order. While it builds tables it asks memory for
// these lines, which would otherwise be idle, so that the product finds them in the second cache.
constexpr int64_t kMostParts = 32;
struct Upcoming {
  struct Part {
    const uint8_t* data;
    int64_t bytes;
  };
  Part parts[kMostParts];
  int64_t count, at, offset;  // of parts; where asking has come to
};

struct BuildJob {
  const float* x;  // [n, groups * kGroup], rotated
  int64_t x_stride;
  const Codebook* const* codebooks;  // [P]
  TableShape shape;
  uint8_t* tables;     // [n, shape.bytes()]
  Upcoming* upcoming;  // or null
};

// Several matrices that share one input; their rows are accumulated one after the other.
struct MultiplyJob {
  const uint8_t* tables;
  int64_t n;
  TableShape table;
  bool symmetric;
  const uint8_t* const* planes;  // [P], packed
  PlaneShape plane;
  float* sums;  // [n, sums_stride]: unscaled result of the strips asked for, from their first row
  int64_t sums_stride;
};

// y = sums * scales (+ bias) (+ residual), cast to the type of the output.
struct FinishJob {
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
  const void* scales;                // [rows]
  Scalar scale_type;
  void* out;  // out_type, rows from first_row on, out_stride apart
  Scalar out_type;
  int64_t first_row, out_stride;
};

struct RotateJob {
  const float* signs;  // [d], +-1 or +-factor, or null: no rotation, only a conversion
  int64_t d, block;    // Hadamard over consecutive blocks
  const float* odd;    // [d / block, d / block], or null
};

// Eight-bit rows (embeddings and head): y = (rows x) * scales, x as int16 with one factor a row.
struct RowsJob {
  const int8_t* rows;  // [count, d]
  int64_t d;
  const void* scales;  // [count]
  Scalar scale_type;
  const int16_t* x;     // [n, d]
  const float* x_step;  // [n]: x = int16 * step
  int64_t n;
  void* out;  // [n, out_stride]
  Scalar out_type;
  int64_t out_stride;
};

// Attention of one head and one token over cached keys and values [length, d].
struct AttendJob {
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
  int table_bits;
  int64_t group_bytes_symmetric, group_bytes_full;
  bool (*supported)();
  // One unit is one block of one plane of one row; units are numbered row, plane, block.
  void (*build)(const BuildJob&, int64_t first_unit, int64_t last_unit);
  void (*multiply)(const MultiplyJob&, int64_t first_strip, int64_t last_strip);
  void (*finish)(const FinishJob&, int64_t first_row, int64_t last_row);
  void (*decode)(const DecodeJob&, int64_t first_row, int64_t last_row);
  // One row: x of any type -> out float32 [d]; scratch [d].
  void (*rotate)(const RotateJob&, const void* x, Scalar x_type, float* out, float* scratch);
  float (*quantize_row)(const void* x, Scalar x_type, int64_t d, int16_t* out);  // its step
  void (*rows)(const RowsJob&, int64_t first_row, int64_t last_row);
  // Between products (block.h).
  void (*norm)(const float* x, const float* weight, int64_t d, float eps, float* out);
  void (*turn)(const float* cosine, const float* sine, int64_t d, float* x);
  void (*store)(const float* x, int64_t count, Scalar type, void* out, int64_t index);
  void (*attend)(const AttendJob&);
  void (*gate)(const float* gates, const float* ups, int64_t count, float* out);
  uint64_t (*stream)(const uint8_t* data, int64_t bytes);

  int64_t group_bytes(bool symmetric) const {
    return symmetric ? group_bytes_symmetric : group_bytes_full;
  }
};

}  // namespace drop
