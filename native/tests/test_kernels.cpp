// Checks every kernel this processor supports against naive loops, through the C interface only.
// Runs anywhere the library builds: natively, under sanitizers, and under an emulator, where it is
// how the NEON kernels are tested. Prints one line a kernel; exits with the number of failures.
#include <cmath>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "checks.h"
#include "naive.h"
#include "naive_trellis.h"

namespace {

double relative_error(const std::vector<float>& a, const std::vector<double>& b) {
  double error = 0, size = 0;
  for (size_t i = 0; i < b.size(); ++i) {
    error += (a[i] - b[i]) * (a[i] - b[i]);
    size += b[i] * b[i];
  }
  return std::sqrt(error / size);
}

void check_products(int kernel, const std::string& name, const Problem& problem,
                    std::vector<std::vector<float>>* exact, size_t index) {
  const Case& c = problem.shape;
  const std::string where = name + " d_out " + std::to_string(c.d_out) + " G " +
                            std::to_string(c.groups) + " P " + std::to_string(c.prefix) + " K " +
                            std::to_string(c.entries);
  const bool eight = name.find("-u8") != std::string::npos;
  const std::vector<float> all = problem.run(kernel, 0, c.n, 1);
  const double error = relative_error(all, problem.y);
  check(error < (eight ? (c.outlier ? 8e-2 : 2e-2) : 1e-3),
        where + ": error " + std::to_string(error));
  check(problem.run(kernel, 0, c.n, 3) == all, where + ": threads change the result");
  for (int64_t i = 0; i < c.n; ++i) {
    const std::vector<float> one = problem.run(kernel, i, 1, 1);
    check(std::memcmp(one.data(), all.data() + i * c.d_out, one.size() * 4) == 0,
          where + ": other rows change the result");
  }
  std::vector<float>& expected = (*exact)[index * 2 + eight];
  if (expected.empty()) expected = all;
  check(all == expected, where + ": differs from another kernel");
}

void check_input_group(int kernel, const std::string& name, Random& random) {
  // d = 24 = 8 * 3: a Hadamard of 8 and an odd factor; two matrices, one with a bias.
  Problem first({70, 3, 2, 128, 2, false}, random), second({5, 3, 2, 128, 2, false}, random);
  second.prepared.swap(first.prepared);
  const int64_t d = 24;
  std::vector<float> signs, odd, rotated(static_cast<size_t>(2 * d));
  for (int64_t i = 0; i < d; ++i) signs.push_back(random.next() & 1024 ? 1.f : -1.f);
  for (int i = 0; i < 9; ++i) odd.push_back(random.gauss());
  for (int64_t i = 0; i < 2; ++i) {  // naive rotation
    for (int64_t a = 0; a < 3; ++a) {
      for (int64_t b = 0; b < 8; ++b) {
        double sum = 0;
        for (int64_t k = 0; k < 3; ++k) {
          for (int64_t l = 0; l < 8; ++l) {
            const double sign = __builtin_popcountll(static_cast<uint64_t>(b & l)) % 2 ? -1 : 1;
            sum += odd[a * 3 + k] * sign * signs[k * 8 + l] * first.x[i * d + k * 8 + l];
          }
        }
        rotated[i * d + a * 8 + b] = static_cast<float>(sum / std::sqrt(8.0));
      }
    }
  }
  std::vector<float> out(static_cast<size_t>(2 * d));
  drop_rotate(kernel, first.x.data(), 0, 2, d, d, 8, signs.data(), odd.data(), out.data(), 2);
  double worst = 0;
  for (size_t i = 0; i < out.size(); ++i) worst = std::fmax(worst, std::fabs(out[i] - rotated[i]));
  check(worst < 1e-4, name + ": rotation off by " + std::to_string(worst));

  const auto planes1 = first.plane_pointers(), planes2 = second.plane_pointers();
  const auto books = second.book_pointers();
  const DropMatrix matrices[2] = {
      {planes1.data(), 70, first.scales.data(), 0, nullptr, 0},
      {planes2.data(), 5, second.scales.data(), 0, second.bias.data(), 0}};
  const DropInputGroup input{DROP_INPUT_GROUP_MAGIC, DROP_BYTES, d, 8,
                             signs.data(),           odd.data(), 2, 128,
                             books.data(),           matrices,   2};
  std::vector<float> y(150), parts(150);
  check(drop_input_group(kernel, &input, first.x.data(), 0, 2, d, y.data(), 0, 2) == 0,
        name + ": input group");
  Aligned<uint8_t> lut(2 * drop_lut_bytes(kernel, 3, 2, 128));
  drop_build_lut(kernel, out.data(), 2, 3, 2, books.data(), lut.data(), 1);
  drop_lut_gemv(kernel, lut.data(), 2, 3, 2, 128, matrices, 2, parts.data(), 0, 1);
  check(y == parts, name + ": input group differs from its steps");
}

void check_decode(int kernel, const std::string& name, const Problem& problem) {
  const Case& c = problem.shape;
  const int64_t d = c.groups * 8;
  const auto books = problem.book_pointers();
  std::vector<const uint8_t*> canonical;
  for (const auto& plane : problem.codes) canonical.push_back(plane.data());
  const auto packed = problem.plane_pointers();
  const int64_t first = c.d_out / 3;
  std::vector<float> expected, out(static_cast<size_t>((c.d_out - first) * d)), other(out);
  for (int64_t r = first; r < c.d_out; ++r) {
    for (int64_t i = 0; i < d; ++i) {
      float sum = 0;
      for (int64_t m = 0; m < c.prefix; ++m) {
        sum += problem.books[m][problem.codes[m][r * c.groups + i / 8] * 8 + i % 8];
      }
      expected.push_back(sum * problem.scales[r]);
    }
  }
  drop_decode(kernel, canonical.data(), 0, c.d_out, c.groups, c.prefix, books.data(),
              problem.scales.data(), 0, first, c.d_out, out.data(), 0, 2);
  drop_decode(kernel, packed.data(), 1, c.d_out, c.groups, c.prefix, books.data(),
              problem.scales.data(), 0, first, c.d_out, other.data(), 0, 1);
  check(out == expected && other == expected, name + ": decode");
}

void check_int8_rows(int kernel, const std::string& name, Random& random) {
  for (int64_t d : {1, 15, 33, 576, 600}) {
    const int64_t count = 7, n = 2;
    std::vector<int8_t> rows(static_cast<size_t>(count * d));
    std::vector<float> x(static_cast<size_t>(n * d)), scales(7), out(14);
    std::vector<double> expected;
    for (int8_t& row : rows) row = static_cast<int8_t>(random.next() >> 40);
    for (float& value : x) value = random.gauss();
    for (float& scale : scales) scale = 0.5f + static_cast<float>(random.next() % 100) / 100;
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t r = 0; r < count; ++r) {
        double sum = 0;
        for (int64_t k = 0; k < d; ++k) sum += rows[r * d + k] * static_cast<double>(x[i * d + k]);
        expected.push_back(sum * scales[r]);
      }
    }
    drop_int8_rows(kernel, rows.data(), count, d, scales.data(), 0, x.data(), 0, n, out.data(), 0,
                   1);
    check(relative_error(out, expected) < 2e-4, name + ": eight-bit rows of " + std::to_string(d));
  }
}

