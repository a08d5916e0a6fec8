"""Export one level of a checkpoint as a plain Hugging Face folder, for any runtime.

Steps:
1. Plan: every tensor of the original model under its own name, with shape and target type; known
   from the headers alone, so safetensors headers can be written before anything is decoded.
2. Stream: each file is its header followed by its tensors, decoded a slab of rows at a time (codes
   -> rotated weights -> back to the original space). The weights of one slab are in memory,
   whatever the size of the model.
3. config.json without `quantization_config`, tokenizer and other side files as they are, a model
   card; the folder appears by a rename, whole or not at all.

The result knows nothing of planes: it has the quality of its level and the size of a 16-bit model.
A tied head is stored once, as in the original. Decoding runs in float32 and rounds once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dropbydrop.models.weight_files import INDEX, SINGLE
from dropbydrop.system.atomic_folder import AtomicFolder
from dropbydrop.system.console import printable, progress_bar
from dropbydrop.system.errors import DropError
from dropbydrop.system.paths import absolute

from . import Checkpoint
from .config import CARD_FILE, CONFIG_FILE, LOG_FILE, RESERVED_PREFIXES, table_inputs_name
from .files import dump_json
from .tables import dense_table
from .tensor_files import (
    DTYPE_NAMES,
    DTYPES,
    FLOATS,
    StreamedTensor,
    TensorInfo,
    into_shards,
    raw_bytes,
    stream_tensors,
    wide_first,
)
from .writer import SHARD_BYTES

_SLAB = 4096  # rows that are decoded together


Rows = Callable[[int, int], Tensor]
"""rows(low, high) -> rows low ... high - 1 of a tensor, in any type; of a scalar, itself."""


def _slabs(name: str, info: TensorInfo, rows: Rows) -> Iterator[memoryview]:
    """The bytes of a tensor, slab by slab, in the target type."""
    dtype = DTYPES[info.dtype]
    count = info.shape[0] if info.shape else 1
    step = max(1, _SLAB // math.prod(info.shape[1:-1]))  # of a stack of experts: whole matrices
    for low in range(0, count, step):
        wide = rows(low, min(low + step, count))
        slab = wide.to(dtype)
        if dtype.is_floating_point and not bool(torch.isfinite(slab).all()):
            raise DropError(
                f"{name} has values that {str(dtype).removeprefix('torch.')} cannot hold "
                f"(largest magnitude {float(wide.abs().max()):.3g}); export with --dtype "
                "bfloat16 or float32."
            )
        yield raw_bytes(slab.contiguous())


def export(
    source: Path | str,
    out: Path | str,
    bits: int | None = None,
    *,
    dtype: str = "bfloat16",
    shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
) -> dict[str, Any]:
    """Write level `bits` of the checkpoint `source` as the dense Hugging Face folder `out`.

    Args:
        bits: a level of the checkpoint; by default the highest.
        dtype: "bfloat16", "float16" or "float32", of every floating-point tensor.
        shard_bytes: larger models are split into several files, as usual on the Hub.

    Returns:
        {"out", "bits", "dtype", "tensors", "files", "bytes"}.

    Raises:
        DropError: `out` exists, the disk is full, values that do not fit the type; nothing is
            left behind.
        PrecisionError, MissingPlaneError, FormatError: as `Checkpoint.require`.
    """
    if dtype not in FLOATS:
        raise DropError(f"--dtype {dtype}: choose one of {', '.join(FLOATS)}.")
    checkpoint = Checkpoint.open(source)
    level = checkpoint.require(checkpoint.levels[-1] if bits is None else bits)
    checkpoint.check_contents(checkpoint.quantization.prefix_of(level))
    tensors = _plan(checkpoint, level, FLOATS[dtype])
    with (
        AtomicFolder(absolute(out)) as folder,
        folder.disk_errors(),
        progress_bar(progress) as bar,
    ):
        task = bar.add_task(f"export {level} bits", total=len(tensors))
        _write_weights(folder, tensors, shard_bytes, lambda: bar.advance(task))
        _write_side_files(folder, checkpoint, level, dtype)
        folder.publish()
    return {
        "out": str(folder.out),
        "bits": level,
        "dtype": dtype,
        "tensors": len(tensors),
        "files": sorted(folder.files),
        "bytes": sum(entry.size for entry in folder.files.values()),
    }


def _plan(checkpoint: Checkpoint, level: int, dtype: torch.dtype) -> list[StreamedTensor]:
    """Every tensor of the dense model."""
    parts: dict[str, tuple[tuple[int, ...], torch.dtype, Rows]] = {}
    quantization = checkpoint.quantization
    prefix = quantization.prefix_of(level)
    ours = {f"{module}.scales" for module in checkpoint.shapes}
    ours |= set(quantization.guards)
    renamed: dict[str, str] = {}
    for module, matrix in checkpoint.shapes.items():
        if len(matrix) == 2:
            parts[f"{module}.weight"] = (matrix, dtype, _linear_rows(checkpoint, module, prefix))
        else:
            parts[module] = _stack(checkpoint, module, prefix, dtype)
            renamed[f"{module}.bias"] = f"{module}_bias"
    for module in quantization.tables:
        inputs = table_inputs_name(module)
        ours |= {f"{module}.scales", inputs}
        shape = tuple(checkpoint.rest[name].shape[0] for name in (f"{module}.scales", inputs))
        parts[f"{module}.weight"] = (shape, dtype, _table_rows(checkpoint, module, prefix))
    if quantization.embeddings.bits == 8:
        for module in quantization.embeddings.modules:
            ours |= {f"{module}.rows", f"{module}.row_scales"}
            shape = checkpoint.rest[f"{module}.rows"].shape
            parts[f"{module}.weight"] = (shape, dtype, _embedding_rows(checkpoint, module))
    for stored, info in checkpoint.rest.items():
        if stored in ours or stored.startswith(RESERVED_PREFIXES):
            continue
        kept = DTYPES[info.dtype]
        target = dtype if kept.is_floating_point else kept
        name = renamed.get(stored, stored)
        parts[name] = (info.shape, target, _kept_rows(checkpoint, stored))
    tensors = []
    for name, (shape, target, rows) in parts.items():
        info = TensorInfo(DTYPE_NAMES[target], tuple(shape))
        tensors.append(StreamedTensor(name, info, partial(_slabs, name, info, rows)))
    return wide_first(tensors)


def dense_rows(
    checkpoint: Checkpoint,
    module: str,
    prefix: int,
    rows: slice | None = None,
    expert: int | None = None,
) -> Tensor:
    """Rows of W in the original space, from the first `prefix` planes: float32 [n, d_in].

    Args:
        rows: consecutive ones, by default all.
        expert: which matrix of a stack of experts.
    """
    index = checkpoint.quantization.group_index[module]
    books = checkpoint.read_set(checkpoint.quantization.input_groups[index].codebooks)
    scales = checkpoint.read(f"{module}.scales")
    codes = [checkpoint.read_codes(module, m) for m in range(1, prefix + 1)]
    if expert is not None:
        scales, codes = scales[expert], [plane[expert] for plane in codes]
    return checkpoint.read_rotation(index).transpose(books.decode(codes, scales, prefix, rows=rows))


def _linear_rows(checkpoint: Checkpoint, module: str, prefix: int) -> Rows:
    """Rows of W in the original space: those of the first `prefix` planes, rotated back."""

    def rows(low: int, high: int) -> Tensor:
        return dense_rows(checkpoint, module, prefix, slice(low, high))

    return rows


def _stack(
    checkpoint: Checkpoint, module: str, prefix: int, dtype: torch.dtype
) -> tuple[tuple[int, ...], torch.dtype, Rows]:
    """A stack of experts as the original model keeps it."""
    quantization = checkpoint.quantization
    group = quantization.input_groups[quantization.group_index[module]]
    transposed = group.layout == "fused-transposed"
    experts, d_out, d_in = checkpoint.shapes[module]

    def rows(low: int, high: int) -> Tensor:
        each = [dense_rows(checkpoint, module, prefix, expert=e) for e in range(low, high)]
        return torch.stack([w.T if transposed else w for w in each])

    shape = (experts, d_in, d_out) if transposed else (experts, d_out, d_in)
    return shape, dtype, rows


def _embedding_rows(checkpoint: Checkpoint, module: str) -> Rows:
    def rows(low: int, high: int) -> Tensor:
        scales = checkpoint.read(f"{module}.row_scales")[low:high]
        return checkpoint.read(f"{module}.rows")[low:high].float() * scales.float()[:, None]

    return rows


def _table_rows(checkpoint: Checkpoint, module: str, prefix: int) -> Rows:
    def rows(low: int, high: int) -> Tensor:
        count = checkpoint.quantization.table_prefix(prefix)
        return dense_table(checkpoint, module, count, slice(low, high))

    return rows


def _kept_rows(checkpoint: Checkpoint, stored: str) -> Rows:
    """A tensor that is stored as it is."""

    def rows(low: int, high: int) -> Tensor:
        tensor = checkpoint.read(stored)
        return tensor[low:high] if tensor.dim() else tensor

    return rows


def _write_weights(
    folder: AtomicFolder,
    tensors: list[StreamedTensor],
    shard_bytes: int,
    advance: Callable[[], None],
) -> None:
    """model.safetensors, or shards of at most `shard_bytes` and their index."""

    def counted(tensor: StreamedTensor) -> Iterator[bytes | memoryview]:
        yield from tensor.chunks()
        advance()

    shards = into_shards(tensors, shard_bytes)
    where: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        whole = len(shards) == 1
        name = SINGLE if whole else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        told = [replace(t, chunks=partial(counted, t)) for t in shard]
        folder.write(name, stream_tensors(told, {"format": "pt"}))
        where |= {t.name: name for t in shard}
    if len(shards) > 1:
        total = sum(t.info.nbytes for t in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": where}
        folder.write(INDEX, [dump_json(index)])


def _write_side_files(folder: AtomicFolder, checkpoint: Checkpoint, level: int, dtype: str) -> None:
    """Config, tokenizer and model card."""
    other = {*checkpoint.manifest.tensor_files(), CONFIG_FILE, CARD_FILE, LOG_FILE}
    for name in sorted(set(checkpoint.manifest.files) - other):
        if (checkpoint.path / name).is_file():
            folder.copy(name, checkpoint.path / name)
    config = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
    config.pop("torch_dtype", None)
    config["dtype"] = dtype
    folder.write(CONFIG_FILE, [dump_json(config)])
    folder.write(CARD_FILE, [_card(checkpoint, level, dtype, config).encode()])


def _card(checkpoint: Checkpoint, level: int, dtype: str, config: Mapping[str, Any]) -> str:
    """README.md of the dense folder. Deterministic."""
    made = checkpoint.quantization.provenance
    base = printable(str(made.get("base_model", config.get("model_type", "model"))))
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---
# {base}, {level} bits, as {dtype}

Plain {dtype} weights, exported with dropbydrop from level \
{level} of a nested checkpoint. They carry {checkpoint.true_bits(level):.3f} bits of information \
a weight in the decoder matrices; the files are as large as those of any {dtype} model. Whatever \
runs this architecture reads them.

Made from: `{json.dumps(made.get("calibration", {}), sort_keys=True)}`, preset \
`{printable(str(made.get("preset")))}`, seed {printable(str(made.get("seed")))}.
"""
