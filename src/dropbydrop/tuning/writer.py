"""Write the tuned checkpoint: all of it, or nothing.

The planes are copied from the checkpoint that was tuned, byte by byte, and compared with its
manifest on the way. `model.safetensors` is written anew with the tuned tensors in their places, in
the order that every writer of this format uses. Other files are copied; the log of tuning is added
and the model card says what was done. The folder appears by a rename (system/atomic_folder.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dropbydrop.checkpoint import Checkpoint, QuantizationConfig
from dropbydrop.checkpoint.config import (
    CARD_FILE,
    CONFIG_FILE,
    REST_FILE,
    codebook_name,
)
from dropbydrop.checkpoint.publish import publish
from dropbydrop.checkpoint.tensor_files import (
    StreamedTensor,
    TensorInfo,
    raw_bytes,
    stream_tensors,
    wide_first,
)
from dropbydrop.system.atomic_folder import AtomicFolder
from dropbydrop.system.errors import FormatError

TUNE_LOG = "tune-log.jsonl"  # one line a step or block


def check_intact(checkpoint: Checkpoint) -> None:
    """Raises MissingPlaneError or FormatError unless every plane is there and nothing is damaged.

    Text files may have been edited since.
    """
    checkpoint.require(checkpoint.levels[-1])
    needed = {
        *checkpoint.manifest.rest,
        *(n for names in checkpoint.manifest.planes for n in names),
    }
    for finding in checkpoint.verify():
        if finding.file in needed:
            raise FormatError(finding.message)
    checkpoint.check_contents(len(checkpoint.manifest.planes))


def with_sets(quantization: QuantizationConfig, sets: Sequence[str]) -> QuantizationConfig:
    """The same description with another codebook set for each input group."""
    pairs = zip(quantization.input_groups, sets, strict=True)
    return replace(
        quantization, input_groups=tuple(replace(s, codebooks=name) for s, name in pairs)
    )


def write_tuned(
    folder: AtomicFolder,
    checkpoint: Checkpoint,
    quantization: QuantizationConfig,
    tensors: Mapping[str, Tensor],
    log: Sequence[Mapping[str, Any]],
    card: str,
    before_publish: Callable[[str], None] | None = None,
) -> None:
    """Fill `folder` and publish it.

    Args:
        quantization: of the new checkpoint; its sets and provenance may differ from the old one's.
        tensors: tuned tensors by name, in the types they are stored in. A set without tuned
            codebooks is taken from the old checkpoint's set of the same input group.
        log: lines that are appended to the log of tuning.
        card: what is appended to the model card.
        before_publish: called with the manifest's SHA-256 when all but the rename is done.

    Raises:
        FormatError: a plane differs from what the manifest says.
        DropError: the disk is full.
    """
    with folder.disk_errors():
        for name in (n for names in checkpoint.manifest.planes for n in names):
            folder.copy(name, checkpoint.path / name)
            if folder.files[name] != checkpoint.manifest.files[name]:
                raise FormatError(
                    f"{checkpoint.path / name} is not what the manifest says: damaged, or changed "
                    "meanwhile. Fetch it again."
                )
        folder.write(REST_FILE, stream_tensors(_rest(checkpoint, quantization, tensors)))
        for name, content in _side_files(checkpoint, log, card):
            folder.write(name, content)
        old = checkpoint.manifest
        counts = old.quantized_parameters, old.total_parameters
        publish(folder, checkpoint.config, quantization, old.planes, counts, before_publish)


def _rest(
    checkpoint: Checkpoint, quantization: QuantizationConfig, tensors: Mapping[str, Tensor]
) -> list[StreamedTensor]:
    """The tensors of model.safetensors: tuned ones, and the others as they were."""
    tables = checkpoint.quantization.embeddings.codebooks
    own = f"codebooks.{tables}." if tables else "codebooks.."  # no set has an empty name
    sources = {n: n for n in checkpoint.rest if n.startswith(own) or not n.startswith("codebooks.")}
    for input_group, old in zip(
        quantization.input_groups, checkpoint.quantization.input_groups, strict=True
    ):
        for m, plane in enumerate(quantization.planes, 1):
            for suffix in plane.parts:
                source = codebook_name(old.codebooks, m, suffix)
                sources[codebook_name(input_group.codebooks, m, suffix)] = source
    unknown = set(tensors) - set(sources)
    assert not unknown, f"tuned tensors {sorted(unknown)} have no place in the checkpoint"
    infos = {name: checkpoint.rest[source] for name, source in sources.items()}
    for name, tensor in tensors.items():
        found = TensorInfo.of(tensor)
        assert found == infos[name], f"{name} is {found}, stored as {infos[name]}"
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name}: values that are not finite in {tensor.dtype}")

    def chunks(name: str) -> Iterator[memoryview]:
        yield raw_bytes(tensors[name] if name in tensors else checkpoint.read(sources[name]))

    return wide_first(StreamedTensor(n, info, partial(chunks, n)) for n, info in infos.items())


def _side_files(
    checkpoint: Checkpoint, log: Sequence[Mapping[str, Any]], card: str
) -> Iterator[tuple[str, list[bytes]]]:
    """Tokenizer and the like as they are; the card and the log of tuning with what is new."""
    manifest = checkpoint.manifest
    done = {*manifest.tensor_files(), CONFIG_FILE}
    names = {*manifest.files, TUNE_LOG, CARD_FILE} - done
    lines = "".join(json.dumps(line) + "\n" for line in log)
    added = {TUNE_LOG: lines.encode(), CARD_FILE: card.encode()}
    for name in sorted(names):
        path = checkpoint.path / name
        old = path.read_bytes() if name in manifest.files and path.is_file() else b""
        yield name, [old + added.get(name, b"")]
