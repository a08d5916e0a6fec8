// How the states of one plane are laid out, and in which order a Viterbi step visits them.
//
// A state is the last L bits of the stream. Bit i of the stream is bit i % bits of the state's
// number (`bits` is L, made even when k = 2): a row replaces the k oldest bits where they are, and
// nothing moves. So a step is, in place, for all values of the bits that stay: the least of the 2^k
// old metrics, then plus the cost of each of the 2^k new states. The low bits of the number are
// lanes, the others vectors. A cycle of bits / k rows brings every bit to its turn; its steps run in
// passes over the metrics, several steps while they are in registers:
//   lanes    the steps that replace lane bits, one vector at a time
//   mixed    k = 2, one lane bit and one vector bit, when the lanes have an odd number of bits
//   vectors  the others, `width` bits at a time, 2^width vectors at a time
//
// The cost of a state is that of its label, and labels are linear: the costs of the N states of a
// vector are row x of a table [64][N], x the label of the vector's first state, and there are only
// 64 such rows. Rows x and x ^ label(lane bit) hold the same costs with lanes exchanged, so that one
// or a few rows of the table are computed and the others are copied by doubling (`Phase`).
#pragma once

#include <algorithm>
#include <vector>

#include "lanes.h"
#include "trellis.h"

namespace drop {
namespace {

enum class Kind { lanes, mixed, vectors };

struct Pass {
  Kind kind;
  int first, steps;  // of the cycle
  int shift, width;  // bits of the vector's number below those that are replaced, and these
  int words;         // back pointers of a group of 2^width vectors
  int64_t base;      // where they begin in those of a cycle
  std::vector<uint16_t> offset;  // [group][step][2^width] bytes into the table of the step
};

// What a step of the cycle needs to make its table of costs.
struct Phase {
  int computed;               // rows that are computed: 64 / 2^(rank of the labels of lane bits)
  int doubling[kLaneBits], doublings;
  std::vector<Line> values;   // [computed][N] float32
  uint8_t row_of[kLabels];    // row of the table for a label
  uint8_t label[3][256];      // label of a state: of its low, middle and high byte, added
};

struct Plan {
  explicit Plan(const DropTrellisPlane& plane)
      : k(plane.bits),
        cycle(int(cycle_of(plane))),
        bits(k * cycle),
        vectors(1 << (bits - kLaneBits)),
        phase(cycle) {
    std::copy(plane.values, plane.values + kLabels, values);
    for (float v : values) reach = std::max(reach, std::abs(v));
    for (int s = 0; s < cycle; s++) set_phase(plane, s);
    const int widest = N == 32 ? 4 : k == 1 ? 3 : 2;
    int s = kLaneBits / k;
    add_pass(Kind::lanes, 0, s, 0);
    if (k == 2 && kLaneBits % 2) add_pass(Kind::mixed, s++, 1, 1);
    while (s < cycle) {
      const int left = (cycle - s) * k, passes = (left + widest - 1) / widest;
      const int width = (left / k + passes - 1) / passes * k;
      add_pass(Kind::vectors, s, width / k, width);
      s += width / k;
    }
  }

  int label(int step, int state) const {
    const Phase& p = phase[step];
    return p.label[0][state & 255] ^ p.label[1][state >> 8 & 255] ^ p.label[2][state >> 16];
  }
  int newest(int step, int state) const { return state >> k * step & ((1 << k) - 1); }
  int64_t groups(const Pass& pass) const { return vectors >> pass.width; }

  int k, cycle, bits;   // bits of a row, rows until each bit is replaced once, bits of a state
  int vectors;          // that the metrics fill
  float values[kLabels], reach = 0;  // and the largest in size
  std::vector<Phase> phase;          // of each step
  std::vector<Pass> passes;
  int64_t words = 0;  // back pointers of a cycle

 private:
  // Label word of a bit of the state's number at a step.
  int tap(const DropTrellisPlane& plane, int step, int bit) const {
    const int age = (k * step + k - 1 - bit + bits) % bits;
    return age < plane.window ? plane.taps[age] % kLabels : 0;
  }

  void set_phase(const DropTrellisPlane& plane, int s) {
    Phase& p = phase[s];
    for (int byte = 0; byte < 3; byte++)
      for (int x = 0; x < 256; x++) {
        p.label[byte][x] = 0;
        for (int b = 0; b < 8 && 8 * byte + b < bits; b++)
          if (x >> b & 1) p.label[byte][x] ^= uint8_t(tap(plane, s, 8 * byte + b));
      }
    // The span of the lane bits' labels, and the least label of each of its cosets.
    std::vector<int> span{0};
    p.doublings = 0;
    for (int b = 0; b < kLaneBits; b++) {
      const int word = tap(plane, s, b);
      if (std::find(span.begin(), span.end(), word) != span.end()) continue;
      p.doubling[p.doublings++] = b;
      for (size_t i = 0, size = span.size(); i < size; i++) span.push_back(span[i] ^ word);
    }
    std::vector<int> order;
    for (int x = 0; x < kLabels; x++)
      if (std::all_of(span.begin(), span.end(), [x](int y) { return (x ^ y) >= x; }))
        order.push_back(x);
    p.computed = int(order.size());
    p.values.resize((p.computed * N * sizeof(float) + sizeof(Line) - 1) / sizeof(Line));
    float* at = (float*)p.values.data();
    for (int x : order)
      for (int lane = 0; lane < N; lane++) *at++ = values[x ^ label(s, lane)];
    for (int d = 0; d < p.doublings; d++)
      for (size_t i = 0, size = order.size(); i < size; i++)
        order.push_back(order[i] ^ tap(plane, s, p.doubling[d]));
    for (int i = 0; i < kLabels; i++) p.row_of[order[i]] = uint8_t(i);
  }

  void add_pass(Kind kind, int first, int steps, int width) {
    Pass pass{kind, first, steps, 0, width, 0, words, {}};
    if (kind == Kind::lanes) pass.words = steps * k;
    if (kind == Kind::mixed) pass.words = 3;
    if (kind == Kind::vectors) {
      pass.shift = k * first - kLaneBits;
      pass.words = steps * (k == 1 ? 1 << (width - 1) : 3 << (width - 2));
    }
    words += pass.words * groups(pass);
    for (int64_t g = 0; g < groups(pass); g++)
      for (int s = 0; s < steps; s++)
        for (int i = 0; i < 1 << width; i++) {
          const int state = vector_of(pass, g, i) << kLaneBits;
          const int row = phase[first + s].row_of[label(first + s, state)];
          pass.offset.push_back(uint16_t(row * sizeof(vs)));
        }
    passes.push_back(std::move(pass));
  }

 public:
  // Number of the i-th vector of a group.
  static int vector_of(const Pass& pass, int64_t group, int i) {
    const int64_t low = group & ((int64_t(1) << pass.shift) - 1);
    return int((group >> pass.shift << (pass.shift + pass.width)) | int64_t(i) << pass.shift | low);
  }
};

}  // namespace
}  // namespace drop
