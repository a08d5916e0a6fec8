"""The JSON of a checkpoint, its names, and its bytes: golden files, strict parsing."""

from __future__ import annotations

import copy
import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dropbydrop.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    Embeddings,
    Manifest,
    QuantizationConfig,
    StoredGroup,
)
from dropbydrop.checkpoint.fields import plain_name
from dropbydrop.checkpoint.files import dump_json
from dropbydrop.checkpoint.int8_rows import quantize_rows
from dropbydrop.checkpoint.tensor_files import TensorInfo, encode_header, read_header
from dropbydrop.coding.codebook_set import BytesSet, TrellisSet
from dropbydrop.coding.planes import BytesPlane, TrellisPlane
from dropbydrop.coding.rotation import Rotation, pack_input_scales
from dropbydrop.system.errors import FormatError, PrecisionError
from tiny import sign

# ------------------------------------------------------------------------------ golden bytes
# Written once from fixed inputs. If one of these changes, readers in the field break: raise
# FORMAT_VERSION and docs/format.md, do not edit the numbers.

GOLDEN = {
    "config.json": "b3cdf0df8bba063b11274edd65ac2d8d3359b7e31da8d749878c862a73280548",
    "manifest.json": "e11510d3a8c03d66b94e7c040ccff4ba157673154a0bca034ad11761c597bce5",
    "model.safetensors": "125fd8ceaeaf4ec4ac8e6fadc0d05ed4ec51047ee0f507c3f6daf6760f6518c5",
    "notes.txt": "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03",
    "plane-1.safetensors": "be12e73fd65afca10dd2536e04644af5003172038e8facca92afbf37a7e7092b",
    "plane-2.safetensors": "b9cb71c65988a19671038f0f951b2c8088a58b6a38ab13a4c71499e4a340d36d",
}


def golden_rotation() -> Rotation:
    """Scaled signs and an odd factor, d_in 24 = 8 * 3."""
    signs = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0, -1.0] * 4)
    signs = signs * torch.exp2((torch.arange(24) - 12) / 8)
    odd = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    return Rotation(24, 8, signs, odd)


def write_golden(out: Path) -> None:
    """Two linears of one input group, no random numbers anywhere."""
    spec = StoredGroup("s", ("a", "b"), 24)
    quantization = QuantizationConfig(
        2, (1, 2), (BytesPlane(), BytesPlane()), (spec,), Embeddings(8, ("e",), True), {"seed": 7}
    )
    with CheckpointWriter(out) as writer:
        writer.add_group(spec, golden_rotation())
        book = torch.arange(128 * 8).reshape(128, 8) / 64
        writer.add_codebook_set("universal", BytesSet.of([book, book / 2]))
        for offset, (module, d_out) in enumerate((("b", 2), ("a", 4))):
            codes = [
                (torch.arange(d_out * 3).reshape(d_out, 3) * 5 + m + offset).to(torch.uint8)
                for m in range(2)
            ]
            writer.add_linear(module, codes, torch.arange(1, d_out + 1) / 8, d_in=24)
        writer.add_embedding("e", torch.arange(-12, 12).reshape(3, 8) / 4, bits=8)
        writer.add_tensor("norm.weight", torch.ones(24, dtype=torch.bfloat16))
        config = {"model_type": "toy", "dtype": "float32"}
        writer.finish(config, quantization, {"notes.txt": b"hello\n"}, 200)


GOLDEN_TRELLIS = {
    "config.json": "cf31d829eb3cf1bcc8db3b424726128612906c65560e45c9abf7a85b26018a46",
    "manifest.json": "4ce720aa99e93a9bc2b724e8403441bf956dd5c6ed1aae9aff90824647aa07f4",
    "model.safetensors": "a820bc8298c70aadf0ad40cf49b46346467a064c441e3c57b0a5a09271a7ea9d",
    "plane-1.safetensors": "04ad3d0467aed3c771c800c6eb6a6f4a573a1150663c363370f28ba9fa735548",
    "plane-2.safetensors": "cdf185b4993ebc070cad49f83001909a3431bbbd469c8077461a137a4f42e40a",
}
GOLDEN_WEIGHTS = {  # SHA-256 of float32 [d_out, d_in] of a level, in rotated coordinates
    "a at 2 bits": "6899baa87e9883b1c7e886d65af6e62212acaf2dd9b26afdc34d994939f0f9ad",
    "a at 3 bits": "ca8738a21a2012580e1371dacf9611a5a4b92f552bb0ce3793a8ebc6c94b30d9",
    "b at 2 bits": "5765af012892dc6c9d1e683a12867e01c7f1e3f777af518c3ed38f0294c00c70",
    "b at 3 bits": "b968376af5348cec4412337983ecd86ca5e65d39f867442ab3dacdee82fe6157",
}


