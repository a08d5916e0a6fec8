// The kernels of NEON once more, for processors with SDOT (trellis_neon.h).
#define DROP_ISA neon_dotprod
#include "isa_neon.cpp"
