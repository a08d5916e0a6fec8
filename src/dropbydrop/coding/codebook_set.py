"""`CodebookSet`: what stored codes mean. One codebook a plane, all planes of one kind.

For both kinds a plane gives every group of g weights (8, or 1) one of K entries; so what they share
is an index and a table:

    W^_P[r, g*j : g*(j+1)] = scales[r] * sum_{m=1..P} entries_m[index_m[r, j]]        (AQLM, eq. 2)

    bytes     index = the code itself; entries [256, 8]
    trellis   index = the label of a window of the input's bit stream, entries [64, 1]

The stream of a trellis plane holds k bits a weight: bit i of input j is bit i % 8 of
codes[i // 8, j], and the bits of row r are k*r .. k*r + k - 1. The window of row r is the L bits
that end with its own; the bit of age a (0 is bit k*r + k - 1) adds taps[a] to the label, modulo 2
in every bit (GF(2)). The stream is a ring: before its first bit comes the last one of its last
byte, padding included (tail biting; a start from zeros costs up to 13 % of the error at 576 rows).
So the label is the output of a convolutional code, the classical trellis-coded quantization
(Marcellin and Fischer 1990) without its tables: a linear map of the window is better than a random
table of 2^L values (docs/trellis.md), and it is computed, not looked up. The value is an integer of
at most 63 in size times one scale a plane, so products with integer inputs are exact sums.

Invariant: lower precision = prefix. Decoding P planes reads codes_1..codes_P and nothing else, and
equals, bit for bit, the P-th partial sum of decoding more planes. Sums run in float32 in the order
of the planes and are scaled once at the end.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from .code import expand_codebook, partial_sums
from .planes import LABELS, BytesPlane, PlaneSpec, TrellisPlane

VALUE_MAX = 63  # size of an integer value: sums of two products with int8 inputs fit 16 bits


@dataclass(frozen=True, eq=False)
class CodebookSet(ABC):
    """See the module's note. Immutable.

    Attributes:
        planes: a spec for each codebook.
        parts: the stored tensors of each, by the suffix of their names (`PlaneSpec.parts`).
    """

    planes: tuple[PlaneSpec, ...]
    parts: tuple[Mapping[str, Tensor], ...]

    @property
    def kind(self) -> str:
        """That of its planes."""
        return self.planes[0].kind

    @property
    @abstractmethod
    def entries(self) -> tuple[Tensor, ...]:
        """The table of each plane, float32 [K, g]."""

    @abstractmethod
    def index(self, m: int, codes: Tensor, d_out: int, rows: slice | None = None) -> Tensor:
        """Entry of every group of plane m (counted from 0): integers [d_out, G].

        codes: uint8 of the plane's shape; rows: of these consecutive rows only (both ends given).
        """

    def problems(self) -> Iterator[str]:
        """Values that no codebook may hold; what decodes relies on there being none."""
        for m, part in enumerate(self.parts, 1):
            for suffix, stored in part.items():
                if not torch.isfinite(stored).all():
                    yield f"{m}{suffix} has values that are not finite"

    def to(self, device: torch.device | str) -> Self:
        """The set on a device."""
        moved = tuple({key: t.to(device) for key, t in part.items()} for part in self.parts)
        return type(self)(self.planes, moved)

    def first(self, prefix: int) -> Self:
        """The set of the first `prefix` planes."""
        return type(self)(self.planes[:prefix], self.parts[:prefix])

    def named(self) -> dict[str, Tensor]:
        """All stored tensors: number of the plane and suffix, such as "2.scale" -> tensor."""
        return {
            f"{m}{suffix}": tensor
            for m, part in enumerate(self.parts, 1)
            for suffix, tensor in part.items()
        }

    def sums(
        self,
        codes: Sequence[Tensor],
        d_out: int,
        prefixes: Sequence[int],
        rows: slice | None = None,
    ) -> list[Tensor]:
        """Partial sums before scaling, float32 [d_out, d_in], for every P of `prefixes`.

        Args:
            codes: of planes 1..M; only the first `prefixes[-1]` are read.
            prefixes: numbers of planes, ascending.
            rows: of these consecutive rows only (both ends given).
        """
        index = [self.index(m, codes[m], d_out, rows) for m in range(prefixes[-1])]
        return partial_sums(index, self.entries, prefixes)

    def decode(
        self,
        codes: Sequence[Tensor],
        scales: Tensor,
        prefix: int,
        dtype: torch.dtype = torch.float32,
        rows: slice | None = None,
    ) -> Tensor:
        """The matrix of the first `prefix` planes, `dtype` [n, d_in], for rotated inputs.

        Args:
            codes: of planes 1..M, of all rows, as stored.
            scales: [d_out], of the rows.
            rows: of these consecutive rows only (both ends given).
        """
        if not 1 <= prefix <= min(len(codes), len(self.planes)):
            raise ValueError(f"prefix {prefix} with {len(codes)} and {len(self.planes)} planes")
        (weight,) = self.sums(codes, len(scales), [prefix], rows)
        kept = scales if rows is None else scales[rows]
        return weight.mul_(kept.to(torch.float32)[:, None]).to(dtype)


class BytesSet(CodebookSet):
    """Codebooks of byte planes; parts: float16 or float32 [K/2, g] (sign-symmetric) or [K, g]."""

    @staticmethod
    def of(codebooks: Sequence[Tensor] | Tensor) -> BytesSet:
        """Sign-symmetric codebooks [K/2, g] of planes 1..M."""
        return BytesSet(
            tuple(BytesPlane() for _ in codebooks), tuple({"": book} for book in codebooks)
        )

    @property
    def stacked(self) -> Tensor:
        """float32 [M, K/2, g], as the search and the refit of sign-symmetric codebooks take it."""
        return torch.stack([part[""].to(torch.float32) for part in self.parts])

    @property
    def entries(self) -> tuple[Tensor, ...]:
        """See `CodebookSet.entries`."""
        specs = (plane for plane in self.planes if isinstance(plane, BytesPlane))
        return tuple(
            expand_codebook(part[""], spec.sign_symmetric)
            for spec, part in zip(specs, self.parts, strict=True)
        )

    def index(self, m: int, codes: Tensor, d_out: int, rows: slice | None = None) -> Tensor:
        """See `CodebookSet.index`."""
        return codes if rows is None else codes[rows]


class TrellisSet(CodebookSet):
    """Codebooks of trellis planes; parts: int8 values [K], float32 scale [1], uint8 taps [L]."""

    planes: tuple[TrellisPlane, ...]

    def problems(self) -> Iterator[str]:
        """See `CodebookSet.problems`."""
        yield from super().problems()
        for m, part in enumerate(self.parts, 1):
            if int(part[""].to(torch.int32).abs().max()) > VALUE_MAX:
                yield f"{m} has values beyond {VALUE_MAX}"
            if int(part[".taps"].max()) >= LABELS:
                yield f"{m}.taps has labels of more than {LABELS} values"
            if not bool((part[".scale"] > 0).all()):
                yield f"{m}.scale is not above 0"

    @property
    def entries(self) -> tuple[Tensor, ...]:
        """See `CodebookSet.entries`."""
        return tuple((part[""].to(torch.float32) * part[".scale"])[:, None] for part in self.parts)

    def index(self, m: int, codes: Tensor, d_out: int, rows: slice | None = None) -> Tensor:
        """See `CodebookSet.index`; uint8 [d_out, d_in]."""
        bits, taps = self.planes[m].bits, self.parts[m][".taps"]
        if rows is None:
            return labels(codes, taps, bits, d_out)
        # the bytes of these rows, and the two before, which hold the rest of the first windows
        start = bits * rows.start // 8 - 2
        part = torch.arange(start, -(-bits * rows.stop // 8), device=codes.device) % len(codes)
        before = rows.start - start * 8 // bits
        return labels(codes[part], taps, bits, before + rows.stop - rows.start)[before:]


def stream_bits(codes: Tensor) -> Tensor:
    """uint8 [n, d_in] -> bits uint8 [8 n, d_in], in the order of the stream."""
    shifts = torch.arange(8, dtype=torch.uint8, device=codes.device)
    return ((codes[:, None] >> shifts[None, :, None]) & 1).reshape(-1, codes.shape[1])


def pack_stream(bits: Tensor) -> Tensor:
    """Bits uint8 [n, d_in] -> codes uint8 [ceil(n / 8), d_in]; `stream_bits` undoes it."""
    missing = -bits.shape[0] % 8
    whole = torch.nn.functional.pad(bits, (0, 0, 0, missing)).view(-1, 8, bits.shape[1])
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (whole << shifts[None, :, None]).sum(1, dtype=torch.uint8)


def labels(codes: Tensor, taps: Tensor, bits: int, d_out: int) -> Tensor:
    """Label of every weight: uint8 [d_out, d_in].

    A label is linear in the bits of its window, which lie in its own byte and the two before it: so
    each of the three adds (XOR) what a table says, for all rows of the own byte in one word.

    codes uint8 [bytes of a stream, d_in]; taps uint8 [L], L at most 17; bits: k.
    """
    size, rows, index = codes.shape[1], 8 // bits, codes.to(torch.int32).flatten()
    found = torch.zeros((), dtype=torch.int32 if rows == 4 else torch.int64, device=codes.device)
    for back, table in enumerate(_byte_labels(taps, bits).view(found.dtype)):
        found = found ^ table[:, 0].index_select(0, index).view(-1, size).roll(back, 0)
    by_row = found.view(torch.uint8).view(-1, size, rows).transpose(1, 2)  # [bytes, rows, d_in]
    return by_row.reshape(-1, size)[:d_out]


def _byte_labels(taps: Tensor, bits: int) -> Tensor:
    """What byte b - back adds to the labels of the rows of byte b: uint8 [back, value, row]."""
    back, bit, row = torch.meshgrid(*map(torch.arange, (3, 8, 8 // bits)), indexing="ij")
    age = (bits * row + bits - 1 + 8 * back - bit).to(taps.device)
    known = (age >= 0) & (age < len(taps))
    added = torch.where(known, taps[age.clamp(0, len(taps) - 1)], torch.zeros_like(taps[0]))
    found = torch.zeros(3, 1, 8 // bits, dtype=torch.uint8, device=taps.device)
    for i in range(8):  # bytes below 2^i, then those with bit i
        found = torch.cat([found, found ^ added[:, i : i + 1]], 1)
    return found


SETS: dict[str, type[CodebookSet]] = {"bytes": BytesSet, "trellis": TrellisSet}


def set_of(planes: Sequence[PlaneSpec], named: Mapping[str, Tensor]) -> CodebookSet:
    """The set of these planes from its stored tensors, as `CodebookSet.named` calls them.

    Raises:
        KeyError: a tensor is missing.
    """
    parts = tuple(
        {suffix: named[f"{m}{suffix}"] for suffix in plane.parts}
        for m, plane in enumerate(planes, 1)
    )
    return SETS[planes[0].kind](tuple(planes), parts)
