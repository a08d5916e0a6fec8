"""Tables in planes as a loaded model holds them: eight-bit rows, made once for each precision.

What is stored are a few bits a weight (coding/tables.py); what a look-up and a head read are rows
of int8 in rotated coordinates, as of tables stored in eight bits:

    W = W' Q,   W' ~ rows * row_scales       step of a row: its largest weight / 127

So a head runs at the speed of an eight-bit one, on every device, whatever its planes are; rounding
W' once more adds about a hundredth of the error of 4 bits. Views at one precision share the rows,
and rows that no model uses any more are freed. They are made from the files of the checkpoint,
which stay open: the first view at another precision takes as long as decoding its table.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dropbydrop import kernels
from dropbydrop.checkpoint.int8_rows import quantize_rows
from dropbydrop.checkpoint.tables import read_table, read_table_rotation
from dropbydrop.coding.rotation import Rotation
from dropbydrop.coding.tables import rings

from .plane_store import PlaneStore


@dataclass(frozen=True, eq=False)
class TableRows:
    """Rows of a table at one precision. Immutable, shared.

    Attributes:
        rows: int8 [vocab, d], rotated.
        row_scales: float16 [vocab].
    """

    rows: Tensor
    row_scales: Tensor

    def __deepcopy__(self, memo: dict[int, Any]) -> TableRows:
        return self


@dataclass(frozen=True, eq=False)
class Turns:
    """Q, and Q^T by the same kernel: the Hadamard part is symmetric and commutes with the odd
    factor, so Q^T x = signs * (a rotation by the transposed factor without signs) x."""

    forward: Rotation
    backward: Rotation

    @staticmethod
    def of(rotation: Rotation) -> Turns:
        """Both of a rotation."""
        odd = None if rotation.odd is None else rotation.odd.T.contiguous()
        return Turns(rotation, replace(rotation, signs=torch.ones_like(rotation.signs), odd=odd))

    def apply(self, x: Tensor) -> Tensor:
        """x [..., d] -> Q x, in float32 (float64 stays)."""
        return kernels.rotate(x, self.forward)

    def transpose(self, x: Tensor) -> Tensor:
        """x [..., d] -> Q^T x, likewise: rows of W' to rows of W."""
        return kernels.rotate(x, self.backward) * self.forward.signs


@dataclass(frozen=True)
class TableSource:
    """Where the rows of a table come from.

    Attributes:
        store: of the model and its views.
        name: the module in the checkpoint.
        count: its planes in use.
    """

    store: PlaneStore
    name: str
    count: int

    def __deepcopy__(self, memo: dict[int, Any]) -> TableSource:
        return self

    def turns(self, device: torch.device) -> Turns:
        """Q and its transpose on a device."""
        found: Turns = self.store.derived(
            ("table rotation", self.name, device),
            lambda: Turns.of(read_table_rotation(self.store.checkpoint, self.name).to(device)),
        )
        return found

    def read(self, device: torch.device) -> TableRows:
        """The rows on a device.

        Raises:
            MissingPlaneError, FormatError: as `Checkpoint.require`.
        """
        key = ("table", self.name, self.count, device)
        found: TableRows = self.store.shared(key, lambda: self._build(device))
        return found

    def _build(self, device: torch.device) -> TableRows:
        checkpoint = self.store.checkpoint
        spec = checkpoint.quantization.embeddings
        codes = read_table(checkpoint, self.name, self.count)
        planes = spec.planes[: len(codes)]
        books = self.store.derived(
            ("books", spec.codebooks),
            lambda: kernels.prepare_codebooks(checkpoint.read_set(spec.codebooks)),
        )
        scales = checkpoint.read(f"{self.name}.scales")
        kernel = _decoder(device.type)
        count, length = rings(len(scales))
        d = codes[0].shape[-1]
        rows = torch.empty(len(scales), d, dtype=torch.int8)
        row_scales = torch.empty(len(scales), dtype=torch.float16)
        for ring in range(count):
            part = slice(ring * length, min((ring + 1) * length, len(scales)))
            own = torch.zeros(length, dtype=torch.float16)
            own[: part.stop - part.start] = scales[part]
            held = tuple(
                kernels.Plane.stored(plane[ring].to(device), spec, length, d)
                for plane, spec in zip(codes, planes, strict=True)
            )
            matrix = kernels.Matrix(held, own.to(device), None)
            weight = kernels.decode_dense(matrix, books, len(held), kernel=kernel)
            rows[part], row_scales[part] = quantize_rows(weight[: part.stop - part.start])
        return TableRows(rows.to(device), row_scales.to(device))


def _decoder(device: str) -> str:
    """The best kernel here that reads trellis planes, whichever was named for the matrices."""
    return next(
        kernel.name
        for kernel in kernels.available()
        if kernel.device in ("any", device) and kernel.reads("trellis")
    )
