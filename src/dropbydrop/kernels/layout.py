"""What kernels read: planes in the layout of their device, matrices, and prepared codebooks.

Codes are stored as `PlaneSpec.shape` says. GPU kernels and torch read them so; a native CPU kernel
wants what one instruction multiplies side by side ("packed"):

    bytes     the same group of 64 rows; native/kernels/geometry.h defines the order. Packing
              permutes bytes and pads rows to a multiple of 64
    trellis   one byte of the streams of 64 inputs: as stored, inputs padded to a multiple of 64.
              Where there is nothing to pad the packed plane is the stored one, not copied

Both are one for all instruction sets and invertible. A loaded plane is held in one layout only, the
one that its device reads (`to_device_layout`), shared by all views of a checkpoint; the other one
is made where it is asked for and not kept. Prefix P reads the first P planes.

A prepared codebook is what the native kernels read beside codes. Of bytes: float32 entries of all
256 codes for decoding, int16 entries for building look-up tables. Of trellis: matrices of the taps
and tables of the values. A few kilobytes for each set of the whole model.

Without the native library planes stay as stored and only the "torch" kernel reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dropbydrop.coding.code import ENTRIES, GROUP
from dropbydrop.coding.codebook_set import CodebookSet, TrellisSet
from dropbydrop.coding.planes import BytesPlane, PlaneSpec
from dropbydrop.system.errors import KernelError
from dropbydrop.system.native_library import library

from . import registry

STRIP = 64  # rows of a packed byte plane, inputs of a packed trellis plane: multiples of this


@dataclass(frozen=True, eq=False)
class Plane:
    """One plane of a matrix as it is held. Immutable.

    Attributes:
        data: uint8; codes of the shape that `spec` says, or packed: bytes [padded d_out * G],
            trellis [bytes of a stream, padded d_in].
        spec: its kind and shape.
        d_out, d_in: of the matrix.
        packed: which of the two layouts it is.
        experts: 0, or the number E of matrices of a stack; `data` has a dimension E in front.
    """

    data: Tensor
    spec: PlaneSpec
    d_out: int
    d_in: int
    packed: bool
    experts: int = 0

    @staticmethod
    def stored(codes: Tensor, spec: PlaneSpec, *matrix: int) -> Plane:
        """Codes as they are on disk, of a matrix (d_out, d_in) or a stack (E, d_out, d_in).

        Raises:
            ValueError: codes of another shape.
        """
        if codes.dtype != torch.uint8 or tuple(codes.shape) != spec.shape(*matrix):
            raise ValueError(
                f"codes of {codes.dtype} {tuple(codes.shape)}; a {spec.kind} plane of a matrix "
                f"{list(matrix)} is uint8 {list(spec.shape(*matrix))}"
            )
        *stack, d_out, d_in = matrix
        return Plane(codes, spec, d_out, d_in, packed=False, experts=stack[0] if stack else 0)

    @property
    def matrix(self) -> tuple[int, ...]:
        """(d_out, d_in), or (E, d_out, d_in) of a stack."""
        stack = (self.experts,) if self.experts else ()
        return (*stack, self.d_out, self.d_in)

    def expert(self, e: int) -> Plane:
        """Matrix e of a stack, on the same storage."""
        return replace(self, data=self.data[e], experts=0)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Tensor:
        """`change` of the data, or of that of each matrix of a stack."""
        return (
            torch.stack([change(one) for one in self.data]) if self.experts else change(self.data)
        )

    def to_stored(self) -> Tensor:
        """Codes as on disk, on the device of the plane."""
        if not self.packed:
            return self.data
        if self.spec.kind == "trellis":
            return self.data[..., : self.d_in].contiguous()
        return self._each(lambda data: unpack_bytes(data, self.d_out, self.d_in // GROUP))

    def to_packed(self) -> Plane:
        """The plane as native kernels read it.

        Raises:
            KernelError: a byte plane without the native library or not on the CPU.
        """
        if self.packed:
            return self
        data = self.data.contiguous()
        if self.spec.kind == "bytes":
            data = self._each(pack_bytes)
        elif missing := -self.d_in % STRIP:
            data = torch.nn.functional.pad(data, (0, missing))
        return replace(self, data=data, packed=True)

    def to(self, device: torch.device) -> Plane:
        """The plane in the layout of a device; itself if it is there already."""
        if self.data.device == device:
            return self
        return to_device_layout(self.to_stored().to(device), self.spec, *self.matrix)


def to_device_layout(codes: Tensor, spec: PlaneSpec, *matrix: int) -> Plane:
    """A plane of stored codes in the layout that its device reads: packed on a CPU with native
    kernels for it, else as stored."""
    plane = Plane.stored(codes, spec, *matrix)
    return plane.to_packed() if codes.device.type == "cpu" and _native(spec) else plane


def plane_bytes(spec: PlaneSpec, *matrix: int) -> int:
    """Bytes of a plane as the CPU of this machine holds it (padded); args as `Plane.stored`."""
    *stack, d_out, d_in = matrix
    if not _native(spec):
        return spec.nbytes(*matrix)
    if spec.kind == "trellis":
        return spec.nbytes(*stack, d_out, -(-d_in // STRIP) * STRIP)
    return spec.nbytes(*stack, -(-d_out // STRIP) * STRIP, d_in)


def _native(spec: PlaneSpec) -> bool:
    return registry.select(kind=spec.kind).native


def pack(
    codes: Sequence[Tensor], specs: Sequence[PlaneSpec], d_out: int, d_in: int
) -> tuple[Plane, ...]:
    """Planes 1..M of a matrix, codes as stored; packed when the native library is there and the
    codes are on the CPU, else as they are. `specs` are of M planes or more.

    Raises:
        ValueError: not codes of a matrix [d_out, d_in].
    """
    given = zip(codes, specs[: len(codes)], strict=True)
    planes = [Plane.stored(plane.contiguous(), spec, d_out, d_in) for plane, spec in given]
    packs = library() is not None and codes[0].device.type == "cpu"
    return tuple(plane.to_packed() if packs else plane for plane in planes)


def pack_bytes(codes: Tensor) -> Tensor:
    """Codes of a byte plane uint8 [d_out, G] -> packed bytes [padded d_out * G].

    Raises:
        KernelError: no native library, or codes that are not on the CPU.
    """
    lib = library()
    if lib is None or codes.device.type != "cpu":
        raise KernelError(
            f"packing codes on {codes.device} needs the native CPU library; use the torch kernel."
        )
    (rows, groups), codes = codes.shape, codes.contiguous()
    packed = torch.empty(lib.drop_packed_bytes(rows, groups), dtype=torch.uint8)
    lib.drop_pack(codes.data_ptr(), rows, groups, packed.data_ptr())
    return packed


def unpack_bytes(packed: Tensor, rows: int, groups: int) -> Tensor:
    """Inverse of `pack_bytes`: packed bytes -> uint8 [d_out, G]."""
    lib = library()
    if lib is None:
        raise KernelError("unpacking needs the native library that packed these codes.")
    if packed.numel() != lib.drop_packed_bytes(rows, groups):
        raise ValueError(f"{packed.numel()} packed bytes are not [{rows}, {groups}] codes")
    codes = torch.empty(rows, groups, dtype=torch.uint8)
    lib.drop_unpack(packed.data_ptr(), rows, groups, codes.data_ptr())
    return codes


@dataclass(frozen=True, eq=False)
class Matrix:
    """A matrix as kernels read it.

    Attributes:
        planes: planes 1..M, of one kind, all in one layout; may be more than are used.
        scales: [d_out], of the rows. bias: [d_out] or None.
    """

    planes: tuple[Plane, ...]
    scales: Tensor
    bias: Tensor | None = None

    @property
    def rows(self) -> int:
        """d_out."""
        return self.planes[0].d_out

    @property
    def d_in(self) -> int:
        """Number of inputs."""
        return self.planes[0].d_in

    @property
    def packed(self) -> bool:
        """Whether its planes are packed for the native kernels."""
        return self.planes[0].packed

    def data(self, prefix: int) -> list[Tensor]:
        """The first planes as they are held."""
        return [plane.data for plane in self.planes[:prefix]]

    def check(self, prefix: int, books: Codebooks) -> None:
        """Raise ValueError unless there are `prefix` planes and codebooks that describe them."""
        specs = books.set.planes
        if not 1 <= prefix <= min(len(self.planes), len(specs)):
            raise ValueError(
                f"prefix {prefix} with {len(self.planes)} planes and {len(specs)} codebooks"
            )
        mine = tuple(plane.spec for plane in self.planes[:prefix])
        if mine != specs[:prefix]:
            raise ValueError(f"planes {mine} with codebooks of {specs[:prefix]}")


@dataclass(frozen=True, eq=False)
class Codebooks:
    """A set of codebooks as kernels read it. Immutable, shared by all input groups that name it.

    Attributes:
        set: what the codes mean, on the CPU.
        prepared: M tensors uint8 for the native library; empty without it.
    """

    set: CodebookSet
    prepared: tuple[Tensor, ...]
    _derived: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)

    @property
    def kind(self) -> str:
        """Kind of the planes."""
        return self.set.kind

    @property
    def entries(self) -> tuple[Tensor, ...]:
        """The table of each plane, float32 [K, g], on the CPU."""
        tables: tuple[Tensor, ...] = self.derived("entries", lambda: self.set.entries)
        return tables

    @property
    def lut_entries(self) -> int:
        """Of byte planes: entries of a look-up table, 128 when all are sign-symmetric, else 256.

        A set with one that is not takes the general path for all: twice the work.
        """
        return lut_entries(self.set)

    def on(self, device: torch.device) -> CodebookSet:
        """`set` on a device."""
        copy: CodebookSet = self.derived(("copy", device), lambda: self.set.to(device))
        return copy

    def derived(self, key: Hashable, build: Callable[[], Any]) -> Any:
        """The value of `key`, built once for all input groups that share this set."""
        if key not in self._derived:
            self._derived[key] = build()
        return self._derived[key]


def lut_entries(books: CodebookSet) -> int:
    """See `Codebooks.lut_entries`; 0 for trellis planes."""
    if books.kind != "bytes":
        return 0
    halved = all(isinstance(spec, BytesPlane) and spec.sign_symmetric for spec in books.planes)
    return ENTRIES // 2 if halved else ENTRIES


def prepare_codebooks(books: CodebookSet) -> Codebooks:
    """Codebooks of planes 1..M, ready for every kernel.

    Raises:
        ValueError: values or taps that no checkpoint has (`CodebookSet.problems`).
    """
    here = books.to("cpu")
    if library() is None:
        return Codebooks(here, ())
    if isinstance(here, TrellisSet):
        return Codebooks(here, _prepare_trellis(here))
    return Codebooks(here, _prepare_bytes(here))


def _prepare_bytes(books: CodebookSet) -> tuple[Tensor, ...]:
    lib, count, prepared = library(), lut_entries(books), []
    assert lib is not None
    for table in books.entries:
        if not bool(torch.isfinite(table).all()):  # rounding them would overflow
            raise ValueError("codebooks with values that are not finite")
        blob = torch.empty(lib.drop_codebook_bytes(count), dtype=torch.uint8)
        lib.drop_prepare_codebook(table[:count].contiguous().data_ptr(), count, blob.data_ptr())
        prepared.append(blob)
    return tuple(prepared)


def _prepare_trellis(books: TrellisSet) -> tuple[Tensor, ...]:
    lib, prepared = library(), []
    assert lib is not None
    for spec, part in zip(books.planes, books.parts, strict=True):
        taps, values = part[".taps"].contiguous(), part[""].contiguous()
        blob = torch.empty(lib.drop_trellis_bytes(), dtype=torch.uint8)
        scale, addresses = float(part[".scale"]), (taps.data_ptr(), values.data_ptr())
        if lib.drop_prepare_trellis(spec.bits, spec.window, *addresses, scale, blob.data_ptr()):
            raise ValueError(f"{spec} with taps {taps.tolist()} and values {values.tolist()}")
        prepared.append(blob)
    return tuple(prepared)
