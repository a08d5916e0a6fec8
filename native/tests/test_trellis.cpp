// Trellis planes of one kernel against naive loops; called by test_kernels.cpp.
#include <cstring>

#include "checks.h"
#include "naive_trellis.h"

namespace {

void check_products(int kernel, const std::string& where, const TrellisProblem& problem) {
  const TrellisCase& c = problem.shape;
  std::vector<float> expected = problem.products, all, other;
  expected.insert(expected.end(), problem.biased.begin(), problem.biased.end());
  check(problem.run(kernel, 0, c.n, 1, &all) == 0, where + ": refused");
  check(all == expected, where + ": products");
  problem.run(kernel, 0, c.n, 3, &other);
  check(other == all, where + ": threads change the result");
  for (int64_t i = 0; i < c.n; ++i) {
    problem.run(kernel, i, 1, 2, &other);
    check(std::memcmp(other.data(), all.data() + i * c.d_out,
                      static_cast<size_t>(c.d_out) * sizeof(float)) == 0,
          where + ": other rows change the result");
  }
}

void check_decode(int kernel, const std::string& where, const TrellisProblem& problem) {
  const TrellisCase& c = problem.shape;
  const auto books = problem.book_pointers();
  const auto planes = problem.plane_pointers();
  const std::vector<float>& expected = problem.decoded;
  const int64_t prefix = static_cast<int64_t>(planes.size());
  for (int64_t first : {int64_t{0}, c.d_out / 3, c.d_out - 1}) {
    for (int threads = 1; threads <= 3; ++threads) {
      const int64_t count = (c.d_out - first) * c.d_in;
      std::vector<float> out(static_cast<size_t>(count));
      std::vector<uint16_t> half(out.size());
      drop_trellis_decode(kernel, planes.data(), c.d_out, c.d_in, prefix, books.data(),
                          problem.scales.data(), 0, first, c.d_out, out.data(), 0, threads);
      check(std::memcmp(out.data(), expected.data() + first * c.d_in, out.size() * 4) == 0,
            where + ": decode");
      drop_trellis_decode(kernel, planes.data(), c.d_out, c.d_in, prefix, books.data(),
                          problem.scales.data(), 0, first, c.d_out, half.data(), 2, threads);
      for (size_t i = 0; i < out.size(); ++i) {
        uint32_t bits;
        std::memcpy(&bits, &out[i], 4);
        check(half[i] == (bits + 0x7fff + (bits >> 16 & 1)) >> 16, where + ": decode to bfloat16");
      }
    }
  }
}

// The largest sums that 32 bits must hold, and the refusal beyond them.
void check_limit(int kernel, const std::string& name, TrellisProblem& problem) {
  std::vector<float> out;
  for (float x : {32639.0f, 32384.0f, -32512.0f}) {  // low bytes 127, -128, 0
    for (float& value : problem.x) value = x;
    problem.x[0] = 32639;
    problem.multiply();
    problem.run(kernel, 0, 1, 2, &out);
    out.resize(problem.products.size());
    check(out == problem.products, name + ": largest sums");
  }
  problem.shape.d_in += 1;
  check(problem.run(kernel, 0, 1, 1, &out) == -1, name + ": too many inputs are not refused");
  problem.shape.d_in -= 1;
}

void check_odd_inputs(int kernel, const std::string& name, Random& random) {
  TrellisProblem problem({12, 70, {2, 1}, 12, 1}, random);
  std::vector<float> out;
  for (float& value : problem.x) value = 0;
  problem.run(kernel, 0, 1, 1, &out);
  for (size_t r = 0; r < 12; ++r) check(out[r] == 0, name + ": zero input");
  problem.x[5] = 1e-30f;
  problem.run(kernel, 0, 1, 1, &out);
  check(std::fabs(out[0]) < 1e-25f, name + ": tiny input");
  problem.x[5] = std::nanf("");
  problem.run(kernel, 0, 1, 1, &out);
  check(std::isnan(out[0]), name + ": NaN is lost");
  problem.x[5] = INFINITY;
  problem.run(kernel, 0, 1, 1, &out);
  check(std::isnan(out[0]), name + ": infinity is lost");
}

std::vector<TrellisProblem> problems_of_all_shapes() {
  Random random;
  std::vector<TrellisCase> cases = {{1, 1, {2, 1, 1}, 12, 1},     {9, 65, {1, 2}, 14, 2},
                                    {100, 200, {2, 1, 1}, 16, 3}, {30, 2112, {2, 1}, 12, 5},
                                    {257, 130, {1, 1, 1}, 13, 1}, {12, 4100, {2}, 17, 1}};
  for (int window = 8; window <= 17; ++window) {
    cases.push_back({70, 63, {1}, window, 1});
    cases.push_back({70, 64, {2}, window, 1});
    cases.push_back({21, 24, {2, 1}, window, 2});
  }
  for (int64_t n = 1; n <= 17; ++n) cases.push_back({19, 72, {2, 1, 1}, 12, n});
  std::vector<TrellisProblem> problems;
  for (const TrellisCase& c : cases) problems.emplace_back(c, random);
  return problems;
}

// Values of 63 everywhere, as many inputs as a product may have.
TrellisProblem largest_problem() {
  Random random;
  TrellisProblem problem({5, 1 << 17, {1}, 8, 1}, random);
  for (int8_t& value : problem.values[0]) value = 63;
  for (int8_t& value : problem.matrices[0]) value = 63;
  problem.prepared.clear();
  problem.prepare(1);
  return problem;
}

}  // namespace

void check_trellis(int kernel, const std::string& name) {
  static const std::vector<TrellisProblem> problems = problems_of_all_shapes();
  static TrellisProblem largest = largest_problem();
  for (const TrellisProblem& problem : problems) {
    const TrellisCase& c = problem.shape;
    const std::string where = name + " trellis d_out " + std::to_string(c.d_out) + " d_in " +
                              std::to_string(c.d_in) + " window " + std::to_string(c.window) +
                              " n " + std::to_string(c.n) + " P " + std::to_string(c.bits.size());
    check_products(kernel, where, problem);
    check_decode(kernel, where, problem);
  }
  check_limit(kernel, name, largest);
  Random random;
  check_odd_inputs(kernel, name, random);
}

void check_trellis_refusals() {
  std::vector<uint8_t> taps(18, 1);
  std::vector<int8_t> values(64, 1);
  Aligned<uint8_t> out(drop_trellis_bytes());
  const auto prepare = [&](int bits, int window) {
    return drop_prepare_trellis(bits, window, taps.data(), values.data(), 1, out.data());
  };
  check(prepare(1, 17) == 0 && prepare(2, 8) == 0, "a trellis within bounds is refused");
  check(prepare(0, 12) && prepare(3, 12) && prepare(1, 7) && prepare(1, 18), "trellis bounds");
  taps[3] = 64;
  check(prepare(1, 12) == -1, "a tap of seven bits");
  taps[3] = 1;
  values[9] = -64;
  check(prepare(1, 12) == -1, "a value of -64");
}
