// One Viterbi pass of a plane over a segment of rows: forward with back pointers, then back.
//
// Path metrics are int16. A cost is s (x - v)^2 less the least of its row, s such that `kLargest` /
// rows of a cycle stands for an error of about twice the plane's own, and no more than that: labels
// so far off are on no good path. Every state is reached from the best within a cycle, so metrics
// differ by less than kLargest; they are lowered once a cycle, and never overflow.
// Rows past the last have no cost. Of equal metrics the older bit 0 wins.
#pragma once

#include <cmath>

#include "plan.h"

namespace drop {
namespace {

constexpr int kLargest = 32000;  // that a cycle adds to the best metric: half of int16's range

// Costs of the labels for a row with target x and weight s: the table [64][N] of a phase.
template <int B>
inline void double_rows(int16_t* table, int rows) {
  for (int i = 0; i < rows; i++)
    store(table + (rows + i) * N, exchange<B>(load<vs>(table + i * N)));
}

inline void make_table(const Phase& phase, float x, float s, float most, int16_t* table) {
  alignas(64) float square[kLabels * N];
  const int halves = phase.computed * 2;
  const float* values = (const float*)phase.values.data();
  vf least = splat(INFINITY);
  for (int h = 0; h < halves; h++) {
    const vf d = load<vf>(values + h * R) - x;
    store(square + h * R, d * d);
    least = min_of(least, d * d);
  }
  const float low = lowest(least);
  for (int h = 0; h < halves; h++) {
    const vf cost = min_of((load<vf>(square + h * R) - low) * s, splat(most));
    store(table + h * R, __builtin_convertvector(__builtin_convertvector(cost + 0.5f, vi), half_vs));
  }
  int rows = phase.computed;
  for (int d = 0; d < phase.doublings; d++, rows *= 2) switch (phase.doubling[d]) {
      case 0: double_rows<0>(table, rows); break;
      case 1: double_rows<1>(table, rows); break;
      case 2: double_rows<2>(table, rows); break;
#if DROP_LANES >= 16
      case 3: double_rows<3>(table, rows); break;
#endif
#if DROP_LANES >= 32
      case 4: double_rows<4>(table, rows); break;
#endif
    }
}

inline vs costs_at(const int16_t* table, uint16_t offset) {
  return load<vs>((const char*)table + offset);
}

// K = 1: every lane bit in turn. K = 2: two at a time, the older first.
template <int K, int S, int Steps>
inline vs lane_steps(vs x, const int16_t* tables, const uint16_t* offset, Word* words) {
  if constexpr (S == Steps) {
    return x;
  } else {
    vs y = exchange<K * S>(x);
    words[K * S] = below(y, x);
    x = min_of(x, y);
    if constexpr (K == 2) {
      y = exchange<K * S + 1>(x);
      words[K * S + 1] = below(y, x);
      x = min_of(x, y);
    }
    x += costs_at(tables + S * kLabels * N, offset[S]);
    return lane_steps<K, S + 1, Steps>(x, tables, offset, words);
  }
}

// `drop` is what all metrics are lowered by first.
template <int K>
void lane_pass(const Plan& plan, const Pass& pass, const int16_t* tables, int16_t drop,
               int16_t* metrics, Word* words) {
  constexpr int kSteps = kLaneBits / K;
  const uint16_t* offset = pass.offset.data();
  for (int v = 0; v < plan.vectors; v++, offset += kSteps, words += kSteps * K) {
    const vs x = load<vs>(metrics + v * N) - splat(drop);
    store(metrics + v * N, lane_steps<K, 0, kSteps>(x, tables, offset, words));
  }
}

// The older bit, a lane's, first, as everywhere: of equal metrics the same one then wins.
void mixed_pass(const Plan& plan, const Pass& pass, const int16_t* tables, int16_t* metrics,
                Word* words) {
  const uint16_t* offset = pass.offset.data();
  for (int v = 0; v < plan.vectors; v += 2, offset += 2, words += 3) {
    vs best[2];
    for (int i = 0; i < 2; i++) {
      const vs x = load<vs>(metrics + (v + i) * N), y = exchange<kLaneBits - 1>(x);
      words[i] = below(y, x);
      best[i] = min_of(x, y);
    }
    words[2] = below(best[1], best[0]);
    const vs least = min_of(best[0], best[1]);
    store(metrics + v * N, least + costs_at(tables, offset[0]));
    store(metrics + (v + 1) * N, least + costs_at(tables, offset[1]));
  }
}

template <int K, int Width>
void vector_pass(const Plan& plan, const Pass& pass, const int16_t* tables, int16_t* metrics,
                 Word* words) {
  constexpr int kCount = 1 << Width, kSteps = Width / K;
  const uint16_t* offset = pass.offset.data();
  const int64_t stride = int64_t(N) << pass.shift, groups = plan.groups(pass);
  for (int64_t g = 0; g < groups; g++) {
    int16_t* at = metrics + int64_t(Plan::vector_of(pass, g, 0)) * N;
    vs x[kCount];
#pragma GCC unroll 16
    for (int i = 0; i < kCount; i++) x[i] = load<vs>(at + i * stride);
#pragma GCC unroll 4
    for (int s = 0; s < kSteps; s++) {
      const int16_t* table = tables + s * kLabels * N;
      const int a = 1 << K * s, b = 2 * a;
#pragma GCC unroll 16
      for (int i = 0; i < kCount; i++) {
        if (i & a || (K == 2 && i & b)) continue;
        *words++ = below(x[i + a], x[i]);
        vs best = min_of(x[i], x[i + a]);
        if constexpr (K == 2) {
          *words++ = below(x[i + a + b], x[i + b]);
          const vs other = min_of(x[i + b], x[i + a + b]);
          *words++ = below(other, best);
          best = min_of(best, other);
          x[i + b] = best + costs_at(table, offset[i + b]);
          x[i + a + b] = best + costs_at(table, offset[i + a + b]);
        }
        x[i] = best + costs_at(table, offset[i]);
        x[i + a] = best + costs_at(table, offset[i + a]);
      }
      offset += kCount;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kCount; i++) store(at + i * stride, x[i]);
  }
}

template <int K>
void run_pass(const Plan& plan, const Pass& pass, const int16_t* tables, int16_t drop,
              int16_t* metrics, Word* words) {
  words += pass.base;
  if (pass.kind == Kind::lanes) return lane_pass<K>(plan, pass, tables, drop, metrics, words);
  if (pass.kind == Kind::mixed) return mixed_pass(plan, pass, tables, metrics, words);
  if (pass.width == 2) return vector_pass<K, 2>(plan, pass, tables, metrics, words);
#if DROP_LANES == 32
  if (pass.width == 4) return vector_pass<K, 4>(plan, pass, tables, metrics, words);
#endif
  if constexpr (K == 1) {
    if (pass.width == 1) return vector_pass<1, 1>(plan, pass, tables, metrics, words);
    return vector_pass<1, 3>(plan, pass, tables, metrics, words);
  }
}

inline int16_t least_of(const Plan& plan, const int16_t* metrics) {
  vs some[8];  // eight chains: a vector's minimum waits for nothing but its load
  for (int i = 0; i < 8; i++) some[i] = load<vs>(metrics + i % plan.vectors * N);
  for (int v = 8; v < plan.vectors; v += 8)
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) some[i] = min_of(some[i], load<vs>(metrics + (v + i) * N));
  vs least = some[0];
  for (int i = 1; i < 8; i++) least = min_of(least, some[i]);
  int16_t low = least[0];
  for (int i = 1; i < N; i++) low = std::min(low, int16_t(least[i]));
  return low;
}

// Metrics before the first row: of every state alike, or with one state that it must be.
inline void start_metrics(const Plan& plan, int state, int16_t* metrics) {
  const int16_t lowest = -32768;
  std::fill(metrics, metrics + int64_t(plan.vectors) * N, state < 0 ? lowest : int16_t(0));
  if (state >= 0) metrics[state] = lowest;
}

// One cycle of rows: x and s are targets and weights of its `plan.cycle` rows.
void forward(const Plan& plan, const float* x, const float* s, int16_t* tables, int16_t* metrics,
             Word* words) {
  const int16_t drop = int16_t(least_of(plan, metrics) + 32768);
  for (const Pass& pass : plan.passes) {
    for (int i = 0; i < pass.steps; i++) {
      const int step = pass.first + i;
      make_table(plan.phase[step], x[step], s[step], float(kLargest / plan.cycle),
                 tables + i * kLabels * N);
    }
    if (plan.k == 1)
      run_pass<1>(plan, pass, tables, drop, metrics, words);
    else
      run_pass<2>(plan, pass, tables, drop, metrics, words);
  }
}

// The state before a step, from the state after it and the back pointers of its cycle.
inline int before(const Plan& plan, const Pass& pass, const Word* words, int step, int state) {
  const int k = plan.k, s = step - pass.first;
  const int cleared = state & ~(((1 << k) - 1) << k * step);
  const int lane = cleared & (N - 1), v = cleared >> kLaneBits;
  words += pass.base;
  int old, newer = 0;
  if (pass.kind == Kind::lanes) {
    words += (int64_t(v) * pass.steps + s) * k;
    if (k == 2) newer = bit_of(words[1], lane);
    old = bit_of(words[0], lane | newer << (k * step + 1));
  } else {  // for a mixed pass: one group for two vectors
    const int i = v >> pass.shift & ((1 << pass.width) - 1);
    const int64_t low = v & ((1 << pass.shift) - 1);
    const int64_t group = int64_t(v) >> (pass.shift + pass.width) << pass.shift | low;
    const int index = (i & ((1 << k * s) - 1)) | i >> (k * s + k) << k * s;
    words += group * pass.words + int64_t(s) * (pass.words / pass.steps) + index * (k == 1 ? 1 : 3);
    if (k == 2) newer = bit_of(words[2], lane);
    old = bit_of(words[newer], lane);
  }
  return cleared | (old | newer << 1) << k * step;
}

// Number of a state with the least metric.
inline int best_state(const Plan& plan, const int16_t* metrics) {
  const int16_t* last = metrics + int64_t(plan.vectors) * N;
  return int(std::min_element(metrics, last) - metrics);
}

}  // namespace
}  // namespace drop
