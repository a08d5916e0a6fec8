"""Matrices with correlated inputs, for tests of quantizers."""

from __future__ import annotations

import torch
from torch import Tensor

from dropbydrop.coding.objective import weighted_errors
from dropbydrop_research.baselines.additive import Training

SHORT = Training(kmeans_iterations=20, steps=20, epochs=4)


def matrix_and_gram(d_out: int = 6, d_in: int = 144, seed: int = 0) -> tuple[Tensor, Tensor]:
    """W, and H of correlated inputs with unequal energies (full rank)."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(d_out, d_in, generator=generator) * 0.05
    x = torch.randn(4 * d_in, d_in, generator=generator)
    x = x @ torch.randn(d_in, d_in, generator=generator) / d_in**0.5
    x = x * torch.linspace(0.3, 2, d_in)[torch.randperm(d_in, generator=generator)]
    return weight, x.T @ x / len(x)


def error(weight: Tensor, decoded: Tensor, h: Tensor) -> float:
    return weighted_errors(weight, [decoded], h)[0]
