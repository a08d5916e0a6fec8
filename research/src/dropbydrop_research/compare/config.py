"""Settings of `compare`; what needs the model is checked in job.py."""

from __future__ import annotations

from dataclasses import dataclass

from dropbydrop.quantization.config import WINDOWS, check_levels
from dropbydrop.system.settings import Settings, setting

ALL = (
    "drop", "dedicated", "trellis", "trellis-dedicated", "paper-weights", "paper", "aqlm",
    "aqlm-drop", "gptq", "rtn", "any-precision", "matryoshka",
)  # fmt: skip


@dataclass(frozen=True)
class CompareConfig(Settings):
    """What is compared, and on how much.

    Attributes:
        methods: names of the methods, in the order of the table.
        levels: precisions at which each method is evaluated, ascending.
        calibration: a text or .jsonl file, "hub:DATASET[[:CONFIG]:SPLIT]", or "self".
        calibration_windows: calibration windows of at most 1,024 tokens.
        blocks: how many of the first decoder blocks are quantized; None: all.
        seq_len, windows: tokens of an evaluation window, and how many; None: all of the text.
        preset: search effort of this package's methods.
        seed: seed of the calibration and of what methods draw.
        device: where blocks run and matrices are encoded.

    Raises:
        DropError: a value out of its range.
    """

    methods: tuple[str, ...] = setting(ALL, "Methods, in the order of the table.")
    levels: tuple[int, ...] = setting((2, 3, 4), "Levels, such as 2,3,4.", option="bits")
    calibration: str = setting(
        "self", "Text or .jsonl file, hub:DATASET[:SPLIT], or self: text that the model writes."
    )
    calibration_windows: int = setting(64, "Number of calibration windows of 1,024 tokens.")
    blocks: int | None = setting(None, "Number of blocks to quantize, from the first [all].")
    seq_len: int = setting(2048, "Tokens of a window of --text.")
    windows: int | None = setting(None, "Number of windows of --text [all].")
    preset: str = setting(
        "balanced",
        "Search effort of this package: fast, balanced or best.",
        choices=tuple(WINDOWS),
    )
    seed: int = setting(0, "Seed of the calibration and of what methods draw.")
    device: str = setting("cpu", "Device: cpu, cuda, cuda:1.")

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", check_levels(self.levels))
        object.__setattr__(self, "calibration", str(self.calibration))
        super().__post_init__()
