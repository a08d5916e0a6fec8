// Choosing the codes of one group for a vector of rows: a beam over the stages m = 1..M.
//
//   cost so far   J_m(q) = J_{m-1} + lambda_m ||t_m - q||^2          (supervised stages only)
//   kept by       J_{m-1} + a ||t~ - q||^2, the lookahead: levels P >= m pull on q with weight
//                 lambda_P * lookahead^(P - m); a sum of quadratics in q is one quadratic with the
//                 blended target t~. At an unsupervised stage this is what tells candidates apart.
//   Of the two signs of an entry only the better is considered.
// Selection keeps B keys a lane in registers: the upper bits of a key are the (non-negative) score,
// the lower 13 its candidate and code, so that one min and one max insert it. The price is that
// scores closer than 2^-10 relative are ordered by index. The last stage is exact.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "lanes.h"
#include "search.h"

namespace drop {
namespace {

constexpr int kVectors = 4;  // vectors of rows in a tile: amortises whitening the codebooks
constexpr int kTile = kVectors * N;
constexpr int32_t kIndexMask = (1 << 13) - 1;  // candidate (5 bits), sign and entry (8 bits)

struct Workspace {
  explicit Workspace(const Problem& p)
      : w(p.d_in * kTile),
        error(size_t(p.levels) * p.d_in * kTile),
        codes(size_t(p.d_in / kGroup) * p.planes * kTile),
        whitened(size_t(p.planes) * kHalf * kGroup),
        norm(size_t(p.planes) * kHalf) {}
  std::vector<float> w, error;        // [d_in][tile], [levels][d_in][tile]
  std::vector<uint8_t> codes;         // [G][M][tile]
  std::vector<float> whitened, norm;  // [M][128][8], [M][128]: C_m R_j and its squared norms
  int64_t rows = 0;                   // of the tile that exist; the others are zeros
};

// How the levels pull on the stages; depends on the problem only.
struct Schedule {
  explicit Schedule(const Problem& p) {
    for (int m = 0; m < p.planes; m++) {
      at[m] = -1;
      total[m] = 0;
      for (int l = 0; l < p.levels; l++) {
        const int ahead = p.level[l] - 1 - m;
        if (ahead == 0) at[m] = l;
        pull[m][l] = ahead < 0 ? 0 : p.lambda[l] * std::pow(p.lookahead, float(ahead));
        total[m] += pull[m][l];
      }
      for (int l = 0; l < p.levels; l++) pull[m][l] /= total[m];
    }
  }
  int at[kMaxCodebooks];                     // level supervised after stage m, or -1
  float total[kMaxCodebooks];                // a, weight of the blended quadratic
  float pull[kMaxCodebooks][kMaxCodebooks];  // shares of the levels in the blended target
};

struct Candidates {
  alignas(64) vf q[kMaxBeam][kGroup];  // whitened partial sums
  vf cost[kMaxBeam];                   // J so far
  alignas(64) uint8_t code[kMaxBeam][kMaxCodebooks][N];
};

// whitened[m][k] = C_m[k] R, row vectors.
void whiten(const Problem& p, const float* factor, Workspace& ws) {
  for (int e = 0; e < p.planes * kHalf; e++) {
    const float* c = p.codebooks + size_t(e) * kGroup;
    float out[kGroup] = {0}, sum = 0;
    for (int a = 0; a < kGroup; a++)
      for (int b = 0; b < kGroup; b++) out[b] += c[a] * factor[a * kGroup + b];
    for (int b = 0; b < kGroup; b++) sum += out[b] * out[b];
    std::memcpy(&ws.whitened[size_t(e) * kGroup], out, sizeof out);
    ws.norm[e] = sum;
  }
}

// Keys of the B best (candidate, code) pairs of one stage, ascending, for each lane.
template <int B>
void select(const Workspace& ws, int m, int parents, const vf (*residual)[kGroup], const vf* base,
            vi* keys) {
  vi best[B];
  for (int b = 0; b < B; b++) best[b] = splat(int32_t(0x7f000000));
  const float* book = &ws.whitened[size_t(m) * kHalf * kGroup];
  const float* norm = &ws.norm[size_t(m) * kHalf];
  for (int parent = 0; parent < parents; parent++) {
    vf r[kGroup];
    for (int c = 0; c < kGroup; c++) r[c] = residual[parent][c] * 2.0f;
    const vf offset = base[parent];
    for (int k = 0; k < kHalf; k += 4) {
      vf dot[4] = {vf{}, vf{}, vf{}, vf{}};
#pragma GCC unroll 8
      for (int c = 0; c < kGroup; c++)
#pragma GCC unroll 4
        for (int u = 0; u < 4; u++) dot[u] += r[c] * book[(k + u) * kGroup + c];
      vi key[4];
#pragma GCC unroll 4
      for (int u = 0; u < 4; u++) {
        const vf score = offset + norm[k + u] - abs_of(dot[u]);
        const vi sign = ((vi)dot[u] >> 31) & 128;
        key[u] = (max_of((vi)score, vi{}) & ~kIndexMask) | sign | ((parent << 8) | (k + u));
      }
      const vi low = min_of(min_of(key[0], key[1]), min_of(key[2], key[3]));
      if (!any_below(low, best[B - 1])) continue;
#pragma GCC unroll 4
      for (int u = 0; u < 4; u++) {
        if (!any_below(key[u], best[B - 1])) continue;
#pragma GCC unroll 32
        for (int b = B - 1; b > 0; b--) best[b] = max_of(best[b - 1], min_of(best[b], key[u]));
        best[0] = min_of(best[0], key[u]);
      }
    }
  }
  for (int b = 0; b < B; b++) keys[b] = best[b];
}

// The exact best (candidate, code) of the last stage: no packing of scores.
void select_last(const Workspace& ws, int m, int parents, const vf (*residual)[kGroup],
                 const vf* base, vi* key) {
  vf best = splat(INFINITY);
  vi index = vi{};
  const float* book = &ws.whitened[size_t(m) * kHalf * kGroup];
  const float* norm = &ws.norm[size_t(m) * kHalf];
  for (int parent = 0; parent < parents; parent++) {
    vf r[kGroup];
    for (int c = 0; c < kGroup; c++) r[c] = residual[parent][c] * 2.0f;
    for (int k = 0; k < kHalf; k += 4) {
      vf dot[4] = {vf{}, vf{}, vf{}, vf{}};
#pragma GCC unroll 8
      for (int c = 0; c < kGroup; c++)
#pragma GCC unroll 4
        for (int u = 0; u < 4; u++) dot[u] += r[c] * book[(k + u) * kGroup + c];
#pragma GCC unroll 4
      for (int u = 0; u < 4; u++) {
        const vf score = base[parent] + norm[k + u] - abs_of(dot[u]);
        const vi code = (((vi)dot[u] >> 31) & 128) | ((parent << 8) | (k + u));
        const vi better = score < best;
        best = better ? score : best;
        index = better ? code : index;
      }
    }
  }
  *key = index;
}

void select_any(int beam, const Workspace& ws, int m, int parents, const vf (*residual)[kGroup],
                const vf* base, vi* keys) {
  switch (beam) {
    case 1: return select<1>(ws, m, parents, residual, base, keys);
    case 2: return select<2>(ws, m, parents, residual, base, keys);
    case 4: return select<4>(ws, m, parents, residual, base, keys);
    case 8: return select<8>(ws, m, parents, residual, base, keys);
    case 16: return select<16>(ws, m, parents, residual, base, keys);
    default: return select<32>(ws, m, parents, residual, base, keys);
  }
}

inline const float* entry(const float* book, int code, float* sign) {
  *sign = code & kHalf ? -1.0f : 1.0f;
  return book + (code & (kHalf - 1)) * kGroup;
}

// Beam over the stages for one group of N rows. `target` [levels][8] is whitened.
// Returns the cost and writes the chosen codes to chosen[m][lane].
vf beam_search(const Problem& p, const Schedule& plan, const Workspace& ws,
               const vf (*target)[kGroup], uint8_t (*chosen)[N]) {
  static thread_local Candidates store[2];
  Candidates* now = &store[0];
  Candidates* next = &store[1];
  int parents = 1;
  for (int c = 0; c < kGroup; c++) now->q[0][c] = vf{};
  now->cost[0] = vf{};
  vf residual[kMaxBeam][kGroup], base[kMaxBeam];
  vi keys[kMaxBeam];
  for (int m = 0; m < p.planes; m++) {
    vf blend[kGroup];
    for (int c = 0; c < kGroup; c++) {
      blend[c] = vf{};
      for (int l = 0; l < p.levels; l++)
        if (plan.pull[m][l] != 0) blend[c] += target[l][c] * plan.pull[m][l];
    }
    for (int b = 0; b < parents; b++) {
      vf square = vf{};
      for (int c = 0; c < kGroup; c++) {
        residual[b][c] = blend[c] - now->q[b][c];
        square += residual[b][c] * residual[b][c];
      }
      base[b] = now->cost[b] * (1.0f / plan.total[m]) + square;
    }
    const bool last = m == p.planes - 1;
    const int kept = last ? 1 : std::min(p.beam, parents * kHalf);
    if (last)
      select_last(ws, m, parents, residual, base, keys);
    else
      select_any(p.beam, ws, m, parents, residual, base, keys);
    const float* book = &ws.whitened[size_t(m) * kHalf * kGroup];
    for (int b = 0; b < kept; b++) {
      float q[kGroup][N], cost[N];
      for (int lane = 0; lane < N; lane++) {
        const int parent = (keys[b][lane] & kIndexMask) >> 8, code = keys[b][lane] & 255;
        float sign;
        const float* c = entry(book, code, &sign);
        const float* old = (const float*)&now->q[parent][0] + lane;
        for (int i = 0; i < kGroup; i++) q[i][lane] = old[i * N] + sign * c[i];
        cost[lane] = ((const float*)&now->cost[parent])[lane];
        for (int i = 0; i < m; i++) next->code[b][i][lane] = now->code[parent][i][lane];
        next->code[b][m][lane] = uint8_t(code);
      }
      vf sum = load(cost);
      const int l = plan.at[m];
      vf square = vf{};
      for (int c = 0; c < kGroup; c++) {
        next->q[b][c] = load(q[c]);
        if (l >= 0) {
          const vf d = target[l][c] - next->q[b][c];
          square += d * d;
        }
      }
      if (l >= 0) sum += square * p.lambda[l];
      next->cost[b] = sum;
    }
    parents = kept;
    std::swap(now, next);
  }
  for (int m = 0; m < p.planes; m++) std::memcpy(chosen[m], now->code[0][m], N);
  return now->cost[0];
}

// Cost of given codes against whitened targets.
vf cost_of(const Problem& p, const Schedule& plan, const Workspace& ws, const vf (*target)[kGroup],
           const uint8_t* codes /* [M][kTile] */) {
  float q[kGroup][N] = {{0}};
  vf cost = vf{};
  for (int m = 0; m < p.planes; m++) {
    const float* book = &ws.whitened[size_t(m) * kHalf * kGroup];
    for (int lane = 0; lane < N; lane++) {
      float sign;
      const float* c = entry(book, codes[m * kTile + lane], &sign);
      for (int i = 0; i < kGroup; i++) q[i][lane] += sign * c[i];
    }
    const int l = plan.at[m];
    if (l < 0) continue;
    vf square = vf{};
    for (int c = 0; c < kGroup; c++) {
      const vf d = target[l][c] - load(q[c]);
      square += d * d;
    }
    cost += square * p.lambda[l];
  }
  return cost;
}

}  // namespace
}  // namespace drop
