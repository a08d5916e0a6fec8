// The values of trellis planes, for the CUDA sources that read them. After numbers.cu.
//
// A byte of a stream holds 8/K rows, and their windows end in it and span the two bytes
// before it; labels are linear, so those of a byte are T0[byte] ^ T1[byte before] ^ T2[byte before
// that], one look-up each for all of its rows, a byte a label. Shared memory:
//   tables  [3][256] entries of STRIDE bytes, each many copies of one word (K = 2) or pair (K = 1):
//           with STRIDE = 128 every lane (of a half-warp, for pairs) has a copy in banks of its own.
//   values  64 bytes. They lie in 16 banks, and lanes that read one word share it: no conflict.
// A weight costs a look-up of its value and 3/4 of a bank's turn for its label, and 1.75 (K = 2) or
// 1.375 (K = 1) instructions that use shared memory.
//
// Where shared memory has room for 128 KiB, `each_pair` looks the values of two rows that follow each
// other up at once, by the bits of both windows: half an instruction a weight, no labels. Lanes read
// at random, so that a look-up takes the 3.5 turns of the fullest of 32 banks: 1.77 for 32 weights.
// The table has the newest 16 bits; each older one (OLDER of them) is folded into these: it changes
// both labels as some of these do together (trellis.py finds which).
//
// Compile-time constants: STRIDE (a power of two, 16 to 128), VECTOR (bytes a load of codes may
// take: 4, 1), THREADS of a block.

constexpr int TILE = 16;  // rows of a warp
constexpr int TABLES = 3 * 256;
constexpr int PAIRS = 65536;  // entries of the table of `each_pair`, 16 bits each
constexpr int FOLDS = 3;      // older bits, at most

struct Planes {
  int count, bits[8];
};

#ifdef STRIDE

#ifndef DROP_HOST  // tests compile this file for the host and define this themselves
// Bytes that are 255 where a byte of the word has its highest bit, else 0: four of them, by number.
template <u32 SELECT> __device__ inline u32 signs(u32 word) {
  u32 found;
  asm("prmt.b32 %0, %1, 0, %2;" : "=r"(found) : "r"(word), "n"(SELECT));
  return found;
}
#endif

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

// The table of `each_pair` into shared memory; not yet synchronized.
__device__ inline void fill_pairs(uint4 *to, const uint4 *pairs) {
#pragma unroll 8
  for (int i = threadIdx.x; i < PAIRS / 8; i += THREADS) to[i] = pairs[i];
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

// The last 8 bits of the streams of 4 inputs where pair p of rows of a byte ends; `before`: the byte
// before. The oldest bit is the lowest.
template <int K> __device__ inline u32 last_of(u32 before, u32 own, int p) {
  const int bits = 2 * K * (p + 1);  // of the byte
  const u32 high = 0x01010101u * (255u & (255u << (8 - bits)));
  return bits == 8 ? own : ((own << (8 - bits)) & high) | ((before >> bits) & ~high);
}

// use(row, found) for every second row of a tile: of 4 inputs, the values of `row` and of the row
// after it, the first in the low byte. words: as for `each_row`; pairs: of `fill_pairs`; folds: what
// the bits older than 16 change, the youngest first, in both halves of a word.
template <int K, int OLDER, class Use>
__device__ inline void each_pair(const u8 *pairs, const u32 (&folds)[FOLDS],
                                 const u32 (&words)[TILE * K / 8 + 2], const Use &use) {
  constexpr int count = 4 / K;                        // pairs of a byte
  constexpr int extra = OLDER > K + 1 ? K + 1 : OLDER;  // no window has more than 17 bits
  u32 before[count];                                  // the 8 bits before those of each pair
#pragma unroll
  for (int p = 0; p < count; p++) before[p] = last_of<K>(words[0], words[1], p);
#pragma unroll
  for (int t = 0; t < TILE * K / 8; t++)
#pragma unroll
    for (int p = 0; p < count; p++) {
      const u32 own = last_of<K>(words[t + 1], words[t + 2], p);
      u32 two[2] = {__byte_perm(before[p], own, 0x5140), __byte_perm(before[p], own, 0x7362)};
#pragma unroll
      for (int e = 0; e < extra; e++) {
        const u32 older = words[t] << (8 - 2 * K * (p + 1) + e);  // the bit is the highest of a byte
        two[0] ^= signs<0x9988>(older) & folds[e];
        two[1] ^= signs<0xbbaa>(older) & folds[e];
      }
      u32 found[4];
#pragma unroll
      for (int c = 0; c < 4; c++) {
        const u32 at = c % 2 ? (two[c / 2] >> 15) & 0x1fffeu : (two[c / 2] & 0xffffu) * 2;
        found[c] = *(const u16 *)(pairs + at);
      }
      before[p] = own;
      use((t * count + p) * 2, found);
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