// An input group that owns what it points to, of either kind of plane.
struct OwnedInput {
  std::vector<std::unique_ptr<Problem>> problems;
  std::vector<std::unique_ptr<TrellisProblem>> trellises;
  std::vector<std::vector<const uint8_t*>> planes;
  std::vector<DropMatrix> matrices;
  std::vector<const void*> books;
  DropInputGroup input;

  OwnedInput(const std::vector<int64_t>& heights, int64_t d, bool trellis, Random& random) {
    planes.reserve(heights.size());
    for (int64_t rows : heights) {
      if (trellis) {
        trellises.emplace_back(new TrellisProblem({rows, d, {2, 1}, 12, 1}, random));
        add(*trellises.back(), rows);
      } else {
        problems.emplace_back(new Problem({rows, d / 8, 2, 128, 1, false}, random));
        add(*problems.back(), rows);
      }
    }
    books = trellis ? trellises.front()->book_pointers() : problems.front()->book_pointers();
    input = {DROP_INPUT_GROUP_MAGIC,
             trellis ? DROP_TRELLIS : DROP_BYTES,
             d,
             8,
             nullptr,
             nullptr,
             2,
             128,
             books.data(),
             matrices.data(),
             static_cast<int64_t>(matrices.size())};
  }

  template <typename AnyProblem>
  void add(AnyProblem& problem, int64_t rows) {
    for (float& scale : problem.scales) scale *= 0.02f;
    planes.push_back(problem.plane_pointers());
    matrices.push_back({planes.back().data(), rows, problem.scales.data(), 0, nullptr, 0});
  }
};

