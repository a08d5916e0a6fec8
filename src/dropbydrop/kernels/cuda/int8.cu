// Products of a few rows with P planes of codes, in 8-bit integers. Compiled at run time (nvrtc.py).
//
//     y[i, r] = scales[r] * sum_b units[i, b] * sum_m book_units[m] * sum_{j in b} C_m[c_m[r, j]] . x[i, j]
//
// b runs over blocks of 16 groups (128 inputs), j over the groups of a block. The innermost sums are
// exact: bytes times bytes in 32-bit integers (dp4a), at most 16 * 8 * 127 * 127 < 2^21. Around them
// float32, in this order: planes, then the blocks of a lane, then lanes by butterflies.
//
// Two launches an input group, however many matrices read its input:
//   rotate_rows  x -> Q x (float32, in shared memory) -> bytes and a unit for each 128 of them.
//   product      all rows of all matrices of the group.
// On devices from 9.0 on each may start while the kernel before it runs. The second loads the
// codebooks and asks for its first codes, then waits (`wait_for_inputs`) before it reads x.
//
// Layout. A crew of LANES lanes takes R rows of W; a lane takes one block at a time: 16 codes of a
// plane and row are one 16-byte load, and neighbouring lanes read neighbouring bytes. Shared memory:
//   books  [P][256][COPIES] of 8 bytes. With 16 copies the lanes of a half-warp read 16 different
//          pairs of banks whatever their codes are: one look-up a lane without conflicts, 8 bytes of
//          shared memory a code, where 16-bit entries cost 16 and a gather through L1 a cache line.
//   x      [N][blocks][8] of 16 bytes, the eight pieces of block b exchanged by xor with b % 8, so
//          that lanes reading piece j of different blocks do not meet in a bank.
// Blocks of threads are persistent: books and x are loaded once and serve many rows.
//
// Compile-time constants: P planes, N rows of x in a pass, R rows of W of a crew, LANES (a power of
// two up to 32), COPIES (a power of two up to 16), VECTOR (bytes a load of codes may take: 16, 4, 1),
// MATRICES of the group, RESIDENT (blocks that shared memory lets a multiprocessor hold: a bound on
// registers). The result depends on none but P and LANES, and LANES on the shape alone (int8.py).

constexpr int MOST = 4;  // matrices of an input group; more take further launches

// Where the matrices of a group are. Their rows are counted one after the other.
struct Matrices {
  const u8 *codes[MOST][8];  // planes of each, [rows, groups]
  int end[MOST];             // the row after the last of each
};

// x [n, d] of a type -> steps int8 [n, 128 * blocks] and units float32 [n, blocks], Q x ~ units *
// steps. Inputs past d count as zeros; a block with a NaN or infinity gets a NaN unit. Grid: spans of
// `span` outputs (a multiple of `size` and of 128), rows. Shared memory: padded(span) floats.
extern "C" __global__ void rotate_rows(const void *x, const float *signs, const float *factor,
                                       signed char *steps, float *units, int type, int d, int odd,
                                       int size, int span, int blocks) {
  extern __shared__ uint4 shared[];
  start_dependents();
  wait_for_inputs();
  float *y = (float *)shared;
  const int first = blockIdx.x * span, lane = threadIdx.x & 31;
  const long long row = blockIdx.y;
  rotate(x, type, row, signs, factor, y, first, span, d, odd, size);
  const float unit = __fdiv_rn(1.0f, __fsqrt_rn((float)size));
  for (int b = threadIdx.x / 32; b < span / 128 && first / 128 + b < blocks; b += blockDim.x / 32) {
    float value[4], largest = 0.0f, bad = 0.0f;
    for (int i = 0; i < 4; i++) {
      value[i] = __fmul_rn(y[padded(b * 128 + lane * 4 + i)], unit);
      largest = fmaxf(largest, fabsf(value[i]));
      bad += value[i] - value[i];
    }
    for (int offset = 16; offset; offset >>= 1) {
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, offset));
      bad += __shfl_xor_sync(0xffffffffu, bad, offset);
    }
    const float inverse = largest > 0.0f ? __fdiv_rn(127.0f, largest) : 0.0f;
    u32 word = 0;
    for (int i = 0; i < 4; i++)
      word |= (u32)(__float2int_rn(value[i] * inverse) & 255) << (8 * i);
    const long long block = row * blocks + first / 128 + b;
    ((u32 *)steps)[block * 32 + lane] = word;
    if (lane == 0) units[block] = __fdiv_rn(largest, 127.0f) + bad;
  }
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

