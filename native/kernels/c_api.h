// C interface of the CPU kernels, as called through ctypes (common/c_api.h). Nothing is kept
// between calls except scratch memory per thread.
//
// Kernels are numbered 0 .. drop_kernel_count() - 1, best first. A look-up table (LUT) belongs to
// the kernel that built it. `type`: 0 float32, 1 float16, 2 bfloat16. Functions that return int
// give 0, or -1 when the kernel number is wrong or not supported by this machine. Pointers must be
// valid for the shapes given, whose letters common/constants.h explains; the Python side checks
// them.
#pragma once

#include "common/c_api.h"

#ifdef __cplusplus
extern "C" {
#endif

DROP_API int drop_kernel_count(void);
DROP_API const char* drop_kernel_name(int kernel);
DROP_API const char* drop_kernel_summary(int kernel);
DROP_API int drop_kernel_supported(int kernel);

// Packed planes (geometry.h). codes uint8 [d_out, groups].
DROP_API int64_t drop_packed_bytes(int64_t d_out, int64_t groups);
DROP_API void drop_pack(const uint8_t* codes, int64_t d_out, int64_t groups, uint8_t* packed);
DROP_API void drop_unpack(const uint8_t* packed, int64_t d_out, int64_t groups, uint8_t* codes);

// Prepared codebooks. values float32 [entries, 8]; entries 128 means sign-symmetric.
DROP_API int64_t drop_codebook_bytes(int64_t entries);
DROP_API void drop_prepare_codebook(const float* values, int64_t entries, void* prepared);

// Prepared codebooks of trellis planes (trellis.h). bits 1 or 2, window 8 .. 17, taps [window]
// below 64 by age, values int8 [64] of at most 63 in size; else -1. `out` has drop_trellis_bytes(),
// 64-byte aligned.
DROP_API int64_t drop_trellis_bytes(void);
DROP_API int drop_prepare_trellis(int bits, int window, const uint8_t* taps, const int8_t* values,
                                  float scale, void* out);

// The LUT of one activation row.
DROP_API int64_t drop_lut_bytes(int kernel, int64_t groups, int64_t prefix, int64_t entries);

// x [n, x_stride] of x_type -> out float32 [n, d_in]. Hadamard over blocks of `block` after signs
// (float32 [d_in], +-1 or +-factor); `odd` float32 [d_in / block, d_in / block] or null. Null
// signs: conversion only.
DROP_API int drop_rotate(int kernel, const void* x, int x_type, int64_t n, int64_t x_stride,
                         int64_t d_in, int64_t block, const float* signs, const float* odd,
                         float* out, int threads);

// x float32 [n, groups * 8], codebooks [prefix] prepared -> lut uint8 [n, drop_lut_bytes].
DROP_API int drop_build_lut(int kernel, const float* x, int64_t n, int64_t groups, int64_t prefix,
                            const void* const* codebooks, uint8_t* lut, int threads);

typedef struct {
  const uint8_t* const* planes;  // [prefix], packed or held (trellis.h)
  int64_t d_out;
  const void* scales;  // [d_out]
  int64_t scale_type;
  const void* bias;  // [d_out] or null
  int64_t bias_type;
} DropMatrix;

// Products of one input with `count` matrices. out: matrix after matrix, each [n, d_out], out_type.
DROP_API int drop_lut_gemv(int kernel, const uint8_t* lut, int64_t n, int64_t groups,
                           int64_t prefix, int64_t entries, const DropMatrix* matrices,
                           int64_t count, void* out, int out_type, int threads);

// An input group: everything that consumes one input. Rotation, tables or integers, and products in
// one call. kind DROP_BYTES: packed planes, codebooks of drop_prepare_codebook. DROP_TRELLIS: held
// planes, codebooks of drop_prepare_trellis, d_in at most 2^17; `entries` is not read.
#define DROP_BYTES 0
#define DROP_TRELLIS 1
#define DROP_INPUT_GROUP_MAGIC \
  0x32707267706e6964  // first word of a DropInputGroup; anything else is refused
typedef struct {
  int64_t magic, kind;
  int64_t d_in, block;
  const float* signs;
  const float* odd;
  int64_t prefix, entries;
  const void* const* codebooks;
  const DropMatrix* matrices;
  int64_t count;
} DropInputGroup;

DROP_API int drop_input_group(int kernel, const DropInputGroup* input, const void* x, int x_type,
                              int64_t n, int64_t x_stride, void* out, int out_type, int threads);

// A few tokens, of one sequence or of several, through all blocks of a Llama-like decoder (step.cpp). Weights of
// norms are float32; q_norm and k_norm [head_dim] may be null. gate_up holds two matrices of
// `intermediate` rows. cosines and sines [positions, head_dim].
typedef struct {
  const float *input_norm, *post_norm, *q_norm, *k_norm;
  DropInputGroup qkv, output, gate_up, down;
} DropBlock;

#define DROP_DECODER_MAGIC 0x7265646f63656464  // "ddecoder"
typedef struct {
  int64_t magic;
  int64_t hidden, heads, kv_heads, head_dim, intermediate, positions;
  double eps, attention_scale;
  const float *final_norm, *cosines, *sines;
  const DropBlock* blocks;
  int64_t count;
} DropDecoder;

typedef struct {
  void *keys, *values;  // [kv_heads, capacity, head_dim] of cache_type
} DropCache;

// Where one token stands: its position, and the caches of its sequence, [blocks], which have room
// for `capacity` tokens; they are read up to `position` and written there. Tokens of one sequence
// follow each other and name the same caches; sequences share none. `decoder` is that of the
// token's own precision, null for the call's: decoders of a call differ in their prefixes, norms and
// tables of cosines and sines, and name the same planes, codebooks, scales and signs.
typedef struct {
  int64_t position, capacity;
  const DropCache* caches;
  const DropDecoder* decoder;
} DropPlace;

typedef struct {
  const float* x;  // [n, hidden], embedded tokens; n at most 16
  float* out;      // [n, hidden], after the final norm
  int64_t n, cache_type;
  const DropPlace* places;  // [n]
} DropTokens;

// -2: decoders of different codes.
DROP_API int drop_step(int kernel, const DropDecoder* decoder, const DropTokens* tokens,
                       int threads);

// First `prefix` planes, rows first_row .. last_row -> out [last_row - first_row, groups * 8] of
// out_type (0 or 2). planes packed or row major; scales [d_out]. Equals the reference bit for bit.
DROP_API int drop_decode(int kernel, const uint8_t* const* planes, int packed, int64_t d_out,
                         int64_t groups, int64_t prefix, const void* const* codebooks,
                         const void* scales, int scale_type, int64_t first_row, int64_t last_row,
                         void* out, int out_type, int threads);

// The same of trellis planes, held: -> out [last_row - first_row, d_in].
DROP_API int drop_trellis_decode(int kernel, const uint8_t* const* planes, int64_t d_out,
                                 int64_t d_in, int64_t prefix, const void* const* codebooks,
                                 const void* scales, int scale_type, int64_t first_row,
                                 int64_t last_row, void* out, int out_type, int threads);

// Eight-bit rows int8 [d_out, d_in] times x [n, d_in] of x_type, times scales [d_out] -> out
// [n, d_out].
// Activations are rounded to int16, one step a row of x; sums are exact.
DROP_API int drop_int8_rows(int kernel, const int8_t* rows, int64_t d_out, int64_t d_in,
                            const void* scales, int scale_type, const void* x, int x_type,
                            int64_t n, void* out, int out_type, int threads);

// One plain sequential read (its checksum): the yardstick of the benchmarks.
DROP_API uint64_t drop_stream_read(int kernel, const uint8_t* data, int64_t bytes, int threads);

#ifdef __cplusplus
}
#endif
