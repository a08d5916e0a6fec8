// Vectors of DROP_LANES rows. These headers are included by one file for each instruction set, and
// all of their names are its own (an unnamed namespace): the same function compiled with different
// flags must never be merged by the linker.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace drop {
namespace {

constexpr int N = DROP_LANES;

typedef float vf __attribute__((vector_size(N * 4)));
typedef int32_t vi __attribute__((vector_size(N * 4)));

inline vf splat(float x) { return x - vf{}; }
inline vi splat(int32_t x) { return x - vi{}; }
inline vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
inline vf min_of(vf a, vf b) { return a < b ? a : b; }
inline vi min_of(vi a, vi b) { return a < b ? a : b; }
inline vi max_of(vi a, vi b) { return a < b ? b : a; }
inline vf abs_of(vf a) { return (vf)((vi)a & splat(int32_t(0x7fffffff))); }

// Whether any lane of a is below its lane of b.
inline bool any_below(vi a, vi b) {
#if defined(__AVX512F__) && DROP_LANES == 16
  return _mm512_cmplt_epi32_mask((__m512i)a, (__m512i)b) != 0;
#elif defined(__AVX2__) && DROP_LANES == 8
  return _mm256_movemask_ps((__m256)((__m256i)(a < b))) != 0;
#else
  vi m = a < b;
  int32_t any = 0;
  for (int l = 0; l < N; l++) any |= m[l];
  return any != 0;
#endif
}

}  // namespace
}  // namespace drop
