// Search of nested additive codes, rows in vector lanes. Included by one small file for each
// instruction set, which sets DROP_LANES (rows in a vector) and is compiled with its own flags.
//
// Steps, for a tile of rows that stays in cache (all arithmetic in units of the row scale):
//   1. Error feedback (LDLQ with one error state a level): groups from last to first. The whitened
//      target of level P is t_P = w_j R_j + sum_{i > j} e_i^(P) coupling[j][i], with H = L L^T the
//      Cholesky factor, R_j its diagonal block and the coupling its column block.
//   2. Block descent: groups from first to last, everything else fixed, t_P = w_j R_j +
//      sum_{i not in j} e_i^(P) H_ij R_j^{-T} with H_jj = R_j R_j^T. A row's group takes the new
//      codes only if its cost decreases, so J never increases.
// Both choose the codes of one group by the same beam (beam.h).
//
// Layout: E [levels][d_in][rows of the tile], codes [G][M][rows of the tile].
// Limits: sign-symmetric codebooks of 2 x 128 entries of 8, M <= 8, B <= 32.
#pragma once

#include "beam.h"

namespace drop {
namespace {

// target[c][level] += sum_i error[level][i] * coupling[i][c] for L levels at once; the
// accumulators of three levels are the most that stay in 32 registers.
template <int L>
void feed(const Problem& p, const float* coupling, const float* error, int64_t first, int64_t last,
          vf (*target)[kGroup]) {
  vf acc[L][kGroup];
  for (int l = 0; l < L; l++)
    for (int c = 0; c < kGroup; c++) acc[l][c] = target[l][c];
  const size_t plane = size_t(p.d_in) * kTile;
  for (int64_t i = first; i < last; i++) {
    const float* a = coupling + i * kGroup;
    for (int l = 0; l < L; l++) {
      const vf e = load(error + l * plane + i * kTile);
#pragma GCC unroll 8
      for (int c = 0; c < kGroup; c++) acc[l][c] += e * a[c];
    }
  }
  for (int l = 0; l < L; l++)
    for (int c = 0; c < kGroup; c++) target[l][c] = acc[l][c];
}

// error[level][group's inputs] = w - q_P for the codes of one group.
void set_error(const Problem& p, const Schedule& plan, Workspace& ws, int64_t group, int row0) {
  const uint8_t* codes = &ws.codes[size_t(group) * p.planes * kTile + row0];
  const size_t plane = size_t(p.d_in) * kTile;
  float q[kGroup][N] = {{0}};
  for (int m = 0; m < p.planes; m++) {
    const float* book = p.codebooks + size_t(m) * kHalf * kGroup;
    for (int lane = 0; lane < N; lane++) {
      float sign;
      const float* c = entry(book, codes[m * kTile + lane], &sign);
      for (int i = 0; i < kGroup; i++) q[i][lane] += sign * c[i];
    }
    const int l = plan.at[m];
    if (l < 0) continue;
    for (int c = 0; c < kGroup; c++) {
      const size_t at = size_t(group * kGroup + c) * kTile + row0;
      store(&ws.error[l * plane + at], load(&ws.w[at]) - load(q[c]));
    }
  }
}

void visit(const Problem& p, const Schedule& plan, Workspace& ws, const Metric& metric,
           int64_t group, bool descent, int64_t* changed) {
  const float* factor = metric.factor + size_t(group) * kGroup * kGroup;
  const float* coupling = metric.coupling + size_t(group) * p.d_in * kGroup;
  const size_t plane = size_t(p.d_in) * kTile;
  whiten(p, factor, ws);
  for (int v = 0; v < kVectors; v++) {
    const int row0 = v * N;
    vf own[kGroup], target[kMaxCodebooks][kGroup];
    for (int c = 0; c < kGroup; c++) {
      own[c] = vf{};
      for (int a = 0; a < kGroup; a++)
        own[c] += load(&ws.w[size_t(group * kGroup + a) * kTile + row0]) * factor[a * kGroup + c];
      for (int l = 0; l < p.levels; l++) target[l][c] = own[c];
    }
    const int64_t first = descent ? 0 : (group + 1) * kGroup;
    for (int l = 0; l < p.levels;) {
      const float* error = &ws.error[l * plane + row0];
      switch (std::min(p.levels - l, 3)) {
        case 1:
          feed<1>(p, coupling, error, first, p.d_in, target + l);
          l += 1;
          break;
        case 2:
          feed<2>(p, coupling, error, first, p.d_in, target + l);
          l += 2;
          break;
        default:
          feed<3>(p, coupling, error, first, p.d_in, target + l);
          l += 3;
          break;
      }
    }
    alignas(64) uint8_t chosen[kMaxCodebooks][N];
    const vf cost = beam_search(p, plan, ws, target, chosen);
    uint8_t* codes = &ws.codes[size_t(group) * p.planes * kTile + row0];
    if (!descent) {
      for (int m = 0; m < p.planes; m++) std::memcpy(codes + m * kTile, chosen[m], N);
      set_error(p, plan, ws, group, row0);
      continue;
    }
    // The margin keeps float rounding from trading equal codes back and forth.
    const vi better = cost < cost_of(p, plan, ws, target, codes) * (1.0f - 1e-6f);
    bool any = false;
    for (int lane = 0; lane < N; lane++) {
      if (!better[lane] || row0 + lane >= ws.rows) continue;
      any = true;
      (*changed)++;
      for (int m = 0; m < p.planes; m++) codes[m * kTile + lane] = chosen[m][lane];
    }
    if (any) set_error(p, plan, ws, group, row0);
  }
}

void search_tile(const Problem& p, const Schedule& plan, Workspace& ws, int64_t first, int64_t rows,
                 int64_t* changed) {
  const int64_t groups = p.d_in / kGroup;
  ws.rows = rows;
  std::fill(ws.w.begin(), ws.w.end(), 0.0f);  // rows past the end: zero weights
  for (int64_t r = 0; r < rows; r++)
    for (int64_t i = 0; i < p.d_in; i++) ws.w[i * kTile + r] = p.w[(first + r) * p.d_in + i];
  std::fill(ws.codes.begin(), ws.codes.end(), 0);
  if (p.start) {
    for (int64_t j = groups - 1; j >= 0; j--)
      visit(p, plan, ws, p.feedback, j, /*descent=*/false, nullptr);
  } else {
    for (int m = 0; m < p.planes; m++)
      for (int64_t r = 0; r < rows; r++)
        for (int64_t j = 0; j < groups; j++)
          ws.codes[(j * p.planes + m) * kTile + r] =
              p.codes[(m * p.d_out + first + r) * groups + j];
    for (int64_t j = 0; j < groups; j++)
      for (int v = 0; v < kVectors; v++) set_error(p, plan, ws, j, v * N);
  }
  for (int s = 0; s < p.sweeps; s++) {
    int64_t count = 0;
    for (int64_t j = 0; j < groups; j++) visit(p, plan, ws, p.descent, j, /*descent=*/true, &count);
    changed[s] += count;
  }
  for (int m = 0; m < p.planes; m++)
    for (int64_t r = 0; r < rows; r++)
      for (int64_t j = 0; j < groups; j++)
        p.codes[(m * p.d_out + first + r) * groups + j] = ws.codes[(j * p.planes + m) * kTile + r];
}

void search_rows(const Problem& p, int64_t first, int64_t last, int64_t* changed) {
  Workspace ws(p);
  const Schedule plan(p);
  for (int64_t r = first; r < last; r += kTile)
    search_tile(p, plan, ws, r, std::min<int64_t>(kTile, last - r), changed);
}

}  // namespace
}  // namespace drop
