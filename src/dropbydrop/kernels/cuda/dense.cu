// A matrix from P planes of codes, exactly. Compiled at run time (nvrtc.py); after numbers.cu.
//
//     out[r, 8 j .. 8 j + 7] = scales[r] * sum_m C_m[c_m[r, j]]
//
// in float32, planes in their order, rounded once: bit for bit what dropbydrop.code.decode gives.
//
// Layout. Codebooks lie in shared memory as [P][256][COPIES] entries of 16 bytes (eight float16):
// with eight copies the lanes that are served together read different banks whatever their codes
// are. A warp takes AT_ONCE times 32 groups of a row; a lane reads one byte a plane and writes 16
// bytes (32 of float32), its neighbours the next ones. Blocks of threads are persistent.
//
// Compile-time constants: P planes, COPIES (8 or 4), THREADS.

constexpr int AT_ONCE = 4;

struct Planes { const u8 *at[8]; };

#ifdef P
extern "C" __global__ void __launch_bounds__(THREADS)
decode(const Planes planes, const uint4 *books, const void *scales, void *out, int scale_type,
       int type, int rows, int groups) {
  extern __shared__ uint4 shared[];
  for (int i = threadIdx.x; i < P * 256 * COPIES; i += THREADS) shared[i] = books[i / COPIES];
  __syncthreads();
  const int lane = threadIdx.x & 31, pieces = (groups + 32 * AT_ONCE - 1) / (32 * AT_ONCE);
  const uint4 *copy = shared + lane % COPIES;
  for (long long tile = blockIdx.x * (long long)(THREADS / 32) + threadIdx.x / 32;
       tile < (long long)rows * pieces; tile += (long long)gridDim.x * (THREADS / 32)) {
    const long long row = tile / pieces;
    const int first = (int)(tile - row * pieces) * (32 * AT_ONCE) + lane;
    const float scale = load_number(scales, scale_type, row);
    u32 codes[AT_ONCE][P];
#pragma unroll
    for (int k = 0; k < AT_ONCE; k++)
#pragma unroll
      for (int m = 0; m < P; m++)
        codes[k][m] = first + 32 * k < groups
                          ? __ldcs(planes.at[m] + row * groups + first + 32 * k)
                          : 0;
#pragma unroll
    for (int k = 0; k < AT_ONCE; k++) {
      const int group = first + 32 * k;
      if (group >= groups) continue;
      float sum[8];
#pragma unroll
      for (int m = 0; m < P; m++) {
        const uint4 entry = copy[(m * 256 + codes[k][m]) * COPIES];
        const u32 words[4] = {entry.x, entry.y, entry.z, entry.w};
#pragma unroll
        for (int i = 0; i < 8; i++) {
          const float value = half_to_float((u16)(words[i / 2] >> (16 * (i % 2))));
          sum[i] = m ? sum[i] + value : value;
        }
      }
#pragma unroll
      for (int i = 0; i < 8; i++) sum[i] = __fmul_rn(sum[i], scale);
      uint4 *to = (uint4 *)out + (row * groups + group) * (type == 0 ? 2 : 1);
      if (type == 0) {
        to[0] = make_uint4(__float_as_uint(sum[0]), __float_as_uint(sum[1]),
                           __float_as_uint(sum[2]), __float_as_uint(sum[3]));
        to[1] = make_uint4(__float_as_uint(sum[4]), __float_as_uint(sum[5]),
                           __float_as_uint(sum[6]), __float_as_uint(sum[7]));
      } else {
        u32 both[4];
#pragma unroll
        for (int i = 0; i < 4; i++)
          both[i] = type == 1 ? float_to_half(sum[2 * i]) | (u32)float_to_half(sum[2 * i + 1]) << 16
                              : to_bfloat16(sum[2 * i], sum[2 * i + 1]);
        to[0] = make_uint4(both[0], both[1], both[2], both[3]);
      }
    }
  }
}
#endif
