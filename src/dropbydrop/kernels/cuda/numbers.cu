// Numbers of three types in memory, for the other CUDA sources: this text stands before theirs.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;

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
// Two numbers rounded to bfloat16, the first in the low half.
__device__ inline u32 to_bfloat16(float low, float high) {
  u32 both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
#endif

__device__ inline float number(float word, int) { return word; }
__device__ inline float number(u16 word, int type) {
  return type == 1 ? half_to_float(word) : __uint_as_float((u32)word << 16);
}

// Element i of an array of float32 (type 0), float16 (1) or bfloat16 (2).
__device__ inline float load_number(const void *array, int type, long long i) {
  return type == 0 ? ((const float *)array)[i] : number(((const u16 *)array)[i], type);
}

__device__ inline void store_number(void *array, int type, long long i, float value) {
  if (type == 0) {
    ((float *)array)[i] = value;
  } else if (type == 1) {
    ((u16 *)array)[i] = float_to_half(value);
  } else {
    ((u16 *)array)[i] = (u16)to_bfloat16(value, 0.0f);
  }
}

