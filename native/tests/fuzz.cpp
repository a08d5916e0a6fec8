// libFuzzer target over the C interface: shapes, types and values from the fuzzer's bytes.
//
// The contract (kernels/c_api.h) is that pointers are valid for the shapes given, which the Python
// side checks; codes, codebooks, scales, activations and taps come from a checkpoint or a prompt
// and may be anything. So every buffer has exactly the bytes that its shape demands, each in an
// allocation of its own, and holds what the fuzzer says; AddressSanitizer and UBSan see the rest.
// Three things are asserted beside: packing is undone exactly; where all values are finite and of
// ordinary size, every kernel gives the bits of the portable one; and a token of a decode step does
// not depend on those it shares a call with.
//
// Built with clang and -DDROPBYDROP_FUZZ=ON; scripts/fuzz_native.sh does it.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "fuzz_inputs.h"
#include "kernels/c_api.h"
#include "search/c_api.h"
#include "trellis/c_api.h"

namespace {

// Runs `call(kernel, out)` for every kernel; `exact` results must be those of the portable one.
template <typename Call>
void on_kernels(int64_t bytes, bool compare, const char* what, Call call) {
  std::vector<uint8_t> expected;
  for (int kernel = drop_kernel_count() - 1; kernel >= 0; --kernel) {
    if (!drop_kernel_supported(kernel)) continue;
    const std::string name = drop_kernel_name(kernel);
    Aligned<uint8_t> out(bytes);
    std::memset(out.data(), 0, static_cast<size_t>(bytes));
    call(kernel, out.data());
    if (!compare || name.find("-u8") != std::string::npos) continue;
    const std::vector<uint8_t> found(out.data(), out.data() + bytes);
    if (expected.empty()) expected = found;
    if (found != expected) broken(std::string(what) + " of " + name);
  }
}

void pack(Bytes& bytes) {
  const int64_t d_out = bytes.number(1, 200), groups = bytes.number(1, 300);
  Aligned<uint8_t> codes = bytes.array<uint8_t>(d_out * groups);
  Aligned<uint8_t> packed(drop_packed_bytes(d_out, groups)), back(d_out * groups);
  drop_pack(codes.data(), d_out, groups, packed.data());
  drop_unpack(packed.data(), d_out, groups, back.data());
  if (std::memcmp(codes.data(), back.data(), static_cast<size_t>(d_out * groups))) broken("packing");
}

void products(Bytes& bytes, bool trellis) {
  const bool wild = bytes.flag(), x_wild = bytes.flag();
  const int64_t rows = bytes.number(1, 150), d_in = width_of(bytes, trellis);
  const int64_t prefix = bytes.number(1, 4), entries = bytes.flag() ? 128 : 256;
  const Input input(bytes, trellis, {rows}, d_in, prefix, entries, wild);
  const int64_t n = bytes.number(1, 18), stride = d_in + bytes.number(0, 5);
  Aligned<float> x = bytes.floats((n - 1) * stride + d_in, x_wild);
  const int threads = static_cast<int>(bytes.number(1, 3));
  on_kernels(n * rows * 4, !wild && !x_wild, "product", [&](int kernel, void* out) {
    if (drop_input_group(kernel, &input.group, x.data(), 0, n, stride, out, 0, threads)) {
      broken("a product is refused");
    }
  });
}

void decode(Bytes& bytes, bool trellis) {
  const bool wild = bytes.flag();
  const int64_t d_out = bytes.number(1, 150), d_in = width_of(bytes, trellis);
  const Codebooks books(bytes, trellis, bytes.number(1, 4), bytes.flag() ? 128 : 256);
  const Matrix matrix(bytes, books, d_out, d_in, wild);
  const int64_t first = bytes.number(0, d_out - 1), last = bytes.number(first + 1, d_out);
  const int threads = static_cast<int>(bytes.number(1, 3)), type = bytes.flag() ? 2 : 0;
  const int64_t size = (last - first) * d_in * (type ? 2 : 4);
  on_kernels(size, !wild, "decoding", [&](int kernel, void* out) {
    const auto* planes = matrix.plane_pointers.data();
    const auto* pointers = books.pointers.data();
    if (trellis) {
      drop_trellis_decode(kernel, planes, d_out, d_in, books.prefix, pointers,
                          matrix.scales.data(), 0, first, last, out, type, threads);
    } else {
      drop_decode(kernel, planes, 1, d_out, d_in / 8, books.prefix, pointers,
                  matrix.scales.data(), 0, first, last, out, type, threads);
    }
  });
}

void int8_rows(Bytes& bytes) {
  const int64_t d_out = bytes.number(1, 70), d_in = bytes.number(1, 300), n = bytes.number(1, 5);
  const bool wild = bytes.flag();
  Aligned<int8_t> rows = bytes.array<int8_t>(d_out * d_in);
  Aligned<float> x = bytes.floats(n * d_in, wild), scales = bytes.floats(d_out, wild);
  on_kernels(n * d_out * 4, !wild, "eight-bit rows", [&](int kernel, void* out) {
    drop_int8_rows(kernel, rows.data(), d_out, d_in, scales.data(), 0, x.data(), 0, n, out, 0, 2);
  });
}

// Some sequences, some of them at one plane, token by token and all in one call: the same bits.
void step(Bytes& bytes) {
  const bool wild = bytes.flag();
  const Decoder decoder(bytes, wild);
  const int64_t cache_type = bytes.number(0, 2), hidden = decoder.hidden;
  const int64_t length = bytes.number(1, decoder.positions), count = bytes.number(1, 16 / length);
  const int64_t capacity = length + bytes.number(0, 3), n = count * length;
  const int threads = static_cast<int>(bytes.number(1, 3));
  std::vector<bool> low;
  for (int64_t i = 0; i < count; ++i) low.push_back(bytes.flag());
  Aligned<float> x = bytes.floats(n * hidden, wild), alone(n * hidden), together(n * hidden);
  for (int kernel = 0; kernel < drop_kernel_count(); ++kernel) {
    if (!drop_kernel_supported(kernel)) continue;
    const auto run = [&](const std::vector<DropPlace>& places, int64_t first, float* out) {
      const DropTokens tokens{x.data() + first * hidden, out + first * hidden,
                              static_cast<int64_t>(places.size()), cache_type, places.data()};
      return drop_step(kernel, &decoder.whole, &tokens, threads);
    };
    std::vector<std::unique_ptr<Sequence>> kept;
    std::vector<DropPlace> places;
    for (int64_t i = 0; i < count; ++i) {
      const DropDecoder* own = low[i] ? &decoder.low : nullptr;
      Sequence single(bytes, decoder, capacity, cache_type);
      const auto& shared = *kept.emplace_back(new Sequence(bytes, decoder, capacity, cache_type));
      for (int64_t at = 0; at < length; ++at) {
        if (run({{at, capacity, single.caches.data(), own}}, i * length + at, alone.data())) {
          broken("a step is refused");
        }
        places.push_back({at, capacity, shared.caches.data(), own});
      }
    }
    if (run(places, 0, together.data())) broken("a step of several tokens is refused");
    bool finite = !wild;
    for (int64_t i = 0; i < n * hidden; ++i) finite = finite && std::isfinite(alone.data()[i]);
    if (finite && std::memcmp(alone.data(), together.data(), static_cast<size_t>(n * hidden) * 4)) {
      broken(std::string("a step depends on its company, ") + drop_kernel_name(kernel));
    }
    for (DropPlace late : {DropPlace{capacity, capacity, nullptr, nullptr},
                           DropPlace{decoder.positions, decoder.positions + 1, nullptr, nullptr},
                           DropPlace{-1, capacity, nullptr, nullptr}}) {
      if (run({late}, 0, together.data()) != -1) broken("a step beyond its cache is taken");
    }
  }
}

void search(Bytes& bytes) {
  const int64_t d_out = bytes.number(1, 12), groups = bytes.number(1, 6), d_in = groups * 8;
  const bool wild = bytes.flag();
  DropSearch problem{};
  problem.d_out = d_out;
  problem.d_in = d_in;
  problem.planes = static_cast<int>(bytes.number(1, 4));
  problem.beam = 1 << bytes.number(0, 4);
  for (int p = 1; p <= problem.planes; ++p) {
    if (p < problem.planes && bytes.flag()) continue;
    problem.level[problem.levels] = p;
    problem.lambda[problem.levels++] = 1.0f / static_cast<float>(p);
  }
  problem.lookahead = 0.25f;
  Aligned<float> w = bytes.floats(d_out * d_in, wild);
  Aligned<float> books = bytes.floats(problem.planes * 128 * 8, false);
  Aligned<float> coupling = bytes.floats(groups * d_in * 8, wild);
  Aligned<float> factor = bytes.floats(groups * 64, wild);
  Aligned<uint8_t> codes = bytes.array<uint8_t>(problem.planes * d_out * groups);
  problem.w = w.data();
  problem.codebooks = books.data();
  problem.feedback = problem.descent = {coupling.data(), factor.data()};
  problem.start = bytes.flag();
  problem.sweeps = static_cast<int>(bytes.number(0, 2));
  Aligned<int64_t> changed(problem.sweeps + 1);
  problem.codes = codes.data();
  problem.changed = changed.data();
  for (int i = 0; const char* name = drop_search_backend(i); ++i) {
    if (drop_search(name, &problem, 2)) broken("a search is refused");
  }
}

void trellis_search(Bytes& bytes) {
  const int64_t d_out = bytes.number(1, 40), d_in = bytes.number(1, 6);
  const bool wild = bytes.flag();
  DropTrellis problem{};
  problem.d_out = d_out;
  problem.d_in = d_in;
  problem.planes = static_cast<int>(bytes.number(1, 3));
  std::vector<Aligned<uint8_t>> codes;
  for (int m = 0; m < problem.planes; ++m) {
    DropTrellisPlane& plane = problem.plane[m];
    plane.bits = bytes.flag() ? 2 : 1;
    plane.window = static_cast<int>(bytes.number(8, 9));
    for (float& value : plane.values) value = static_cast<float>(bytes.next()) / 64 - 2;
    for (uint8_t& tap : plane.taps) tap = bytes.next() & 63;
    codes.push_back(bytes.array<uint8_t>(d_in * std::max<int64_t>(3, (plane.bits * d_out + 7) / 8)));
    problem.codes[m] = codes.back().data();
    if (m + 1 < problem.planes && bytes.flag()) continue;
    problem.prefix[problem.levels] = m + 1;
    problem.lambda[problem.levels++] = 1.0f / static_cast<float>(m + 1);
  }
  Aligned<float> w = bytes.floats(d_in * d_out, wild), weights = bytes.floats(d_out, wild);
  Aligned<float> lower = bytes.floats(d_in * d_in, wild), h = bytes.floats(d_in * d_in, wild);
  problem.w = w.data();
  problem.row_weights = weights.data();
  problem.lower = bytes.flag() ? lower.data() : nullptr;
  problem.h = h.data();
  problem.sweeps = static_cast<int>(bytes.number(0, 1));
  Aligned<int64_t> changed(problem.sweeps + 1);
  problem.changed = changed.data();
  for (int i = 0; const char* name = drop_trellis_backend(i); ++i) {
    const int status = drop_trellis_search(name, &problem, 1);
    if (status == 1 || status == 3) broken("a trellis search is refused");
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Bytes bytes(data, size);
  switch (bytes.next() % 9) {
    case 0: pack(bytes); break;
    case 1: products(bytes, false); break;
    case 2: products(bytes, true); break;
    case 3: decode(bytes, false); break;
    case 4: decode(bytes, true); break;
    case 5: int8_rows(bytes); break;
    case 6: search(bytes); break;
    case 7: trellis_search(bytes); break;
    default: step(bytes);
  }
  return 0;
}
