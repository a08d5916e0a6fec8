"""Files of a checkpoint: the manifest, and the header of a safetensors file.

A safetensors file is 8 bytes (little-endian length n of the header), n bytes of JSON padded with
spaces to a multiple of 8, then the tensors without holes. The header is written and checked here,
because the writer streams tensors from disk and the reader wants to say precisely what is wrong
with a file before a library maps it; tensors themselves are read with the safetensors library.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dropbydrop.errors import DropError, FormatError
from dropbydrop.system.digest import FileEntry

from .config import (
    FORMAT,
    FORMAT_VERSION,
    MANIFEST_FILE,
    REST_FILE,
    Fields,
    check_version,
    plain_name,
)

METADATA = {"format": "pt", "dropbydrop_version": str(FORMAT_VERSION)}
MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
DTYPES = {
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
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_SHA256 = re.compile(r"[0-9a-f]{64}")


def plane_file(m: int, shard: int = 1, shards: int = 1) -> str:
    """File of plane m, or of one of its shards (counted from 1)."""
    suffix = "" if shards == 1 else f"-{shard:05d}-of-{shards:05d}"
    return f"plane-{m}{suffix}.safetensors"


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        FormatError: missing, unreadable or not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FormatError(
            f"{path} does not exist: not a dropbydrop checkpoint, or an incomplete copy of one "
            "(hf download REPO --local-dir FOLDER fetches a whole one from the Hub)."
        ) from None
    except (OSError, ValueError) as error:
        raise FormatError(f"{path} cannot be read as JSON ({error}). Fetch it again.") from error


def dump_json(data: Any) -> bytes:
    """The one JSON form that is written: sorted keys, two spaces, final newline, UTF-8."""
    text = json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode()


def check_replaceable(folder: Path) -> None:
    """Raises DropError unless `folder` is a checkpoint, which `overwrite` may replace."""
    try:
        ours = read_json(folder / MANIFEST_FILE).get("format") == FORMAT
    except (FormatError, AttributeError):
        ours = False
    if not ours:
        raise DropError(
            f"{folder} exists and is not a dropbydrop checkpoint, so it is not overwritten. "
            "Choose another name, or remove it yourself."
        )


# ----------------------------------------------------------------------------- safetensors


@dataclass(frozen=True)
class TensorInfo:
    """What a safetensors header says about one tensor."""

    dtype: str  # safetensors name, e.g. "U8"
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def encode_header(
    tensors: Sequence[tuple[str, TensorInfo]], metadata: Mapping[str, str] = METADATA
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


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Names, dtypes and shapes in a safetensors file; checks its length and its version.

    Raises:
        FormatError: truncated, damaged, or written by an unknown version.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))
        if length > min(MAX_HEADER, size - 8):
            raise FormatError(
                f"{path} is damaged or cut off within its header ({size} bytes). Fetch it again."
            )
        raw = file.read(length)
    try:
        header = json.loads(raw)
        metadata = header.pop("__metadata__", {})
        offsets = sorted(tuple(entry["data_offsets"]) for entry in header.values())
        tensors = {
            name: TensorInfo(entry["dtype"], tuple(entry["shape"]))
            for name, entry in header.items()
        }
        spans = {name: entry["data_offsets"] for name, entry in header.items()}
        fits = all(spans[n][1] - spans[n][0] == info.nbytes for n, info in tensors.items())
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise FormatError(f"{path}: the header is damaged ({error!r}). Fetch it again.") from error
    end = 0
    for start, stop in offsets:
        fits, end = fits and start == end, stop
    if not fits or size != 8 + length + end:
        raise FormatError(
            f"{path} has {size} bytes but its header describes {8 + length + end}: cut off or "
            "damaged. Fetch it again."
        )
    if metadata.get("dropbydrop_version") != METADATA["dropbydrop_version"]:
        check_version(metadata.get("dropbydrop_version"), str(path))
    return tensors


# -------------------------------------------------------------------------------- manifest


@dataclass(frozen=True)
class Manifest:
    """`manifest.json`: every file of the full checkpoint but itself. Written once, never changed.

    Attributes:
        files: name -> size and hash.
        planes: planes[m - 1] are the file names of plane m (several when sharded).
        rest: files that every precision needs; version 1 writes exactly `model.safetensors`.
        quantized_parameters: weights of the quantized linears (d_out * d_in each).
        total_parameters: parameters of the original model, tied ones once.
    """

    files: Mapping[str, FileEntry]
    planes: tuple[tuple[str, ...], ...]
    rest: tuple[str, ...]
    quantized_parameters: int
    total_parameters: int

    @staticmethod
    def from_dict(data: object, where: str = MANIFEST_FILE) -> Manifest:
        """Parse and validate.

        Raises:
            FormatError: not ours, unknown version, names with a path in them, contradictions.
        """
        fields = Fields(data, where)
        if fields.data.pop("format", None) != FORMAT:
            raise FormatError(f"{where}: format is not {FORMAT!r}. Not one of our folders.")
        check_version(fields.data.pop("format_version", None), where)
        files: dict[str, FileEntry] = {}
        for name, entry in fields.take("files", dict).items():
            one = Fields(entry, f"{where}: {plain_name(name, where)}")
            files[name] = FileEntry(one.take("size", int), one.take("sha256", str))
            one.done()
            if files[name].size < 0 or not _SHA256.fullmatch(files[name].sha256):
                raise FormatError(f"{where}: size or sha256 of {name} is malformed.")
        planes = tuple(
            _plane_names(names, m, where) for m, names in enumerate(fields.take("planes", list), 1)
        )
        rest = tuple(plain_name(name, where) for name in fields.take("rest", list))
        counts = Fields(fields.take("parameters", dict), f"{where}: parameters")
        quantized, total = counts.take("quantized", int), counts.take("total", int)
        counts.done()
        fields.done()
        if rest != (REST_FILE,):
            raise FormatError(f"{where}: rest is {list(rest)}; version 1 has [{REST_FILE!r}].")
        unlisted = {name for names in (*planes, rest) for name in names} - set(files)
        if unlisted:
            raise FormatError(f"{where}: {sorted(unlisted)} have no size and hash. Damaged.")
        if not 0 < quantized <= total:
            raise FormatError(f"{where}: {quantized} quantized of {total} parameters: damaged.")
        return Manifest(files, planes, rest, quantized, total)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "files": {
                name: {"size": entry.size, "sha256": entry.sha256}
                for name, entry in self.files.items()
            },
            "planes": [list(names) for names in self.planes],
            "rest": list(self.rest),
            "parameters": {"quantized": self.quantized_parameters, "total": self.total_parameters},
        }


def _plane_names(names: object, m: int, where: str) -> tuple[str, ...]:
    """The files of plane m, which must be exactly the names the format gives them."""
    if not isinstance(names, list) or not names:
        raise FormatError(f"{where}: plane {m} names no files. Damaged.")
    expected = tuple(plane_file(m, i, len(names)) for i in range(1, len(names) + 1))
    found = tuple(plain_name(name, where) for name in names)
    if found != expected:
        raise FormatError(f"{where}: plane {m} is in {list(found)}; expected {list(expected)}.")
    return found
