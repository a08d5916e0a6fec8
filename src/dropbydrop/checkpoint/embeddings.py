"""`embeddings` and `planes` of quantization_config: parsed strictly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import accumulate
from typing import Any, cast

from dropbydrop.coding.planes import KINDS, PlaneSpec, TrellisPlane, counts_of
from dropbydrop.system.errors import FormatError

from .fields import Fields, module_names

MAX_PLANES = 64  # kMaxPlanes of the native kernels


def parse_plane(data: object, where: str = "plane") -> PlaneSpec:
    """The spec of a plane (FormatError naming what is unknown)."""
    given = Fields(data, where)
    name = given.take("kind", str)
    if name not in KINDS:
        raise FormatError(
            f"{where}: plane of kind {name!r}; this version decodes {' and '.join(KINDS)}. "
            "Upgrade dropbydrop."
        )
    kind = KINDS[name]
    plain = {f.name: type(f.default) for f in fields(cast(Any, kind))}
    return kind(**given.exactly(**plain))


@dataclass(frozen=True)
class Embeddings:
    """Embedding (and untied head) modules: tables.

    Attributes:
        bits: 8, int8 rows with a scale each; 16, plain 16-bit weights; or a tuple, one for each
            level of the checkpoint: tables in planes (coding/tables.py), of which that level reads
            so many bits a weight.
        planes: of tables in planes, one spec a plane.
        codebooks: name of their codebook set.
    """

    bits: int | tuple[int, ...]
    modules: tuple[str, ...]
    tied: bool
    planes: tuple[PlaneSpec, ...] = ()
    codebooks: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "modules", module_names(self.modules, "embeddings"))
        if not isinstance(self.bits, list | tuple):
            if self.bits not in (8, 16):
                raise FormatError(
                    f"embeddings of {self.bits} bits; this version reads 8 and 16, or a list for "
                    "embeddings in planes."
                )
            return
        object.__setattr__(self, "bits", tuple(self.bits))
        object.__setattr__(self, "planes", tuple(self.planes))
        module_names([self.codebooks], "embeddings")
        if len(self.planes) > MAX_PLANES:
            raise FormatError(f"embeddings of {len(self.planes)} planes. The config is damaged.")
        if any(not isinstance(plane, TrellisPlane) for plane in self.planes):
            raise FormatError(
                "embeddings in planes of another kind than trellis are unknown to this version. "
                "Upgrade dropbydrop."
            )
        whole = all(type(bits) is int for bits in self.by_level)
        if not whole or list(self.by_level) != sorted(self.by_level):
            raise FormatError(
                f"embeddings of {list(self.by_level)} bits: whole numbers are needed, none smaller "
                "than that of the level below. The config is damaged."
            )
        counts_of(self.planes, sorted(set(self.by_level)))

    @property
    def by_level(self) -> tuple[int, ...]:
        """Bits of every level, of tables in planes; else none."""
        return self.bits if isinstance(self.bits, tuple) else ()

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Planes of a table that every level reads, of tables in planes; else none."""
        known = sorted(set(self.by_level))
        by_bits = dict(zip(known, counts_of(self.planes, known), strict=True)) if known else {}
        return tuple(by_bits[bits] for bits in self.by_level)

    @property
    def choices(self) -> dict[int, int]:
        """Bits a weight -> planes, of all prefixes of a table in planes; else none."""
        sums = accumulate(plane.bits for plane in self.planes)
        return {bits: count for count, bits in enumerate(sums, 1)}

    def files(self, ends: Sequence[int]) -> tuple[int, ...]:
        """The number of the plane file that holds each plane of a table: that of the lowest level
        that reads it, `ends` being how many files each level reads."""
        pairs = list(zip(self.counts, ends, strict=True))
        return tuple(
            next(end for count, end in pairs if count >= k) for k in range(1, len(self.planes) + 1)
        )

    @staticmethod
    def from_dict(data: object, where: str = "embeddings") -> Embeddings:
        """Raises FormatError naming what is unknown."""
        given = Fields(data, where)
        if not isinstance(given.data.get("bits"), list):
            return Embeddings(**given.exactly(bits=int, modules=list, tied=bool))
        values = given.exactly(bits=list, modules=list, tied=bool, planes=list, codebooks=str)
        planes = enumerate(values.pop("planes"), 1)
        return Embeddings(
            **values, planes=tuple(parse_plane(p, f"{where}: plane {m}") for m, p in planes)
        )

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        plain = {"bits": self.bits, "modules": list(self.modules), "tied": self.tied}
        if not self.by_level:
            return plain
        planes = [plane.to_dict() for plane in self.planes]
        return plain | {"bits": list(self.by_level), "planes": planes, "codebooks": self.codebooks}
