"""What a tuning run yields, and how the model card and the caller are told."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from .job import Job


@dataclass
class Result:
    """What a method yields: tensors as they are stored, and what the report says.

    Attributes:
        loss: level, as a string -> [before, after].
    """

    tensors: dict[str, Tensor]
    loss: dict[str, list[float]]
    steps: int
    trained: int
    log: list[dict[str, Any]]
    calibration: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """All but the tensors, JSON-able."""
        return {name: value for name, value in vars(self).items() if name != "tensors"}


@dataclass(frozen=True)
class TuneReport:
    """What a run did. Seconds are wall-clock, memory is the peak of the process.

    Attributes:
        loss: level -> [before, after] on windows that were not trained on, after rounding to what
            is stored: KL to the original in nats a token (distill), or the mean over blocks of the
            relative squared error of a block's output (blocks).
        steps: of the optimizer, over all blocks.
        trained: values that were trained.
        resumed: steps (distill) or blocks (blocks) taken over from an interrupted run.
        log: one entry a step or block.
    """

    out: Path
    method: str
    loss: dict[int, list[float]]
    steps: int
    trained: int
    seconds: float
    peak_gib: float
    device_gib: float
    resumed: int
    log: list[dict[str, Any]] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, without the log."""
        return {
            "out": str(self.out),
            "method": self.method,
            "loss": {str(p): pair for p, pair in self.loss.items()},
            "steps": self.steps,
            "trained": self.trained,
            "seconds": round(self.seconds, 2),
            "peak_gib": round(self.peak_gib, 3),
            "peak_device_gib": round(self.device_gib, 3),
            "resumed": self.resumed,
        }


def card_section(job: Job, result: Result) -> str:
    """What the model card says about this run."""
    config, text = job.config, result.calibration
    loss = "KL to the original, nats a token" if config.method == "distill" else "error of a block"
    trained = "codebooks, row scales and norms" if config.train == "all" else "row scales and norms"
    rows = "\n".join(f"| {p} | {a:.4f} | {b:.4f} |" for p, (a, b) in result.loss.items())
    source = f"`{text['text']}`" if text.get("kind") == "text" else "text that the model wrote"
    return f"""
## Tuned: {config.method}

Trained: {trained}; the codes are those of before. Text: {source}, {text.get("windows")} windows \
of {text.get("seq_len")} tokens, {config.passes} epochs.

| bits | {loss}, before | after |
|---|---|---|
{rows}
"""
