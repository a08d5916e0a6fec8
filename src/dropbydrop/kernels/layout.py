"""What kernels read: planes in the layout of their device, matrices, and prepared codebooks.

Codes on disk are row major, uint8 [d_out, G]. A native CPU kernel wants the same group of many rows
side by side; native/kernels/geometry.h defines that order, one for all instruction sets. Packing
permutes bytes, pads rows to a multiple of 64 and nothing else, so it is invertible. A loaded plane
is held in one layout only, the one that its device reads (`to_device_layout`), shared by all views
of a checkpoint; the other one is made where it is asked for and not kept. Prefix P reads the first
P planes.

A prepared codebook holds a codebook twice: float32 entries of all 256 codes for decoding, int16
entries for building look-up tables. A few kilobytes for each set of the whole model.

Without the native library planes stay row major and only the "torch" kernel reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dropbydrop.coding.code import ENTRIES, GROUP
from dropbydrop.system.errors import KernelError
from dropbydrop.system.native_library import library

from . import registry

STRIP = 64  # rows are padded to a multiple of this


@dataclass(frozen=True, eq=False)
class Plane:
    """One plane of a matrix as it is held. Immutable.

    Attributes:
        data: uint8; packed bytes [padded rows * G], or codes [rows, G].
        rows, groups: d_out and G of the matrix.
        packed: which of the two layouts it is.
    """

    data: Tensor
    rows: int
    groups: int
    packed: bool

    @staticmethod
    def row_major(codes: Tensor) -> Plane:
        """Codes uint8 [rows, G] as they are."""
        return Plane(codes, codes.shape[0], codes.shape[1], packed=False)

    def to_row_major(self) -> Tensor:
        """Codes uint8 [rows, G], on the device of the plane."""
        return unpack_plane(self.data, self.rows, self.groups) if self.packed else self.data

    def to(self, device: torch.device) -> Plane:
        """The plane in the layout of a device; itself if it is there already."""
        if self.data.device == device:
            return self
        return to_device_layout(self.to_row_major().to(device))


def to_device_layout(codes: Tensor) -> Plane:
    """A plane, uint8 [rows, G], in the layout that its device reads: packed on a CPU with native
    kernels, else row major."""
    packs = codes.device.type == "cpu" and registry.select().native
    return _packed(codes) if packs else Plane.row_major(codes)


def pack(codes: Sequence[Tensor]) -> tuple[Plane, ...]:
    """Planes 1..M of a matrix, uint8 [d_out, G] each; packed when the native library is there and
    the codes are on the CPU, else row major.

    Raises:
        ValueError: not codes, or not of one shape.
    """
    for plane in codes:
        _check_codes(plane)
        if plane.shape != codes[0].shape:
            raise ValueError(f"planes of {tuple(plane.shape)} and {tuple(codes[0].shape)}")
    packs = library() is not None and codes[0].device.type == "cpu"
    return tuple(_packed(c) if packs else Plane.row_major(c.contiguous()) for c in codes)


def _packed(codes: Tensor) -> Plane:
    return Plane(pack_plane(codes), codes.shape[0], codes.shape[1], packed=True)


def pack_plane(codes: Tensor) -> Tensor:
    """Codes uint8 [rows, G] -> packed bytes [padded rows * G].

    Raises:
        KernelError: no native library, or codes that are not on the CPU.
    """
    _check_codes(codes)
    lib = library()
    if lib is None or codes.device.type != "cpu":
        raise KernelError(
            f"packing codes on {codes.device} needs the native CPU library; use the torch kernel."
        )
    (rows, groups), codes = codes.shape, codes.contiguous()
    packed = torch.empty(lib.drop_packed_bytes(rows, groups), dtype=torch.uint8)
    lib.drop_pack(codes.data_ptr(), rows, groups, packed.data_ptr())
    return packed


def unpack_plane(packed: Tensor, rows: int, groups: int) -> Tensor:
    """Inverse of `pack_plane`: packed bytes -> uint8 [rows, G]."""
    lib = library()
    if lib is None:
        raise KernelError("unpacking needs the native library that packed these codes.")
    if packed.numel() != lib.drop_packed_bytes(rows, groups):
        raise ValueError(f"{packed.numel()} packed bytes are not [{rows}, {groups}] codes")
    codes = torch.empty(rows, groups, dtype=torch.uint8)
    lib.drop_unpack(packed.data_ptr(), rows, groups, codes.data_ptr())
    return codes


def _check_codes(codes: Tensor) -> None:
    if codes.dtype != torch.uint8 or codes.dim() != 2:
        raise ValueError(f"codes of {codes.dtype} {tuple(codes.shape)}; need uint8 [d_out, G]")


@dataclass(frozen=True, eq=False)
class Matrix:
    """A matrix as kernels read it.

    Attributes:
        planes: planes 1..M, all in one layout; may be more than are used.
        scales: [d_out], of the rows. bias: [d_out] or None.
    """

    planes: tuple[Plane, ...]
    scales: Tensor
    bias: Tensor | None = None

    @property
    def rows(self) -> int:
        """d_out."""
        return self.planes[0].rows

    @property
    def d_in(self) -> int:
        """Number of inputs."""
        return self.planes[0].groups * GROUP

    @property
    def packed(self) -> bool:
        """Whether its planes are packed for the native kernels."""
        return self.planes[0].packed

    def data(self, prefix: int) -> list[Tensor]:
        """The first planes as they are held."""
        return [plane.data for plane in self.planes[:prefix]]

    def check(self, prefix: int, books: Codebooks) -> None:
        """Raise ValueError unless there are `prefix` planes and codebooks."""
        if not 1 <= prefix <= min(len(self.planes), len(books.entries)):
            raise ValueError(
                f"prefix {prefix} with {len(self.planes)} planes and {len(books.entries)} codebooks"
            )


@dataclass(frozen=True, eq=False)
class Codebooks:
    """A set of codebooks as kernels read it. Immutable, shared by all input groups that name it.

    Attributes:
        entries: M tensors float32 [256, 8], the entries of all codes, on the CPU.
        prepared: M tensors uint8 for the native library; empty without it.
        symmetric: every codebook is sign-symmetric (128 entries and a sign bit a code).
    """

    entries: tuple[Tensor, ...]
    prepared: tuple[Tensor, ...]
    symmetric: bool
    _derived: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)

    @property
    def lut_entries(self) -> int:
        """Entries of a look-up table: 128 when symmetric, else 256."""
        return ENTRIES // 2 if self.symmetric else ENTRIES

    def on(self, device: torch.device) -> tuple[Tensor, ...]:
        """`entries` on a device."""
        copies: tuple[Tensor, ...] = self.derived(
            ("copies", device), lambda: tuple(table.to(device) for table in self.entries)
        )
        return copies

    def derived(self, key: Hashable, build: Callable[[], Any]) -> Any:
        """The value of `key`, built once for all input groups that share this set."""
        if key not in self._derived:
            self._derived[key] = build()
        return self._derived[key]


def prepare_codebooks(entries: Sequence[Tensor], symmetric: bool | Sequence[bool]) -> Codebooks:
    """Codebooks [256, 8] of planes 1..M, as `code.expand_codebook` expands them.

    Args:
        symmetric: whether each is sign-symmetric. A set with one that is not takes the general
            path for all: look-up tables of 256 entries, twice the work.
    """
    flags = [symmetric] * len(entries) if isinstance(symmetric, bool) else list(symmetric)
    for table in entries:
        if tuple(table.shape) != (ENTRIES, GROUP):
            raise ValueError(f"codebook of {tuple(table.shape)}; need [{ENTRIES}, {GROUP}]")
    whole = tuple(table.detach().to("cpu", torch.float32).contiguous() for table in entries)
    count = ENTRIES // 2 if all(flags) else ENTRIES
    lib = library()
    prepared = []
    for table in whole if lib else ():
        assert lib is not None
        blob = torch.empty(lib.drop_codebook_bytes(count), dtype=torch.uint8)
        lib.drop_prepare_codebook(table[:count].data_ptr(), count, blob.data_ptr())
        prepared.append(blob)
    return Codebooks(whole, tuple(prepared), all(flags))
