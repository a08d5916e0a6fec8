"""What the plugin cannot do is refused by name, before anything is read."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import tiny
from dropbydrop.system.errors import FormatError, PrecisionError, UnsupportedModelError
from dropbydrop_vllm.config import DropByDropConfig, asked_bits, check_engine


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The quantization_config of a toy, and its folder."""
    folder = tiny.write_checkpoint(tmp_path_factory.mktemp("toy") / "out")
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return {"folder": folder, "config": config["quantization_config"]}


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"tensor_parallel_size": 2}, "tensor parallelism over 2"),
        ({"pipeline_parallel_size": 4}, "pipeline parallelism over 4"),
        ({"lora_config": object()}, "LoRA"),
    ],
)
def test_engines(settings: dict[str, Any], word: str) -> None:
    plain = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "lora_config": None}
    given = SimpleNamespace(**{**plain, **settings})
    with pytest.raises(UnsupportedModelError, match=word):
        check_engine(SimpleNamespace(parallel_config=given, lora_config=given.lora_config))  # type: ignore[arg-type]


def test_tables_in_planes(stored: dict[str, Any]) -> None:
    plane = {"kind": "trellis", "window": 12, "entries": 64}
    tables = {
        "bits": [2, 3, 4], "modules": ["model.embed_tokens"], "tied": True, "codebooks": "tables",
        "planes": [{**plane, "bits": bits} for bits in (2, 1, 1)],
    }  # fmt: skip
    with pytest.raises(UnsupportedModelError, match="--head-bits 8"):
        DropByDropConfig.from_config({**stored["config"], "embeddings": tables})


def test_levels(stored: dict[str, Any]) -> None:
    config = DropByDropConfig.from_config(stored["config"]).stored
    assert asked_bits(None, config) == 4
    assert asked_bits({"bits": 2}, config) == 2
    for wrong in ({"bits": 5}, {"bits": "2"}, {"level": 2}, 3):
        with pytest.raises(PrecisionError):
            asked_bits(wrong, config)


def test_another_config_than_that_of_the_folder(stored: dict[str, Any], tmp_path: Path) -> None:
    config = DropByDropConfig.from_config({**stored["config"], "bits": 2})
    with pytest.raises(FormatError, match="additional-config"):
        config.maybe_update_config(str(stored["folder"]))
    with pytest.raises(FormatError, match="not a folder"):
        config.maybe_update_config(str(tmp_path / "none"))