def write_golden_trellis(out: Path) -> None:
    """As `write_golden`: planes of 2 and 1 bits, windows of 9 and 17 bits, levels 2 and 3."""
    group = StoredGroup("s", ("a", "b"), 24)
    planes = (TrellisPlane(bits=2, window=9), TrellisPlane(bits=1, window=17))
    values = (torch.arange(64) * 37 % 127 - 63).to(torch.int8)
    parts = tuple(
        {
            "": values.roll(5 * m),
            ".scale": torch.tensor([0.3 / 2**m]),
            ".taps": (torch.arange(plane.window) * 11 % 64 + m).to(torch.uint8),
        }
        for m, plane in enumerate(planes)
    )
    embeddings = Embeddings(16, ("e",), True)
    with CheckpointWriter(out) as writer:
        writer.add_group(group, golden_rotation())
        writer.add_codebook_set("universal", TrellisSet(planes, parts))
        for offset, (module, d_out) in enumerate((("b", 2), ("a", 37))):
            codes = [
                torch.arange(n * 24).reshape(n, 24).mul(29 + m).add(offset).to(torch.uint8)
                for m, n in enumerate(plane.shape(d_out, 24)[0] for plane in planes)
            ]
            writer.add_linear(module, codes, torch.arange(1, d_out + 1) / 8, d_in=24)
        writer.add_embedding("e", torch.arange(-12, 12).reshape(3, 8) / 4, bits=16)
        config = {"model_type": "toy", "dtype": "float32"}
        writer.finish(config, QuantizationConfig(3, (2, 3), planes, (group,), embeddings))


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize(
    ("write", "golden"), [(write_golden, GOLDEN), (write_golden_trellis, GOLDEN_TRELLIS)]
)
def test_golden_bytes(
    tmp_path: Path, write: Callable[[Path], None], golden: dict[str, str]
) -> None:
    write(tmp_path / "out")
    files = sorted((tmp_path / "out").iterdir())
    assert {path.name: digest(path.read_bytes()) for path in files} == golden


FIRST_MANIFEST = "b30d041df11a20a16ec00c712c7bed85269251d61ad28471aea8d73217857902"


def test_a_manifest_without_xxh128(tmp_path: Path) -> None:
    """As it was written before XXH128: the same bytes of all else, read and compared by SHA-256."""
    out = tmp_path / "out"
    write_golden(out)
    sign(out, xxh128=False)
    assert digest((out / "manifest.json").read_bytes()) == FIRST_MANIFEST
    checkpoint = Checkpoint.open(out)
    assert digest(dump_json(checkpoint.manifest.to_dict())) == FIRST_MANIFEST
    checkpoint.check_contents(2)
    assert checkpoint.verify() == []
    path = out / "plane-2.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(
        FormatError, match=r"plane-2.safetensors is not what the manifest says: SHA"
    ):
        Checkpoint.open(out).read_codes("a", 2)


def test_golden_weights(tmp_path: Path) -> None:
    """What trellis codes mean, from the bytes of the file alone."""
    write_golden_trellis(tmp_path / "out")
    checkpoint, found = Checkpoint.open(tmp_path / "out"), {}
    books = checkpoint.read_set("universal")
    for module, (d_out, _) in checkpoint.shapes.items():
        codes = [checkpoint.read_codes(module, m) for m in (1, 2)]
        scales = checkpoint.read(f"{module}.scales")
        for level, prefix in ((2, 1), (3, 2)):
            weight = books.decode(codes, scales, prefix)
            assert weight.shape == (d_out, 24)
            found[f"{module} at {level} bits"] = digest(weight.numpy().tobytes())
    assert found == GOLDEN_WEIGHTS


