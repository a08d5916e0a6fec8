// C interface of the search of nested trellis codes (common/c_api.h).
//
// What is minimised over the bit streams of all inputs and planes (units of w: the row's scale):
//
//     J = sum_P lambda_P sum_r weight_r (w_r - q_P,r) H (w_r - q_P,r)^T,   q_P = sum_{m <= P} C_m
//
// or, with `row_feedback`, sum_P lambda_P tr(H_O E_P H E_P^T) with E_P[r] = w_r - q_P,r, where the
// outputs have a metric H_O = (I + F) D (I + F)^T of their own: F is `row_feedback`, above its blocks
// of `row_block` rows, D block diagonal, and row_weights the diagonal of D. (What D couples within a
// block is left out of the search.)
//
// C_m[r][j] = values[m][label of the window of row r in the stream of input j]
// (coding/codebook_set.py). See trellis_core.h for the steps.
#pragma once

#include "common/c_api.h"

#ifdef __cplusplus
extern "C" {
#endif

#define DROP_TRELLIS_MAX_PLANES 8
#define DROP_TRELLIS_LABELS 64
#define DROP_TRELLIS_MAX_WINDOW 17

typedef struct {
  int bits, window;                       // k: 1 or 2; L: 8 to 17
  float values[DROP_TRELLIS_LABELS];      // by label
  uint8_t taps[DROP_TRELLIS_MAX_WINDOW];  // label word of the bit of each age
} DropTrellisPlane;

typedef struct {
  int64_t d_out, d_in;
  int planes;                              // M
  int levels;                              // number of supervised prefixes, ascending
  DropTrellisPlane plane[DROP_TRELLIS_MAX_PLANES];
  int prefix[DROP_TRELLIS_MAX_PLANES];     // planes of each supervised prefix; the last is M
  float lambda[DROP_TRELLIS_MAX_PLANES];   // weight of each
  const float* w;            // [d_in][d_out], transposed; rows divided by their scale
  const float* row_weights;  // [d_out]
  const float* lower;        // [d_in][d_in], H = lower lower^T; null: codes are improved only
  const float* h;            // [d_in][d_in], for sweeps
  int sweeps;
  uint8_t* codes[DROP_TRELLIS_MAX_PLANES];  // [d_in][max(3, ceil(k d_out / 8))] each, in without `lower`; out
  int64_t* changed;          // [sweeps] number of inputs whose codes changed
  const float* row_feedback;  // [d_out][d_out] or null: F. With `lower` and without sweeps
  int64_t row_block;          // rows of its blocks: whole cycles of all planes, two blocks at least
} DropTrellis;

// Name of the i-th backend that runs on this machine, best first; null past the end.
DROP_API const char* drop_trellis_backend(int index);

// Runs the search. 0: done; 1: unknown backend; 2: arguments out of range; 3: out of memory.
DROP_API int drop_trellis_search(const char* backend, const DropTrellis* problem, int threads);

#ifdef __cplusplus
}
#endif
