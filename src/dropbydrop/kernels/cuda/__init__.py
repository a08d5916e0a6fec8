"""GPU kernels for a prefix of additive codes, by the names "triton", "cuda-i8", "cuda-i16".

    group = CudaGroup([mq, mk, mv], books, rotation, 2, "triton")
    q, k, v = group(x)         # rotation and three products; decodes when x has many rows

Files: cuda_group.py chooses between few rows and a dense matrix; ops.py launches the Triton
kernels of triton_kernels.py; int8.py and dense.py launch CUDA kernels for byte planes (int8.cu,
dense.cu), trellis.py those for trellis planes (trellis.cu, trellis_dense.cu, with labels.cu), which
nvrtc.py compiles at run time; numbers.cu and rotate.cu are parts of them. Importing this package
imports neither Triton nor CUDA.
"""

from .cuda_group import CudaGroup, decode_dense, takes
from .ops import device_entries, has_triton, rows_linear

__all__ = [
    "CudaGroup",
    "decode_dense",
    "device_entries",
    "has_triton",
    "rows_linear",
    "takes",
]
