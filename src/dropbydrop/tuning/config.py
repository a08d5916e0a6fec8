"""A checked order for tuning: what is tuned, on what, and how; refusals by name.

Everything that can be told before any work is told here: unknown options, planes that are missing
or damaged, levels that are not there, experts, and a model that the checkpoint was not made from.
The last is judged by the config and by the weights themselves: decoded matrices correlate with the
original's. A sibling of the model (another fine-tune of the same weights) passes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig

from dropbydrop.checkpoint import Checkpoint
from dropbydrop.checkpoint.config import MANIFEST_FILE
from dropbydrop.data.calibration import SELF
from dropbydrop.errors import CalibrationError, DropError, FormatError
from dropbydrop.models.block_runner import BlockRunner
from dropbydrop.models.model_config import context_length
from dropbydrop.models.sources import Source, resolve
from dropbydrop.system.accelerator import multiplies_bfloat16, pick_device
from dropbydrop.system.digest import CODING_ROOMS, code_digest, digest, model_digest
from dropbydrop.system.version import __version__

from .student import TRAINED, Student, refuse_experts
from .writer import check_intact

METHODS = ("distill", "blocks")
EPOCHS = {"distill": 2, "blocks": 2}
RATES = {"distill": 1e-3, "blocks": 2e-3}
_LIKE = 0.3  # correlation of decoded and original weights; that of other models is near 0
_SAME = ("model_type", "num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size")


@dataclass(frozen=True)
class Job:
    """A checked order."""

    checkpoint: Checkpoint
    source: Source
    teacher: BlockRunner
    levels: tuple[int, ...]
    method: str
    calibration: str | Path
    train: str
    windows: int
    seq_len: int
    epochs: int
    rate: float
    together: bool
    seed: int

    @property
    def half(self) -> bool:
        """Whether matrix products run in bfloat16."""
        return multiplies_bfloat16(self.teacher.device)

    @property
    def held(self) -> int:
        """Windows that are set apart for measuring."""
        return max(1, self.windows // 16)


def prepare(
    checkpoint: str | Path,
    *,
    model: str | Path | None,
    method: str,
    calibration: str | Path,
    bits: Sequence[int] | None,
    train: str,
    windows: int,
    seq_len: int,
    epochs: int | None,
    learning_rate: float | None,
    together: bool,
    seed: int,
    device: str,
) -> Job:
    """Check an order; see `tune` for the arguments.

    Raises:
        DropError: see the module's note.
    """
    for option, value, known in (("--method", method, METHODS), ("--train", train, TRAINED)):
        if value not in known:
            raise DropError(f"{option} {value!r}: choose one of {', '.join(known)}.")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise DropError("tuning runs in one process; start it without torchrun.")
    if windows < 2:
        raise CalibrationError(f"{windows} windows: tuning sets one apart, so it needs 2 or more.")
    epochs = EPOCHS[method] if epochs is None else epochs
    rate = RATES[method] if learning_rate is None else learning_rate
    if epochs < 1 or not 0 < rate < 1:
        raise DropError(
            f"{epochs} epochs at a learning rate of {rate}: give 1 epoch or more, and a rate "
            "between 0 and 1 (the relative change that a step makes)."
        )
    opened = Checkpoint.open(checkpoint)
    wanted = sorted(set(opened.levels if bits is None else bits))
    levels = tuple(opened.quantization.check_level(p) for p in wanted)
    check_intact(opened)
    source = _original(opened, model)
    teacher = BlockRunner.open(source.folder, device=pick_device(device))
    refuse_experts(teacher)
    context = context_length(teacher.model.config)
    return Job(
        opened, source, teacher, levels, method, calibration, train, windows,
        min(seq_len, context or seq_len), epochs, rate, together, seed,
    )  # fmt: skip


def _original(checkpoint: Checkpoint, model: str | Path | None) -> Source:
    """The model that the checkpoint was made from."""
    name = checkpoint.quantization.provenance.get("base_model")
    if model is None and not isinstance(name, str):
        raise DropError(f"{checkpoint.path} does not say what it was made from; name it: --model.")
    try:
        source = resolve(model or str(name))
    except DropError as error:
        if model is not None:
            raise
        raise DropError(
            f"the original model of {checkpoint.path}, {name!r}, is not at hand ({error}) Name "
            "its folder with --model."
        ) from error
    theirs, ours = AutoConfig.from_pretrained(source.folder), checkpoint.config
    for key in _SAME:
        found = getattr(theirs.get_text_config(), key, None)
        if key in ours and found is not None and found != ours[key]:
            raise FormatError(
                f"{checkpoint.path} was made from a model with {key} = {ours[key]!r}, "
                f"{source.name} has {found!r}: another model. Give the one it was "
                "quantized from, with --model."
            )
    return source


def check_like(student: Student, teacher: BlockRunner) -> None:
    """Raises FormatError when decoded weights have nothing to do with the original's."""
    checkpoint = student.checkpoint
    input_groups = checkpoint.quantization.input_groups
    for number in {0, len(input_groups) // 2, len(input_groups) - 1}:
        name = input_groups[number].modules[0]
        original = teacher.read(f"{name}.weight", torch.float32)
        decoded = student.dense_weight(name)
        alike = torch.nn.functional.cosine_similarity(original.flatten(), decoded.flatten(), 0)
        if not float(alike) > _LIKE:
            raise FormatError(
                f"{name} in {checkpoint.path} has a correlation of {float(alike):.2f} with that of "
                "the model given: the checkpoint was made from another model. Give the one it was "
                "quantized from, with --model."
            )


def fingerprint(job: Job) -> dict[str, Any]:
    """Everything that the bytes of the result depend on; by the names of the options."""
    text = Path(job.calibration).expanduser()
    content = digest(text) if job.calibration != SELF and text.is_file() else None
    return {
        "checkpoint": digest(job.checkpoint.path / MANIFEST_FILE),
        "model": model_digest(job.source.folder),
        "method": job.method,
        "bits": job.levels,
        "train": job.train,
        "calibration": [str(job.calibration), content],
        "windows": job.windows,
        "seq-len": job.seq_len,
        "epochs": job.epochs,
        "learning-rate": job.rate,
        "together": job.together,
        "seed": job.seed,
        "device": str(job.teacher.device),
        "dropbydrop": [__version__, code_digest(*CODING_ROOMS, "tuning")],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
