"""Lazy reading of a Hugging Face folder's safetensors, one tensor at a time.

Every tensor that is returned owns its memory. (`safe_open` hands out views of a memory map; a
view would keep the whole file mapped, count as resident memory and change under us if the file
did.) Files are opened per call, so nothing stays mapped between two blocks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dropbydrop.system.errors import FormatError, first_line

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_PART = 64 << 20


class WeightFiles:
    """The tensors of a folder's `model.safetensors` or of its shards.

    Raises:
        FormatError: no safetensors, an index that names missing files, or an unreadable file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file_of: dict[str, str] = {}  # tensor name -> file name
        index = self._index() if (folder / INDEX).is_file() else None
        if index is None and not (folder / SINGLE).is_file():
            raise FormatError(
                f"{folder} has neither {SINGLE} nor {INDEX}; save the model as safetensors "
                "(model.save_pretrained does)."
            )
        files = [SINGLE] if index is None else sorted(set(index.values()))
        if index is not None and (folder / SINGLE).is_file() and files != [SINGLE]:
            raise FormatError(
                f"{folder} holds two sets of weights: {SINGLE}, and the files of {INDEX} (first: "
                f"{files[0]}). transformers reads the former, other software the latter. Remove "
                "the one that is out of date."
            )
        for file in files:
            with self._open(file) as handle:
                self._file_of |= dict.fromkeys(handle.keys(), file)
        wrong = {n for n, file in (index or {}).items() if self._file_of.get(n) != file}
        wrong |= self._file_of.keys() - index.keys() if index is not None else set()
        if wrong:
            raise FormatError(
                f"{folder / INDEX} and the files that it names disagree about {len(wrong)} "
                f"tensors (first: {min(wrong)}): they are of two downloads. Download the model "
                "again."
            )

    def _index(self) -> dict[str, str]:
        """Tensor name -> file name, as the index says; all files are there."""
        folder = self.folder
        try:
            listed = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].items()
        except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
            raise FormatError(
                f"{folder / INDEX} is not a safetensors index ({first_line(error)}); fetch it "
                "again."
            ) from error
        index = {str(name): str(file) for name, file in listed}
        files = sorted(set(index.values()))
        if bad := [file for file in files if Path(file).name != file]:
            raise FormatError(f"{folder / INDEX} points outside its folder: {bad[0]!r}.")
        if missing := [file for file in files if not (folder / file).is_file()]:
            raise FormatError(
                f"{folder} lacks {len(missing)} of {len(files)} weight files "
                f"(first: {missing[0]}); download the model again."
            )
        return index

    def _open(self, file: str) -> safe_open:
        try:
            return safe_open(self.folder / file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise FormatError(
                f"{self.folder / file} cannot be read ({error}); it is truncated or damaged, "
                "download it again."
            ) from error

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from its file's header."""
        with self._open(self._file_of[name]) as handle:
            return tuple(handle.get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Type of a tensor as safetensors calls it ("BF16"), from its file's header."""
        with self._open(self._file_of[name]) as handle:
            return str(handle.get_slice(name).get_dtype())

    def parts(self, name: str) -> Iterator[Tensor]:
        """A tensor in runs of its rows of about 64 MiB, as stored; one at a time is in memory."""
        with self._open(self._file_of[name]) as handle:
            view = handle.get_slice(name)
            shape = view.get_shape()
            if len(shape) < 2:
                yield handle.get_tensor(name)
                return
            rows = max(1, _PART // max(1, 4 * math.prod(shape[1:])))
            for low in range(0, shape[0], rows):
                yield view[low : low + rows]

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor as it is stored, or converted to `dtype` when it is floating point."""
        with self._open(self._file_of[name]) as handle:
            try:
                stored = handle.get_tensor(name)
            except SafetensorError as error:
                raise FormatError(
                    f"{self.folder / self._file_of[name]} has no readable tensor {name} "
                    f"({error}); download the model again."
                ) from error
            wanted = dtype if dtype is not None and stored.is_floating_point() else stored.dtype
            if stored.nbytes > 2 * _PART and stored.ndim > 1:
                del stored
                return self._read_large(name, wanted)
            return stored.to(wanted, copy=True)

    def _read_large(self, name: str, wanted: torch.dtype) -> Tensor:
        """The same in runs of rows, the file opened for each: what was read of a map counts as
        memory of the process until it is closed."""
        with self._open(self._file_of[name]) as handle:
            shape = handle.get_slice(name).get_shape()
        whole = torch.empty(shape, dtype=wanted)
        rows = max(1, _PART // (4 * math.prod(shape[1:])))
        for low in range(0, shape[0], rows):
            with self._open(self._file_of[name]) as handle:
                whole[low : low + rows] = handle.get_slice(name)[low : low + rows]
        return whole
