"""Safetensors files, written tensor by tensor, and their headers, checked before anything is read.

A safetensors file is 8 bytes (little-endian length n of the header), n bytes of JSON padded with
spaces to a multiple of 8, then the tensors without holes. The header is written and checked here,
because writers stream tensors that no memory holds together (from raw files, from another
checkpoint, decoded a slab at a time) and the reader wants to say precisely what is wrong with a
file before anything uses it. Tensors are read by transformers with the safetensors library, and one
by one by checked_file.py.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dropbydrop.system.errors import FormatError

from .fields import FORMAT_VERSION, check_version, parse_json

METADATA = {"format": "pt", "format_version": str(FORMAT_VERSION)}
MAX_HEADER = 16 << 20  # bytes; 100,000 tensors take 12 MB
DTYPES = {  # by their safetensors names
    "U8": torch.uint8,
    "I8": torch.int8,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I32": torch.int32,
    "I64": torch.int64,
    "BOOL": torch.bool,
}
FLOATS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
FLOAT_TYPES = ("F16", "BF16", "F32", "F64")
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """What a safetensors header says about one tensor."""

    dtype: str  # safetensors name, e.g. "U8"
    shape: tuple[int, ...]

    @staticmethod
    def of(tensor: Tensor) -> TensorInfo:
        """Dtype and shape of a tensor."""
        return TensorInfo(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))

    @property
    def itemsize(self) -> int:
        """Bytes of one value."""
        return DTYPES[self.dtype].itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * self.itemsize

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


# --------------------------------------------------------------------------------- writing


@dataclass(frozen=True)
class StreamedTensor:
    """A tensor to be written: what the header says of it, and its bytes when their turn comes."""

    name: str
    info: TensorInfo
    chunks: Callable[[], Iterable[bytes | memoryview]]

    @staticmethod
    def of(name: str, tensor: Tensor) -> StreamedTensor:
        """A tensor in memory."""
        return StreamedTensor(name, TensorInfo.of(tensor), lambda: [raw_bytes(tensor)])


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, row-major, as they lie in memory (a copy only if they must be)."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    data: memoryview = flat.view(torch.uint8).numpy().data
    return data


def encode_header(
    tensors: Iterable[tuple[str, TensorInfo]], metadata: Mapping[str, str] = METADATA
) -> bytes:
    """Length and JSON header of a file that holds `tensors` in this order."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, info in tensors:
        start, end = end, end + info.nbytes
        header[name] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data begins at a multiple of 8
    return struct.pack("<Q", len(text)) + text


def stream_tensors(
    tensors: Sequence[StreamedTensor], metadata: Mapping[str, str] = METADATA
) -> Iterator[bytes | memoryview]:
    """A safetensors file in pieces: the header, then every tensor in the order given."""
    yield encode_header(((tensor.name, tensor.info) for tensor in tensors), metadata)
    for tensor in tensors:
        yield from tensor.chunks()


def wide_first(tensors: Iterable[StreamedTensor]) -> list[StreamedTensor]:
    """The one order of a file of many types: wide types first, which keeps every tensor aligned to
    its own width, then by name."""
    return sorted(tensors, key=lambda tensor: (-tensor.info.itemsize, tensor.name))


def into_shards(tensors: Iterable[StreamedTensor], shard_bytes: int) -> list[list[StreamedTensor]]:
    """Consecutive tensors in files of at most `shard_bytes`, larger ones in a file of their own."""
    shards: list[list[StreamedTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.info.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.info.nbytes
    return shards


# --------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of its tensors.

    Attributes:
        tensors: name -> type and shape.
        starts: name -> where its data begins, bytes from the beginning of the file.
    """

    tensors: dict[str, TensorInfo]
    starts: dict[str, int]


def read_header(data: bytes | mmap.mmap, where: str) -> Header:
    """The header of a file with these bytes; checks its length and its version.

    Raises:
        FormatError: truncated, damaged, or written by an unknown version.
    """
    size = len(data)
    (length,) = struct.unpack("<Q", data[:8].ljust(8, b"\xff"))
    if length > min(MAX_HEADER, size - 8):
        raise FormatError(
            f"{where} is damaged or cut off within its header ({size} bytes). Fetch it again."
        )
    try:
        header = parse_json(data[8 : 8 + length], f"{where}: the header")
        metadata = _strings(header.pop("__metadata__", {}))
        spans = {name: _span(entry) for name, entry in header.items()}
        fits, end = True, 0
        for start, stop, info in sorted(spans.values(), key=lambda span: span[:2]):
            fits, end = fits and start == end and stop - start == info.nbytes, stop
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"{where}: the header is damaged ({error!r}). Fetch it again.") from error
    if not fits or size != 8 + length + end:
        raise FormatError(
            f"{where} has {size} bytes but its header describes {8 + length + end}: cut off or "
            "damaged. Fetch it again."
        )
    if metadata.get("format_version") != METADATA["format_version"]:
        check_version(metadata.get("format_version"), where)
    tensors = {name: info for name, (_, _, info) in spans.items()}
    return Header(tensors, {name: 8 + length + start for name, (start, _, _) in spans.items()})


def _strings(metadata: Any) -> dict[str, str]:
    if not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ holds more than strings")
    return dict(metadata)


def _span(entry: Any) -> tuple[int, int, TensorInfo]:
    """First byte, last byte + 1, type and shape of an entry of a header."""
    if set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"an entry has the keys {sorted(entry)}")
    start, stop = entry["data_offsets"]
    info = TensorInfo(entry["dtype"], tuple(entry["shape"]))
    if any(type(n) is not int or not 0 <= n < 1 << 48 for n in (start, stop, *info.shape)):
        raise ValueError("a shape or an offset is no size")
    if math.prod(info.shape) >= 1 << 48 or len(info.shape) > 8:
        raise ValueError("a shape of more values than any file holds")
    return start, stop, info
