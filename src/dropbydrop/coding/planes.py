"""What a plane is on disk: its kind, the bits it spends a weight, and all of its shapes.

    kind      codes of a matrix [d_out, d_in], uint8            codebook
    bytes     [d_out, G], one code a group of g = 8 inputs      K = 256 entries of g weights
    trellis   [ceil(bits * d_out / 8), d_in], a ring of bits    K = 64 values of one weight, and how
              down the rows of every input; 3 bytes at least    a window of the stream names one

A stack of E matrices of one shape (the experts of a block) has the codes of each, one after the
other: a dimension more, in front.

A checkpoint is of one kind. Its planes are ordered; level P reads the first `count` of them, those
whose bits add up to P (`counts_of`). Users count bits (a level), everything below counts planes
(a prefix). What the codes mean is in codebook_set.py; this module is pure.

Sizes and shapes are computed here alone; the names of types are those of safetensors.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from itertools import accumulate
from typing import Any, ClassVar

from dropbydrop.system.errors import FormatError, PrecisionError

from .code import ENTRIES, GROUP

LABELS = 64  # values of a trellis plane: a label has 6 bits
WINDOWS = range(8, 18)  # bits of a window that every decoder knows: it spans three bytes
FAMILIES = ((2, 3, 4), (3, 4, 5), (1, 2, 3, 4))  # of levels; each has a universal set
SHORTEST = 3  # bytes of a stream: no window is longer


class PlaneSpec(ABC):
    """One plane; the subclasses are the kinds. Every plane of a checkpoint describes itself."""

    kind: ClassVar[str]
    bits: int  # a weight

    def shape(self, *matrix: int) -> tuple[int, ...]:
        """Shape of the codes, uint8, of a matrix [d_out, d_in] or of a stack [E, d_out, d_in]."""
        *stack, d_out, d_in = matrix
        return (*stack, *self.shape_of_one(d_out, d_in))

    @abstractmethod
    def shape_of_one(self, d_out: int, d_in: int) -> tuple[int, int]:
        """Shape of the codes of a single matrix."""

    def nbytes(self, *matrix: int) -> int:
        """Bytes of the codes of a matrix [d_out, d_in] or of a stack [E, d_out, d_in]."""
        return math.prod(self.shape(*matrix))

    @property
    @abstractmethod
    def parts(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """Stored tensors of the codebook: suffix of the name -> (type, shape)."""

    @property
    def codebook_bytes(self) -> int:
        """Bytes of the stored codebook."""
        width = {"F16": 2, "F32": 4, "I8": 1, "U8": 1}
        return sum(width[dtype] * math.prod(shape) for dtype, shape in self.parts.values())

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        assert is_dataclass(self)
        return asdict(self) | {"kind": self.kind}


@dataclass(frozen=True)
class BytesPlane(PlaneSpec):
    """One code a group of 8 weights: 1 bit a weight (AQLM's code with half of its entries)."""

    entries: int = ENTRIES
    group: int = GROUP
    dtype: str = "uint8"
    sign_symmetric: bool = True
    kind: ClassVar[str] = "bytes"
    bits: ClassVar[int] = 1  # type: ignore[misc]

    def __post_init__(self) -> None:
        if (self.entries, self.group, self.dtype) != (ENTRIES, GROUP, "uint8"):
            raise FormatError(
                f"plane of {self.entries} entries, group {self.group}, dtype {self.dtype}; this "
                f"version decodes {ENTRIES} entries, group {GROUP}, uint8. Upgrade dropbydrop."
            )

    def shape_of_one(self, d_out: int, d_in: int) -> tuple[int, int]:
        """(d_out, G)."""
        return d_out, d_in // self.group

    @property
    def parts(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """Half of the entries when the top bit is the sign."""
        stored = self.entries // 2 if self.sign_symmetric else self.entries
        return {"": ("F16", (stored, self.group))}


@dataclass(frozen=True)
class TrellisPlane(PlaneSpec):
    """A ring of bits down the rows of every input, read through a sliding window.

    Attributes:
        bits: k, new bits a weight: 1 or 2.
        window: L, bits of the stream that name a value.
        entries: K, the number of values.
    """

    bits: int = 1
    window: int = 12
    entries: int = LABELS
    kind: ClassVar[str] = "trellis"

    def __post_init__(self) -> None:
        if self.bits not in (1, 2) or self.window not in WINDOWS or self.entries != LABELS:
            raise FormatError(
                f"trellis plane of {self.bits} bits a weight, window {self.window} and "
                f"{self.entries} values; this version decodes 1 or 2 bits, windows of "
                f"{WINDOWS[0]} to {WINDOWS[-1]} bits and {LABELS} values. Upgrade dropbydrop."
            )

    def shape_of_one(self, d_out: int, d_in: int) -> tuple[int, int]:
        """(bytes of a stream, d_in): 8 / k consecutive rows of an input in one byte."""
        return max(-(-self.bits * d_out // 8), SHORTEST), d_in

    @property
    def parts(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """Integer values with one float32 scale; taps, the label word of each bit by its age."""
        return {
            "": ("I8", (self.entries,)),
            ".scale": ("F32", (1,)),
            ".taps": ("U8", (self.window,)),
        }


KINDS: dict[str, type[PlaneSpec]] = {"bytes": BytesPlane, "trellis": TrellisPlane}


def counts_of(planes: Sequence[PlaneSpec], levels: Sequence[int]) -> tuple[int, ...]:
    """The number of planes that each level reads.

    Raises:
        FormatError: levels that do not ascend, or are not the sum of the bits of the first planes;
            the last must read all.
    """
    sums = list(accumulate(plane.bits for plane in planes))
    whole = all(type(level) is int for level in levels)
    if not levels or not whole or list(levels) != sorted(set(levels)) or levels[0] < 1:
        raise FormatError(f"levels {list(levels)} must ascend from at least 1.")
    if not set(levels) <= set(sums) or levels[-1] != sums[-1]:
        raise FormatError(
            f"levels {list(levels)} contradict planes of {[plane.bits for plane in planes]} bits: "
            f"the first planes add up to {sums}, and the last level must read all of them."
        )
    return tuple(sums.index(level) + 1 for level in levels)


def trellis_planes(levels: Sequence[int], window: int) -> tuple[TrellisPlane, ...]:
    """The planes for these levels: what each adds to the one before, by two bits, then by one."""
    steps = [high - low for low, high in zip([0, *levels[:-1]], levels, strict=True)]
    bits = [b for step in steps for b in [2] * (step // 2) + [1] * (step % 2)]
    return tuple(TrellisPlane(b, window) for b in bits)


def family_of(levels: Sequence[int]) -> tuple[int, ...]:
    """The levels whose trellis planes serve `levels`: the first of `FAMILIES` that has them all.

    Raises:
        PrecisionError: no family has them.
    """
    for family in FAMILIES:
        if set(levels) <= set(family):
            return family
    known = ", or ".join(",".join(map(str, family)) for family in FAMILIES)
    raise PrecisionError(
        f"--bits {','.join(map(str, levels))} with --code trellis: trellis planes serve levels out "
        f"of {known}. Choose among one of these, or take --code bytes."
    )


def planes_of(kind: str, levels: Sequence[int], window: int) -> tuple[PlaneSpec, ...]:
    """The planes that `quantize` gives a checkpoint; `window` is that of trellis planes.

    Raises:
        PrecisionError: levels that this kind does not have.
    """
    if kind == "trellis":
        planes = trellis_planes(family_of(levels), window)
        return planes[: list(accumulate(plane.bits for plane in planes)).index(levels[-1]) + 1]
    return tuple(BytesPlane() for _ in range(levels[-1]))
