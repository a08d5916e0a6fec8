"""The JSON schemas beside docs/format.md, against what is written and what is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dropbydrop.checkpoint import Manifest, QuantizationConfig
from dropbydrop.checkpoint.config import parse_plane
from dropbydrop.coding.planes import WINDOWS, BytesPlane, TrellisPlane
from dropbydrop.system.errors import DropError, FormatError
from tiny import write_checkpoint

DOCS = Path(__file__).parents[2] / "docs"
Change = Callable[[dict[str, Any]], Any]


def validator(name: str) -> jsonschema.Draft202012Validator:
    schema = json.loads((DOCS / f"format.{name}.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


CONFIG, MANIFEST = validator("config"), validator("manifest")
OTHER_KIND = {  # a valid plane that is not of this kind
    "bytes": TrellisPlane().to_dict(),
    "trellis": BytesPlane().to_dict(),
}


@pytest.fixture(scope="module")
def written(
    tmp_path_factory: pytest.TempPathFactory, code: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """quantization_config and manifest of a checkpoint whose planes are sharded."""
    folder = tmp_path_factory.mktemp("schema")
    out = write_checkpoint(folder / "out", code=code, shard_bytes=2000)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    return config, json.loads((out / "manifest.json").read_text())


def test_what_is_written_is_valid(written: tuple[dict[str, Any], dict[str, Any]]) -> None:
    config, manifest = written
    CONFIG.validate(config)
    MANIFEST.validate(manifest)
    assert QuantizationConfig.from_dict(config).to_dict() == config
    assert Manifest.from_dict(manifest).to_dict() == manifest


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.pop("levels"),
        lambda d: d.update(format_version=2),
        lambda d: d.update(surprise=1),
        lambda d: d.update(bits="4"),
        lambda d: d["planes"][0].pop("kind"),
        lambda d: d["planes"][0].update(kind="hexagons"),
        lambda d: d["planes"][0].update(entries=16),
        lambda d: d["planes"][0].update(dtype="int8"),
        lambda d: d["planes"][0].update(bits=3),
        lambda d: d["planes"][0].update(window=7),
        lambda d: d["planes"][0].update(window=18),
        lambda d: d["planes"].append(OTHER_KIND[d["planes"][0]["kind"]]),
        lambda d: d["input_groups"][0].update(d_in=20),
        lambda d: d["input_groups"][0].update(modules=[]),
        lambda d: d["input_groups"][0].update(codebooks="a/b"),
        lambda d: d["input_groups"][0].update(rotation={"kind": "block", "block": 8}),
        lambda d: d["embeddings"].update(bits=4),
    ],
)
def test_damaged_configs(written: tuple[dict[str, Any], dict[str, Any]], change: Change) -> None:
    """The schema refuses them, and so does the reader."""
    data = copy.deepcopy(written[0])
    change(data)
    assert not CONFIG.is_valid(data)
    with pytest.raises(DropError):
        QuantizationConfig.from_dict(data)


@pytest.fixture(scope="module")
def with_tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """quantization_config of a checkpoint with embedding and head in planes."""
    out = write_checkpoint(tmp_path_factory.mktemp("tables") / "out", embedding_bits=(3, 5, 5))
    config: dict[str, Any] = json.loads((out / "config.json").read_text())["quantization_config"]
    CONFIG.validate(config)
    assert QuantizationConfig.from_dict(config).to_dict() == config
    return config


@pytest.mark.parametrize(
    "change",
    [
        lambda e: e.update(bits=[]),
        lambda e: e.update(bits=["3", 5, 5]),
        lambda e: e.update(bits=[3, True, 5]),
        lambda e: e.update(bits=8),
        lambda e: e.update(planes=[]),
        lambda e: e["planes"][0].update(kind="hexagons"),
        lambda e: e["planes"].__setitem__(0, OTHER_KIND["trellis"]),
        lambda e: e.pop("codebooks"),
        lambda e: e.update(codebooks="a/b"),
        lambda e: e.update(surprise=1),
    ],
)
def test_damaged_tables(with_tables: dict[str, Any], change: Change) -> None:
    data = copy.deepcopy(with_tables)
    change(data["embeddings"])
    assert not CONFIG.is_valid(data)
    with pytest.raises(DropError):
        QuantizationConfig.from_dict(data)


@pytest.mark.parametrize(
    "change",
    [
        lambda e: e.update(bits=[5, 5]),  # of three levels
        lambda e: e.update(bits=[5, 3, 5]),
        lambda e: e.update(bits=[3, 4, 4]),  # not all planes
        lambda e: e.update(bits=[1, 5, 5]),
        lambda e: e.update(codebooks="universal"),
        lambda e: e.update(planes=e["planes"][:-1]),
    ],
)
def test_tables_that_contradict_the_rest(with_tables: dict[str, Any], change: Change) -> None:
    """What the schema cannot say."""
    data = copy.deepcopy(with_tables)
    change(data["embeddings"])
    with pytest.raises(FormatError):
        QuantizationConfig.from_dict(data)


@given(
    bits=st.integers(-1, 4), window=st.integers(0, 20), entries=st.sampled_from([0, 63, 64, 256])
)
@settings(max_examples=200, deadline=None)
def test_ranges_of_trellis_planes(bits: int, window: int, entries: int) -> None:
    """The schema and the parser agree on every plane, both ways."""
    plane = {"kind": "trellis", "bits": bits, "window": window, "entries": entries}
    try:
        parse_plane(plane)
    except DropError:
        parsed = False
    else:
        parsed = True
    assert parsed == CONFIG.evolve(schema=CONFIG.schema["$defs"]["trellis_plane"]).is_valid(plane)
    assert parsed == (bits in (1, 2) and window in WINDOWS and entries == 64)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(format="zip"),
        lambda d: d.pop("files"),
        lambda d: d["files"].update({"../evil": {"size": 1, "sha256": "0" * 64}}),
        lambda d: d["files"]["config.json"].update(size=-1),
        lambda d: d["files"]["config.json"].update(sha256="0" * 63),
        lambda d: d["planes"].append([]),
        lambda d: d["planes"][0].append("evil.safetensors"),
        lambda d: d.update(rest=[]),
        lambda d: d["parameters"].update(quantized=0),
    ],
)
def test_damaged_manifests(written: tuple[dict[str, Any], dict[str, Any]], change: Change) -> None:
    data = copy.deepcopy(written[1])
    change(data)
    assert not MANIFEST.is_valid(data)
    with pytest.raises(DropError):
        Manifest.from_dict(data)


def paths(data: Any, so_far: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if _list(data) else ()
    return [so_far, *(p for key, value in items for p in paths(value, (*so_far, key)))]


def _list(data: Any) -> bool:
    return isinstance(data, list)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)


@given(data=st.data(), value=JSON)
@settings(max_examples=60, deadline=None)
def test_no_json_crashes_the_strict_parsers(
    written: tuple[dict[str, Any], dict[str, Any]], data: st.DataObject, value: Any
) -> None:
    """Any value at any place: it is parsed, or refused by name; what is parsed is valid."""
    readers: tuple[tuple[Any, Any], ...] = (
        (QuantizationConfig, CONFIG),
        (Manifest, MANIFEST),
    )
    for (reader, schema), good in zip(readers, written, strict=True):
        spot = data.draw(st.sampled_from(paths(good)))
        damaged = _replaced(copy.deepcopy(good), spot, value)
        try:
            reader.from_dict(damaged)
        except DropError:
            continue
        assert schema.is_valid(damaged)


def _replaced(data: Any, spot: tuple[Any, ...], value: Any) -> Any:
    if not spot:
        return value
    *keys, last = spot
    inner = data
    for key in keys:
        inner = inner[key]
    inner[last] = value
    return data
