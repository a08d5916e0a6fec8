"""Triton kernels are interpreted on the CPU where there is no GPU; decided before Triton loads."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="module", params=["bytes", "trellis"])
def code(request: pytest.FixtureRequest) -> str:
    """Kind of the planes: what depends on it runs for both."""
    return str(request.param)