// A decoder of two blocks, and the same at one plane: neither pieces of a sequence nor threads nor
// tokens of the other precision change a bit. (Its values are compared with transformers in
// tests/kernels/test_step.py.)
void check_step(int kernel, const std::string& name, bool trellis, Random& random) {
  constexpr int64_t hidden = 24, heads = 3, d = 8, size = 72, length = 9, capacity = 10;
  std::vector<std::unique_ptr<OwnedInput>> inputs;
  std::vector<DropBlock> blocks;
  std::vector<float> ones(static_cast<size_t>(hidden), 1.0f), twos(ones.size(), 2.0f), cosines,
      sines, x;
  const auto input = [&](const std::vector<int64_t>& heights, int64_t width) {
    inputs.emplace_back(new OwnedInput(heights, width, trellis, random));
    return inputs.back()->input;
  };
  for (int i = 0; i < 2; ++i) {
    blocks.push_back({ones.data(), ones.data(), i ? ones.data() : nullptr, nullptr,
                      input({heads * d, d, d}, hidden), input({hidden}, heads * d),
                      input({size, size}, hidden), input({hidden}, size)});
  }
  for (int64_t i = 0; i < capacity * d; ++i) {
    cosines.push_back(static_cast<float>(std::cos(0.1 * (i / d) * (i % (d / 2) + 1))));
    sines.push_back(static_cast<float>(std::sin(0.1 * (i / d) * (i % (d / 2) + 1))));
  }
  for (int64_t i = 0; i < length * hidden; ++i) x.push_back(random.gauss());
  const DropDecoder decoder{DROP_DECODER_MAGIC,
                            hidden,
                            heads,
                            1,
                            d,
                            size,
                            capacity,
                            1e-5,
                            0.35,
                            ones.data(),
                            cosines.data(),
                            sines.data(),
                            blocks.data(),
                            2};
  std::vector<DropBlock> first_planes = blocks;
  for (DropBlock& block : first_planes) {
    for (DropInputGroup* input : {&block.qkv, &block.output, &block.gate_up, &block.down}) {
      input->prefix = 1;
    }
    block.input_norm = twos.data();
  }
  DropDecoder low = decoder;
  low.blocks = first_planes.data();
  low.final_norm = twos.data();
  const auto run = [&](const std::vector<DropPlace>& places, const float* in, float* out,
                       int threads) {
    const DropTokens tokens{in, out, static_cast<int64_t>(places.size()), 0, places.data()};
    return drop_step(kernel, &decoder, &tokens, threads);
  };
  struct Sequence {  // keys and values of its own
    std::vector<float> memory[4];
    DropCache caches[2];
    Sequence() {
      for (auto& part : memory) part.resize(static_cast<size_t>(capacity * d));
      caches[0] = {memory[0].data(), memory[1].data()};
      caches[1] = {memory[2].data(), memory[3].data()};
    }
  };
  std::vector<float> expected;
  const std::vector<std::vector<int64_t>> pieces = {{1, 1, 1, 1, 1, 1, 1, 1, 1}, {4, 1, 4}, {9}};
  for (int threads = 1; threads <= 3; ++threads) {
    for (const auto& parts : pieces) {
      Sequence sequence;
      std::vector<float> out(x.size());
      int64_t at = 0;
      for (int64_t n : parts) {
        std::vector<DropPlace> places;
        for (int64_t i = 0; i < n; ++i) places.push_back({at + i, capacity, sequence.caches, nullptr});
        check(run(places, x.data() + at * hidden, out.data() + at * hidden, threads) == 0,
              name + ": step");
        at += n;
      }
      for (float value : out) check(std::isfinite(value), name + ": step is not finite");
      if (expected.empty()) expected = out;
      check(out == expected, name + ": step depends on pieces or threads");
    }
    std::vector<float> expected_low(x.size());
    Sequence alone;
    for (int64_t at = 0; at < length; ++at) {
      check(run({{at, capacity, alone.caches, &low}}, x.data() + at * hidden,
                expected_low.data() + at * hidden, threads) == 0,
            name + ": step at one plane");
    }
    check(expected_low != expected, name + ": one plane is as good as two");
    // The same sequence four times in one call, each some tokens behind the last, two of them at
    // one plane.
    Sequence sequences[4];
    for (int64_t time = 0; time < length + 6; ++time) {
      std::vector<DropPlace> places;
      std::vector<float> in, want;
      for (int64_t s = 0; s < 4; ++s) {
        const int64_t at = time - 2 * s;
        if (at < 0 || at >= length) continue;
        places.push_back({at, capacity, sequences[s].caches, s % 2 ? &low : nullptr});
        const auto& right = s % 2 ? expected_low : expected;
        in.insert(in.end(), x.begin() + at * hidden, x.begin() + (at + 1) * hidden);
        want.insert(want.end(), right.begin() + at * hidden, right.begin() + (at + 1) * hidden);
      }
      std::vector<float> out(in.size());
      check(run(places, in.data(), out.data(), threads) == 0, name + ": step of sequences");
      check(out == want, name + ": step depends on other sequences");
    }
  }
  const std::vector<DropPlace> late = {{0, capacity, nullptr, nullptr},
                                       {capacity, capacity, nullptr, nullptr}};
  check(run(late, x.data(), expected.data(), 1) == -1, name + ": step past the cache");
  Sequence sequence;
  first_planes[1].down.matrices = blocks[1].output.matrices;
  const std::vector<DropPlace> other = {{0, capacity, sequence.caches, nullptr},
                                        {0, capacity, sequence.caches, &low}};
  check(run(other, x.data(), expected.data(), 1) == -2, name + ": step of two codes");
}

