// Runs a CUDA kernel on the host, thread by thread: enough of CUDA C for this package's. For tests.
//
// CUDA threads are fibers of one thread, so a run is reproducible; __syncthreads is a meeting of the
// block, a shuffle two meetings of the warp around an exchange in memory. Blocks run one after the
// other, so shared memory is one array. Integer and float arithmetic is that of IEEE, as on the GPU (compile without contraction).
#pragma once
#include <math.h>
#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define DROP_HOST 1
#define __device__
#define __global__
#define __shared__
#define __launch_bounds__(...)

struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct Index { int x, y; };

inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

inline Index threadIdx, blockIdx, blockDim, gridDim;
alignas(16) uint4 shared[(256 << 10) / 16];

// One fiber a CUDA thread: it runs until it has to wait for others.
struct Meeting {
  int arrived = 0, passed = 0;
};
struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(256 << 10);
  bool done = false;
};
inline ucontext_t scheduler;
inline std::vector<std::unique_ptr<Fiber>> fibers;
inline Meeting whole_block;
inline std::vector<Meeting> warps;
inline std::vector<float> slots;
inline std::function<void()> body;

// Wait until `count` threads have come here: others run meanwhile.
inline void meet(Meeting &meeting, int count) {
  const int turn = meeting.passed, own = threadIdx.x;
  if (++meeting.arrived == count) {
    meeting.arrived = 0;
    meeting.passed++;
  }
  while (meeting.passed == turn) {
    swapcontext(&fibers[own]->context, &scheduler);
    threadIdx = {own, 0};
  }
}

inline void __syncthreads() { meet(whole_block, blockDim.x); }

inline float __shfl_xor_sync(unsigned, float value, int offset) {
  const int own = threadIdx.x;
  Meeting &warp = warps[own / 32];
  slots[own] = value;
  meet(warp, 32);
  const float got = slots[own ^ offset];
  meet(warp, 32);
  return got;
}

// The result of `add(one, other)` over the values of a warp.
template <class T, class Add> T reduced(T value, const Add &add) {
  static std::vector<T> values(1024);
  const int own = threadIdx.x, first = own / 32 * 32;
  values[own] = value;
  meet(warps[own / 32], 32);
  T total = values[first];
  for (int i = 1; i < 32; i++) total = add(total, values[first + i]);
  meet(warps[own / 32], 32);
  return total;
}
inline int __reduce_add_sync(unsigned, int value) {
  return reduced(value, [](int a, int b) { return int(unsigned(a) + unsigned(b)); });
}
inline unsigned __reduce_max_sync(unsigned, unsigned value) {
  return reduced(value, [](unsigned a, unsigned b) { return a > b ? a : b; });
}
inline void __syncwarp() { meet(warps[threadIdx.x / 32], 32); }
inline void __threadfence() {}
inline unsigned atomicAdd(unsigned *at, unsigned value) { return (*at += value) - value; }

template <class T> T __ldcs(const T *at) { return *at; }
template <class T> T __ldcg(const T *at) { return *at; }
template <class T> T __ldg(const T *at) { return *at; }

inline unsigned __byte_perm(unsigned a, unsigned b, unsigned select) {
  uint8_t from[8], to[4];
  std::memcpy(from, &a, 4);
  std::memcpy(from + 4, &b, 4);
  for (int i = 0; i < 4; i++) to[i] = from[(select >> (4 * i)) & 7];
  std::memcpy(&a, to, 4);
  return a;
}
// Of four bytes that SELECT names, 255 where the highest bit is set, else 0.
template <unsigned SELECT> unsigned signs(unsigned word) {
  unsigned found = 0;
  for (int i = 0; i < 4; i++) {
    const unsigned which = (SELECT >> (4 * i)) & 7;
    if (which < 4 && (word >> (8 * which + 7)) & 1) found |= 255u << (8 * i);
  }
  return found;
}
// Two 16-bit integers times the bytes of b from `first` on.
inline int dot2(int a, int b, int c, int first) {
  int16_t u[2];
  int8_t v[4];
  std::memcpy(u, &a, 4);
  std::memcpy(v, &b, 4);
  return c + u[0] * v[first] + u[1] * v[first + 1];
}
inline int __dp2a_lo(int a, int b, int c) { return dot2(a, b, c, 0); }
inline int __dp2a_hi(int a, int b, int c) { return dot2(a, b, c, 2); }

inline int __dp4a(int a, int b, int c) {
  int8_t u[4], v[4];
  std::memcpy(u, &a, 4);
  std::memcpy(v, &b, 4);
  for (int i = 0; i < 4; i++) c += int(u[i]) * int(v[i]);
  return c;
}

inline void start_dependents() {}
inline void wait_for_inputs() {}
inline void prefetch(const void *) {}
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __ll2float_rn(long long a) { return float(a); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline int __float2int_rn(float a) { return a != a ? 0 : int(lrintf(a)); }
inline float __uint_as_float(unsigned a) { float f; std::memcpy(&f, &a, 4); return f; }
inline unsigned __float_as_uint(float f) { unsigned a; std::memcpy(&a, &f, 4); return a; }
inline float half_to_float(unsigned short bits) {
  _Float16 h;
  std::memcpy(&h, &bits, 2);
  return float(h);
}
inline unsigned short float_to_half(float f) {
  const _Float16 h = _Float16(f);
  unsigned short bits;
  std::memcpy(&bits, &h, 2);
  return bits;
}

inline unsigned to_bfloat16(float low, float high) {  // to nearest even; a NaN stays one
  const auto half = [](float f) {
    const unsigned bits = __float_as_uint(f);
    return f != f ? 0x7fffu : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  };
  return half(low) | half(high) << 16;
}

inline void start(int thread) {
  threadIdx = {thread, 0};
  body();
  fibers[thread]->done = true;
}

template <class Kernel> void run(int grid_x, int grid_y, int threads, const Kernel &kernel) {
  blockDim = {threads, 1};
  gridDim = {grid_x, grid_y};
  body = kernel;
  for (int block = 0; block < grid_x * grid_y; block++) {
    blockIdx = {block % grid_x, block / grid_x};
    whole_block = {};
    warps.assign(threads / 32, {});
    slots.assign(threads, 0);
    fibers.clear();
    for (int i = 0; i < threads; i++) {
      fibers.push_back(std::make_unique<Fiber>());
      ucontext_t &context = fibers[i]->context;
      getcontext(&context);
      context.uc_stack.ss_sp = fibers[i]->stack.data();
      context.uc_stack.ss_size = fibers[i]->stack.size();
      context.uc_link = &scheduler;
      makecontext(&context, (void (*)())start, 1, i);
    }
    for (int left = threads; left;) {
      left = 0;
      for (int i = 0; i < threads; i++) {
        if (fibers[i]->done) continue;
        threadIdx = {i, 0};
        swapcontext(&scheduler, &fibers[i]->context);
        left += !fibers[i]->done;
      }
    }
  }
}
