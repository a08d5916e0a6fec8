"""Codebooks of trellis planes as the CUDA kernels read them (labels.cu).

There are two ways to the values of a plane. By labels: a byte of a stream holds 8/k rows, and their
labels are sums modulo 2 of three look-ups, in the byte itself and in the two before it. By pairs:
the values of two rows that follow each other depend on the bits of both windows, L + k of them, and
where these are 16 one look-up finds both. More are folded: both labels are linear in the bits and
have 12 bits, so a bit older than 16 adds to them what some of the newest 16 add together, and
stands for these. A plane with an older bit that adds what these cannot has no pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dropbydrop.coding.codebook_set import CodebookSet, labels

INDEX = 16  # bits by which the values of two rows are looked up at once
PAIR_BYTES = 2 << INDEX  # of that table
FOLDS = 3  # older bits of the windows of two rows, at most


@dataclass(frozen=True)
class Tables:
    """Codebooks of planes 1..M as the kernels read them, on one device.

    Attributes:
        bits: of each plane.
        labels: int32 [M, 3 * 256, 2], labels of the rows of a byte, by this byte, the one before
            and the one before that.
        values: int8 [M, 64]. scales: float32 [M].
        pairs: int16 [M, 65536], values of two rows that follow each other, the first in the low
            byte, by the newest 16 bits of the window of the second, the oldest bit lowest.
        folds: int32 [M, 3], what each older bit changes of these, in both halves of a word.
        extra: older bits of each plane's windows; -1: `pairs` cannot have them.
    """

    bits: tuple[int, ...]
    labels: Tensor
    values: Tensor
    scales: Tensor
    pairs: Tensor
    folds: Tensor
    extra: tuple[int, ...]

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """What decoding to a dense matrix reads."""
        return self.labels, self.values, self.scales


def prepare(books: CodebookSet, device: torch.device | str) -> Tables:
    """The tables of a `TrellisSet`, on a device."""
    bits = tuple(spec.bits for spec in books.planes)
    words = [_label_words(p[".taps"].cpu(), k) for p, k in zip(books.parts, bits, strict=True)]
    windows = [
        _pair_windows(p[".taps"].tolist(), k) for p, k in zip(books.parts, bits, strict=True)
    ]
    pairs = [
        _pair_values(columns, part[""].cpu())
        for (columns, _), part in zip(windows, books.parts, strict=True)
    ]
    folds = torch.zeros(len(bits), FOLDS, dtype=torch.int64)
    for m, (_, found) in enumerate(windows):
        folds[m, : len(found or ())] = torch.tensor(found or (), dtype=torch.int64) * 0x10001
    return Tables(
        bits,
        torch.stack(words).to(device),
        torch.stack([part[""] for part in books.parts]).to(device),
        torch.cat([part[".scale"] for part in books.parts]).float().to(device),
        torch.stack(pairs).to(device),
        (folds - (folds >> 31 << 32)).int().to(device),
        tuple(-1 if found is None else len(found) for _, found in windows),
    )


def _label_words(taps: Tensor, bits: int) -> Tensor:
    """int32 [3 * 256, 2]: labels that each value of a byte gives to the rows of its own byte, of
    the next one, and of the one after; a byte a label, rows of 2 bits twice."""
    per_byte, every = 8 // bits, torch.arange(256, dtype=torch.uint8, device=taps.device)
    tables = []
    for age in range(3):
        ring = torch.zeros(3, 256, dtype=torch.uint8, device=taps.device)
        ring[2 - age] = every
        rows = labels(ring, taps, bits, 3 * per_byte)[2 * per_byte :]  # [8 / k, 256]
        tables.append(rows.T.contiguous().view(torch.int32).expand(256, 2))
    return torch.cat(tables).contiguous()


def _pair_windows(taps: Sequence[int], bits: int) -> tuple[list[int], list[int] | None]:
    """What the bits of the windows of two rows do to both labels.

    Returns:
        (for each of the newest 16 bits, the oldest first, what it adds to the label of the first
        row + 64 times that of the second; for each older bit, the youngest first, which of these
        add the same, as a number; None where none do).
    """
    span = max(len(taps) + bits, INDEX)
    second = [*taps, *[0] * (span - len(taps))]
    first = [*[0] * bits, *taps, *[0] * (span - len(taps) - bits)]
    by_age = [a | b << 6 for a, b in zip(first, second, strict=True)]
    columns, older = by_age[INDEX - 1 :: -1], by_age[INDEX:]
    basis: dict[int, tuple[int, int]] = {}  # by its highest bit: a sum of columns, and of which

    def reduced(column: int, which: int) -> tuple[int, int]:
        while column and (held := basis.get(column.bit_length())):
            column, which = column ^ held[0], which ^ held[1]
        return column, which

    for i, column in enumerate(columns):
        left, which = reduced(column, 1 << i)
        if left:
            basis[left.bit_length()] = left, which
    folded = [reduced(column, 0) for column in older]
    if any(left for left, _ in folded):
        return columns, None
    return columns, [which for _, which in folded]


def _pair_values(columns: Sequence[int], values: Tensor) -> Tensor:
    """int16 [65536]: `Tables.pairs` of one plane."""
    both = torch.zeros(1, dtype=torch.int64)
    for column in columns:
        both = torch.cat([both, both ^ column])
    return torch.stack([values[both & 63], values[both >> 6]], 1).view(torch.int16).flatten()
