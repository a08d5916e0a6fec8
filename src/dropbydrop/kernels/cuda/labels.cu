// The values of trellis planes, for the CUDA sources that read them. After numbers.cu.
//
// A byte of a stream holds 8/K rows, and their windows end in it and span the two bytes
// before it; labels are linear, so those of a byte are T0[byte] ^ T1[byte before] ^ T2[byte before
// that], one look-up each for all of its rows, a byte a label. Shared memory:
//   tables  [3][256] entries of STRIDE bytes, each many copies of one word (K = 2) or pair (K = 1):
//           with STRIDE = 128 every lane (of a half-warp, for pairs) has a copy in banks of its own.
//   values  64 bytes. They lie in 16 banks, and lanes that read one word share it: no conflict.
// A weight costs a look-up of its value and 3/4 of a bank's turn for its label: shared memory is
// what limits this kernel, 1.75 turns of a warp for 32 weights.
//
// Compile-time constants: STRIDE (a power of two, 16 to 128), VECTOR (bytes a load of codes may
// take: 4, 1), THREADS of a block.

constexpr int TILE = 16;  // rows of a warp
constexpr int TABLES = 3 * 256;

struct Planes {
  int count, bits[8];
};

#ifdef STRIDE

// The tables and values of a plane into shared memory, as the note has them; not yet synchronized.
__device__ inline void fill(uint4 *to, const uint2 *tables, const u32 *values) {
  constexpr int each = STRIDE / 16, count = TABLES * each;
#pragma unroll 8
  for (int k = 0; k < (count + THREADS - 1) / THREADS; k++) {
    const int i = k * THREADS + threadIdx.x;
    const uint2 pair = tables[(i < count ? i : 0) / each];
    if (i < count) to[i] = make_uint4(pair.x, pair.y, pair.x, pair.y);
  }
  if (threadIdx.x < 16) ((u32 *)(to + count))[threadIdx.x] = values[threadIdx.x];
}

// Where the entry of byte c of a word is: bytes from the first entry of a table.
__device__ inline u32 entry_of(u32 word, int c) {
  constexpr int shift = STRIDE == 128 ? 7 : STRIDE == 64 ? 6 : STRIDE == 32 ? 5 : 4;
  const int by = 8 * c - shift;
  return (by < 0 ? word << -by : word >> by) & (255u << shift);
}

// use(row, values of 4 inputs) for all rows of a tile. words: 4 inputs of the two bytes above the
// tile, then of its own; copy: of the entries, for this lane.
template <int K, class Use>
__device__ inline void each_row(const u8 *tables, u32 copy, const u32 (&words)[TILE * K / 8 + 2],
                                const Use &use) {
  constexpr int bytes = TILE * K / 8, pair = 2 / K;
  constexpr u32 next = 256 * STRIDE;
  const u8 *values = tables + TABLES * STRIDE;
  u32 above[4], over[4];  // entries of the byte before, and of the one before that
#pragma unroll
  for (int c = 0; c < 4; c++) {
    over[c] = entry_of(words[0], c) | copy;
    above[c] = entry_of(words[1], c) | copy;
  }
#pragma unroll
  for (int t = 0; t < bytes; t++) {
    u32 labels[4][pair];
#pragma unroll
    for (int c = 0; c < 4; c++) {
      const u32 own = entry_of(words[t + 2], c) | copy;
      if (K == 2) {
        labels[c][0] = *(const u32 *)(tables + own) ^ *(const u32 *)(tables + next + above[c]) ^
                       *(const u32 *)(tables + 2 * next + over[c]);
      } else {
        const uint2 a = *(const uint2 *)(tables + own);
        const uint2 b = *(const uint2 *)(tables + next + above[c]);
        const uint2 e = *(const uint2 *)(tables + 2 * next + over[c]);
        labels[c][0] = a.x ^ b.x ^ e.x;
        labels[c][pair - 1] = a.y ^ b.y ^ e.y;
      }
      over[c] = above[c];
      above[c] = own;
    }
#pragma unroll
    for (int q = 0; q < 8 / K; q++) {
      u32 found[4];
#pragma unroll
      for (int c = 0; c < 4; c++) found[c] = values[(labels[c][q / 4] >> (8 * (q % 4))) & 255];
      use(t * (8 / K) + q, found);
    }
  }
}

// Four consecutive codes from input `at` of a byte of the streams, zeros past d.
__device__ inline u32 load_codes(const u8 *from, int at, int d) {
  if (VECTOR == 4) return at < d ? __ldg((const u32 *)(from + at)) : 0;
  u32 word = 0;
  for (int c = 0; c < 4; c++)
    if (at + c < d) word |= (u32)from[at + c] << (8 * c);
  return word;
}

// The byte of a stream of `rows` rows that tile `tile` reads as number t, from 0 for the second one
// above it. The stream is a ring.
template <int K> __device__ inline int byte_of(int tile, int t, int rows) {
  const int have = (K * rows + 7) / 8, bytes = have < 3 ? 3 : have;
  const int at = tile * (TILE * K / 8) - 2 + t;
  return at < 0 ? at + bytes : at < bytes ? at : bytes - 1;
}

// Where all of these are, in codes [bytes, d].
template <int K>
__device__ inline void offsets_of(int tile, int rows, int d, u32 (&offsets)[TILE * K / 8 + 2]) {
#pragma unroll
  for (int t = 0; t < TILE * K / 8 + 2; t++) offsets[t] = (u32)byte_of<K>(tile, t, rows) * (u32)d;
}

#endif