void check_odd_inputs(int kernel, const std::string& name, Random& random) {
  Problem problem({64, 130, 1, 128, 1, false}, random);
  for (float& value : problem.x) value = 0;
  for (float y : problem.run(kernel, 0, 1, 1)) check(y == 0, name + ": zero input");
  problem.x[5] = 1e-30f;
  for (float y : problem.run(kernel, 0, 1, 1)) check(std::fabs(y) < 1e-25f, name + ": tiny input");
  problem.x[5] = std::nanf("");
  check(std::isnan(problem.run(kernel, 0, 1, 1)[0]), name + ": NaN is lost");
  problem.x[5] = INFINITY;
  check(!std::isfinite(problem.run(kernel, 0, 1, 1)[0]), name + ": infinity is lost");
}

void check_packing(Random& random) {
  for (int64_t rows : {1, 63, 64, 65, 300}) {
    for (int64_t groups : {1, 127, 128, 129, 300}) {
      std::vector<uint8_t> codes(static_cast<size_t>(rows * groups)), back(codes.size());
      for (uint8_t& code : codes) code = static_cast<uint8_t>(random.next() >> 20);
      std::vector<uint8_t> packed(static_cast<size_t>(drop_packed_bytes(rows, groups)));
      drop_pack(codes.data(), rows, groups, packed.data());
      drop_unpack(packed.data(), rows, groups, back.data());
      check(back == codes, "packing " + std::to_string(rows) + " x " + std::to_string(groups));
    }
  }
}

}  // namespace

int main() {
  Random random;
  std::vector<Problem> problems;
  for (const Case& c :
       {Case{64, 1, 1, 128, 1, false}, Case{1, 2, 2, 128, 3, false}, Case{65, 8, 3, 128, 2, false},
        Case{200, 72, 4, 128, 3, true}, Case{320, 129, 2, 128, 2, true},
        Case{131, 257, 1, 128, 2, true}, Case{100, 33, 8, 128, 2, false},
        Case{257, 130, 2, 256, 2, false}, Case{30, 3, 3, 256, 16, false}}) {
    problems.emplace_back(c, random);
  }
  check_packing(random);
  check_trellis_refusals();
  check_search();
  std::vector<std::vector<float>> exact(problems.size() * 2);
  for (int kernel = 0; kernel < drop_kernel_count(); ++kernel) {
    const std::string name = drop_kernel_name(kernel);
    if (!drop_kernel_supported(kernel)) {
      std::printf("%-16s not supported here\n", name.c_str());
      continue;
    }
    const int before = failures;
    for (size_t i = 0; i < problems.size(); ++i) {
      check_products(kernel, name, problems[i], &exact, i);
      check_decode(kernel, name, problems[i]);
    }
    check_input_group(kernel, name, random);
    check_int8_rows(kernel, name, random);
    check_step(kernel, name, false, random);
    check_step(kernel, name + " trellis", true, random);
    check_odd_inputs(kernel, name, random);
    check_trellis(kernel, name);
    std::printf("%-16s %s\n", name.c_str(), failures == before ? "ok" : "FAILED");
  }
  std::printf("threads: %s\n%s\n", drop_thread_pool(), failures ? "FAILED" : "all kernels ok");
  return failures > 99 ? 99 : failures;
}
