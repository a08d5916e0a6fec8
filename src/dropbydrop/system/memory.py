"""What this process takes of the machine: its peak memory, and an allocator that gives back."""

from __future__ import annotations

import ctypes
import resource
import sys
from pathlib import Path

import torch

_M_MMAP_THRESHOLD = -3  # <malloc.h>


def map_large_allocations() -> None:
    """Have the allocator return every large block of memory to the system when it is freed.

    As large blocks are freed, glibc raises the size from which it maps them on their own, up to
    32 MB; smaller matrices then live on a heap that long-lived small objects fragment, and the peak
    grows with the number of blocks (a tenth from 4 to 12). A fixed limit keeps it flat, if it is
    set before the model is built. It holds for the rest of the process; other allocators are left
    alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def peak_memory() -> int:
    """Peak resident bytes of this process so far."""
    try:  # getrusage also counts what the process was before exec: a copy of its parent
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError, ValueError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def device_peak(device: torch.device) -> int:
    """Peak bytes that this process held on a GPU so far; 0 for the CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
