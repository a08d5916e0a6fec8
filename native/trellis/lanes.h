// Vectors of DROP_LANES states, and of half as many rows. These headers are included by one file
// for each instruction set, and all of their names are its own (an unnamed namespace): the same
// function compiled with different flags must never be merged by the linker.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX512BW__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace drop {
namespace {

constexpr int N = DROP_LANES;                            // path metrics in a vector, int16
constexpr int kLaneBits = N == 32 ? 5 : N == 16 ? 4 : 3;  // bits of a state that name its lane
constexpr int R = N / 2;                                 // rows in a vector, float32

typedef int16_t vs __attribute__((vector_size(N * 2)));
typedef int16_t half_vs __attribute__((vector_size(N)));
typedef float vf __attribute__((vector_size(N * 2)));
typedef int32_t vi __attribute__((vector_size(N * 2)));

struct alignas(64) Line {  // what vectors are allocated in
  char bytes[64];
};

inline vf splat(float x) { return x - vf{}; }
inline vs splat(int16_t x) { return x - vs{}; }
template <typename V>
inline V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <typename V>
inline void store(void* p, V v) {
  std::memcpy(p, &v, sizeof v);
}
template <typename V>
inline V min_of(V a, V b) {
  return a < b ? a : b;
}

// The vector with lanes exchanged whose numbers differ in bit B.
template <int B, size_t... I>
inline vs exchange(vs x, std::index_sequence<I...>) {
  return __builtin_shufflevector(x, x, (I ^ (size_t(1) << B))...);
}
template <int B>
inline vs exchange(vs x) {
  return exchange<B>(x, std::make_index_sequence<N>{});
}

// The least of all lanes.
template <int Step, size_t... I>
inline float lowest(vf x, std::index_sequence<I...> lanes) {
  if constexpr (Step == 0) {
    return x[0];
  } else {
    return lowest<Step / 2>(min_of(x, vf(__builtin_shufflevector(x, x, (I ^ size_t(Step))...))),
                            lanes);
  }
}
inline float lowest(vf x) { return lowest<R / 2>(x, std::make_index_sequence<R>{}); }

// Which lanes of a are below those of b: one or more bits a lane, as the instruction set has it.
#if defined(__AVX512BW__) && DROP_LANES == 32
typedef uint32_t Word;
inline Word below(vs a, vs b) { return _mm512_cmplt_epi16_mask((__m512i)a, (__m512i)b); }
inline int bit_of(Word word, int lane) { return word >> lane & 1; }
#elif defined(__AVX2__) && DROP_LANES == 16
typedef uint32_t Word;
inline Word below(vs a, vs b) { return uint32_t(_mm256_movemask_epi8((__m256i)(a < b))); }
inline int bit_of(Word word, int lane) { return word >> 2 * lane & 1; }
#else
typedef uint64_t Word;
inline Word below(vs a, vs b) {
  typedef int8_t narrow __attribute__((vector_size(N)));
  const narrow bytes = __builtin_convertvector((vs)(a < b), narrow);
  Word word;
  std::memcpy(&word, &bytes, sizeof word);
  return word;
}
inline int bit_of(Word word, int lane) { return int(word >> 8 * lane & 1); }
#endif

}  // namespace
}  // namespace drop
