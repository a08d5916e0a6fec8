// The rotation of one row of x in shared memory, and how a launch waits for the one before it: for
// the CUDA sources that multiply few rows. This text stands between numbers.cu and theirs.

#ifndef DROP_HOST  // tests compile this file for the host and define these themselves
__device__ inline void start_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ inline void wait_for_inputs() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ inline void prefetch(const void *at) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
}
#endif

__device__ inline int padded(int i) { return i + (i >> 3); }  // strides of 8 meet in no bank

// x times its signs into y, zeros past d. Eight loads are under way at once: one block of threads
// may be all that runs, and its time is that of the memory's answers.
template <class Word>
__device__ inline void load_signed(const Word *x, int type, const float *signs, float *y, int first,
                                   int span, int d) {
  for (int start = threadIdx.x; start < span; start += 8 * blockDim.x) {
    Word words[8];
    float factors[8];
#pragma unroll
    for (int k = 0; k < 8; k++) {
      const int at = first + start + k * (int)blockDim.x;
      words[k] = x[at < d ? at : d - 1];
      factors[k] = signs[at < d ? at : d - 1];
    }
#pragma unroll
    for (int k = 0; k < 8; k++) {
      const int to = start + k * (int)blockDim.x;
      if (to < span) y[padded(to)] = first + to < d ? number(words[k], type) * factors[k] : 0.0f;
    }
  }
}

// The same with the factor [odd, odd], which mixes the entries of all Hadamard blocks.
template <class Word>
__device__ inline void load_mixed(const Word *x, int type, const float *signs, const float *factor,
                                  float *y, int first, int span, int d, int odd, int size) {
  for (int i = threadIdx.x; i < span; i += blockDim.x) {
    const int at = first + i, column = at % size;
    const float *weights = factor + (at / size) * odd;
    float value = 0.0f;
    if (at < d) {
#pragma unroll 16
      for (int o = 0; o < odd; o++) {
        const int from = o * size + column;
        value = fmaf(weights[o], number(x[from], type) * signs[from], value);
      }
    }
    y[padded(i)] = value;
  }
}

// Q x of `span` consecutive outputs, `first` onwards, into y[padded(0 .. span)]; zeros past d.
// Q = (factor (x) H) signs, H the Hadamard matrix of `size`; `factor` [odd, odd] or null, `signs`
// +-1 or +-factor. The factor comes first, while loading (both commute); then H in passes of up to
// three stages, from the largest stride down.
__device__ inline void rotate(const void *x, int type, long long row, const float *signs,
                              const float *factor, float *y, int first, int span, int d, int odd,
                              int size) {
  const float *wide = (const float *)x + row * d;
  const u16 *narrow = (const u16 *)x + row * d;
  if (factor && type == 0)
    load_mixed(wide, type, signs, factor, y, first, span, d, odd, size);
  else if (factor)
    load_mixed(narrow, type, signs, factor, y, first, span, d, odd, size);
  else if (type == 0)
    load_signed(wide, type, signs, y, first, span, d);
  else
    load_signed(narrow, type, signs, y, first, span, d);
  __syncthreads();
  for (int left = size; left > 1;) {
    const int points = left >= 8 ? 8 : left, h = left / points;
    for (int t = threadIdx.x; t < span / points; t += blockDim.x) {
      const int base = t / h * h * points + t % h;
      float v[8];
#pragma unroll
      for (int k = 0; k < 8; k++) v[k] = k < points ? y[padded(base + k * h)] : 0.0f;
#pragma unroll
      for (int stage = 1; stage < 8; stage *= 2) {
        if (stage < points) {
#pragma unroll
          for (int k = 0; k < 8; k++) {
            if (!(k & stage)) {
              const float low = v[k], high = v[k | stage];
              v[k] = low + high;
              v[k | stage] = low - high;
            }
          }
        }
      }
#pragma unroll
      for (int k = 0; k < 8; k++)
        if (k < points) y[padded(base + k * h)] = v[k];
    }
    __syncthreads();
    left = h;
  }
}

