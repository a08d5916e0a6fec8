// Products of a few rows with trellis planes, in exact integers. Compiled at run time (nvrtc.py);
// after numbers.cu, rotate.cu and labels.cu, which says how values are found and what that costs.
//
//     q[i, j] = round(x[i, j] * inverse),  |q| <= MOST_STEPS, one step a row of x
//     S_m     = sum_j values_m[label_m[r, j]] * q[i, j]             exact, 64 bits
//     y[i, r] = sum_m float(S_m) * scale_m * step * row_scales[r] + bias[r]     in this order, no fma
//
// The sums being exact, a result depends neither on how the work is cut nor on the rows of x that
// are multiplied together, and is that of every other kernel for the same q (native/kernels/trellis.h).
//
// A warp takes TILE rows and a chunk of inputs, a lane 4 consecutive inputs of every 128: a 4-byte
// load a byte of the streams, two bytes above the tile included. Four values make a word, and dp2a
// adds their products with 4 inputs of 16 bits. In the end the lanes' sums are added and stored; the
// warp that is the last of a tile (`arrived`) adds those of all chunks and planes and writes y.
//
// A block of threads serves one plane, so one plane's tables must fit into its shared memory. It is
// persistent, and alone on its multiprocessor. Its warps take neighbouring tiles, which lie in few
// pages of memory: a multiprocessor remembers where some 16 pages are. Each block begins elsewhere
// in its chunks, else all would read the same columns of a matrix, a power of two apart, at a time.
// On devices from 9.0 on `product` may start while `rotate_floats` runs: it fills the tables, then
// waits.
//
// Compile-time constants: N rows of x in a pass, THREADS, EXTRA (bits that `each_pair` folds, -1 for
// `each_row`), and those of labels.cu.

constexpr int MOST = 4;  // matrices of an input group; more take further launches
// Where the matrices of a group are. Their rows and tiles are counted one after the other.
struct Matrices {
  const u8 *codes[MOST][8];  // planes of each, [bytes of a stream, d]
  int rows[MOST];            // of each; 0 for those that are not there
};

// x [n, d] of a type -> Q x in float32 [n, width], zeros past d, and the bits of the largest size in
// each span, [n, spans]; infinity or more where there is a NaN. Clears `arrived`. Grid: spans of
// `span` outputs (a multiple of `size` and of 128), rows. Shared memory: padded(span) + 32 words.
extern "C" __global__ void rotate_floats(const void *x, const float *signs, const float *factor,
                                         float *rotated, u32 *largest, u32 *arrived, int type,
                                         int d, int odd, int size, int span, int width,
                                         int counters) {
  extern __shared__ uint4 shared[];
  start_dependents();
  wait_for_inputs();
  float *y = (float *)shared;
  u32 *most = (u32 *)(y + padded(span));
  const int first = blockIdx.x * span, lane = threadIdx.x & 31;
  const long long row = blockIdx.y;
  for (int i = threadIdx.x; i < counters && blockIdx.x + blockIdx.y == 0; i += blockDim.x)
    arrived[i] = 0;
  rotate(x, type, row, signs, factor, y, first, span, d, odd, size);
  const float unit = __fdiv_rn(1.0f, __fsqrt_rn((float)size));
  u32 bits = 0;
  for (int i = threadIdx.x; i < span; i += blockDim.x) {
    const float value = __fmul_rn(y[padded(i)], unit);
    const u32 here = __float_as_uint(value) & 0x7fffffffu;
    bits = here > bits ? here : bits;
    if (first + i < width) rotated[row * width + first + i] = value;
  }
  bits = __reduce_max_sync(0xffffffffu, bits);
  if (lane == 0) most[threadIdx.x / 32] = bits;
  __syncthreads();
  if (threadIdx.x < 32) {
    bits = __reduce_max_sync(0xffffffffu, lane < blockDim.x / 32 ? most[lane] : 0);
    if (lane == 0) largest[row * gridDim.x + blockIdx.x] = bits;
  }
}

#ifdef N

// How a row of x is rounded: the largest size in it, as bits, in all lanes.
__device__ inline u32 largest_of(const u32 *largest, int spans) {
  u32 bits = 0;
  for (int i = threadIdx.x & 31; i < spans; i += 32) bits = largest[i] > bits ? largest[i] : bits;
  return __reduce_max_sync(0xffffffffu, bits);
}
__device__ inline float inverse_of(u32 bits) {
  const float largest = __uint_as_float(bits);
  return bits >= 0x7f800000u || largest < 1e-25f ? 0.0f : __fdiv_rn((float)MOST_STEPS, largest);
}
__device__ inline float step_of(u32 bits) {
  const float inverse = inverse_of(bits);
  if (bits >= 0x7f800000u) return __uint_as_float(0x7fc00000u);
  return inverse == 0.0f ? 0.0f : __fdiv_rn(1.0f, inverse);
}