// Where the entry of code i of a word is in `books`: bytes from the entry of code 0.
__device__ inline u32 offset_of(u32 word, int i) {
  constexpr int bits = COPIES == 16 ? 7 : COPIES == 8 ? 6 : 5;  // COPIES * 8 bytes an entry
  const int shift = 8 * i - bits;
  return (shift < 0 ? word << -shift : word >> shift) & (255u << bits);
}

__device__ inline u32 word_of(uint4 v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// The matrix of a row: selected, as parameters that are indexed at run time would go to memory.
__device__ inline const u8 *row_of(const Matrices &all, int m, int row, int groups) {
  const u8 *at = all.codes[0][m];
  int first = 0;
#pragma unroll
  for (int i = 1; i < MATRICES; i++) {
    if (row >= all.end[i - 1]) {
      at = all.codes[i][m];
      first = all.end[i - 1];
    }
  }
  return at + (long long)(row - first) * groups;
}

// y [n, rows of all matrices] of a type; scales and bias (or null) float32 of all rows.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
product(const Matrices all, const uint2 *books, const float *book_units, const uint4 *steps,
        const float *units, const float *scales, const float *bias, void *out, int type, int n,
        int groups) {
  extern __shared__ uint4 shared[];
  const int blocks = (groups + 15) / 16, rows = all.end[MATRICES - 1];
  uint4 *x = shared + P * 256 * COPIES / 2;
  uint2 *book = (uint2 *)shared;
  const int first_x = blockIdx.y * N;  // rows first_x .. first_x + N of x
  const int lane = threadIdx.x & 31, own = lane % LANES, crew = lane / LANES;
  const int warp = blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
  const int rows_of_warp = 32 / LANES * R;

#pragma unroll
  for (int r = 0; r < R; r++) {
    const int row = warp * rows_of_warp + crew * R + r;
#pragma unroll
    for (int m = 0; m < P; m++)
      if (row < rows && own < blocks) prefetch(row_of(all, m, row, groups) + own * 16);
  }
  for (int i = threadIdx.x; i < P * 256 * COPIES; i += THREADS) book[i] = books[i / COPIES];
  wait_for_inputs();
  for (int i = threadIdx.x; i < N * blocks * 8; i += THREADS) {
    const int b = i / 8 % blocks, row = first_x + i / 8 / blocks;
    const uint4 zero = make_uint4(0, 0, 0, 0);
    x[i - i % 8 + ((i ^ b) & 7)] =
        row < n ? steps[((long long)row * blocks + b) * 8 + i % 8] : zero;
  }
  __syncthreads();

  const u32 copy = lane % COPIES * 8;  // bits that no offset has
  float unit_of[P];
  for (int m = 0; m < P; m++) unit_of[m] = book_units[m];

  for (long long tile = (long long)warp * rows_of_warp; tile < rows;
       tile += (long long)gridDim.x * (THREADS / 32) * rows_of_warp) {
    const int first_row = (int)tile + crew * R;
    const u8 *from[R][P];
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
      for (int m = 0; m < P; m++)
        from[r][m] = row_of(all, m, first_row + r < rows ? first_row + r : 0, groups);
    float sum[N][R];
    for (int i = 0; i < N; i++)
      for (int r = 0; r < R; r++) sum[i][r] = 0.0f;
    for (int b = own; b < blocks; b += LANES) {
      uint4 codes[R][P];
#pragma unroll
      for (int r = 0; r < R; r++)
#pragma unroll
        for (int m = 0; m < P; m++)
          codes[r][m] = load_codes(from[r][m], b * 16, groups);
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
              const u32 offset = offset_of(word_of(codes[r][m], at / 4), at % 4) | copy;
              const uint2 entry = *(const uint2 *)((const u8 *)(book + m * 256 * COPIES) + offset);
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
        const int row = first_row + r;
        if (own == 0 && row < rows && first_x + i < n) {
          const float scaled = __fmul_rn(total, scales[row]);
          store_number(out, type, (first_x + i) * (long long)rows + row,
                       bias ? scaled + bias[row] : scaled);
        }
      }
  }
}

#endif
