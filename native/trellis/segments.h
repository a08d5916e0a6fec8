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
//
// Blocks of rows (`follow`) take turns instead: each starts in the state in which the one before
// ended, and is decided with a look at the rows behind it, whose targets may still change. The planes
// of a block follow each other, so that a plane looks kAhead cycles less far than the one before it:
// what it sees, that one has decided. The first block starts before row 0 in the same way, and the
// last one ends in the state that closes the ring.
#pragma once

#include "viterbi.h"

namespace drop {
namespace {

constexpr int64_t kSegment = 768;  // rows, about
constexpr int kWarmUp = 8;         // cycles
constexpr float kHeaviest = 16;    // times the mean weight: that of a row in path metrics at most

struct Segment {
  int64_t warm, first, last;  // rows: where it starts, and those it decides; whole cycles
  int64_t kept, seen;         // rows whose back pointers are kept: a block's are more
  float heaviest, unit;       // the most that a row weighs, and from weight to path metric
};

// The search of one plane in one input after the other.
class PlaneSearch {
 public:
  // Plane m of a problem, in segments or in blocks of rows; its ring has `bytes`.
  PlaneSearch(const Problem& p, int m, int64_t bytes, int64_t padded)
      : plan(p.plane[m]), ring(8 * bytes / plan.k), weights_(padded, 0), states(padded), values(padded) {
    const int64_t rows = p.d_out, block = p.row_feedback ? p.row_block : 0;
    const int64_t before = beyond_of(p, 0), beyond = beyond_of(p, m);
    std::copy(p.row_weights, p.row_weights + rows, weights_.begin());
    const int64_t count = block ? rows / block : std::max<int64_t>(1, (ring + kSegment / 2) / kSegment);
    const int64_t cycles = (ring + plan.cycle - 1) / plan.cycle, end = cycles * plan.cycle;
    for (int64_t i = 0; i < count; i++) {
      Segment s;
      s.first = block ? i * block : cycles * i / count * plan.cycle;
      s.last = i + 1 == count ? end : block ? s.first + block : cycles * (i + 1) / count * plan.cycle;
      s.warm = s.first - (block ? beyond : kWarmUp * plan.cycle);
      s.kept = block && i == 0 ? s.warm : s.first;
      // Block 0 sees nothing twice: rows before it are the ring's last.
      const int64_t most = i ? end : (ring - before) / plan.cycle * plan.cycle;
      s.seen = block ? std::max(s.last, std::min(s.last + beyond, most)) : s.last;
      set_weights(s, rows);
      segments.push_back(s);
      words_.emplace_back((s.seen - s.kept + plan.cycle) / plan.cycle * plan.words);
    }
  }

  int64_t table_size() const { return int64_t(kLabels) * N * std::max(kLaneBits, 4); }

  // The path of a segment for targets x of the rows of the ring: its states and values.
  void search(size_t index, const float* x, int16_t* tables, int16_t* metrics) {
    start_metrics(plan, -1, metrics);
    run(index, segments[index].warm, x, tables, metrics);
    trace(index, segments[index].last - 1, best_state(plan, metrics), false);
  }

  // The path of a block after that of the one before; x of the rows that it sees.
  void follow(size_t index, const float* x, int16_t* tables, int16_t* metrics) {
    const Segment& s = segments[index];
    start_metrics(plan, index ? states[s.first - 1] : -1, metrics);
    run(index, index ? s.first : s.warm, x, tables, metrics);
    if (index + 1 == segments.size()) return trace(index, ring - 1, end_, false);
    trace(index, s.seen - 1, best_state(plan, metrics), false);
    if (index) return;
    int state = previous(0, 0, states[0]);
    end_ = turned(state);
    for (int64_t r = -1; r >= s.warm; r--) {  // values that later planes see before row 0
      values[ring + r] = plan.values[plan.label(step_of(r), state)];
      if (r > s.warm) state = previous(0, r, state);
    }
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
    for (int64_t r = from; r < s.seen; r += plan.cycle) {
      for (int i = 0; i < plan.cycle; i++) {
        const int64_t row = r + i < 0 ? ring - 1 - (-1 - r - i) % ring : r + i;
        target[i] = x[row];
        weight[i] = row < ring ? std::min(weights_[row], s.heaviest) * s.unit : 0;
      }
      forward(plan, target, weight, tables, metrics, words_of(index, r));
    }
  }

  int step_of(int64_t r) const { return int((r % plan.cycle + plan.cycle) % plan.cycle); }

  // Back pointers of the cycle of row r; those of a segment's warm-up are not kept.
  Word* words_of(size_t index, int64_t r) {
    const int64_t kept = segments[index].kept;
    const int64_t c = r < kept ? 0 : (r - kept) / plan.cycle + 1;
    return words_[index].data() + c * plan.words;
  }

  int previous(size_t index, int64_t r, int state) {
    const int step = step_of(r);
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

  int end_ = 0;                 // the state that closes a ring of blocks
  std::vector<float> weights_;  // of rows
  std::vector<std::vector<Word>> words_;

 public:
  std::vector<int32_t> states;  // after each row of the ring
  std::vector<float> values;    // of each row
};

}  // namespace
}  // namespace drop