// Two inputs rounded to int16, the first in the low half: adding 1.5 * 2^23 leaves the integer in
// the low bits.
__device__ inline u32 rounded(float low, float high, float inverse) {
  const u32 a = __float_as_uint(__fadd_rn(__fmul_rn(low, inverse), 12582912.0f));
  const u32 b = __float_as_uint(__fadd_rn(__fmul_rn(high, inverse), 12582912.0f));
  return __byte_perm(a, b, 0x5410);
}

// What the parts of a product share.
struct Job {
  const float *rotated;  // of the first row of x of the pass, [n, width]
  int n, d, width;       // n: rows of x from there on
  int chunk;             // inputs of a unit: a multiple of 128
  float inverse[N];
};

// The tile that is number `tile` of all matrices.
struct Place {
  const u8 *codes;  // of its matrix
  int tile, rows;   // in its matrix; rows of that
  int first;        // row of its matrix, counted over all
};
__device__ inline Place place_of(const Matrices &all, int tile, int m) {
  Place at = {all.codes[0][m], tile, all.rows[0], 0};
#pragma unroll
  for (int i = 1; i < MOST; i++) {
    const int before = (at.rows + TILE - 1) / TILE;
    if (at.tile >= before && all.rows[i]) {
      at = {all.codes[i][m], at.tile - before, all.rows[i], at.first + at.rows};
    }
  }
  return at;
}

// Where a plane's values are: in shared memory, and what `each_pair` folds.
struct Held {
  const u8 *tables;
  u32 folds[FOLDS];
};

// sums += the products of 4 inputs of a tile's rows.
template <int K>
__device__ inline void add_products(const Held &held, const u32 (&codes)[TILE * K / 8 + 2],
                                    const u32 (&inputs)[N][2], int (&sums)[N][TILE]) {
  if constexpr (EXTRA >= 0) {
    each_pair<K, EXTRA>(held.tables, held.folds, codes, [&](int r, const u32 (&found)[4]) {
#pragma unroll
      for (int h = 0; h < 2; h++) {  // two inputs of two rows
        const int both = (int)__byte_perm(found[2 * h], found[2 * h + 1], 0x5140);
#pragma unroll
        for (int i = 0; i < N; i++) {
          sums[i][r] = __dp2a_lo((int)inputs[i][h], both, sums[i][r]);
          sums[i][r + 1] = __dp2a_hi((int)inputs[i][h], both, sums[i][r + 1]);
        }
      }
    });
  } else {
    const int lane = threadIdx.x & 31;
    const u32 copy = K == 2 ? lane * 4 % STRIDE : lane * 8 % STRIDE;
    each_row<K>(held.tables, copy, codes, [&](int r, const u32 (&found)[4]) {
      const u32 four = __byte_perm(__byte_perm(found[0], found[1], 0x0040),
                                   __byte_perm(found[2], found[3], 0x0040), 0x5410);
#pragma unroll
      for (int i = 0; i < N; i++)
        sums[i][r] = __dp2a_hi((int)inputs[i][1], (int)four,
                               __dp2a_lo((int)inputs[i][0], (int)four, sums[i][r]));
    });
  }
}

// Sums of a tile over a chunk of inputs; those of row r, summed over lanes, are for lane r.
template <int K>
__device__ inline void sums_of(const Job &job, const Held &held, const Place &place, int split,
                               long long (&total)[N]) {
  constexpr int words = TILE * K / 8 + 2;
  const int lane = threadIdx.x & 31;
  u32 offsets[words], next[words];
  offsets_of<K>(place.tile, place.rows, job.d, offsets);
  const int first = split * job.chunk + lane * 4;
  const int stop = (split + 1) * job.chunk < job.d ? (split + 1) * job.chunk : job.d;
  const int pieces = (stop - split * job.chunk + 127) / 128;
  int at = first + blockIdx.x % pieces * 128;
  int sums[N][TILE];
  for (int i = 0; i < N; i++)
    for (int r = 0; r < TILE; r++) sums[i][r] = 0;
#pragma unroll
  for (int t = 0; t < words; t++) next[t] = load_codes(place.codes + offsets[t], at, job.d);
  for (int left = pieces; left; left--) {
    u32 now[words], inputs[N][2];
    const int after = at + 128 - lane * 4 < stop ? at + 128 : first;
#pragma unroll
    for (int t = 0; t < words; t++) {
      now[t] = next[t];
      next[t] = load_codes(place.codes + offsets[t], after, left > 1 ? job.d : 0);
    }
#pragma unroll
    for (int i = 0; i < N; i++) {
      const int row = i < job.n ? i : 0;
      const uint4 x = *(const uint4 *)(job.rotated + (long long)row * job.width + at);
      inputs[i][0] = rounded(__uint_as_float(x.x), __uint_as_float(x.y), job.inverse[i]);
      inputs[i][1] = rounded(__uint_as_float(x.z), __uint_as_float(x.w), job.inverse[i]);
    }
    add_products<K>(held, now, inputs, sums);
    at = after;
  }
#pragma unroll
  for (int i = 0; i < N; i++)
#pragma unroll
    for (int r = 0; r < TILE; r++) {  // in halves: 32 lanes' sums take 37 bits
      const int low = __reduce_add_sync(0xffffffffu, sums[i][r] & 0xffff);
      const int high = __reduce_add_sync(0xffffffffu, sums[i][r] >> 16);
      if (lane == r) total[i] = high * 65536LL + low;
    }
}

