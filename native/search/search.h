// Search of nested additive codes: interface shared by the per-instruction-set files.
//
// What is minimised, for every row r of a matrix on its own (units: the row's scale):
//
//     J = sum_P lambda_P (w - q_P) H (w - q_P)^T,   q_P = sum_{m <= P} C_m[code_m]
//
// over the codes of the G = d_in / 8 groups. See search_core.h for the steps.
#pragma once
#include <cstdint>

namespace drop {

constexpr int kGroup = 8;      // g, inputs of a group
constexpr int kHalf = 128;     // stored entries of a sign-symmetric codebook (K / 2)
constexpr int kMaxPlanes = 8;  // M
constexpr int kMaxBeam = 32;

// One pass over the groups: error feedback (LDLQ) or block descent.
//   coupling [G][d_in][8]  coefficient of the error at input i on the whitened target of group j;
//                          zero on the group's own inputs
//   factor   [G][8][8]     R_j with metric = R_j R_j^T, row-major
struct Metric {
  const float* coupling;
  const float* factor;
};

struct Problem {
  int64_t d_out, d_in;
  int planes;                // M
  int beam;                  // B, kept candidates after each stage but the last
  int levels;                // number of supervised prefixes, ascending
  int level[kMaxPlanes];     // P of each
  float lambda[kMaxPlanes];  // weight of each
  float lookahead;           // share of a later level's error that survives one more stage
  const float* w;            // [d_out][d_in], rows divided by their scale
  const float* codebooks;    // [M][128][8]
  Metric feedback;           // used once, from the last group to the first, when `start` is set
  Metric descent;            // used `sweeps` times, from the first group to the last
  int start;                 // 1: codes are created by error feedback; 0: codes are improved
  int sweeps;
  uint8_t* codes;    // [M][d_out][G], in (start == 0) and out
  int64_t* changed;  // [sweeps] number of groups whose codes changed; may be null
};

// Rows [first, last) of the problem. Returns nothing; rows are independent of each other.
using SearchRows = void (*)(const Problem&, int64_t first, int64_t last, int64_t* changed);

void search_rows_portable(const Problem&, int64_t first, int64_t last, int64_t* changed);
#if defined(__x86_64__)
void search_rows_avx2(const Problem&, int64_t first, int64_t last, int64_t* changed);
void search_rows_avx512(const Problem&, int64_t first, int64_t last, int64_t* changed);
#endif

}  // namespace drop