def test_bytes_of_input_scales(tmp_path: Path) -> None:
    """Sign and exponent; a rotation without scales stores the factor 1."""
    write_golden(tmp_path / "out")
    rest = load_file(tmp_path / "out" / "model.safetensors")
    signs = [0, 1, 0, 0, 1, 1] * 4
    stored = rest["input_groups.0.input_scales"].tolist()
    assert stored == [64 - 12 + i + 128 * s for i, s in enumerate(signs)]
    plain = Rotation.make(24, seed=3)
    assert pack_input_scales(plain.signs).tolist() == [
        64 if sign > 0 else 192 for sign in plain.signs
    ]


def test_golden_plane_header(tmp_path: Path) -> None:
    write_golden(tmp_path / "out")
    raw = (tmp_path / "out" / "plane-2.safetensors").read_bytes()
    header = (
        b'{"__metadata__":{"format":"pt","format_version":"1"},'
        b'"a.codes.2":{"dtype":"U8","shape":[4,3],"data_offsets":[0,12]},'
        b'"b.codes.2":{"dtype":"U8","shape":[2,3],"data_offsets":[12,18]}}'
    )
    header += b" " * (-len(header) % 8)
    data = bytes(range(2, 62, 5)) + bytes(range(1, 31, 5))
    assert raw == struct.pack("<Q", len(header)) + header + data


def test_same_input_same_bytes_whatever_the_order(tmp_path: Path) -> None:
    def write(out: Path, names: list[str]) -> None:
        specs = [StoredGroup(n, (n,), 8, "u") for n in ("x", "y")]
        with CheckpointWriter(out) as writer:
            for spec in specs:
                writer.add_group(spec, Rotation.make(8))
            for name in names:
                codes = [torch.full((2, 1), ord(name), dtype=torch.uint8)]
                writer.add_linear(name, codes, torch.full((2,), 0.5), d_in=8)
                writer.add_tensor(f"{name}_norm.weight", torch.ones(8))
            writer.add_codebook_set("u", BytesSet.of([torch.ones(128, 8)]))
            writer.add_embedding("e", torch.ones(4, 8), bits=8)
            q = QuantizationConfig(
                1, (1,), (BytesPlane(),), tuple(specs), Embeddings(8, ("e",), True)
            )
            writer.finish({"model_type": "toy"}, q)

    write(tmp_path / "one", ["x", "y"])
    write(tmp_path / "two", ["y", "x"])
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


