// Products of a few rows with P planes of codes, in 8-bit integers. Compiled at run time (nvrtc.py).
//
//     y[i, r] = scales[r] * sum_b units[i, b] * sum_m book_units[m] * sum_{j in b} C_m[c_m[r, j]] . x[i, j]
//
// b runs over blocks of 16 groups (128 inputs), j over the groups of a block. The innermost sums are
// exact: bytes times bytes in 32-bit integers (dp4a), at most 16 * 8 * 127 * 127 < 2^21. Around them
// float32, in this order: planes, then the blocks of a lane, then lanes by butterflies.
//
// Layout. A team of LANES lanes takes R rows of W; a lane takes one block at a time: 16 codes of a
// plane and row are one 16-byte load, and neighbouring lanes read neighbouring bytes. Shared memory:
//   books  [P][256][COPIES] of 8 bytes. With 16 copies the lanes of a half-warp read 16 different
//          pairs of banks whatever their codes are: one look-up a lane without conflicts, 8 bytes of
//          shared memory a code, where 16-bit entries cost 16 and a gather through L1 a cache line.
//   x      [N][blocks][8] of 16 bytes, the eight pieces of block b exchanged by xor with b % 8, so
//          that lanes reading piece j of different blocks do not meet in a bank.
// Blocks of threads are persistent: books and x are loaded once and serve many rows.
//
// Compile-time constants: P planes, N rows of x in a pass, R rows of W of a team, LANES (a power of
// two up to 32), COPIES (a power of two up to 16), VECTOR (bytes a load of codes may take: 16, 4, 1).
// The result depends on none but P and LANES, and LANES on the shape alone (int8.py).

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;

struct Planes { const u8 *at[8]; };

#ifndef DROP_HOST  // tests compile this file for the host and define these themselves
__device__ inline float half_to_float(u16 h) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
  return f;
}
__device__ inline u16 float_to_half(float f) {
  u16 h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
}
#endif

// Element i of an array of float32 (type 0), float16 (1) or bfloat16 (2).
__device__ inline float load_number(const void *array, int type, long long i) {
  if (type == 0) return ((const float *)array)[i];
  const u16 bits = ((const u16 *)array)[i];
  return type == 1 ? half_to_float(bits) : __uint_as_float((u32)bits << 16);
}

__device__ inline void store_number(void *array, int type, long long i, float value) {
  if (type == 0) {
    ((float *)array)[i] = value;
  } else if (type == 1) {
    ((u16 *)array)[i] = float_to_half(value);
  } else {  // round to nearest even; a NaN stays one
    const u32 bits = __float_as_uint(value);
    ((u16 *)array)[i] =
        value != value ? 0x7fff : (u16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
}

// x float32 [n, d] -> steps int8 [n, 128 * blocks] and units float32 [n, blocks], x ~ units * steps.
// One warp a block; inputs past d count as zeros. A block with a NaN or infinity gets a NaN unit.
extern "C" __global__ void round_rows(const float *x, signed char *steps, float *units, int n,
                                      int d, int blocks) {
  const int lane = threadIdx.x & 31;
  const long long block = (long long)blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5);
  if (block >= (long long)n * blocks) return;  // the same for all lanes of a warp
  const long long row = block / blocks;
  const int first = (int)(block % blocks) * 128 + lane * 4;
  float value[4], largest = 0.0f, bad = 0.0f;
  for (int i = 0; i < 4; i++) {
    value[i] = first + i < d ? x[row * d + first + i] : 0.0f;
    largest = fmaxf(largest, fabsf(value[i]));
    bad += value[i] - value[i];
  }
  for (int offset = 16; offset; offset >>= 1) {
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, offset));
    bad += __shfl_xor_sync(0xffffffffu, bad, offset);
  }
  const float inverse = largest > 0.0f ? __fdiv_rn(127.0f, largest) : 0.0f;
  for (int i = 0; i < 4; i++) {
    steps[block * 128 + lane * 4 + i] = (signed char)__float2int_rn(value[i] * inverse);
  }
  if (lane == 0) units[block] = __fdiv_rn(largest, 127.0f) + bad;
}

#ifdef P

// Sixteen codes from group `first` of a row, zeros past its end.
__device__ inline uint4 load_codes(const u8 *row, int first, int groups) {
  if (VECTOR == 16) return __ldcs((const uint4 *)(row + first));
  u32 word[4] = {0, 0, 0, 0};
  for (int i = 0; i < 4; i++) {
    if (VECTOR == 4) {
      if (first + 4 * i < groups) word[i] = __ldcs((const u32 *)(row + first) + i);
    } else {
      for (int j = 0; j < 4; j++) {
        const int at = first + 4 * i + j;
        if (at < groups) word[i] |= (u32)row[at] << (8 * j);
      }
    }
  }
  return make_uint4(word[0], word[1], word[2], word[3]);
}

