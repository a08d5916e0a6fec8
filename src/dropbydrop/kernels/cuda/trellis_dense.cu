// A matrix from trellis planes, exactly. Compiled at run time (nvrtc.py); after numbers.cu and
// labels.cu, which says how values are found.
//
//     out[r, j] = row_scales[r] * sum_m scale_m * values_m[label_m[r, j]]
//
// in float32, planes in their order, rounded once: bit for bit what `CodebookSet.decode` gives. The
// tables of all planes lie in shared memory, so with many planes STRIDE is small and lanes wait for
// each other. A warp takes TILE rows of 128 inputs. Blocks of threads are persistent.

struct Codes {
  const u8 *at[8];  // [bytes of a stream, d]
};

#ifdef STRIDE

constexpr int PLANE = TABLES * STRIDE + 64;  // bytes of shared memory

template <int K>
__device__ inline void add_plane(const u8 *tables, const u8 *codes, float scale, int tile, int at,
                                 int rows, int d, float (&sums)[TILE][4]) {
  constexpr int count = TILE * K / 8 + 2;
  const int lane = threadIdx.x & 31;
  u32 offsets[count], words[count];
  offsets_of<K>(tile, rows, d, offsets);
#pragma unroll
  for (int t = 0; t < count; t++) words[t] = load_codes(codes + offsets[t], at, d);
  each_row<K>(tables, K == 2 ? lane * 4 % STRIDE : lane * 8 % STRIDE, words,
              [&](int r, const u32 (&found)[4]) {
#pragma unroll
                for (int c = 0; c < 4; c++) {  // int8 to float32 without a conversion, which is slow
                  const float value = __uint_as_float(found[c] ^ 0x4b000080u) - 8388736.0f;
                  sums[r][c] = __fadd_rn(sums[r][c], __fmul_rn(value, scale));
                }
              });
}

extern "C" __global__ void __launch_bounds__(THREADS)
decode(const Codes codes, const Planes planes, const uint2 *tables, const u32 *values,
       const float *scales, const void *row_scales, void *out, int scale_type, int type, int rows,
       int d) {
  extern __shared__ uint4 shared[];
  const int lane = threadIdx.x & 31, pieces = (d + 127) / 128;
  for (int m = 0; m < planes.count; m++)
    fill(shared + m * (PLANE / 16), tables + m * TABLES, values + m * 16);
  __syncthreads();
  for (long long unit = blockIdx.x * (long long)(THREADS / 32) + threadIdx.x / 32;
       unit < (long long)((rows + TILE - 1) / TILE) * pieces;
       unit += (long long)gridDim.x * (THREADS / 32)) {
    const int tile = (int)(unit / pieces), at = (int)(unit % pieces) * 128 + lane * 4;
    float sums[TILE][4];
#pragma unroll
    for (int r = 0; r < TILE; r++)
      for (int c = 0; c < 4; c++) sums[r][c] = 0.0f;
    for (int m = 0; m < planes.count; m++) {
      const u8 *own = (const u8 *)shared + m * PLANE;
      if (planes.bits[m] == 2)
        add_plane<2>(own, codes.at[m], scales[m], tile, at, rows, d, sums);
      else
        add_plane<1>(own, codes.at[m], scales[m], tile, at, rows, d, sums);
    }
#pragma unroll
    for (int r = 0; r < TILE; r++) {
      const int row = tile * TILE + r;
      if (row >= rows || at >= d) continue;
      const float scale = load_number(row_scales, scale_type, row);
      const long long to = (long long)row * d + at;
      float y[4];
#pragma unroll
      for (int c = 0; c < 4; c++) y[c] = __fmul_rn(sums[r][c], scale);
      if (VECTOR == 1) {
        for (int c = 0; c < 4 && at + c < d; c++) store_number(out, type, to + c, y[c]);
      } else if (type == 0) {
        *(uint4 *)((float *)out + to) = make_uint4(__float_as_uint(y[0]), __float_as_uint(y[1]),
                                                   __float_as_uint(y[2]), __float_as_uint(y[3]));
      } else if (type == 1) {
        *(uint2 *)((u16 *)out + to) =
            make_uint2(float_to_half(y[0]) | (u32)float_to_half(y[1]) << 16,
                       float_to_half(y[2]) | (u32)float_to_half(y[3]) << 16);
      } else {
        *(uint2 *)((u16 *)out + to) = make_uint2(to_bfloat16(y[0], y[1]), to_bfloat16(y[2], y[3]));
      }
    }
  }
}

#endif
