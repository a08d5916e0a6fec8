"""No wrong weight unnoticed: what decides a model is what the manifest says, or is refused."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dropbydrop.checkpoint import Checkpoint
from dropbydrop.checkpoint.contents import check_model_config, is_document
from dropbydrop.checkpoint.export import export
from dropbydrop.checkpoint.files import MAX_JSON, read_json
from dropbydrop.checkpoint.tensor_files import METADATA, read_header
from dropbydrop.system.digest import CHUNK, FileHasher, chunk_digests, file_digest
from dropbydrop.system.errors import FormatError
from tiny import sign, write_checkpoint


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory, code: str) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("contents") / "out", code=code)


@pytest.fixture
def out(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "out"))


def flip(path: Path, byte: int, bit: int) -> None:
    with open(path, "r+b") as file:
        file.seek(byte)
        (old,) = file.read(1)
        file.seek(byte)
        file.write(bytes([old ^ 1 << bit]))


# --------------------------------------------------------------------------------- digests


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK])
def test_digests_do_not_depend_on_the_pieces(tmp_path: Path, size: int) -> None:
    data = random.Random(size).randbytes(size)
    (tmp_path / "f").write_bytes(data)
    found = []
    for piece in (size or 1, CHUNK, 1_000_003):
        hasher = FileHasher()
        for start in range(0, size, piece):
            hasher.update(data[start : start + piece])
        found.append(hasher.entry())
    assert {entry.xxh128 for entry in found} == {chunk_digests(tmp_path / "f")}
    assert {(entry.size, entry.sha256) for entry in found} == {(size, file_digest(tmp_path / "f"))}
    assert len(found[0].xxh128 or ()) == -(-size // CHUNK)


# ------------------------------------------------------------------------- damage, wherever it is


def test_every_flipped_bit_is_refused(out: Path) -> None:
    """Bits of every file but documents, drawn anew for each byte that is hit: of tensors, headers,
    the tokenizer. Each is refused by what load and export call first."""
    planes = len(Checkpoint.open(out).manifest.planes)
    rng, names = random.Random(0), sorted(json.loads((out / "manifest.json").read_text())["files"])
    for name in [n for n in names if not is_document(n)] * 12:
        path = out / name
        byte, bit = rng.randrange(path.stat().st_size), rng.randrange(8)
        flip(path, byte, bit)
        with pytest.raises(FormatError):
            Checkpoint.open(out).check_contents(planes)
        flip(path, byte, bit)
    Checkpoint.open(out).check_contents(planes)


def test_a_tensor_is_compared_when_it_is_read(out: Path) -> None:
    checkpoint = Checkpoint.open(out)
    module = checkpoint.quantization.modules[-1]
    flip(out / "plane-2.safetensors", (out / "plane-2.safetensors").stat().st_size - 1, 3)
    with pytest.raises(
        FormatError, match=r"plane-2.safetensors is not what .*XXH128.* from byte 0"
    ):
        Checkpoint.open(out).read_codes(module, 2)
    assert Checkpoint.open(out, verify=False).read_codes(module, 2).dtype == torch.uint8


def test_documents_may_be_edited(out: Path, tmp_path: Path) -> None:
    (out / "README.md").write_text("# mine")
    (out / "quantize-log.jsonl").write_text("")
    Checkpoint.open(out).check_contents(1)


def test_export_compares(out: Path, tmp_path: Path) -> None:
    path = out / "model.safetensors"
    flip(path, path.stat().st_size - 5, 0)
    with pytest.raises(FormatError, match=r"model.safetensors is not what the manifest says"):
        export(out, tmp_path / "dense", progress=False)
    assert not (tmp_path / "dense").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
@pytest.mark.parametrize("name", ["config.json", "manifest.json", "model.safetensors"])
def test_a_pipe_is_not_waited_for(out: Path, name: str) -> None:
    (out / name).unlink()
    os.mkfifo(out / name)
    with pytest.raises(FormatError, match=rf"{name}.* cannot be read \(it is no regular file\)"):
        Checkpoint.open(out).require(2)


def test_a_file_that_is_written_to_while_it_is_open(out: Path) -> None:
    checkpoint = Checkpoint.open(out)
    module = checkpoint.quantization.modules[0]
    checkpoint.read_codes(module, 1)
    flip(out / "plane-1.safetensors", 200, 0)
    with pytest.raises(FormatError, match=r"was replaced, removed or written to"):
        checkpoint.read_codes(module, 1)


# ------------------------------------------------------------------------------ files beside it


@pytest.mark.parametrize(
    "name",
    [
        "adapter_config.json", "adapter_model.safetensors", "generation_config.json", "x.py",
        "model.safetensors.index.json", "chat_template.jinja", "added_tokens.json", "w.bin",
        "plane-9.safetensors",
    ],
)  # fmt: skip
def test_files_that_a_loader_would_read(out: Path, name: str) -> None:
    (out / name).write_text("{}")
    with pytest.raises(FormatError, match=f"holds '{name}', which its manifest does not list"):
        Checkpoint.open(out).check_contents(1)
    Checkpoint.open(out, verify=False).check_contents(1)


def test_files_that_nobody_reads(out: Path) -> None:
    for name in (
        "plan.json",
        "sensitivity.json",
        "notes.txt",
        ".pull.lock",
        "plane-9.safetensors.part",
    ):
        (out / name).write_text("{}")
    Checkpoint.open(out).check_contents(1)


@pytest.mark.parametrize(
    "change",
    [
        {"auto_map": {"AutoModel": "m.M"}},
        {"text_config": {"auto_map": {}}},
        {"transformers_weights": "other.safetensors"},
        {"attn_implementation": "kernels-community/flash-attn"},
        {"_attn_implementation": "flash_attention_2"},
        {"text_config": {"attn_implementation": {"text_config": "a/b:c"}}},
    ],
)
def test_keys_that_fetch_or_redirect(out: Path, change: dict[str, Any]) -> None:
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, **change}))
    sign(out, "config.json")
    with pytest.raises(FormatError, match=r"auto_map|transformers_weights|asks for the attention"):
        Checkpoint.open(out)


def test_attentions_that_fetch_nothing() -> None:
    for name in (None, "eager", "sdpa", {"": "sdpa"}):
        check_model_config({"attn_implementation": name, "transformers_weights": None}, "config")


# ------------------------------------------------------------------------------------- tensors


def rewrite(out: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change model.safetensors, consistently with the manifest."""
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", METADATA)
    sign(out, "model.safetensors")


