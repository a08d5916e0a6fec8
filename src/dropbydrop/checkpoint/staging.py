"""Append-only raw files of tensors: where a checkpoint's tensors wait until they are assembled.

A spill holds the bytes of its tensors back to back, as they lie in memory; names, types, shapes and
offsets are in memory only. `commit` makes what was added durable and hands out its entries, from
which `restore` (in another process, after any kind of crash) continues: bytes behind the last
committed entry are cut off.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from dropbydrop.errors import FormatError

from .files import DTYPE_NAMES, TensorInfo

_CHUNK = 8 << 20


@dataclass(frozen=True)
class StagedTensor:
    """A tensor in a raw file."""

    info: TensorInfo
    offset: int


class StagingFile:
    """An append-only raw file of tensors."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, StagedTensor] = {}
        self.file: BinaryIO = open(path, "wb")  # noqa: SIM115 - lives as long as the writer
        self._committed = 0  # tensors

    @staticmethod
    def restore(path: Path, entries: Sequence[Sequence[Any]]) -> StagingFile:
        """The spill as it was after the commits that returned `entries`.

        Raises:
            FormatError: the file is gone or shorter than that.
        """
        spill = StagingFile.__new__(StagingFile)
        spill.path = path
        spill.tensors = {
            name: StagedTensor(TensorInfo(dtype, tuple(shape)), offset)
            for name, dtype, shape, offset in entries
        }
        spill._committed = len(spill.tensors)
        end = max((s.offset + s.info.nbytes for s in spill.tensors.values()), default=0)
        size = path.stat().st_size if path.is_file() else -1
        if size < end:
            raise FormatError(
                f"{path} has {max(size, 0)} bytes, {end} are needed to go on: the folder "
                f"{path.parent} is damaged. Remove it, and start again."
            )
        spill.file = open(path, "r+b")  # noqa: SIM115
        spill.file.truncate(end)
        spill.file.seek(end)
        return spill

    def add(self, name: str, tensor: Tensor) -> None:
        """Append a tensor."""
        if name in self.tensors:
            raise ValueError(f"tensor {name} was added twice")
        info = TensorInfo(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
        self.tensors[name] = StagedTensor(info, self.file.tell())
        data = tensor.detach().cpu().contiguous().reshape(-1)
        self.file.write(data.view(torch.uint8).numpy().data)

    def commit(self) -> list[list[Any]]:
        """Make what was added durable; [name, dtype, shape, offset] of what is new since then."""
        self.file.flush()
        os.fsync(self.file.fileno())
        new = list(self.tensors.items())[self._committed :]
        self._committed = len(self.tensors)
        return [[name, s.info.dtype, list(s.info.shape), s.offset] for name, s in new]

    def copy(self, raw: BinaryIO, name: str) -> Iterator[bytes]:
        """The bytes of a tensor, from the file opened as `raw`."""
        spilled = self.tensors[name]
        raw.seek(spilled.offset)
        left = spilled.info.nbytes
        while left:
            chunk = raw.read(min(left, _CHUNK))
            if not chunk:
                raise OSError(errno.EIO, "a spilled file is shorter than what was written to it")
            left -= len(chunk)
            yield chunk