__device__ inline u32 word_of(uint4 v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

extern "C" __global__ void __launch_bounds__(THREADS)
product(Planes planes, const uint2 *books, const float *book_units, const uint4 *steps,
        const float *units, const void *scales, const void *bias, void *out, int scale_type,
        int bias_type, int out_type, int n, int d_out, int groups) {
  extern __shared__ uint4 shared[];
  const int blocks = (groups + 15) / 16;
  uint4 *x = shared + P * 256 * COPIES / 2;
  uint2 *book = (uint2 *)shared;
  const int first_x = blockIdx.y * N;  // rows first_x .. first_x + N of x
  for (int i = threadIdx.x; i < P * 256 * COPIES; i += THREADS) book[i] = books[i / COPIES];
  for (int i = threadIdx.x; i < N * blocks * 8; i += THREADS) {
    const int b = i / 8 % blocks, row = first_x + i / 8 / blocks;
    const uint4 zero = make_uint4(0, 0, 0, 0);
    x[i - i % 8 + ((i ^ b) & 7)] =
        row < n ? steps[((long long)row * blocks + b) * 8 + i % 8] : zero;
  }
  __syncthreads();

  const int lane = threadIdx.x & 31, own = lane % LANES, team = lane / LANES;
  const int warp = blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
  const int rows_of_warp = 32 / LANES * R;
  const uint2 *copy = book + lane % COPIES;
  float unit_of[P];
  for (int m = 0; m < P; m++) unit_of[m] = book_units[m];

  for (long long tile = (long long)warp * rows_of_warp; tile < d_out;
       tile += (long long)gridDim.x * (THREADS / 32) * rows_of_warp) {
    const long long first_row = tile + team * R;
    float sum[N][R];
    for (int i = 0; i < N; i++)
      for (int r = 0; r < R; r++) sum[i][r] = 0.0f;
    for (int b = own; b < blocks; b += LANES) {
      uint4 codes[R][P];
#pragma unroll
      for (int r = 0; r < R; r++)
#pragma unroll
        for (int m = 0; m < P; m++)
          codes[r][m] = first_row + r < d_out
                            ? load_codes(planes.at[m] + (first_row + r) * groups, b * 16, groups)
                            : make_uint4(0, 0, 0, 0);
      int dots[N][R][P];
#pragma unroll
      for (int i = 0; i < N; i++)
#pragma unroll
        for (int r = 0; r < R; r++)
#pragma unroll
          for (int m = 0; m < P; m++) dots[i][r][m] = 0;
#pragma unroll
      for (int piece = 0; piece < 8; piece++) {  // two groups
        uint4 inputs[N];
#pragma unroll
        for (int i = 0; i < N; i++) inputs[i] = x[(i * blocks + b) * 8 + (piece ^ (b & 7))];
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const int at = 2 * piece + half;
#pragma unroll
          for (int r = 0; r < R; r++)
#pragma unroll
            for (int m = 0; m < P; m++) {
              const u32 code = (word_of(codes[r][m], at / 4) >> (8 * (at % 4))) & 255;
              const uint2 entry = copy[(m * 256 + code) * COPIES];
#pragma unroll
              for (int i = 0; i < N; i++) {
                const u32 low = half ? inputs[i].z : inputs[i].x;
                const u32 high = half ? inputs[i].w : inputs[i].y;
                dots[i][r][m] =
                    __dp4a((int)entry.y, (int)high, __dp4a((int)entry.x, (int)low, dots[i][r][m]));
              }
            }
        }
      }
#pragma unroll
      for (int i = 0; i < N; i++) {
        const float unit = first_x + i < n ? units[(long long)(first_x + i) * blocks + b] : 0.0f;
#pragma unroll
        for (int r = 0; r < R; r++) {
          float value = 0.0f;
#pragma unroll
          for (int m = 0; m < P; m++) value = fmaf(unit_of[m], (float)dots[i][r][m], value);
          sum[i][r] = fmaf(unit, value, sum[i][r]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < N; i++)
#pragma unroll
      for (int r = 0; r < R; r++) {
        float total = sum[i][r];
#pragma unroll
        for (int offset = LANES / 2; offset; offset >>= 1)
          total += __shfl_xor_sync(0xffffffffu, total, offset);
        const long long row = first_row + r;
        if (own == 0 && row < d_out && first_x + i < n) {
          const float scaled = __fmul_rn(total, load_number(scales, scale_type, row));
          store_number(out, out_type, (first_x + i) * (long long)d_out + row,
                bias ? scaled + load_number(bias, bias_type, row) : scaled);
        }
      }
  }
}

#endif
