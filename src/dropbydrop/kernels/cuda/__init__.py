"""GPU kernels for a prefix of additive codes, by the names "triton" and "cuda-i8".

    group = CudaGroup([mq, mk, mv], books, rotation, 2, "triton")
    q, k, v = group(x)         # rotation and three products; decodes when x has many rows

Files: cuda_group.py chooses between few rows and a dense matrix; ops.py launches the Triton
kernels of triton_kernels.py; int8.py and dense.py launch CUDA kernels, int8.cu and dense.cu, which
nvrtc.py compiles at run time. Importing this package imports neither Triton nor CUDA.
"""

from .cuda_group import CudaGroup, decode_dense
from .ops import device_entries, rows_linear

__all__ = [
    "CudaGroup",
    "decode_dense",
    "device_entries",
    "rows_linear",
]
