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
// Both choose the codes of one group by the same beam over the stages m = 1..M:
//   cost so far   J_m(q) = J_{m-1} + lambda_m ||t_m - q||^2          (supervised stages only)
//   kept by       J_{m-1} + a ||t~ - q||^2, the lookahead: levels P >= m pull on q with weight
//                 lambda_P * lookahead^(P - m); a sum of quadratics in q is one quadratic with the
//                 blended target t~. At an unsupervised stage this is what tells candidates apart.
//   Of the two signs of an entry only the better is considered.
// Selection keeps B keys a lane in registers: the upper bits of a key are the (non-negative) score,
// the lower 13 its candidate and code, so that one min and one max insert it. The price is that
// scores closer than 2^-10 relative are ordered by index. The last stage is exact.
//
// Layout: E [levels][d_in][rows of the tile], codes [G][M][rows of the tile].
// Limits: sign-symmetric codebooks of 2 x 128 entries of 8, M <= 8, B <= 32.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "search.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace drop {
namespace {

constexpr int N = DROP_LANES;
constexpr int kVectors = 4;  // vectors of rows in a tile: amortises whitening the codebooks
constexpr int kTile = kVectors * N;
constexpr int32_t kIndexMask = (1 << 13) - 1;  // candidate (5 bits), sign and entry (8 bits)

typedef float vf __attribute__((vector_size(N * 4)));
typedef int32_t vi __attribute__((vector_size(N * 4)));

inline vf splat(float x) { return x - vf{}; }
inline vi splat(int32_t x) { return x - vi{}; }
inline vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
inline vf min_of(vf a, vf b) { return a < b ? a : b; }
inline vi min_of(vi a, vi b) { return a < b ? a : b; }
inline vi max_of(vi a, vi b) { return a < b ? b : a; }
inline vf abs_of(vf a) { return (vf)((vi)a & splat(int32_t(0x7fffffff))); }

// Whether any lane of a is below its lane of b.
inline bool any_below(vi a, vi b) {
#if defined(__AVX512F__) && DROP_LANES == 16
  return _mm512_cmplt_epi32_mask((__m512i)a, (__m512i)b) != 0;
#elif defined(__AVX2__) && DROP_LANES == 8
  return _mm256_movemask_ps((__m256)((__m256i)(a < b))) != 0;
#else
  vi m = a < b;
  int32_t any = 0;
  for (int l = 0; l < N; l++) any |= m[l];
  return any != 0;
#endif
}

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
  int at[kMaxPlanes];                  // level supervised after stage m, or -1
  float total[kMaxPlanes];             // a, weight of the blended quadratic
  float pull[kMaxPlanes][kMaxPlanes];  // shares of the levels in the blended target
};

struct Candidates {
  alignas(64) vf q[kMaxBeam][kGroup];  // whitened partial sums
  vf cost[kMaxBeam];                   // J so far
  alignas(64) uint8_t code[kMaxBeam][kMaxPlanes][N];
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
    vf own[kGroup], target[kMaxPlanes][kGroup];
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
    alignas(64) uint8_t chosen[kMaxPlanes][N];
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
