"""Write a checkpoint: all of it, or nothing.

Steps:
1. Tensors arrive one by one and are spilled at once to raw files (one a plane, one for the rest)
   in a hidden folder beside OUT. Nothing but names, shapes and offsets stays in memory, so peak
   memory is one tensor, whatever the size of the model.
2. `finish` copies the raw bytes behind safetensors headers, in the canonical order of the sites,
   hashing as it writes. A raw file is deleted as soon as it is copied: the extra disk needed is
   one plane.
3. config.json, the extra files and the manifest follow; everything is synced; the folder is
   renamed to OUT. A rename is atomic, so OUT is never half-written. On an error, Ctrl-C or a
   full disk the hidden folder is removed.

The same input gives the same bytes: order does not depend on the order of the calls, JSON has
sorted keys, and no time or host name is written.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..code import GROUP
from ..errors import DropError, FormatError
from ..rotation import Rotation, pack_signs
from .files import (
    DTYPE_NAMES,
    DTYPES,
    Manifest,
    TensorInfo,
    dump_json,
    encode_header,
    plane_file,
)
from .folder import PartialFolder
from .format import (
    CONFIG_FILE,
    LEVELS_SUFFIX,
    MANIFEST_FILE,
    RESERVED_PREFIXES,
    REST_FILE,
    QuantizationConfig,
    SiteSpec,
    codebook_name,
    codes_name,
    odd_name,
    plain_name,
    signs_name,
)

SHARD_BYTES = 5_000_000_000  # as the Hub's tools
_CHUNK = 8 << 20
_REFUSED_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".py")


@dataclass(frozen=True)
class _Spilled:
    """A tensor in a raw file."""

    info: TensorInfo
    offset: int


class _Spill:
    """An append-only raw file of tensors."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: BinaryIO = open(path, "wb")  # noqa: SIM115 - lives as long as the writer
        self.tensors: dict[str, _Spilled] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        if name in self.tensors:
            raise ValueError(f"tensor {name} was added twice")
        info = TensorInfo(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
        self.tensors[name] = _Spilled(info, self.file.tell())
        data = tensor.detach().cpu().contiguous().reshape(-1)
        self.file.write(data.view(torch.uint8).numpy().data)


class CheckpointWriter:
    """Context manager that writes one checkpoint folder; see the module's note for the steps.

    Args:
        out: the folder to create; its parent must exist.
        overwrite: replace an existing checkpoint, at the very end. Anything that is not a
            dropbydrop checkpoint is never replaced.
        shard_bytes: a plane above this size is split at tensor boundaries.

    Raises:
        DropError: `out` exists, its parent does not, or the disk is full.
    """

    def __init__(
        self, out: Path | str, *, overwrite: bool = False, shard_bytes: int = SHARD_BYTES
    ) -> None:
        if sys.byteorder != "little":  # raw bytes are spilled as they lie in memory
            raise DropError("writing checkpoints needs a little-endian machine.")
        self._folder = PartialFolder(Path(os.path.abspath(out)), overwrite)
        self._shard_bytes = shard_bytes
        self._planes: list[_Spill] = []
        self._linears: dict[str, tuple[int, int]] = {}  # module -> (d_out, d_in)
        self._sites: list[SiteSpec] = []
        self._sets: dict[str, int] = {}  # codebook set -> planes
        with self._folder.disk_errors():
            self._rest = self._spill("rest")

    # -- adding ---------------------------------------------------------------------------

    def add_linear(
        self,
        module: str,
        codes: Sequence[Tensor],
        scales: Tensor | None = None,
        level_scales: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> None:
        """Add a quantized linear.

        Args:
            module: its full name in the Hugging Face model.
            codes: M planes, uint8 [d_out, G].
            scales: [d_out], one row scale for all levels; not stored when `level_scales` is given.
            level_scales: [levels, d_out], a row scale for each level.
            bias: [d_out], stored in its own dtype.

        Raises:
            ValueError: shapes or dtypes that do not fit (a bug of the caller).
        """
        shape = tuple(codes[0].shape)
        if any(c.dtype != torch.uint8 or tuple(c.shape) != shape or c.dim() != 2 for c in codes):
            raise ValueError(f"{module}: codes must be uint8 [d_out, G], all planes alike")
        if self._planes and len(self._planes) != len(codes):
            raise ValueError(f"{module}: {len(codes)} planes, other matrices {len(self._planes)}")
        d_out = shape[0]
        kind, rows = ("scales", scales) if level_scales is None else ("level_scales", level_scales)
        dims = 1 if level_scales is None else 2
        if rows is None or rows.dim() != dims or rows.shape[-1] != d_out:
            raise ValueError(f"{module}: scales must be [{d_out}], level_scales [levels, {d_out}]")
        rows = _half(rows, module)
        with self._folder.disk_errors():
            if not self._planes:
                self._planes = [self._spill(f"plane-{m}") for m in range(1, len(codes) + 1)]
            for m, (spill, plane) in enumerate(zip(self._planes, codes, strict=True), 1):
                spill.add(codes_name(module, m), plane)
            self._rest.add(f"{module}.{kind}", rows)
            if bias is not None:
                self._rest.add(f"{module}.bias", bias)
        self._linears[module] = (d_out, shape[1] * GROUP)

    def add_codebook_set(self, name: str, codebooks: Sequence[Tensor]) -> None:
        """Add a set: M codebooks [K/2, g] (sign-symmetric planes) or [K, g], stored in float16."""
        with self._folder.disk_errors():
            for m, codebook in enumerate(codebooks, 1):
                self._rest.add(codebook_name(name, m), _half(codebook, f"codebook {name}.{m}"))
        self._sets[name] = len(codebooks)

    def add_site(self, site: SiteSpec, rotation: Rotation) -> None:
        """Add an input site and its rotation; the order of the calls numbers the sites."""
        if dict(site.rotation) != rotation.spec() or site.d_in != rotation.d_in:
            raise ValueError(f"{site.name}: the rotation does not match its description")
        with self._folder.disk_errors():
            if rotation.signs is not None:
                self._rest.add(signs_name(len(self._sites)), pack_signs(rotation.signs.cpu()))
            if rotation.odd is not None:
                name = odd_name(rotation.odd.shape[0])
                if name not in self._rest.tensors:
                    self._rest.add(name, rotation.odd.to(torch.float32))
        self._sites.append(site)

    def add_embedding(self, module: str, weight: Tensor, bits: int) -> None:
        """Add an embedding or untied head.

        Args:
            weight: [vocab, d]. With 8 bits: w ~ rows * row_scales, row_scales = max|w| / 127 of
                each row, rounded to float16 before the rows are. With 16: bfloat16 stays as it
                is, anything else becomes float16.
        """
        with self._folder.disk_errors():
            if bits == 8:
                rows, row_scales = quantize_rows(weight)
                self._rest.add(f"{module}.rows", rows)
                self._rest.add(f"{module}.row_scales", row_scales)
            elif weight.dtype == torch.bfloat16:
                self._rest.add(f"{module}.weight", weight)
            else:
                self._rest.add(f"{module}.weight", _half(weight, module))

    def add_tensor(self, name: str, tensor: Tensor, *, per_level: bool = False) -> None:
        """Add any other parameter (norms, ...) under its Hugging Face name, in its own dtype.

        With `per_level`, tensor is [levels, *shape]: one variant of the parameter per level.
        """
        if name.startswith(RESERVED_PREFIXES):
            raise ValueError(f"{name}: this prefix is reserved for the format")
        with self._folder.disk_errors():
            self._rest.add(name + LEVELS_SUFFIX if per_level else name, tensor)

    # -- finishing ------------------------------------------------------------------------

    def finish(
        self,
        config: Mapping[str, Any],
        quantization: QuantizationConfig,
        extra_files: Mapping[str, bytes | Path] | None = None,
        parameters: Mapping[str, int] | None = None,
    ) -> Path:
        """Assemble the files, write config and manifest, and rename the folder to OUT.

        Args:
            config: config.json of the base model; its quantization_config is replaced.
            extra_files: further files by plain name (tokenizer, model card, ...).
            parameters: {"total": parameters of the original model, tied ones counted once};
                "quantized" is counted here, and compared if given.

        Returns:
            The folder.

        Raises:
            DropError: the disk is full, or OUT appeared meanwhile.
            ValueError: parts that contradict each other (a bug of the caller).
        """
        quantized = sum(d_out * d_in for d_out, d_in in self._linears.values())
        counts = {"quantized": quantized, "total": quantized, **(parameters or {})}
        self._check_parts(quantization, counts, quantized)
        _check_config(config)
        with self._folder.disk_errors():
            for name in quantization.guards:
                self._rest.add(name, torch.empty(0, dtype=torch.float16))
            planes = [
                self._assemble_plane(m, quantization) for m in range(1, len(self._planes) + 1)
            ]
            # Wide types first keeps every tensor aligned; names make the order unique.
            order = sorted(
                self._rest.tensors,
                key=lambda name: (-DTYPES[self._rest.tensors[name].info.dtype].itemsize, name),
            )
            self._assemble(REST_FILE, self._rest, order)
            self._rest.path.unlink()
            for name, content in sorted((extra_files or {}).items()):
                self._write_extra(name, content)
            # Without a dtype transformers would take that of some tensor, here of the scales.
            dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
            whole = {**config, "dtype": dtype, "quantization_config": quantization.to_dict()}
            self._folder.write(CONFIG_FILE, [dump_json(whole)])
            manifest = Manifest(
                dict(self._folder.files), tuple(planes), (REST_FILE,), quantized, counts["total"]
            ).to_dict()
            Manifest.from_dict(manifest)  # never write what the reader would refuse
            self._folder.write(MANIFEST_FILE, [dump_json(manifest)])
            self._folder.publish()
        return self._folder.out

    def _check_parts(
        self, quantization: QuantizationConfig, counts: Mapping[str, int], quantized: int
    ) -> None:
        problems = []
        if tuple(self._sites) != quantization.sites:
            problems.append("the sites added are not those of the config")
        if set(self._linears) != set(quantization.modules):
            difference = sorted(set(self._linears) ^ set(quantization.modules))
            problems.append(f"linears and sites differ in {difference}")
        for site in quantization.sites:
            problems += [
                f"{module} has d_in {self._linears[module][1]}, its site {site.d_in}"
                for module in site.modules
                if module in self._linears and self._linears[module][1] != site.d_in
            ]
        wrong = {s: self._sets.get(s) for s in quantization.sets}
        if len(self._planes) != len(quantization.planes) or any(
            count != len(quantization.planes) for count in wrong.values()
        ):
            problems.append(f"{len(quantization.planes)} planes, codebook sets have {wrong}")
        if counts["quantized"] != quantized or counts["total"] < quantized:
            problems.append(f"parameters {dict(counts)}, counted {quantized} quantized")
        if problems:
            raise ValueError("; ".join(problems))

    def _assemble_plane(self, m: int, quantization: QuantizationConfig) -> tuple[str, ...]:
        spill = self._planes[m - 1]
        shards: list[list[str]] = [[]]
        size = 0
        for name in (codes_name(module, m) for module in quantization.modules):
            nbytes = spill.tensors[name].info.nbytes
            if shards[-1] and size + nbytes > self._shard_bytes:
                shards.append([])
                size = 0
            shards[-1].append(name)
            size += nbytes
        names = tuple(plane_file(m, i, len(shards)) for i in range(1, len(shards) + 1))
        for name, tensors in zip(names, shards, strict=True):
            self._assemble(name, spill, tensors)
        spill.path.unlink()
        return names

    def _assemble(self, name: str, spill: _Spill, order: Sequence[str]) -> None:
        """Write the safetensors file `name` from tensors of a raw file."""
        spill.file.close()
        header = encode_header([(tensor, spill.tensors[tensor].info) for tensor in order])
        with open(spill.path, "rb") as raw:
            body = (chunk for tensor in order for chunk in _copy(raw, spill.tensors[tensor]))
            self._folder.write(name, chain([header], body))

    def _write_extra(self, name: str, content: bytes | Path) -> None:
        reserved = {CONFIG_FILE, MANIFEST_FILE, *self._folder.files}
        if plain_name(name, "extra_files") in reserved or name.endswith(_REFUSED_SUFFIXES):
            raise ValueError(f"{name} cannot be an extra file of a checkpoint")
        if isinstance(content, bytes):
            self._folder.write(name, [content])
            return
        with open(content, "rb") as source:
            self._folder.write(name, iter(lambda: source.read(_CHUNK), b""))

    def _spill(self, name: str) -> _Spill:
        return _Spill(self._folder.path / f"{name}.raw")

    def abort(self) -> None:
        """Remove everything written so far. Harmless after `finish`."""
        for spill in (*self._planes, self._rest):
            with suppress(OSError):
                spill.file.close()  # flushes, and fails, on a full disk
        self._folder.discard()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.abort()
        if kind is None and not self._folder.published:
            raise RuntimeError("the checkpoint was not finished: call finish() inside the block")


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Eight-bit rows: weight [vocab, d] -> int8 rows [vocab, d], float16 row_scales [vocab].

    weight ~ rows * row_scales[:, None]. The scale is rounded to float16 first, so that the rows
    are the nearest ones for the scale that is stored. Works in slabs of rows.
    """
    rows = torch.empty(weight.shape, dtype=torch.int8)
    row_scales = torch.empty(weight.shape[0], dtype=torch.float16)
    for start in range(0, weight.shape[0], 8192):
        slab = weight[start : start + 8192].detach().cpu().to(torch.float32)
        scale = _half(slab.abs().amax(dim=1) / 127, "embedding rows")
        safe = torch.where(scale > 0, scale.float(), torch.ones(()))  # an all-zero row stays zero
        row_scales[start : start + 8192] = scale
        rows[start : start + 8192] = (slab / safe[:, None]).round().clamp(-127, 127).to(torch.int8)
    return rows, row_scales


def _copy(raw: BinaryIO, spilled: _Spilled) -> Iterator[bytes]:
    raw.seek(spilled.offset)
    left = spilled.info.nbytes
    while left:
        chunk = raw.read(min(left, _CHUNK))
        if not chunk:
            raise OSError(errno.EIO, "a spilled file is shorter than what was written to it")
        left -= len(chunk)
        yield chunk


def _half(tensor: Tensor, what: str) -> Tensor:
    half = tensor.detach().to(torch.float16)
    if not torch.isfinite(half).all():
        raise ValueError(f"{what}: values that are not finite in float16")
    return half


def _check_config(config: Mapping[str, Any]) -> None:
    if "auto_map" in config:
        raise FormatError(
            "the base config has 'auto_map' (code from the Hub); checkpoints never carry code. "
            "Use an architecture that is part of transformers."
        )
