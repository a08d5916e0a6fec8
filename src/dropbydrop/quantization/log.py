"""What a run of the quantizer keeps books of: its log, and the report that is made from it.

A log can be handed over to another process, so that a run continues exactly where it was
(checkpoint/journal.py): `mark` returns what is new since the last call as JSON, `restore` takes a
list of such records.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dropbydrop.tuning.report import TuneReport


@dataclass(frozen=True)
class Report:
    """What a run did. Seconds are wall-clock, memory is the peak of the whole process.

    Attributes:
        device_gib: peak memory on a GPU; 0 without one.
        errors: mean over matrices of the relative weighted error at each level.
        kept: parameters left in 8 or 16 bits (or as they were): name, bits, reason.
        unguided: why tokens do not count by gradients of the loss; "" if they do. `plain` are the
            matrices whose tokens do not, of a run where others' do.
        starved: stack of experts -> how many of them calibration gave fewer tokens than they have
            inputs; what they compute for other tokens counts more for them (models/experts.py).
        tuning: what tuning after the search did; None without it.
        untuned: why there was none where there is by default; "" if there was, or is none.
        resumed: blocks taken over from an interrupted run; seconds count their work too, except
            for the total.
    """

    out: Path
    levels: tuple[int, ...]
    seconds: dict[str, float]
    peak_gib: float
    device_gib: float
    model_gib: float
    errors: dict[int, float]
    matrices: int
    kept: list[dict[str, Any]]
    unguided: str
    backend: str
    resumed: int
    log: list[dict[str, Any]] = field(repr=False)
    tuning: TuneReport | None = None
    untuned: str = ""

    @property
    def plain(self) -> list[str]:
        """See the class."""
        return [m["module"] for m in self.log if not (self.unguided or m.get("guided"))]

    @property
    def starved(self) -> dict[str, int]:
        """See the class."""
        return {
            line["module"]: sum(count < line["shape"][-1] for count in line["tokens"])
            for line in self.log
            if "tokens" in line
        }

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, without the line-by-line log."""
        return {
            "out": str(self.out),
            "levels": list(self.levels),
            "seconds": {k: round(v, 2) for k, v in self.seconds.items()},
            "peak_gib": round(self.peak_gib, 3),
            "peak_device_gib": round(self.device_gib, 3),
            "model_float32_gib": round(self.model_gib, 3),
            "mean_relative_error": {str(p): e for p, e in self.errors.items()},
            "matrices": self.matrices,
            "kept": self.kept,
            "token_weights": self.unguided or "gradients",
            **({"without_gradients": self.plain} if self.plain else {}),
            **({"starved_experts": self.starved} if self.starved else {}),
            "backend": self.backend,
            "resumed_blocks": self.resumed,
            **({"tuning": self.tuning.to_dict()} if self.tuning else {}),
            **({"not_tuned": self.untuned} if self.untuned else {}),
        }


@dataclass
class RunLog:
    """The books of a run.

    Attributes:
        matrices: one entry a matrix: module, shape, relative errors, outliers, seconds.
        kept: parameters that are not coded: name, bits, values, reason.
        unguided: see `Report`.
        parameters: parameters of the original model, met so far (tied ones once).
        seconds: wall-clock time by phase.
    """

    levels: tuple[int, ...]
    matrices: list[dict[str, Any]] = field(default_factory=list)
    kept: list[dict[str, Any]] = field(default_factory=list)
    parameters: int = 0
    unguided: str = ""
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(
            ("calibrate", "gradients", "activations", "encode", "write"), 0.0
        )
    )
    _marked: tuple[int, int] = (0, 0)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the time spent inside to a phase."""
        start = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - start

    def mark(self) -> dict[str, Any]:
        """What is new since the last call, JSON-able."""
        matrices, kept = self._marked
        self._marked = len(self.matrices), len(self.kept)
        return {
            "matrices": self.matrices[matrices:],
            "kept": self.kept[kept:],
            "parameters": self.parameters,
            "seconds": self.seconds.copy(),
        }

    def restore(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Take over what `mark` returned in another process."""
        for record in records:
            self.matrices += record["matrices"]
            self.kept += record["kept"]
            self.parameters = record["parameters"]
            self.seconds |= record["seconds"]
        self._marked = len(self.matrices), len(self.kept)

    def mean_errors(self) -> dict[int, float]:
        """Mean relative error over matrices at each level."""
        return {
            p: sum(line["rel_error"][str(p)] for line in self.matrices) / max(len(self.matrices), 1)
            for p in self.levels
        }

    def to_bytes(self) -> bytes:
        """The log as it is stored: without times, so that the same input gives the same bytes."""
        lines = ({k: v for k, v in line.items() if k != "seconds"} for line in self.matrices)
        return "".join(json.dumps(line) + "\n" for line in lines).encode()