def test_files_are_plain_safetensors(tmp_path: Path) -> None:
    """The library that everybody uses reads our files, aligned and with our metadata."""
    write_golden(tmp_path / "out")
    rest = load_file(tmp_path / "out" / "model.safetensors")
    assert rest["codebooks.universal.2"].dtype == torch.float16
    assert rest["rotations.odd3"].shape == (3, 3)
    assert rest["input_groups.0.input_scales"].shape == (24,)
    assert rest["a.weight"].shape == (0,)
    assert torch.equal(rest["e.rows"][0].float() * rest["e.row_scales"][0].float(), GOLDEN_ROW)
    raw = (tmp_path / "out" / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt", "format_version": "1"}
    assert (8 + length) % 8 == 0
    for name, entry in header.items():
        itemsize = {"F32": 4, "F16": 2, "BF16": 2, "U8": 1, "I8": 1}[entry["dtype"]]
        assert entry["data_offsets"][0] % itemsize == 0, name


# row 0 of the embedding, -12/4 .. -5/4, through its float16 scale 3/127 = 0.023620605
_SCALE = torch.tensor(3 / 127).half().float()
GOLDEN_ROW = (torch.arange(-12, -4) / 4 / _SCALE).round() * _SCALE


def test_header_round_trip(tmp_path: Path) -> None:
    tensors = [("x", TensorInfo("F32", (2, 3))), ("empty", TensorInfo("F16", (0,)))]
    path = tmp_path / "f.safetensors"
    path.write_bytes(encode_header(tensors) + bytes(24))
    assert read_header(path.read_bytes(), str(path)).tensors == dict(tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw[:4], "cut off within its header"),
        (lambda raw: raw[:40], "cut off within its header"),
        (lambda raw: raw[:-1], "cut off or damaged"),
        (lambda raw: raw + b"x", "cut off or damaged"),
        (lambda raw: b"\xff" * 8 + raw[8:], "cut off within its header"),
        (lambda raw: raw[:8] + b"[" + raw[9:], "header cannot be read as JSON"),
        (lambda raw: raw.replace(b"[0,24]", b"[0,20]"), "cut off or damaged"),
        (lambda raw: raw.replace(b"[2,3]", b"[2,4]"), "cut off or damaged"),
        (lambda raw: raw.replace(b'"F32"', b'"F99"'), "header is damaged"),
        (lambda raw: raw.replace(b'version":"1"', b'version":"2"'), "format_version '2'"),
        (lambda raw: raw.replace(b"format_version", b"format_wersion"), "version None"),
    ],
)
def test_damaged_header(tmp_path: Path, change: Any, message: str) -> None:
    path = tmp_path / "f.safetensors"
    path.write_bytes(change(encode_header([("x", TensorInfo("F32", (2, 3)))]) + bytes(24)))
    with pytest.raises(FormatError, match=message):
        read_header(path.read_bytes(), str(path))


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header.update(__metadata__=[1]),
        lambda header: header.update(__metadata__=None),
        lambda header: header.update(__metadata__="x"),
        lambda header: header["x"].update(shape=[2.0, 3]),
        lambda header: header["x"].update(shape=[-2, -3]),
        lambda header: header["x"].update(shape=[True, 6]),
    ],
)
def test_header_of_wrong_types(tmp_path: Path, change: Any) -> None:
    raw = encode_header([("x", TensorInfo("F32", (2, 3)))])
    header = json.loads(raw[8:])
    change(header)
    text = json.dumps(header).encode()
    path = tmp_path / "f.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(24))
    with pytest.raises(FormatError):
        read_header(path.read_bytes(), str(path))


# --------------------------------------------------------------------------- strict parsing


def valid_config() -> dict[str, Any]:
    plane = {
        "kind": "bytes",
        "entries": 256,
        "group": 8,
        "dtype": "uint8",
        "sign_symmetric": True,
    }
    input_group = {
        "name": "s",
        "modules": ["m.q", "m.k"],
        "d_in": 96,
        "codebooks": "universal",
        "rotation": {"kind": "full"},
    }
    other = {**input_group, "name": "t", "modules": ["m.o"]}
    return {
        "quant_method": "dropbydrop",
        "format_version": 1,
        "bits": 3,
        "levels": [2, 3],
        "planes": [dict(plane), dict(plane), dict(plane)],
        "input_groups": [input_group, other],
        "embeddings": {"bits": 8, "modules": ["embed"], "tied": True},
        "provenance": {"anything": ["goes", 1]},
    }


def test_config_round_trip() -> None:
    config = QuantizationConfig.from_dict(valid_config())
    assert config.to_dict() == valid_config()
    assert QuantizationConfig.from_dict(config.to_dict()) == config
    assert config.modules == ("m.q", "m.k", "m.o")
    assert config.group_index == {"m.q": 0, "m.k": 0, "m.o": 1}


