"""A quantized checkpoint as the `bound` study asks for it: true rates, and W^ of every level."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dropbydrop import load, view
from dropbydrop.checkpoint import Checkpoint
from dropbydrop.models.block_runner import BlockRunner
from dropbydrop.models.sources import Source, original_of
from dropbydrop.system.console import quiet_transformers
from dropbydrop.system.errors import FormatError

from .data import linear_modules


def checked_original(checkpoint: Checkpoint, model: str | None) -> Source:
    """The unquantized model of a checkpoint: `model`, or what its provenance names.

    Raises:
        DropError: not found, or of other matrices than the checkpoint.
    """
    base_model = checkpoint.quantization.provenance.get("base_model")
    source = original_of(checkpoint.path, checkpoint.config, base_model, model)
    runner = BlockRunner.open(source.folder)
    linears, shapes = set(linear_modules(runner)), checkpoint.shapes
    for module, shape in shapes.items():
        if module not in linears or runner.model.get_submodule(module).weight.shape != shape:
            raise FormatError(
                f"{checkpoint.path} holds {module} as {shape[0]} x {shape[1]}, but {source.name} "
                "does not: it is not the model that the checkpoint was made from."
            )
    return source


def rates_of(checkpoint: Checkpoint, levels: Sequence[int] | None) -> dict[int, float]:
    """Level -> true bits a weight; default: every level whose planes are in the folder.

    Raises:
        PrecisionError, MissingPlaneError: a level that the checkpoint lacks.
    """
    if levels is None:
        present = len(checkpoint.planes_present())
        levels = checkpoint.quantization.served_by(present) or checkpoint.levels[:1]
    return {p: checkpoint.true_bits(checkpoint.require(p)) for p in sorted(levels)}


def reconstruction(path: Path, levels: Sequence[int]) -> Callable[[str, int], Tensor]:
    """reconstruct(module, level) -> W^ float32 [d_out, d_in], from views of one loaded model."""
    with quiet_transformers():
        top = load(path, bits=max(levels), dtype=torch.float32)
    views = {p: view(top, p) for p in levels}

    @torch.no_grad()
    def reconstruct(module: str, level: int) -> Tensor:
        layer: Any = views[level].get_submodule(module)
        if isinstance(layer, torch.nn.Linear):  # left in 16 bits
            return layer.weight.to(torch.float32)
        dense: Tensor = layer.dense_weight(torch.float32)
        return dense

    return reconstruct
