// Searches of trellis codes with and without feedback between rows, for what sanitizers can tell: odd
// windows, whose planes have cycles of different lengths, and rows that planes pad differently. What
// they find is compared in tests/coding/test_trellis_search.py.
#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "checks.h"
#include "naive.h"
#include "trellis/c_api.h"

namespace {

struct SearchProblem {
  SearchProblem(int window, int64_t d_out, int64_t block, Random& random)
      : w(3 * d_out), weights(d_out, 1.0f), lower(9, 0), feedback(d_out * d_out) {
    const int bits[] = {2, 1, 1};
    call.d_out = d_out;
    call.d_in = 3;
    call.planes = call.levels = 3;
    for (int m = 0; m < 3; ++m) {
      for (float& value : call.plane[m].values) value = random.gauss() / float(1 << m);
      for (uint8_t& tap : call.plane[m].taps) tap = uint8_t(random.next() % 64);
      call.plane[m].bits = bits[m];
      call.plane[m].window = window;
      call.prefix[m] = m + 1;
      call.lambda[m] = 1;
      codes[m].resize(3 * std::max<int64_t>(3, (bits[m] * d_out + 7) / 8));
      call.codes[m] = codes[m].data();
    }
    for (float& value : w) value = random.gauss();
    for (int j = 0; j < 3; ++j) lower[4 * j] = 1;
    lower[3] = 0.3f;
    for (int64_t i = 0; i < d_out; ++i)
      for (int64_t r = 0; r < d_out; ++r)
        feedback[i * d_out + r] = i / block < r / block ? 0.02f * random.gauss() : 0;
    call.w = w.data();
    call.row_weights = weights.data();
    call.lower = lower.data();
    call.row_block = block;
  }

  int run(const char* backend, bool blocks) {
    call.row_feedback = blocks ? feedback.data() : nullptr;
    return drop_trellis_search(backend, &call, 2);
  }

  DropTrellis call{};
  std::vector<float> w, weights, lower, feedback;
  std::vector<uint8_t> codes[3];
};

}  // namespace

void check_search() {
  Random random;
  for (int i = 0; const char* backend = drop_trellis_backend(i); ++i)
    for (const auto& [window, block] : {std::pair{8, 32}, {9, 45}})
      for (int64_t d_out : {5, 379, 381}) {
        SearchProblem problem(window, d_out, block, random);
        const std::string where = std::string(backend) + " search, window " + std::to_string(window) +
                                  ", rows " + std::to_string(d_out);
        check(problem.run(backend, false) == 0, where);
        check(problem.run(backend, true) == (d_out < 300 ? 2 : 0), where + ", blocks");
        problem.call.row_block = block + 1;
        check(problem.run(backend, true) == 2, where + ": blocks that are no cycles");
      }
}
