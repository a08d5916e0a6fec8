// A plane's ring of one input, cut into segments that are searched at the same time.
//
// Every segment's forward pass starts eight cycles of rows earlier, from metrics that are all alike:
// by its first row the paths to all states have forgotten where they came from. (Before the first
// row of the ring come its last ones: rows are counted on below 0, and a state's bits keep their
// places.) Its path ends, first, in its best state. Then the last segment is entered in the state
// that the first one comes from, and from there on each in the state that the next one demands, and
// followed back until it meets the path that it had. So the path is one ring, what is lost is
// little (white noise, 1,536 rows: less than .05 %; with segments of 256 rows and four cycles .8 %
// to 2.5 %), and nothing depends on the number of threads. Only if the first segment meets its
// own path nowhere, which happens in rings of a few bytes, it is searched again from the state that
// closes the ring.
#pragma once

#include "viterbi.h"

namespace drop {
namespace {

constexpr int64_t kSegment = 768;  // rows, about
constexpr int kWarmUp = 8;         // cycles
constexpr float kHeaviest = 16;    // times the mean weight: that of a row in path metrics at most

struct Segment {
  int64_t warm, first, last;  // rows: where it starts, and those it decides; whole cycles
  float heaviest, unit;       // the most that a row weighs, and from weight to path metric
};

// The search of one plane in one input after the other.
class PlaneSearch {
 public:
  PlaneSearch(const DropTrellisPlane& plane, const float* row_weights, int64_t rows, int64_t bytes,
              int64_t padded)
      : plan(plane), ring(8 * bytes / plane.bits), weights_(padded, 0), states(padded), values(padded) {
    std::copy(row_weights, row_weights + rows, weights_.begin());
    const int64_t count = std::max<int64_t>(1, (ring + kSegment / 2) / kSegment);
    const int64_t cycles = (ring + plan.cycle - 1) / plan.cycle;
    for (int64_t i = 0; i < count; i++) {
      Segment s;
      s.first = cycles * i / count * plan.cycle;
      s.last = cycles * (i + 1) / count * plan.cycle;
      s.warm = s.first - kWarmUp * plan.cycle;
      set_weights(s, rows);
      segments.push_back(s);
      words_.emplace_back((s.last - s.first + plan.cycle) / plan.cycle * plan.words);
    }
  }

  int64_t table_size() const { return int64_t(kLabels) * N * std::max(kLaneBits, 4); }

  // The path of a segment for targets x of the rows of the ring: its states and values.
  void search(size_t index, const float* x, int16_t* tables, int16_t* metrics) {
    start_metrics(plan, -1, metrics);
    run(index, segments[index].warm, x, tables, metrics);
    trace(index, segments[index].last - 1, best_state(plan, metrics), false);
  }

  // Makes one ring of the paths of the segments; x, tables and metrics as for `search`.
  void join(const float* x, int16_t* tables, int16_t* metrics) {
    const int start = previous(0, 0, states[0]);
    int64_t last = ring - 1;
    int state = turned(start);
    for (size_t i = segments.size(); i-- > 0;) {
      trace(i, last, state, true);
      last = segments[i].first - 1;
      state = previous(i, last + 1, states[last + 1]);
    }
    if (state == start) return;
    last = segments.size() > 1 ? segments[0].last - 1 : ring - 1;
    const int end = states[last];
    start_metrics(plan, start, metrics);
    run(0, 0, x, tables, metrics);
    trace(0, last, end, false);
  }

  const Plan plan;
  const int64_t ring;  // rows, those without a weight included
  std::vector<Segment> segments;

 private:
  void set_weights(Segment& s, int64_t rows) {
    double sum = 0;
    float most = 0;
    const int64_t end = std::min(s.last, rows);
    for (int64_t r = s.first; r < end; r++) {
      sum += weights_[r];
      most = std::max(most, weights_[r]);
    }
    s.heaviest = std::min(most, kHeaviest * float(sum / double(std::max<int64_t>(1, end - s.first))));
    // An error of the plane's own size is about 1/20 (k = 1) or 1/100 of its largest value squared.
    const float whole = plan.reach * plan.reach * (plan.k == 1 ? 2.0f : 1.0f) * s.heaviest;
    s.unit = whole > 0 ? float(kLargest / plan.cycle) / whole : 0;
  }

  // Forward over whole cycles from row `from`, which may be before the ring's first.
  void run(size_t index, int64_t from, const float* x, int16_t* tables, int16_t* metrics) {
    const Segment& s = segments[index];
    float weight[32], target[32];
    for (int64_t r = from; r < s.last; r += plan.cycle) {
      for (int i = 0; i < plan.cycle; i++) {
        const int64_t row = r + i < 0 ? ring - 1 - (-1 - r - i) % ring : r + i;
        target[i] = x[row];
        weight[i] = row < ring ? std::min(weights_[row], s.heaviest) * s.unit : 0;
      }
      forward(plan, target, weight, tables, metrics, words_of(index, r));
    }
  }

  // Back pointers of the cycle of row r; those of the warm-up are not kept.
  Word* words_of(size_t index, int64_t r) {
    const int64_t c = r < segments[index].first ? 0 : (r - segments[index].first) / plan.cycle + 1;
    return words_[index].data() + c * plan.words;
  }

  int previous(size_t index, int64_t r, int state) {
    const int step = int(r % plan.cycle);
    const Pass* pass = &plan.passes[0];
    while (step >= pass->first + pass->steps) pass++;
    return before(plan, *pass, words_of(index, r), step, state);
  }

  // The state after the last row of the ring that is, before the first one, `state`.
  int turned(int state) const {
    const int by = int(plan.k * ring % plan.bits);
    const uint32_t bits = uint32_t(state);
    return int((bits << by | bits >> (plan.bits - by)) & ((1u << plan.bits) - 1));
  }

  // Follows a segment's path back from `state` at row r; with `meet` only until it is the path that
  // is there.
  void trace(size_t index, int64_t r, int state, bool meet) {
    for (;; r--) {
      if (meet && states[r] == state) return;
      states[r] = state;
      values[r] = plan.values[plan.label(int(r % plan.cycle), state)];
      if (r == segments[index].first) return;
      state = previous(index, r, state);
    }
  }

  std::vector<float> weights_;  // of rows
  std::vector<std::vector<Word>> words_;

 public:
  std::vector<int32_t> states;  // after each row of the ring
  std::vector<float> values;    // of each row
};

}  // namespace
}  // namespace drop
