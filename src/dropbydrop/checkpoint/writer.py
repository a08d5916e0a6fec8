"""Write a checkpoint: all of it, or nothing.

Steps:
1. Tensors arrive one by one and are staged at once to raw files (one a plane, one for the rest)
   in a hidden folder beside OUT. Peak memory is one tensor, whatever the size of the model.
2. `finish` copies the raw bytes behind safetensors headers, in the canonical order of the input
   groups, hashing as it writes. A raw file is deleted as soon as it is copied: the extra disk
   needed is one plane.
3. config.json, the extra files and the manifest follow, and the folder appears as OUT
   (atomic_folder.py).

For runs that can be resumed, the raw files lie in a work folder of the caller (`work`) and survive
whatever happens: `commit` makes them durable and returns the record that the next writer needs.
They are kept until OUT is in place, which takes as much disk again as the checkpoint.

The same input gives the same bytes: order does not depend on the order of the calls, JSON has
sorted keys, and no time or host name is written.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dropbydrop.coding.codebook_set import CodebookSet
from dropbydrop.coding.rotation import Rotation
from dropbydrop.system.atomic_folder import AtomicFolder
from dropbydrop.system.errors import DropError, FormatError

from .config import (
    CONFIG_FILE,
    MANIFEST_FILE,
    RESERVED_PREFIXES,
    REST_FILE,
    QuantizationConfig,
    StoredGroup,
    codebook_name,
    codes_name,
    input_scales_name,
    odd_name,
    table_inputs_name,
)
from .contents import plane_tensors
from .fields import plain_name
from .files import REFUSED_SUFFIXES, check_replaceable, plane_file
from .int8_rows import half, quantize_rows
from .publish import publish
from .staging import StagingFile
from .tensor_files import TensorInfo, into_shards, stream_tensors, wide_first

SHARD_BYTES = 5_000_000_000  # as the Hub's tools


class CheckpointWriter:
    """Context manager that writes one checkpoint folder; see the module's note for the steps.

    Args:
        out: the folder to create; its parent must exist.
        overwrite: replace an existing checkpoint, at the very end. Anything that is not a
            dropbydrop checkpoint is never replaced.
        shard_bytes: a plane above this size is split at tensor boundaries.
        work: an existing folder for raw files that outlive this writer; its owner removes it.
        records: what the calls of `commit` of an earlier writer on `work` returned: go on there.

    Raises:
        DropError: `out` exists, its parent does not, or the disk is full.
        FormatError: the raw files in `work` do not hold what the records say.
    """

    def __init__(
        self,
        out: Path | str,
        *,
        overwrite: bool = False,
        shard_bytes: int = SHARD_BYTES,
        work: Path | None = None,
        records: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        if sys.byteorder != "little":  # raw bytes are staged as they lie in memory
            raise DropError("writing checkpoints needs a little-endian machine.")
        self._folder = AtomicFolder(
            Path(os.path.abspath(out)), check_replaceable if overwrite else None, work
        )
        self._shard_bytes, self._work = shard_bytes, work
        self._planes: list[StagingFile] = []
        self._linears: dict[str, tuple[int, ...]] = {}  # module -> ([E,] d_out, d_in)
        self._input_groups: list[StoredGroup] = []
        try:
            with self._folder.disk_errors():
                if records:
                    self._restore(records)
                else:
                    self._rest = self._stage("rest")
        except BaseException:  # nobody has this writer yet to leave it
            self._folder.discard()
            raise
        self._committed = len(self._linears), len(self._input_groups)

    @property
    def input_groups(self) -> tuple[StoredGroup, ...]:
        """The input groups added so far."""
        return tuple(self._input_groups)

    # -- resuming -------------------------------------------------------------------------

    def commit(self) -> dict[str, Any]:
        """Make everything added so far durable; JSON-able record of what is new since then.

        Raises:
            DropError: the disk is full.
        """
        with self._folder.disk_errors():
            staged = {file.path.stem: file.commit() for file in (self._rest, *self._planes)}
        linears, input_groups = self._committed
        self._committed = len(self._linears), len(self._input_groups)
        return {
            "staged": staged,
            "linears": [[name, *shape] for name, shape in list(self._linears.items())[linears:]],
            "input_groups": [group.to_dict() for group in self._input_groups[input_groups:]],
        }

    def _restore(self, records: Sequence[Mapping[str, Any]]) -> None:
        assert self._work is not None, "only a writer with a work folder can go on"
        entries: dict[str, list[Any]] = {}
        for record in records:
            for name, new in record["staged"].items():
                entries.setdefault(name, []).extend(new)
            self._linears |= {name: tuple(shape) for name, *shape in record["linears"]}
            self._input_groups += [StoredGroup.from_dict(group) for group in record["input_groups"]]
        self._rest = StagingFile(self._work / "rest.raw", entries.pop("rest"))
        self._planes = [
            StagingFile(self._work / f"plane-{m}.raw", entries[f"plane-{m}"])
            for m in range(1, len(entries) + 1)
        ]

    # -- adding ---------------------------------------------------------------------------

    def add_linear(
        self,
        module: str,
        codes: Sequence[Tensor],
        scales: Tensor,
        bias: Tensor | None = None,
        *,
        d_in: int,
    ) -> None:
        """Add a quantized linear, or a stack of experts.

        Args:
            module: its full name in the Hugging Face model.
            codes: M planes, uint8, of the shapes that their specs give them (`finish` checks it).
            scales: [d_out] or [E, d_out], the row scales of every level.
            bias: of the shape of `scales`, stored in its own dtype.
            d_in: inputs of the matrix.

        Raises:
            ValueError: what does not fit (a bug of the caller).
        """
        if any(plane.dtype != torch.uint8 for plane in codes) or scales.dim() not in (1, 2):
            raise ValueError(f"{module}: codes must be uint8, and scales [d_out] or [E, d_out]")
        if self._planes and len(self._planes) != len(codes):
            raise ValueError(f"{module}: {len(codes)} planes, other matrices {len(self._planes)}")
        rows = half(scales, module)
        with self._folder.disk_errors():
            if not self._planes:
                self._planes = [self._stage(f"plane-{m}") for m in range(1, len(codes) + 1)]
            for m, (staging, plane) in enumerate(zip(self._planes, codes, strict=True), 1):
                staging.add(codes_name(module, m), plane)
        self._add(f"{module}.scales", rows)
        if bias is not None:
            self._add(f"{module}.bias", bias)
        self._linears[module] = (*scales.shape, d_in)

    def add_codebook_set(self, name: str, books: CodebookSet) -> None:
        """Add a set under a name; what its planes store in float16 is rounded.

        Raises:
            ValueError: values that no reader accepts (a bug of the caller).
        """
        if problems := list(books.problems()):
            raise ValueError(f"codebook set {name}: {'; '.join(problems)}")
        for m, (plane, part) in enumerate(zip(books.planes, books.parts, strict=True), 1):
            for suffix, (dtype, _) in plane.parts.items():
                stored = codebook_name(name, m, suffix)
                self._add(stored, half(part[suffix], stored) if dtype == "F16" else part[suffix])

    def add_group(self, group: StoredGroup, rotation: Rotation) -> None:
        """Add an input group and its rotation; the order of the calls numbers the groups."""
        if group.d_in != rotation.d_in or not rotation.full:
            raise ValueError(f"{group.name}: the rotation does not match its description")
        self._add(input_scales_name(len(self._input_groups)), rotation.packed())
        self._add_odd(rotation)
        self._input_groups.append(group)

    def add_embedding(self, module: str, weight: Tensor, bits: int) -> None:
        """Add an embedding or untied head.

        Args:
            weight: [vocab, d]. With 8 bits: w ~ rows * row_scales, row_scales = max|w| / 127 of
                each row, rounded to float16 before the rows are. With 16: bfloat16 stays as it
                is, anything else becomes float16.
        """
        if bits == 8:
            rows, row_scales = quantize_rows(weight)
            self._add(f"{module}.rows", rows)
            self._add(f"{module}.row_scales", row_scales)
        else:
            kept = weight if weight.dtype == torch.bfloat16 else half(weight, module)
            self._add(f"{module}.weight", kept)

    def add_table(
        self,
        module: str,
        codes: Sequence[Tensor],
        scales: Tensor,
        rotation: Rotation,
        files: Sequence[int],
    ) -> None:
        """Add an embedding or untied head in planes; matrices must have been added before.

        Args:
            codes: its planes, uint8 [rings, bytes, d]. scales: [vocab].
            files: the number of the plane file that holds each plane (`Embeddings.files`).
        """
        for k, (plane, m) in enumerate(zip(codes, files, strict=True), 1):
            with self._folder.disk_errors():
                self._planes[m - 1].add(codes_name(module, k), plane)
        self._add(f"{module}.scales", half(scales, module))
        self._add(table_inputs_name(module), rotation.packed())
        self._add_odd(rotation)

    def _add_odd(self, rotation: Rotation) -> None:
        if rotation.odd is not None:
            name = odd_name(rotation.odd.shape[0])
            if name not in self._rest.tensors:
                self._add(name, rotation.odd.to(torch.float32))

    def add_tensor(self, name: str, tensor: Tensor) -> None:
        """Add any other parameter (norms, ...) under its Hugging Face name, in its own dtype."""
        if name.startswith(RESERVED_PREFIXES):
            raise ValueError(f"{name}: this prefix is reserved for the format")
        self._add(name, tensor)

    def _add(self, name: str, tensor: Tensor) -> None:
        with self._folder.disk_errors():
            self._rest.add(name, tensor)

    # -- finishing ------------------------------------------------------------------------

    def finish(
        self,
        config: Mapping[str, Any],
        quantization: QuantizationConfig,
        extra_files: Mapping[str, bytes | Path] | None = None,
        total_parameters: int | None = None,
        before_publish: Callable[[str], None] | None = None,
    ) -> Path:
        """Assemble the files, write config and manifest, and rename the folder to OUT.

        Args:
            config: config.json of the base model; its quantization_config is replaced.
            extra_files: further files by plain name (tokenizer, model card, ...).
            total_parameters: of the original model, tied ones counted once; by default those of
                the quantized linears.
            before_publish: called with the manifest's SHA-256 when all but the rename is done.

        Returns:
            The folder.

        Raises:
            DropError: the disk is full, or OUT appeared meanwhile.
            ValueError: parts that contradict each other (a bug of the caller).
        """
        quantized = sum(map(math.prod, self._linears.values()))
        counts = quantized, quantized if total_parameters is None else total_parameters
        self._check_parts(quantization, counts)
        if "auto_map" in config:
            raise FormatError(
                "the base config has 'auto_map' (code from the Hub); checkpoints never carry code. "
                "Use an architecture that is part of transformers."
            )
        with self._folder.disk_errors():
            for name in quantization.guards:
                self._rest.add(name, torch.empty(0, dtype=torch.float16))
            planes = [
                self._assemble_plane(m, quantization) for m in range(1, len(self._planes) + 1)
            ]
            self._rest.file.close()
            rest = wide_first(self._rest.streamed(name) for name in self._rest.tensors)
            self._folder.write(REST_FILE, stream_tensors(rest))
            self._drop(self._rest)
            for name, content in sorted((extra_files or {}).items()):
                self._write_extra(name, content)
            # Without a dtype transformers would take that of some tensor, here of the scales.
            dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
            whole = {**config, "dtype": dtype}
            publish(self._folder, whole, quantization, tuple(planes), counts, before_publish)
        return self._folder.out

    def _check_parts(self, quantization: QuantizationConfig, counts: tuple[int, int]) -> None:
        problems = []
        if tuple(self._input_groups) != quantization.input_groups:
            problems.append("the input groups added are not those of the config")
        if set(self._linears) != set(quantization.modules):
            difference = sorted(set(self._linears) ^ set(quantization.modules))
            problems.append(f"linears and input groups differ in {difference}")
        for group in quantization.input_groups:
            expected = [group.experts] * bool(group.experts), group.d_in
            problems += [
                f"{module} is a matrix {list(shape)}, its input group says {expected}"
                for module in group.modules
                if (shape := self._linears.get(module)) and ([*shape[:-2]], shape[-1]) != expected
            ]
        problems += self._contradictions(quantization)
        if counts[1] < counts[0]:
            problems.append(f"{counts[1]} parameters, counted {counts[0]} quantized")
        if problems:
            raise ValueError("; ".join(problems))

    def _infos(self) -> dict[str, TensorInfo]:
        """Tensors of model.safetensors added so far."""
        return {name: staged.info for name, staged in self._rest.tensors.items()}

    def _contradictions(self, quantization: QuantizationConfig) -> Iterator[str]:
        """Staged codes and codebooks that the planes of the config do not describe."""
        if len(self._planes) != len(quantization.planes):
            yield f"{len(self._planes)} planes added, the config has {len(quantization.planes)}"
        for m, staging in enumerate(self._planes[: len(quantization.planes)], 1):
            planned = plane_tensors(quantization, self._linears, self._infos(), m)
            for name, staged in staging.tensors.items():
                if staged.info != (plan := planned.get(name)):
                    yield f"{name} is {staged.info}, its plane says {plan or 'nothing'}"
        expected = quantization.codebooks
        found = {n: info for n, info in self._infos().items() if n.startswith("codebooks.")}
        for name in sorted(set(expected) | set(found)):
            if (here := found.get(name)) != (plan := expected.get(name)):
                yield f"{name} is {here or 'missing'}, expected {plan or 'no such codebook'}"

    def _assemble_plane(self, m: int, quantization: QuantizationConfig) -> tuple[str, ...]:
        staging = self._planes[m - 1]
        staging.file.close()
        shapes = {module: self._linears[module] for module in quantization.modules}
        order = map(staging.streamed, plane_tensors(quantization, shapes, self._infos(), m))
        shards = into_shards(order, self._shard_bytes)
        names = tuple(plane_file(m, i, len(shards)) for i in range(1, len(shards) + 1))
        for name, shard in zip(names, shards, strict=True):
            self._folder.write(name, stream_tensors(shard))
        self._drop(staging)
        return names

    def _drop(self, staging: StagingFile) -> None:
        """Free the disk that an assembled raw file takes, unless it must outlive this process."""
        if self._work is None:
            staging.path.unlink()

    def _write_extra(self, name: str, content: bytes | Path) -> None:
        reserved = {CONFIG_FILE, MANIFEST_FILE, *self._folder.files}
        if plain_name(name, "extra_files") in reserved or name.endswith(REFUSED_SUFFIXES):
            raise ValueError(f"{name} cannot be an extra file of a checkpoint")
        if isinstance(content, bytes):
            self._folder.write(name, [content])
        else:
            self._folder.copy(name, content)

    def _stage(self, name: str) -> StagingFile:
        return StagingFile((self._work or self._folder.path) / f"{name}.raw")

    def abort(self) -> None:
        """Remove everything written so far. Harmless after `finish`."""
        for staging in (*self._planes, self._rest):
            with suppress(OSError):
                staging.file.close()  # flushes, and fails, on a full disk
        self._folder.discard()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        self.abort()
        if kind is None and not self._folder.published:
            raise RuntimeError("the checkpoint was not finished: call finish() inside the block")
