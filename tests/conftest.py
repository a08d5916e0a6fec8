"""Triton kernels are interpreted on the CPU where there is no GPU; decided before Triton loads."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
