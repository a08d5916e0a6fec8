"""What kernels read: packed planes and prepared codebooks.

Codes on disk are row major, uint8 [d_out, G]. A kernel wants the same group of many rows side by
side; native/kernels/geometry.h defines that order, one for all instruction sets. Packing permutes
bytes, pads rows to a multiple of 64 and nothing else, so it is invertible. A loaded plane is held
in one form only, the one that its device reads (`keep`), shared by all views of a checkpoint; the
other one is made where it is asked for and not kept. Prefix P reads the first P planes.

A prepared codebook holds a codebook twice: float32 entries of all 256 codes for decoding, int16
entries for building tables. A few kilobytes for each set of the whole model.

Without the native library planes stay row major and only the "torch" kernel reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dropbydrop.coding.code import ENTRIES, GROUP
from dropbydrop.errors import KernelError
from dropbydrop.system.native_library import library

from . import registry

STRIP = 64  # rows are padded to a multiple of this


@dataclass(frozen=True, eq=False)
class Packed:
    """Planes of one matrix, in the order kernels read. Immutable; may hold more planes than used.

    Attributes:
        planes: uint8, M tensors; [padded rows * groups] when `tiled`, else codes [rows, groups].
        rows, groups: d_out and G of the matrix.
        tiled: packed for the native kernels, or row major.
    """

    planes: tuple[Tensor, ...]
    rows: int
    groups: int
    tiled: bool

    def extended(self, codes: Sequence[Tensor]) -> Packed:
        """The same matrix with further planes appended; what is there is shared, not copied."""
        more = tuple(pack_plane(plane, self.tiled) for plane in codes)
        return Packed(self.planes + more, self.rows, self.groups, self.tiled)


def _check_codes(codes: Tensor) -> None:
    if codes.dtype != torch.uint8 or codes.dim() != 2:
        raise ValueError(f"codes of {codes.dtype} {tuple(codes.shape)}; need uint8 [d_out, G]")


def pack_plane(codes: Tensor, tiled: bool = True) -> Tensor:
    """One plane, uint8 [rows, groups] -> packed bytes (or a contiguous copy-free view of it).

    Raises:
        KernelError: `tiled` without the native library, or codes that are not on the CPU.
    """
    _check_codes(codes)
    codes = codes.contiguous()
    if not tiled:
        return codes
    lib = library()
    if lib is None or codes.device.type != "cpu":
        raise KernelError(
            f"packing codes on {codes.device} needs the native CPU library; use the torch kernel."
        )
    rows, groups = codes.shape
    packed = torch.empty(lib.drop_packed_bytes(rows, groups), dtype=torch.uint8)
    lib.drop_pack(codes.data_ptr(), rows, groups, packed.data_ptr())
    return packed


def pack(codes: Sequence[Tensor]) -> Packed:
    """Planes 1..M of a matrix, uint8 [d_out, G] each -> `Packed`.

    Tiled when the native library is there and the codes are on the CPU, else row major.
    """
    rows, groups = codes[0].shape
    for plane in codes:
        _check_codes(plane)
        if plane.shape != codes[0].shape:
            raise ValueError(f"planes of {tuple(plane.shape)} and {tuple(codes[0].shape)}")
    tiled = library() is not None and codes[0].device.type == "cpu"
    return Packed(tuple(pack_plane(plane, tiled) for plane in codes), rows, groups, tiled)


def unpack_plane(packed: Tensor, rows: int, groups: int) -> Tensor:
    """Inverse of `pack_plane`: packed bytes -> uint8 [rows, groups]."""
    lib = library()
    if lib is None:
        raise KernelError("unpacking needs the native library that packed these codes.")
    if packed.numel() != lib.drop_packed_bytes(rows, groups):
        raise ValueError(f"{packed.numel()} packed bytes are not [{rows}, {groups}] codes")
    codes = torch.empty(rows, groups, dtype=torch.uint8)
    lib.drop_unpack(packed.data_ptr(), rows, groups, codes.data_ptr())
    return codes


def unpack(packed: Packed, prefix: int | None = None) -> list[Tensor]:
    """Inverse of `pack`: the first `prefix` (all) planes, uint8 [d_out, G], canonical."""
    planes = packed.planes[:prefix]
    if not packed.tiled:
        return list(planes)
    return [unpack_plane(plane, packed.rows, packed.groups) for plane in planes]


def keep(codes: Tensor) -> Tensor:
    """A plane, uint8 [rows, groups], in the form that its device reads: packed bytes (one
    dimension) on a CPU with native kernels, else unchanged.
    """
    packs = codes.device.type == "cpu" and registry.select().native
    return pack_plane(codes) if packs else codes


def to_row_major(plane: Tensor, rows: int, groups: int) -> Tensor:
    """Inverse of `keep`: codes uint8 [rows, groups], on the device of `plane`."""
    return plane if plane.dim() == 2 else unpack_plane(plane, rows, groups)


@dataclass(frozen=True, eq=False)
class Codebooks:
    """A set of codebooks as kernels read it. Immutable, shared by all input groups that name the
    set.

    Attributes:
        tables: M tensors float32 [256, 8], the entries of all codes.
        prepared: M tensors uint8 for the native library; empty without it.
        symmetric: every codebook is sign-symmetric (128 entries and a sign bit a code).
    """

    tables: tuple[Tensor, ...]
    prepared: tuple[Tensor, ...]
    symmetric: bool

    @property
    def entries(self) -> int:
        """Entries per table: 128 when symmetric, else 256."""
        return ENTRIES // 2 if self.symmetric else ENTRIES


def prepare_codebooks(tables: Sequence[Tensor], symmetric: bool | Sequence[bool]) -> Codebooks:
    """Codebooks [256, 8] of planes 1..M, as `code.expand_codebook` expands them.

    Args:
        symmetric: whether each is sign-symmetric. A set with one that is not takes the general
            path for all: tables of 256 entries, twice the work.
    """
    flags = [symmetric] * len(tables) if isinstance(symmetric, bool) else list(symmetric)
    for table in tables:
        if tuple(table.shape) != (ENTRIES, GROUP):
            raise ValueError(f"codebook of {tuple(table.shape)}; need [{ENTRIES}, {GROUP}]")
    whole = tuple(table.detach().to("cpu", torch.float32).contiguous() for table in tables)
    entries = ENTRIES // 2 if all(flags) else ENTRIES
    lib = library()
    prepared = []
    for table in whole if lib else ():
        assert lib is not None
        blob = torch.empty(lib.drop_codebook_bytes(entries), dtype=torch.uint8)
        lib.drop_prepare_codebook(table[:entries].data_ptr(), entries, blob.data_ptr())
        prepared.append(blob)
    return Codebooks(whole, tuple(prepared), all(flags))
