// The kernels of AVX2 once more, for processors that have GFNI and AVX-VNNI but no AVX-512: trellis
// planes are half as fast again (trellis_avx2.h).
#define DROP_ISA avx2_gfni
#include "isa_avx2.cpp"
