// A few tokens through all blocks of a Llama-like decoder, in one call.
//
// Measured before it was written: with every product at memory speed, half of a token's time on a
// 135M model was spent between the products, compiled or not, in 211 calls from Python and some 300
// small operators. This is what transformers' LlamaModel computes, nothing else: no sampling, no
// cache management. The tokens may be of one sequence (drafts that are checked) or of several
// (requests that are served together), and each may have a precision of its own: planes are added
// up, so tokens at P planes take part in the first P of a product, and all of them read each weight
// once.
//
// Steps of a block, "|" being a barrier. What is cheap is done by every worker for itself rather
// than shared and waited for.
//
//   norm, rotate (each), q/k/v LUT (shared) | q/k/v (rows shared) |
//   norm and RoPE of heads, append to the cache (kv heads shared) | attention (heads shared) |
//   rotate (each), LUT | output rows, added to the stream |
//   norm, rotate (each), LUT | gate and up (same rows), SiLU | rotate (each), LUT |
//   down rows, added to the stream |
//
// Numbers are float32 between products. Each token's result depends on its own history alone, bit
// for bit: on neither the number of tokens in the call nor of threads.
#include <algorithm>
#include <cstring>

#include "product.h"

namespace drop {
namespace {

thread_local Scratch call_scratch, normed_scratch, score_scratch, reading_scratch, prefix_scratch;

struct Buffers {
  float *stream, *qkv, *mixed, *gates, *active, *rotated;
  uint8_t* tables;
};

constexpr DropInputGroup DropBlock::*kGroups[] = {&DropBlock::qkv, &DropBlock::output,
                                                  &DropBlock::gate_up, &DropBlock::down};
enum GroupOfBlock { kQkv, kOutput, kGateUp, kDown };

// An input group as the tokens of a call read it: the deepest of their precisions, and the planes
// of each token (null: all alike).
struct Reading {
  const DropInputGroup* group;
  const int64_t* prefixes;
};

const DropDecoder& decoder_at(const DropDecoder& decoder, const DropPlace& place) {
  return place.decoder ? *place.decoder : decoder;
}

class Step {
 public:
  Step(const Kernel& kernel, const DropDecoder& decoder, const DropTokens& tokens,
       const Reading* readings, const Buffers& buffers)
      : kernel_(kernel),
        decoder_(decoder),
        tokens_(tokens),
        readings_(readings),
        buffers_(buffers),
        n_(tokens.n) {}

  void run(const Worker& worker) const {
    for (int64_t i = 0; i < decoder_.count; ++i) {
      attention(i, worker);
      feed_forward(i, worker);
    }
    const Range mine = share(n_, worker);
    for (int64_t i = mine.first; i < mine.last; ++i) {
      kernel_.norm(buffers_.stream + i * hidden(), decoder_of(i).final_norm, hidden(), eps(),
                   tokens_.out + i * hidden());
    }
  }

 private:
  int64_t hidden() const { return decoder_.hidden; }
  float eps() const { return static_cast<float>(decoder_.eps); }

  const DropDecoder& decoder_of(int64_t i) const {
    return decoder_at(decoder_, tokens_.places[i]);
  }
  const DropBlock& block_of(int64_t i, int64_t number) const {
    return decoder_of(i).blocks[number];
  }

  const float* normed(int64_t number, const float* DropBlock::*weight) const {
    float* out = normed_scratch.get<float>(n_ * hidden());
    for (int64_t i = 0; i < n_; ++i) {
      kernel_.norm(buffers_.stream + i * hidden(), block_of(i, number).*weight, hidden(), eps(),
                   out + i * hidden());
    }
    return out;
  }

  void run_input_group(int64_t number, GroupOfBlock which, const float* x, float* out,
                       const float* residual, bool aligned, const Worker& worker) const {
    const Reading& reading = readings_[number * 4 + which];
    const DropInputGroup& input = *reading.group;
    Products products{};
    products.out = reinterpret_cast<char*>(out);
    products.out_rows = n_;
    products.residual = residual;
    products.aligned = aligned;
    input_group_share(
        {&kernel_, &input, x, kF32, n_, input.d_in, buffers_.rotated, buffers_.tables,
         reading.prefixes},
        products, worker);
  }

