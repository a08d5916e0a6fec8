"""An order to quantize: what is asked for, checked before any work.

`prepare` refuses by name what would fail later, opens the model and derives what the order leaves
open from its one dial, the preset. Nothing is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from dropbydrop.coding.code import GROUP
from dropbydrop.coding.codebooks import UNIVERSAL
from dropbydrop.coding.encoder import EFFORTS, Effort
from dropbydrop.data.calibration import Calibration
from dropbydrop.errors import CalibrationError, DropError, PrecisionError, UnsupportedModelError
from dropbydrop.models.block_runner import BlockRunner
from dropbydrop.models.embeddings import output_scale
from dropbydrop.models.model_config import context_length
from dropbydrop.models.sources import Source, resolve
from dropbydrop.system.accelerator import pick_device
from dropbydrop.system.memory import map_large_allocations

MAX_BITS = 8
WINDOWS = {"fast": 32, "balanced": 64, "best": 128}
SEQ_LEN = 1024
CODEBOOKS = (UNIVERSAL, "learned")


def check_levels(bits: Sequence[int]) -> tuple[int, ...]:
    """Ascending levels without repeats.

    Raises:
        PrecisionError: none, or one that is not in 1..8.
    """
    levels = tuple(sorted(set(bits)))
    if not levels or any(not 1 <= p <= MAX_BITS for p in levels):
        raise PrecisionError(
            f"--bits {','.join(map(str, bits)) or '(none)'}: give levels from 1 to {MAX_BITS}, "
            "such as --bits 2,3,4. Each level is a precision that the checkpoint can be run at."
        )
    return levels


@dataclass(frozen=True)
class Job:
    """A checked order: what to quantize, and how."""

    source: Source
    runner: BlockRunner
    levels: tuple[int, ...]
    calibration: str | Path | Calibration
    preset: str
    effort: Effort
    codebooks: str
    seed: int
    head_bits: int
    windows: int
    seq_len: int
    backend: str | None


def prepare(
    model: str | Path,
    bits: Sequence[int],
    *,
    calibration: str | Path | Calibration,
    preset: str,
    codebooks: str,
    seed: int,
    head_bits: int,
    windows: int | None,
    seq_len: int,
    device: str,
    backend: str | None,
) -> Job:
    """Check an order and open its model; see `quantize` for the arguments.

    Raises:
        DropError: what can be told before any work.
    """
    map_large_allocations()
    levels = check_levels(bits)
    if preset not in EFFORTS:
        raise DropError(f"preset {preset!r}: choose one of {', '.join(EFFORTS)}.")
    if codebooks not in CODEBOOKS:
        raise DropError(f"--codebooks {codebooks!r}: choose one of {', '.join(CODEBOOKS)}.")
    if head_bits not in (8, 16):
        raise DropError(f"--head-bits {head_bits}: choose 8 or 16.")
    source = resolve(model)
    runner = BlockRunner.open(source.folder, device=pick_device(device))
    check_model(runner, head_bits)
    if isinstance(calibration, Calibration):
        windows, seq_len = _check_windows(calibration, runner, windows)
    return Job(
        source,
        runner,
        levels,
        calibration,
        preset,
        EFFORTS[preset],
        codebooks,
        seed,
        head_bits,
        windows or WINDOWS[preset],
        min(seq_len, context_length(runner.model.config) or SEQ_LEN),
        backend,
    )


def _check_windows(
    calibration: Calibration, runner: BlockRunner, windows: int | None
) -> tuple[int, int]:
    """Number and length of ready windows that this model can run."""
    ids, vocab = calibration.ids, runner.model.config.get_text_config().vocab_size
    good = ids.ndim == 2 and ids.dtype == torch.int64 and ids.shape[0] > 0
    longest = context_length(runner.model.config) or SEQ_LEN
    if not good or not 2 <= ids.shape[1] <= longest:
        raise CalibrationError(
            f"calibration windows {ids.dtype} of shape {list(ids.shape)}: give int64 [n, T], with "
            f"T from 2 to the {longest:,} tokens of the model's context."
        )
    if windows not in (None, ids.shape[0]):
        raise CalibrationError(f"{ids.shape[0]} ready windows, but {windows} are asked for.")
    if int(ids.min()) < 0 or int(ids.max()) >= vocab:
        raise CalibrationError(
            f"calibration windows with tokens from {int(ids.min())} to {int(ids.max())}, for a "
            f"vocabulary of {vocab:,}: they are another tokenizer's."
        )
    return ids.shape[0], ids.shape[1]


def check_model(runner: BlockRunner, head_bits: int) -> None:
    """Refuse by name, before any work, what would fail later.

    Raises:
        UnsupportedModelError: inputs that groups do not divide, or an embedding that computes
            more than a look-up and shall have 8-bit rows.
    """
    for module in runner.embedding_modules:
        embedding = runner.model.get_submodule(module)
        if head_bits == 8 and output_scale(embedding) is None:
            raise UnsupportedModelError(
                f"{module} is a {type(embedding).__name__}, which may compute more than a look-up, "
                "so its rows cannot be stored in 8 bits; quantize this model with --head-bits 16."
            )
    prefix = f"{runner.blocks_name}."
    for name, linear in runner.model.named_modules():
        if name.startswith(prefix) and isinstance(linear, nn.Linear) and linear.in_features % GROUP:
            raise UnsupportedModelError(
                f"{name} has {linear.in_features} inputs, which is not a multiple of {GROUP}, and "
                f"codes cover groups of {GROUP} inputs. This version cannot quantize this model."
            )
