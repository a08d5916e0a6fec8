"""Settings of `tune`; what needs the checkpoint or the model is checked in job.py."""

from __future__ import annotations

from dataclasses import dataclass

from dropbydrop.system.errors import CalibrationError, DropError
from dropbydrop.system.settings import Settings, check_windows, setting

EPOCHS = {"distill": 2, "blocks": 2}  # of a method, unless given
RATES = {"distill": 1e-3, "blocks": 2e-3}


@dataclass(frozen=True)
class TuneConfig(Settings):
    """How a checkpoint is tuned: the options of `dropbydrop tune`, each with its help beside it.

    Attributes:
        method: "distill" lowers the KL to the original's predictions, "blocks" the squared error
            of a block's output.
        levels: ascending.
        train: "all", codebooks (a set for every input group), row scales and norms; or "scales".
        learning_rate: of Adam, relative to the size of what is trained.

    Raises:
        DropError: a value out of its range.
    """

    model: str | None = setting(None, "Original model [the one that OUT names].")
    method: str = setting(
        "distill",
        "Method: distill, the whole model end to end, or blocks, one by one.",
        choices=tuple(EPOCHS),
    )
    calibration: str = setting(
        "self", "Text or .jsonl file, hub:DATASET[:SPLIT], or self: text that the model writes."
    )
    levels: tuple[int, ...] | None = setting(
        None, "Levels to supervise [all of OUT].", option="bits"
    )
    train: str = setting(
        "all",
        "Trained values: all, or scales: row scales and norms, no codebooks.",
        choices=("all", "scales"),
    )
    windows: int = setting(64, "Number of tuning windows.")
    seq_len: int = setting(512, "Tokens of a window.")
    epochs: int | None = setting(None, "Passes over the windows [that of the method].")
    learning_rate: float | None = setting(
        None, "Relative change of a value in a step [that of the method]."
    )
    together: bool = setting(False, "Run every window at all levels, not at a drawn one.")
    seed: int = setting(0, "Seed of calibration, order and levels.")
    device: str = setting("auto", "Device: auto (a GPU if there is one), cpu, cuda, cuda:1.")

    def __post_init__(self) -> None:
        object.__setattr__(self, "calibration", str(self.calibration))
        object.__setattr__(self, "model", None if self.model is None else str(self.model))
        if self.levels is not None:
            object.__setattr__(self, "levels", tuple(sorted(set(self.levels))))
        super().__post_init__()
        check_windows(self.windows, self.seq_len)
        if self.windows < 2:
            raise CalibrationError(
                f"{self.windows} windows: tuning sets one apart, so it needs 2 or more."
            )
        if self.passes < 1 or not 0 < self.rate < 1:
            raise DropError(
                f"{self.passes} epochs at a learning rate of {self.rate}: give 1 epoch or more, "
                "and a rate between 0 and 1 (the relative change that a step makes)."
            )

    @property
    def passes(self) -> int:
        """Passes over the windows, given or the method's."""
        return EPOCHS[self.method] if self.epochs is None else self.epochs

    @property
    def rate(self) -> float:
        """Learning rate, given or the method's."""
        return RATES[self.method] if self.learning_rate is None else self.learning_rate
