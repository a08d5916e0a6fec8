"""Lazy reading of a Hugging Face folder's safetensors, one tensor at a time.

Every tensor that is returned owns its memory. (`safe_open` hands out views of a memory map; a
view would keep the whole file mapped, count as resident memory and change under us if the file
did.) Files are opened per call, so nothing stays mapped between two blocks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dropbydrop.system.errors import FormatError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class WeightFiles:
    """The tensors of a folder's `model.safetensors` or of its shards.

    Raises:
        FormatError: no safetensors, an index that names missing files, or an unreadable file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file_of: dict[str, str] = {}  # tensor name -> file name
        if (folder / INDEX).is_file():
            try:
                index = json.loads((folder / INDEX).read_text())["weight_map"]
            except (ValueError, KeyError, TypeError) as error:
                raise FormatError(
                    f"{folder / INDEX} is not a safetensors index ({error}); fetch it again."
                ) from error
            self._file_of = {str(name): str(file) for name, file in index.items()}
            files = sorted(set(self._file_of.values()))
            if bad := [file for file in files if Path(file).name != file]:
                raise FormatError(f"{folder / INDEX} points outside its folder: {bad[0]!r}.")
            if missing := [file for file in files if not (folder / file).is_file()]:
                raise FormatError(
                    f"{folder} lacks {len(missing)} of {len(files)} weight files "
                    f"(first: {missing[0]}); download the model again."
                )
        elif (folder / SINGLE).is_file():
            with self._open(SINGLE) as handle:
                self._file_of = dict.fromkeys(handle.keys(), SINGLE)
        else:
            raise FormatError(
                f"{folder} has neither {SINGLE} nor {INDEX}; save the model as safetensors "
                "(model.save_pretrained does)."
            )

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
            return stored.to(wanted, copy=True)