Q, ROWS = "model.layers.0.self_attn.q_proj", "model.embed_tokens.rows"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({f"{Q}.levels": torch.ones(3)}), r"'.*q_proj.levels' is not described"),
        (
            lambda t: t.update({f"{Q}.level_scales": torch.ones(3)}),
            "level_scales' is not described",
        ),
        (lambda t: t.update({f"{Q}.codes.1": torch.ones(3)}), r"codes.1' is not described"),
        (
            lambda t: t.update({f"{Q}.bias": torch.ones(3).half()}),
            r"bias is F16 \[3\], expected F16",
        ),
        (lambda t: t.update({f"{Q}.bias": torch.ones(64).char()}), r"bias is I8 \[64\], expected"),
        (
            lambda t: t.update({f"{Q}.scales": t[f"{Q}.scales"][:, None]}),
            "scales is F16 .*expected",
        ),
        (
            lambda t: t.update({f"{Q}.scales": torch.ones(0).half()}),
            r"scales is F16 \[0\], expected",
        ),
        (
            lambda t: t.update({f"{Q}.scales": torch.ones(8).half()}),
            "quantized weights, the manifest",
        ),
        (
            lambda t: t.update({ROWS: t[ROWS].view(-1)}),
            r"rows is I8 \[\d+\], expected I8 \[-1, -1\]",
        ),
        (lambda t: t.update({"codebooks.universal.9": torch.ones(2)}), "9' is not described"),
    ],
)
def test_tensors_of_other_shapes(out: Path, change: Any, message: str) -> None:
    rewrite(out, change)
    with pytest.raises(FormatError, match=message):
        Checkpoint.open(out)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (f"{Q}.scales", float("inf")), ("model.norm.weight", float("nan")),
        ("rotations.odd3", float("nan")), ("model.embed_tokens.row_scales", -float("inf")),
        (ROWS, -128),
    ],
)  # fmt: skip
def test_values_that_are_refused(out: Path, name: str, value: float) -> None:
    rewrite(out, lambda tensors: tensors[name].view(-1)[-1:].fill_(value))
    with pytest.raises(
        FormatError, match=f"{name} has (values that are not finite|the value -128)"
    ):
        Checkpoint.open(out, verify=False).check_contents(1)


# ---------------------------------------------------------------------------------------- JSON


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"a": 1, "a": 2}', "the key 'a' appears twice"),
        (b"[" * 100_000, "cannot be read as JSON"),
        (b'{"a": NaN}', "NaN is no JSON"),
        (b'{"a": 1e999}', "1e999 is more than a number can be"),
        (b'{"a": "\xff"}', "cannot be read as JSON"),
        (b" " * (MAX_JSON + 1), "has more than 16,777,216 bytes"),
    ],
)
def test_json_that_is_refused(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "f.json").write_bytes(text)
    with pytest.raises(FormatError, match=message):
        read_json(tmp_path / "f.json")


@pytest.mark.parametrize(
    "header",
    [
        b'{"__metadata__":null}',
        b'{"__metadata__":{"format_version":1}}',
        b'{"x":{"dtype":"U8","shape":[1],"data_offsets":[0]}}',
        b'{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1,2]}}',
        b'{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"more":0}}',
        b'{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"x":{}}',
        b'{"x":{"dtype":["U8"],"shape":[1],"data_offsets":[0,1]}}',
        b'{"x":{"dtype":"U8","shape":[4294967296,4294967296,0],"data_offsets":[0,1]}}',
        b'{"x":' * 50_000,
        b"null",
    ],
)
def test_headers_that_are_refused(header: bytes) -> None:
    with pytest.raises(FormatError, match=r"header|bytes"):
        read_header(len(header).to_bytes(8, "little") + header + b"\0", "f")


def test_more_planes_than_kernels_read(out: Path) -> None:
    config = json.loads((out / "config.json").read_text())
    quantization = config["quantization_config"]
    quantization["planes"] = quantization["planes"][-1:] * 65
    quantization["levels"] = [65]
    quantization["bits"] = 65
    (out / "config.json").write_text(json.dumps(config))
    sign(out, "config.json")
    with pytest.raises(FormatError, match="65 planes; kernels read up to 64"):
        Checkpoint.open(out)
