"""The device that computes: which one to take, and what it has instructions for."""

from __future__ import annotations

import os
from functools import lru_cache
from importlib.util import find_spec

import torch

from .errors import DropError


def pick_device(device: str) -> str:
    """ "auto" -> "cuda" where there is a CUDA device, else "cpu"; "cuda" -> that of this process.

    Raises:
        DropError: a CUDA device that this machine does not have.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind, index = torch.device(device).type, torch.device(device).index
    except RuntimeError as error:
        raise DropError(f"--device {device}: choose auto, cpu, cuda or cuda:N.") from error
    if kind == "cpu":
        return "cpu"
    if kind != "cuda":
        raise DropError(f"--device {device}: choose auto, cpu, cuda or cuda:N.")
    count = torch.cuda.device_count()
    if index is None:
        index = int(os.environ.get("LOCAL_RANK", 0))
    if not count:
        raise DropError(
            f"--device {device}: PyTorch finds no CUDA device on this machine. Use --device cpu, "
            "or a PyTorch that was built for the GPU here."
        )
    if index >= count:
        raise DropError(
            f"--device {device}: process {index} of this machine needs CUDA device {index}, but "
            f"{count} were found. Start at most {count} processes (--nproc-per-node), or use "
            "--device cpu."
        )
    return f"cuda:{index}"


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions for products in bfloat16."""
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))
    return device.type == "cuda" and torch.cuda.is_bf16_supported()


@lru_cache(maxsize=1)
def triton_interpreted() -> bool:
    """Whether Triton interprets kernels on the CPU in this process (TRITON_INTERPRET=1)."""
    asked = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "on", "true", "y", "yes")
    return asked and find_spec("triton") is not None
