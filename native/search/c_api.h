// C interface of the search of nested additive codes (common/c_api.h).
//
// What is minimised, for every row r of a matrix on its own (units: the row's scale):
//
//     J = sum_P lambda_P (w - q_P) H (w - q_P)^T,   q_P = sum_{m <= P} C_m[code_m]
//
// over the codes of the G = d_in / 8 groups. See search_core.h for the steps.
#pragma once

#include "common/c_api.h"

#ifdef __cplusplus
extern "C" {
#endif

#define DROP_SEARCH_MAX_CODEBOOKS 8

// One pass over the groups: error feedback (LDLQ) or block descent.
//   coupling [G][d_in][8]  coefficient of the error at input i on the whitened target of group j;
//                          zero on the group's own inputs
//   factor   [G][8][8]     R_j with metric = R_j R_j^T, row-major
typedef struct {
  const float* coupling;
  const float* factor;
} DropMetric;

typedef struct {
  int64_t d_out, d_in;
  int planes;                               // M
  int beam;                                 // B, kept candidates after each stage but the last
  int levels;                               // number of supervised prefixes, ascending
  int level[DROP_SEARCH_MAX_CODEBOOKS];     // P of each
  float lambda[DROP_SEARCH_MAX_CODEBOOKS];  // weight of each
  float lookahead;         // share of a later level's error that survives one more stage
  const float* w;          // [d_out][d_in], rows divided by their scale
  const float* codebooks;  // [M][128][8]
  DropMetric feedback;     // used once, from the last group to the first, when `start` is set
  DropMetric descent;      // used `sweeps` times, from the first group to the last
  int start;               // 1: codes are created by error feedback; 0: codes are improved
  int sweeps;
  uint8_t* codes;    // [M][d_out][G], in (start == 0) and out
  int64_t* changed;  // [sweeps] number of groups whose codes changed; may be null
} DropSearch;

// Name of the i-th backend that runs on this machine, best first; null past the end.
DROP_API const char* drop_search_backend(int index);

// Runs the search. 0: done; 1: unknown backend; 2: arguments out of range; 3: out of memory.
DROP_API int drop_search(const char* backend, const DropSearch* problem, int threads);

#ifdef __cplusplus
}
#endif