def _set(*path: Any) -> Any:
    *keys, last, value = path

    def change(data: dict[str, Any]) -> None:
        for key in keys:
            data = data[key]
        data[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("quant_method", "aqlm"), "quant_method is not"),
        (_set("format_version", 2), "format_version 2; this dropbydrop reads version 1"),
        (_set("format_version", True), "format_version True"),
        (_set("format_version", "1"), "format_version '1'"),
        (_set("surprise", 1), r"unknown keys \['surprise'\]"),
        (_set("bits", "3"), "'bits' is '3'; expected int"),
        (_set("bits", True), "'bits' is True; expected int"),
        (_set("levels", []), r"levels \[\] must ascend"),
        (_set("levels", [3, 2]), "must ascend"),
        (_set("levels", [2, 2, 3]), "must ascend"),
        (_set("levels", [0, 3]), "must ascend from at least 1"),
        (_set("levels", [2, 4]), r"contradict planes of \[1, 1, 1\] bits: .* up to \[1, 2, 3\]"),
        (_set("levels", [2.0, 3]), "must ascend"),
        (_set("planes", 1, "entries", 16), "plane of 16 entries"),
        (_set("planes", 1, "group", 4), "group 4"),
        (_set("planes", 1, "dtype", "uint16"), "uint16"),
        (_set("planes", 1, "rotate", 1), r"plane 2 has unknown keys \['rotate'\]"),
        (_set("planes", 1, 3), "plane 2 is int, not a JSON object"),
        (_set("input_groups", []), "lists no input groups"),
        (_set("input_groups", 0, "modules", []), "none, or one twice"),
        (_set("input_groups", 0, "modules", ["m.q", "m.q"]), "none, or one twice"),
        (_set("input_groups", 0, "modules", ["m.o"]), r"module \['m.o'\] appears more than once"),
        (_set("input_groups", 0, "modules", ["../m"]), "is not a module name"),
        (_set("input_groups", 0, "name", "t"), r"input group \['t'\] appears more than once"),
        (_set("input_groups", 0, "d_in", 100), "100 is not a multiple of the group 8"),
        (_set("input_groups", 0, "codebooks", "a/b"), "is not a module name"),
        (_set("input_groups", 0, "rotation", {"kind": "butterfly"}), "unknown to this version"),
        (_set("input_groups", 0, "rotation", {"kind": "none"}), "unknown to this version"),
        (
            _set("input_groups", 0, "rotation", {"kind": "full", "x": 1}),
            r"rotation has unknown keys",
        ),
        (_set("input_groups", 0, "rotation", {}), "rotation lacks 'kind'"),
        (
            _set("planes", 1, "kind", "hexagons"),
            "plane of kind 'hexagons'; .* decodes bytes and tre",
        ),
        (
            _set("planes", 1, {"kind": "trellis", "bits": 1, "window": 12, "entries": 64}),
            r"planes of kinds \['bytes', 'trellis', 'bytes'\]",
        ),
        (_set("embeddings", "bits", 4), "embeddings of 4 bits"),
        (_set("embeddings", "modules", ["m.q"]), "quantized linears and as embeddings"),
    ],
)
def test_config_refused(change: Any, message: str) -> None:
    data = copy.deepcopy(valid_config())
    change(data)
    with pytest.raises(FormatError, match=message):
        QuantizationConfig.from_dict(data)


def trellis_config() -> dict[str, Any]:
    planes = [{"kind": "trellis", "bits": k, "window": 12, "entries": 64} for k in (2, 1, 1)]
    return {**valid_config(), "bits": 4, "levels": [2, 3, 4], "planes": planes}


def test_trellis_config() -> None:
    config = QuantizationConfig.from_dict(trellis_config())
    assert config.to_dict() == trellis_config()
    assert config.kind == "trellis"
    assert [config.prefix_of(p) for p in (2, 3, 4)] == [1, 2, 3]
    assert [config.level_of(count) for count in (1, 2, 3)] == [2, 3, 4]
    assert config.served_by(2) == (2, 3)
    assert config.served_by(0) == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("planes", 0, "window", 7), "trellis plane of 2 bits a weight, window 7"),
        (_set("planes", 0, "window", 18), "window 18 and 64 values; this version decodes"),
        (_set("planes", 0, "bits", 3), "trellis plane of 3 bits"),
        (_set("planes", 0, "bits", True), "expected int"),
        (_set("planes", 0, "entries", 128), "128 values"),
        (_set("planes", 0, "sign_symmetric", True), r"plane 1 has unknown keys"),
        (_set("planes", 0, "kind", "bytes"), "plane 1 lacks 'entries'|plane 1 lacks 'group'"),
        (_set("levels", [1, 2, 3, 4]), r"contradict planes of \[2, 1, 1\] bits"),
        (_set("levels", [2, 3]), r"add up to \[2, 3, 4\], and the last level must"),
    ],
)
def test_trellis_config_refused(change: Any, message: str) -> None:
    data = copy.deepcopy(trellis_config())
    change(data)
    with pytest.raises(FormatError, match=message):
        QuantizationConfig.from_dict(data)


@pytest.mark.parametrize("key", ["bits", "levels", "planes", "input_groups", "embeddings"])
def test_config_lacks_a_key(key: str) -> None:
    data = valid_config()
    del data[key]
    with pytest.raises(FormatError, match=f"lacks '{key}'"):
        QuantizationConfig.from_dict(data)


