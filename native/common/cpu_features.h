// Which instruction sets the processor has, and which ones a file was compiled with.
//
// A file of one instruction set publishes `kCompiledFeatures` beside its entry points, and whoever
// chooses asks `runs_here` of exactly that. A list of features kept by hand would fall behind the
// compiler flags, and the compiler uses whatever its flags allow.
#pragma once

#include <cstdint>

// Whose files of instruction sets are part of this build (CMakeLists.txt).
#ifndef DROP_PORTABLE
#if defined(__x86_64__) || defined(_M_X64)
#define DROP_X86
#elif defined(__aarch64__)
#define DROP_ARM64
#endif
#endif

namespace drop {

enum CpuFeature : uint32_t {
  kAvx2 = 1 << 0,
  kFma = 1 << 1,
  kF16c = 1 << 2,
  kAvx512f = 1 << 3,
  kAvx512bw = 1 << 4,
  kAvx512dq = 1 << 5,
  kAvx512vl = 1 << 6,
  kAvx512vbmi = 1 << 7,
  kAvx512vnni = 1 << 8,
  kGfni = 1 << 9,
  kAvxVnni = 1 << 10,
  kDotProduct = 1 << 11,  // of AArch64
};

// Of the file that includes this header: hence `static`, a constant of its own in each.
static constexpr uint32_t kCompiledFeatures = 0
#ifdef __AVX2__
                                              | kAvx2
#endif
#ifdef __FMA__
                                              | kFma
#endif
#ifdef __F16C__
                                              | kF16c
#endif
#ifdef __AVX512F__
                                              | kAvx512f
#endif
#ifdef __AVX512BW__
                                              | kAvx512bw
#endif
#ifdef __AVX512DQ__
                                              | kAvx512dq
#endif
#ifdef __AVX512VL__
                                              | kAvx512vl
#endif
#ifdef __AVX512VBMI__
                                              | kAvx512vbmi
#endif
#ifdef __AVX512VNNI__
                                              | kAvx512vnni
#endif
#ifdef __GFNI__
                                              | kGfni
#endif
#ifdef __AVXVNNI__
                                              | kAvxVnni
#endif
#ifdef __ARM_FEATURE_DOTPROD
                                              | kDotProduct
#endif
    ;

// Whether this processor and its operating system have all of `features`.
bool runs_here(uint32_t features);

}  // namespace drop
