"""A request to tune, opened and checked: what is tuned, on what, and how; refusals by name.

Everything that can be told before any work is told here: planes that are missing or damaged, levels
that are not there, experts, and a model that the checkpoint was not made from. The last is judged
by the config and by the weights themselves: decoded matrices correlate with the original's. A
sibling of the model (another fine-tune of the same weights) passes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from dropbydrop.checkpoint import Checkpoint
from dropbydrop.checkpoint.config import MANIFEST_FILE
from dropbydrop.data.calibration import Calibration, file_of, load_windows
from dropbydrop.models.block_runner import BlockRunner
from dropbydrop.models.model_config import context_length
from dropbydrop.models.sources import Source, original_of
from dropbydrop.system.accelerator import multiplies_bfloat16, pick_device
from dropbydrop.system.digest import CODING_ROOMS, code_digest, digest, model_digest
from dropbydrop.system.errors import DropError, FormatError
from dropbydrop.system.version import __version__

from .config import TuneConfig
from .student import Student, refuse_experts
from .writer import check_intact

_LIKE = 0.3  # correlation of decoded and original weights; that of other models is near 0


@dataclass(frozen=True)
class Job:
    """What to tune, and how.

    Attributes:
        config: complete settings: nothing in them is left open.
        source: the original model; teacher: its blocks.
        levels: levels to supervise, ascending.
        ready: windows that the caller made; None: they are drawn as `config.calibration` says.
    """

    config: TuneConfig
    checkpoint: Checkpoint
    source: Source
    teacher: BlockRunner
    levels: tuple[int, ...]
    ready: Calibration | None = None

    @property
    def half(self) -> bool:
        """Whether matrix products run in bfloat16."""
        return multiplies_bfloat16(self.teacher.device)

    @property
    def held(self) -> int:
        """Windows that are set apart for measuring."""
        return held_of(self.config.windows)

    def windows(self, progress: bool = True) -> Calibration:
        """The tuning windows; `progress`: show how the model writes them.

        Raises:
            CalibrationError: missing, unreadable or too short a text.
        """
        if self.ready is not None:
            return self.ready
        return draw_windows(self.config, self.source, self.teacher, progress)


def held_of(windows: int) -> int:
    """How many of the windows are set apart for measuring."""
    return max(1, windows // 16)


def draw_windows(
    config: TuneConfig, source: Source, teacher: BlockRunner, progress: bool = True
) -> Calibration:
    """The windows that `config` describes, no longer than the model's context.

    Raises:
        CalibrationError: missing, unreadable or too short a text.
    """
    return load_windows(
        config.calibration,
        source.tokenizer(),
        config.windows,
        fitting(config, teacher).seq_len,
        config.seed,
        source=source,
        device=teacher.device,
        progress=progress,
    )


def fitting(config: TuneConfig, teacher: BlockRunner) -> TuneConfig:
    """The same settings with windows that are no longer than the model's context."""
    longest = context_length(teacher.model.config) or config.seq_len
    return replace(config, seq_len=min(config.seq_len, longest))


def check_tunable(teacher: BlockRunner) -> None:
    """Refuse what no checkpoint of this model, or no process of this run, can be tuned for.

    Raises:
        DropError: several processes. UnsupportedModelError: a mixture of experts.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise DropError(
            "tuning runs in one process; start it without torchrun, or leave it out: `quantize` "
            "with --no-tune does."
        )
    refuse_experts(teacher)


def prepare(
    checkpoint: str | Path,
    config: TuneConfig,
    *,
    source: Source | None = None,
    ready: Calibration | None = None,
) -> Job:
    """Check a request, open checkpoint and original.

    Args:
        source: the original, where it is at hand already.
        ready: windows of the shape that `config` says, in the place of those that it describes.

    Raises:
        DropError: see the module's note.
    """
    opened = Checkpoint.open(checkpoint)
    levels = tuple(opened.quantization.check_level(p) for p in config.levels or opened.levels)
    check_intact(opened)
    base_model = opened.quantization.provenance.get("base_model")
    source = source or original_of(opened.path, opened.config, base_model, config.model)
    teacher = BlockRunner.open(source.folder, device=pick_device(config.device))
    check_tunable(teacher)
    complete = replace(
        fitting(config, teacher),
        levels=levels,
        epochs=config.passes,
        learning_rate=config.rate,
        device=str(teacher.device),
    )
    return Job(complete, opened, source, teacher, levels, ready)


def check_like(student: Student, teacher: BlockRunner) -> None:
    """Raises FormatError when decoded weights have nothing to do with the original's."""
    checkpoint = student.checkpoint
    input_groups = checkpoint.quantization.input_groups
    for number in {0, len(input_groups) // 2, len(input_groups) - 1}:
        name = input_groups[number].modules[0]
        original = teacher.read(f"{name}.weight", torch.float32)
        if not original.any():  # zeros correlate with nothing
            continue
        decoded = student.dense_weight(name)
        alike = torch.nn.functional.cosine_similarity(original.flatten(), decoded.flatten(), 0)
        if not float(alike) > _LIKE:
            raise FormatError(
                f"{name} in {checkpoint.path} has a correlation of {float(alike):.2f} with that of "
                "the model given: the checkpoint was made from another model. Give the one it was "
                "quantized from, with --model."
            )


def fingerprint(job: Job) -> dict[str, Any]:
    """Checkpoint, original, settings by the names of their options, text, code and libraries."""
    file = file_of(job.config.calibration)
    return {
        **job.config.by_option(),
        "checkpoint": digest(job.checkpoint.path / MANIFEST_FILE),
        "model": model_digest(job.source.folder),
        "calibration": [job.config.calibration, None if file is None else digest(file)],
        "dropbydrop": [__version__, code_digest(*CODING_ROOMS, "tuning")],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