@pytest.mark.parametrize("bits", [1, 4, 0, -1, True, 3.0, "3", None])
def test_precision_that_was_never_written(bits: object) -> None:
    config = QuantizationConfig.from_dict(valid_config())
    with pytest.raises(PrecisionError, match="it has 2, 3"):
        config.check_level(bits)


def test_default_precision_must_be_a_level() -> None:
    with pytest.raises(PrecisionError, match="precision 1 is not a level"):
        QuantizationConfig.from_dict({**valid_config(), "bits": 1})


def valid_manifest() -> dict[str, Any]:
    entry = {"size": 1, "sha256": "0" * 64}
    planes = [["plane-1.safetensors"], [f"plane-2-0000{i}-of-00002.safetensors" for i in (1, 2)]]
    names = ["config.json", "model.safetensors", *planes[0], *planes[1]]
    return {
        "format": "dropbydrop",
        "format_version": 1,
        "files": {name: dict(entry) for name in names},
        "planes": planes,
        "rest": ["model.safetensors"],
        "parameters": {"quantized": 10, "total": 12},
    }


def test_manifest_round_trip() -> None:
    assert Manifest.from_dict(valid_manifest()).to_dict() == valid_manifest()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("format", "zip"), "format is not 'dropbydrop'"),
        (_set("format_version", 3), "reads version 1"),
        (_set("extra", 3), "unknown keys"),
        (_set("files", "../evil", {"size": 1, "sha256": "0" * 64}), "only plain file names"),
        (_set("files", "a.json", {"size": 1, "sha256": "0" * 63}), "malformed"),
        (_set("files", "a.json", {"size": -1, "sha256": "0" * 64}), "malformed"),
        (_set("files", "a.json", {"size": "1", "sha256": "0" * 64}), "expected int"),
        (_set("planes", 0, ["/etc/passwd"]), "only plain file names"),
        (_set("planes", 0, ["plane-2.safetensors"]), r"expected \['plane-1.safetensors'\]"),
        (_set("planes", 0, []), "plane 1 names no files"),
        (_set("planes", []), "lists no planes"),
        (_set("planes", 1, ["plane-2.safetensors"]), "have no size and hash"),
        (_set("rest", ["other.safetensors"]), r"this version has \['model.safetensors'\]"),
        (_set("parameters", {"quantized": 13, "total": 12}), "13 quantized of 12"),
        (_set("parameters", {"quantized": 1, "total": 2, "x": 3}), "unknown keys"),
    ],
)
def test_manifest_refused(change: Any, message: str) -> None:
    data = copy.deepcopy(valid_manifest())
    change(data)
    with pytest.raises(FormatError, match=message):
        Manifest.from_dict(data)


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "a/b", "a\\b", "/a", "..a", "a..b", ".hidden", "a\0", "C:a", 3, None, "é"],
)
def test_names_that_are_not_plain(name: object) -> None:
    with pytest.raises(FormatError, match="only plain file names"):
        plain_name(name, "here")


# ------------------------------------------------------------------------------- 8-bit rows


def test_quantize_rows_against_naive() -> None:
    weight = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    weight[4] *= 1e-6  # scale subnormal in float16
    weight[5] = weight[5].bfloat16().float()
    rows, row_scales = quantize_rows(weight)
    for i in range(len(weight)):
        scale = float((weight[i].abs().max() / 127).half())
        assert float(row_scales[i]) == scale
        for j in range(8):
            expected = 0 if scale == 0 else round(float(weight[i, j] / torch.tensor(scale)))
            assert int(rows[i, j]) == max(-127, min(127, expected))


def test_quantize_rows_works_in_slabs() -> None:
    weight = torch.randn(8200, 8, generator=torch.Generator().manual_seed(1))
    rows, row_scales = quantize_rows(weight)
    tail, tail_scales = quantize_rows(weight[8190:])
    assert torch.equal(rows[8190:], tail)
    assert torch.equal(row_scales[8190:], tail_scales)
    error = (rows.float() * row_scales.float()[:, None] - weight).abs().amax(1)
    assert (error <= 0.51 * weight.abs().amax(1) / 127 + 1e-7).all()