  void attention(int64_t number, const Worker& worker) const {
    const int64_t d = decoder_.head_dim, heads = decoder_.heads, kv_heads = decoder_.kv_heads;
    const int64_t q_size = heads * d, kv_size = kv_heads * d;
    run_input_group(number, kQkv, normed(number, &DropBlock::input_norm), buffers_.qkv, nullptr,
                    false, worker);
    worker.barrier();

    float* queries = buffers_.qkv;  // [n, heads, d], then keys and values [n, kv heads, d]
    float* keys = queries + n_ * q_size;
    float* values = keys + n_ * kv_size;
    for (int64_t i = 0; i < n_; ++i) {
      const DropPlace& place = tokens_.places[i];
      const DropCache& cache = place.caches[number];
      const DropBlock& block = block_of(i, number);
      const float* cosine = decoder_of(i).cosines + place.position * d;
      const float* sine = decoder_of(i).sines + place.position * d;
      const auto turn = [&](float* head, const float* weight) {
        if (weight) kernel_.norm(head, weight, d, eps(), head);
        kernel_.apply_rope(cosine, sine, d, head);
      };
      const Range own = share(heads, worker);
      for (int64_t h = own.first; h < own.last; ++h) {
        turn(queries + i * q_size + h * d, block.q_norm);
      }
      const Range own_kv = share(kv_heads, worker);
      for (int64_t h = own_kv.first; h < own_kv.last; ++h) {
        const int64_t at = (h * place.capacity + place.position) * d;
        turn(keys + i * kv_size + h * d, block.k_norm);
        kernel_.store(keys + i * kv_size + h * d, d, cache_type(), cache.keys, at);
        kernel_.store(values + i * kv_size + h * d, d, cache_type(), cache.values, at);
      }
    }
    worker.barrier();

    const int64_t width = cache_type() == kF32 ? 4 : 2;
    int64_t longest = 0;
    for (int64_t i = 0; i < n_; ++i) longest = std::max(longest, tokens_.places[i].position + 1);
    float* scores = score_scratch.get<float>(longest);
    const Range own = share(heads, worker);
    for (int64_t h = own.first; h < own.last; ++h) {
      for (int64_t i = 0; i < n_; ++i) {
        const DropPlace& place = tokens_.places[i];
        const DropCache& cache = place.caches[number];
        const int64_t at = h / (heads / kv_heads) * place.capacity * d * width;
        kernel_.attention({queries + i * q_size + h * d, static_cast<const char*>(cache.keys) + at,
                           static_cast<const char*>(cache.values) + at, cache_type(), d,
                           place.position + 1, static_cast<float>(decoder_.attention_scale), scores,
                           buffers_.mixed + i * q_size + h * d});
      }
    }
    worker.barrier();
    run_input_group(number, kOutput, buffers_.mixed, buffers_.stream, buffers_.stream, false,
                    worker);
    worker.barrier();
  }

  void feed_forward(int64_t number, const Worker& worker) const {
    const int64_t size = decoder_.intermediate;
    run_input_group(number, kGateUp, normed(number, &DropBlock::post_norm), buffers_.gates,
                    nullptr, true, worker);
    const int64_t unit = unit_rows(decoder_.blocks[number].gate_up.kind == DROP_TRELLIS);
    const Range units = share((size + unit - 1) / unit, worker);
    const int64_t first = units.first * unit;
    const int64_t last = units.last * unit < size ? units.last * unit : size;
    for (int64_t i = 0; i < n_; ++i) {
      const float* gates = buffers_.gates + i * size;
      kernel_.silu_mul(gates + first, gates + n_ * size + first, last - first,
                       buffers_.active + i * size + first);
    }
    worker.barrier();
    run_input_group(number, kDown, buffers_.active, buffers_.stream, buffers_.stream, false,
                    worker);
    worker.barrier();
  }

  Scalar cache_type() const { return static_cast<Scalar>(tokens_.cache_type); }

