"""Settings of `quantize`.

Only what can be told from the settings alone is refused here; what needs the model is checked in
job.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dropbydrop.system.errors import DropError, PrecisionError
from dropbydrop.system.settings import Settings, check_windows, setting, whole_number

MAX_BITS = 8
WINDOWS = {"fast": 32, "balanced": 64, "best": 128}  # of a preset, unless given
SEQ_LEN = 1024
KINDS = ("bytes", "trellis")  # of planes


def check_levels(bits: Sequence[int]) -> tuple[int, ...]:
    """Ascending levels without repeats.

    Raises:
        PrecisionError: none, or one that is not an integer in 1..8.
    """
    try:  # integers of numpy and torch are integers
        whole = [] if isinstance(bits, str) else [whole_number(p) for p in bits]
    except TypeError:
        whole = []
    if not whole or any(not 1 <= p <= MAX_BITS for p in whole):
        raise PrecisionError(
            f"--bits {bits!r}: give levels from 1 to {MAX_BITS}, "
            "such as --bits 2,3,4. Each level is a precision that the checkpoint can be run at."
        )
    return tuple(sorted(set(whole)))


@dataclass(frozen=True)
class QuantizeConfig(Settings):
    """How a model is quantized: the options of `dropbydrop quantize`, each with its help beside it.

    Attributes:
        levels: ascending; they are supervised and can be asked for later.
        code: kind of the planes (coding/planes.py).
        preset: calibration tokens, search effort, and whether tokens count by gradients of the
            loss (all but `fast`).
        tune: whether tuning follows the search; None: with preset `best` on a GPU.
        device: under torchrun each process takes the one of its number.
        backend: one of `coding.kinds.backends`.

    Raises:
        DropError: a value out of its range.
    """

    levels: tuple[int, ...] = setting((2, 3, 4), "Levels, such as 2,3,4.", option="bits")
    code: str = setting(
        "bytes",
        "Kind of the planes: bytes, or trellis: nearer to the bound, slower to decode.",
        choices=KINDS,
    )
    calibration: str = setting(
        "self", "Text or .jsonl file, hub:DATASET[:SPLIT], or self: text that the model writes."
    )
    preset: str = setting(
        "balanced", "Search effort: fast, balanced or best.", choices=tuple(WINDOWS)
    )
    codebooks: str = setting(
        "universal",
        "Codebooks: universal, or learned: a set for each input group.",
        choices=("universal", "learned"),
    )
    seed: int = setting(0, "Seed of rotations and calibration.")
    head_bits: int = setting(
        8,
        "Bits of embedding and head: 8 or 16; with 3, 4 or 5 they are in planes, and level P reads "
        "P + 2 bits, at most so many.",
        choices=(3, 4, 5, 8, 16),
    )
    tune: bool | None = setting(
        None,
        "Tune after the search, or do not [with preset best on a GPU].",
        choices=(None, True, False),
    )
    windows: int | None = setting(None, "Number of calibration windows [from the preset].")
    seq_len: int = setting(SEQ_LEN, "Tokens of a calibration window.")
    device: str = setting("auto", "Device: auto (a GPU if there is one), cpu, cuda, cuda:1.")
    backend: str | None = setting(None, "Search backend by name [the best of this machine].")

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", check_levels(self.levels))
        object.__setattr__(self, "calibration", str(self.calibration))
        super().__post_init__()
        check_windows(1 if self.windows is None else self.windows, self.seq_len)
        if self.code == "trellis" and self.codebooks != "universal":
            raise DropError(
                f"--codebooks {self.codebooks} with --code trellis: codebooks of trellis planes "
                "are universal; tuning trains them for a checkpoint (--tune). Leave --codebooks "
                "out, or take --code bytes."
            )

    @property
    def head_in_planes(self) -> bool:
        """Whether embedding and head are coded in planes."""
        return self.head_bits < 8