// y [n, rows of all matrices] of a type; row_scales and bias (or null) float32 of all rows; scales,
// tables, values, pairs and folds of each plane; parts int64 [n, splits, P, rows], which need not be
// cleared.
extern "C" __global__ void __launch_bounds__(THREADS)
product(const Matrices all, const Planes planes, const uint2 *tables, const u32 *values,
        const uint4 *pairs, const u32 *folds, const float *scales, const float *rotated, const u32 *largest,
        const float *row_scales, const float *bias, long long *parts, u32 *arrived, void *out,
        int type, int n, int d, int width, int spans, int splits, int chunk) {
  extern __shared__ uint4 shared[];
  const int P = planes.count, m = blockIdx.x % P, first_x = blockIdx.y * N;
  const int lane = threadIdx.x & 31, bits = planes.bits[m], block = blockIdx.x / P;
  int tiles = 0, rows = 0;
  for (int i = 0; i < MOST; i++) {
    tiles += (all.rows[i] + TILE - 1) / TILE;
    rows += all.rows[i];
  }
  // Units are tiles of the first chunk, then of the second ..; a block takes some in a row.
  const int units = tiles * splits, blocks = gridDim.x / P, each = (units + blocks - 1) / blocks;
  const int end = (block + 1) * each < units ? (block + 1) * each : units;
  const int warp = block * each + threadIdx.x / 32;
  if (warp < end && lane < TILE * bits / 8 + 2) {
    const Place at = place_of(all, warp % tiles, m);
    const int byte = bits == 2 ? byte_of<2>(at.tile, lane, at.rows) : byte_of<1>(at.tile, lane, at.rows);
    prefetch(at.codes + (long long)byte * d + warp / tiles * chunk);
  }
  Held held = {(const u8 *)shared, {}};
  if (EXTRA >= 0)
    fill_pairs(shared, pairs + m * (PAIRS / 8));
  else
    fill(shared, tables + m * TABLES, values + m * 16);
  for (int e = 0; e < EXTRA; e++) held.folds[e] = folds[m * FOLDS + e];
  wait_for_inputs();
  Job job = {rotated + (long long)first_x * width, n - first_x, d, width, chunk};
  u32 most[N];
#pragma unroll
  for (int i = 0; i < N; i++) {
    most[i] = largest_of(largest + (long long)(i < job.n ? first_x + i : 0) * spans, spans);
    job.inverse[i] = inverse_of(most[i]);
  }
  __syncthreads();

  for (int unit = warp; unit < end; unit += THREADS / 32) {
    const int whole = unit % tiles, split = unit / tiles;
    const Place place = place_of(all, whole, m);
    long long total[N];
    if (bits == 2)
      sums_of<2>(job, held, place, split, total);
    else
      sums_of<1>(job, held, place, split, total);
    const int row = place.first + place.tile * TILE + lane % TILE;
    const bool inside = place.tile * TILE + lane % TILE < place.rows;
    if (lane < TILE && inside)
#pragma unroll
      for (int i = 0; i < N; i++)
        if (i < job.n)
          parts[(((long long)(first_x + i) * splits + split) * P + m) * rows + row] = total[i];
    __threadfence();
    __syncwarp();
    u32 turn = 0;
    if (lane == 0) turn = atomicAdd(arrived + blockIdx.y * tiles + whole, 1u);
    if (__reduce_max_sync(0xffffffffu, turn) != (u32)(splits * P - 1)) continue;
    __threadfence();
#pragma unroll
    for (int i = 0; i < N; i++) {
      if (lane >= TILE || !inside || i >= job.n) continue;
      const long long at = first_x + i;
      float sum = 0.0f;
      for (int p = 0; p < P; p++) {
        long long exact = 0;
        for (int s = 0; s < splits; s++) exact += __ldcg(parts + ((at * splits + s) * P + p) * rows + row);
        sum = __fadd_rn(sum, __fmul_rn(__ll2float_rn(exact), scales[p]));
      }
      const float y = __fmul_rn(__fmul_rn(sum, step_of(most[i])), row_scales[row]);
      store_number(out, type, at * rows + row, bias ? __fadd_rn(y, bias[row]) : y);
    }
  }
}

#endif
