"""Random shapes, levels and dtypes: what is written is read back, bit by bit."""

from __future__ import annotations

import json
import struct
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dropbydrop.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    Embeddings,
    QuantizationConfig,
    StoredGroup,
)
from dropbydrop.checkpoint.tensor_files import DTYPES, TensorInfo, encode_header, read_header
from dropbydrop.coding.planes import counts_of
from dropbydrop.coding.rotation import Rotation
from dropbydrop.system.errors import FormatError
from random_model import random_planes, random_set

INFOS = st.builds(
    TensorInfo,
    st.sampled_from(sorted(DTYPES)),
    st.lists(st.integers(0, 5), max_size=3).map(tuple),
)
HEADERS = st.dictionaries(st.text("abc.+é", min_size=1, max_size=6), INFOS, max_size=5)


@given(HEADERS)
@settings(max_examples=60, deadline=None)
def test_headers(tensors: dict[str, TensorInfo]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "f.safetensors"
        header = encode_header(tensors.items())
        assert len(header) % 8 == 0
        path.write_bytes(header + bytes(sum(info.nbytes for info in tensors.values())))
        assert read_header(path.read_bytes(), str(path)).tensors == tensors


@given(HEADERS, st.binary(min_size=1, max_size=8), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_damaged_headers_are_refused(
    tensors: dict[str, TensorInfo], damage: bytes, where: float
) -> None:
    """Overwritten anywhere, a file is read as it was or refused; nothing else is raised."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "f.safetensors"
        whole = encode_header(tensors.items()) + bytes(sum(i.nbytes for i in tensors.values()))
        start = int(where * (len(whole) - 1))
        path.write_bytes(whole[:start] + damage + whole[start + len(damage) :])
        with suppress(FormatError):
            read_header(path.read_bytes(), str(path))


@given(st.text(max_size=40) | st.recursive(st.integers(), st.lists, max_leaves=4))
@settings(max_examples=60, deadline=None)
def test_any_json_in_a_header(value: object) -> None:
    text = json.dumps({"x": value}).encode()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "f.safetensors"
        path.write_bytes(struct.pack("<Q", len(text)) + text)
        with pytest.raises(FormatError):
            read_header(path.read_bytes(), str(path))


@given(
    rows=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    groups=st.integers(1, 6),
    levels=st.sets(st.integers(1, 4), min_size=1),
    code=st.sampled_from(["bytes", "trellis"]),
    window=st.integers(8, 17),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    bits=st.sampled_from([8, 16]),
    symmetric=st.booleans(),
    shard_bytes=st.sampled_from([1, 20, 10**9]),
    seed=st.integers(0, 99),
)
@settings(max_examples=20, deadline=None)
def test_checkpoints(
    rows: list[int],
    groups: int,
    levels: set[int],
    code: str,
    window: int,
    dtype: torch.dtype,
    bits: int,
    symmetric: bool,
    shard_bytes: int,
    seed: int,
) -> None:
    """Matrices [rows, 8 * groups] of one input, and what stays uncoded."""
    generator = torch.Generator().manual_seed(seed)

    def bytes_of(*shape: int) -> torch.Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

    d_in, asked = 8 * groups, sorted(levels)
    names = [f"m{i}" for i in range(len(rows))]
    planes = random_planes(code, asked, sign_symmetric=symmetric, window=window)
    codes = {
        n: [bytes_of(*plane.shape(d, d_in)) for plane in planes]
        for n, d in zip(names, rows, strict=True)
    }
    scales = {n: bytes_of(d) / 64 for n, d in zip(names, rows, strict=True)}
    books = random_set(planes, seed)
    turn = Rotation.make(d_in, seed=seed).scale(0.5 + bytes_of(d_in) / 128)
    group = StoredGroup("g", tuple(names), d_in)
    norm = (bytes_of(d_in) / 64).to(dtype)
    table = (bytes_of(5, 8) / 64).to(torch.float16)
    with tempfile.TemporaryDirectory() as folder:
        with CheckpointWriter(Path(folder) / "out", shard_bytes=shard_bytes) as writer:
            writer.add_group(group, turn)
            writer.add_codebook_set("universal", books)
            for name in names:
                writer.add_linear(name, codes[name], scales[name], d_in=d_in)
            writer.add_embedding("e", table, bits)
            writer.add_tensor("norm.weight", norm)
            embeddings = Embeddings(bits, ("e",), True)
            quantization = QuantizationConfig(asked[-1], tuple(asked), planes, (group,), embeddings)
            writer.finish({"model_type": "toy"}, quantization)
        checkpoint = Checkpoint.open(Path(folder) / "out")
        assert checkpoint.verify() == []
        assert checkpoint.quantization == quantization
        for name in names:
            for m, plane in enumerate(codes[name], 1):
                assert torch.equal(checkpoint.read_codes(name, m), plane)
            assert torch.equal(checkpoint.read(f"{name}.scales"), scales[name].half())
        stored = checkpoint.read_set("universal")
        assert type(stored) is type(books)
        for part, given in zip(stored.parts, books.parts, strict=True):
            assert part.keys() == given.keys()
            assert all(torch.equal(part[key], given[key]) for key in part)
        counts = [quantization.prefix_of(level) for level in asked]
        assert counts == list(counts_of(planes, asked))
        assert [quantization.level_of(count) for count in counts] == asked
        x = torch.randn(2, d_in, generator=generator)
        assert torch.equal(checkpoint.read_rotation(0).apply(x), turn.apply(x))
        assert torch.equal(checkpoint.read("norm.weight"), norm)
        assert checkpoint.read("norm.weight").dtype == dtype
        if bits == 16:
            assert torch.equal(checkpoint.read("e.weight"), table)