  const Kernel& kernel_;
  const DropDecoder& decoder_;
  const DropTokens& tokens_;
  const Reading* readings_;  // [blocks][4]
  const Buffers& buffers_;
  const int64_t n_;
};

// Whether the planes of `part` are the first of those of `whole`.
bool same_code(const DropInputGroup& part, const DropInputGroup& whole) {
  if (part.kind != whole.kind || part.d_in != whole.d_in || part.block != whole.block ||
      part.signs != whole.signs || part.odd != whole.odd || part.entries != whole.entries ||
      part.count != whole.count ||
      !std::equal(part.codebooks, part.codebooks + part.prefix, whole.codebooks)) {
    return false;
  }
  return std::equal(part.matrices, part.matrices + part.count, whole.matrices,
                    [&](const DropMatrix& a, const DropMatrix& b) {
                      return a.d_out == b.d_out && a.scales == b.scales &&
                             a.scale_type == b.scale_type && a.bias == b.bias &&
                             a.bias_type == b.bias_type &&
                             std::equal(a.planes, a.planes + part.prefix, b.planes);
                    });
}

bool same_shape(const DropDecoder& a, const DropDecoder& b) {
  return b.magic == DROP_DECODER_MAGIC && a.hidden == b.hidden && a.heads == b.heads &&
         a.kv_heads == b.kv_heads && a.head_dim == b.head_dim && a.count == b.count &&
         a.intermediate == b.intermediate && a.eps == b.eps &&
         a.attention_scale == b.attention_scale;
}

// How the tokens read each input group -> readings [blocks][4]; prefixes is room for [blocks][4][n].
// False where their decoders are of different codes.
bool read_together(const DropDecoder& decoder, const DropTokens& tokens, Reading* readings,
                   int64_t* prefixes) {
  const DropPlace *places = tokens.places, *end = places + tokens.n;
  if (!std::all_of(places, end, [&](const DropPlace& place) {
        return same_shape(decoder, decoder_at(decoder, place));
      })) {
    return false;
  }
  const bool alike = std::all_of(places, end, [&](const DropPlace& place) {
    return &decoder_at(decoder, place) == &decoder_at(decoder, *places);
  });
  for (int64_t at = 0; at < 4 * decoder.count; ++at, prefixes += tokens.n) {
    const auto group_at = [&](const DropPlace& place) -> const DropInputGroup& {
      return decoder_at(decoder, place).blocks[at / 4].*kGroups[at % 4];
    };
    readings[at] = {&group_at(*places), nullptr};
    if (alike) continue;
    for (int64_t i = 0; i < tokens.n; ++i) {
      const DropInputGroup& group = group_at(places[i]);
      if (!sound(group)) return false;  // before its pointers are followed
      prefixes[i] = group.prefix;
      if (group.prefix > readings[at].group->prefix) readings[at].group = &group;
    }
    readings[at].prefixes = prefixes;
    const DropDecoder* before = nullptr;  // tokens of one precision follow each other
    for (const DropPlace* place = places; place < end; before = (place++)->decoder) {
      if (place > places && place->decoder == before) continue;
      if (!same_code(group_at(*place), *readings[at].group)) return false;
    }
  }
  return true;
}

bool sound(const DropDecoder& decoder, const DropTokens& tokens) {
  if (decoder.magic != DROP_DECODER_MAGIC || tokens.n <= 0 || tokens.n > kRowsAtOnce ||
      decoder.head_dim % 8 != 0 || decoder.head_dim > 256 || decoder.hidden % 8 != 0) {
    return false;
  }
  return std::all_of(tokens.places, tokens.places + tokens.n, [&](const DropPlace& place) {
    return place.position >= 0 && place.position < place.capacity &&
           place.position < decoder_at(decoder, place).positions;
  });
}

}  // namespace
}  // namespace drop

using namespace drop;

int drop_step(int kernel, const DropDecoder* decoder, const DropTokens* tokens, int threads) {
  const Kernel* chosen = usable(kernel);
  if (!chosen || !sound(*decoder, *tokens)) return -1;
  const int64_t n = tokens->n, hidden = decoder->hidden, size = decoder->intermediate;
  const int64_t q_size = decoder->heads * decoder->head_dim;
  const int64_t kv_size = decoder->kv_heads * decoder->head_dim;
  Reading* readings = reading_scratch.get<Reading>(4 * decoder->count);
  int64_t* prefixes = prefix_scratch.get<int64_t>(4 * decoder->count * n);
  if (!read_together(*decoder, *tokens, readings, prefixes)) return -2;
  int64_t widest = 0, table_bytes = 0;
  for (int64_t i = 0; i < 4 * decoder->count; ++i) {
    const DropInputGroup& input = *readings[i].group;
    if (!sound(input)) return -1;
    const int64_t bytes = input_group_table_bytes(*chosen, input, n);
    if (bytes > table_bytes) table_bytes = bytes;
    if (input.d_in > widest) widest = input.d_in;
  }
  // Each buffer starts on a cache line of its own.
  const int64_t sizes[] = {hidden, q_size + 2 * kv_size, q_size, 2 * size, size, widest};
  int64_t offsets[6], total = 0;
  for (int i = 0; i < 6; ++i) {
    offsets[i] = total;
    total += round_up(n * sizes[i], 16);
  }
  float* base = call_scratch.get<float>(total + round_up(table_bytes, 64) / 4);
  const Buffers buffers{base + offsets[0],
                        base + offsets[1],
                        base + offsets[2],
                        base + offsets[3],
                        base + offsets[4],
                        base + offsets[5],
                        reinterpret_cast<uint8_t*>(base + total)};
  std::memcpy(buffers.stream, tokens->x, static_cast<size_t>(n * hidden) * 4);
  const Step step(*chosen, *decoder, *tokens, readings, buffers);
  auto body = [&](const Worker& worker) { step.run(worker); };
  on_threads(threads, body);
  return 0;
}
