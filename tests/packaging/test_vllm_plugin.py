"""What of integrations/vllm can be said without vLLM: its metadata, and which layer holds what.

The rest is tested with vLLM, in an environment of its own: `make test-vllm`.
"""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tiny
from dropbydrop.checkpoint import Checkpoint
from dropbydrop.system.errors import UnsupportedModelError
from dropbydrop.system.version import __version__

PLUGIN = Path(__file__).parents[2] / "integrations" / "vllm"
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
ATTENTION, FEED_FORWARD = "model.layers.0.self_attn", "model.layers.1.mlp"


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    """The table `project` of its pyproject.toml."""
    found: dict[str, Any] = tomllib.loads((PLUGIN / "pyproject.toml").read_text())["project"]
    return found


def test_it_belongs_to_this_version(project: dict[str, Any]) -> None:
    assert project["version"] == __version__
    assert project["dependencies"] == [f"dropbydrop=={__version__}"]  # it brings no torch, no vLLM
    assert project["license"] == "Apache-2.0"
    assert (PLUGIN / "LICENSE").read_text() == (PLUGIN.parents[1] / "LICENSE").read_text()


def test_entry_points_exist(project: dict[str, Any]) -> None:
    points = project["entry-points"]
    assert set(points) == {"vllm.general_plugins", "vllm.logits_processors"}
    for point in (value for group in points.values() for value in group.values()):
        module, _, name = point.partition(":")
        path = PLUGIN / "src" / Path(*module.split("."))
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        bound = {getattr(node, "name", None) for node in ast.parse(file.read_text()).body}
        assert name in bound


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """The layers of a tied Llama; importing them needs no vLLM."""
    monkeypatch.syspath_prepend(str(PLUGIN / "src"))
    from dropbydrop_vllm.names import Names

    yield Names(Checkpoint.open(tiny.write_checkpoint(tmp_path / "out")).quantization)
    assert "vllm" not in sys.modules
    for module in [m for m in sys.modules if m.split(".")[0] == "dropbydrop_vllm"]:
        del sys.modules[module]


def test_merged_layers_are_input_groups(names: Any) -> None:
    assert names.linear(f"{ATTENTION}.qkv_proj", PACKED) == (
        f"{ATTENTION}.q_proj",
        f"{ATTENTION}.k_proj",
        f"{ATTENTION}.v_proj",
    )
    assert names.linear(f"{FEED_FORWARD}.down_proj", PACKED) == (f"{FEED_FORWARD}.down_proj",)
    assert f"{FEED_FORWARD}.down_proj" not in names.left()
    assert f"{FEED_FORWARD}.up_proj" in names.left()
    assert names.linear("model.vision.qkv_proj", PACKED) is None
    assert names.linear("lm_head", PACKED) is None  # rows, not codes
    assert names.embedding("") == names.embedding("model.embed_tokens") == "model.embed_tokens"
    assert names.embedding("lm_head") is None


def test_names_of_vllm(names: Any) -> None:
    names.rename(lambda name: name.replace("model.", "language_model.model.", 1))
    prefix = f"language_model.{FEED_FORWARD}"
    assert names.linear(f"{prefix}.gate_up_proj", PACKED) == (
        f"{FEED_FORWARD}.gate_proj",
        f"{FEED_FORWARD}.up_proj",
    )
    assert names.linear(f"{FEED_FORWARD}.gate_up_proj", PACKED) is None


def test_what_is_no_input_group_is_refused(names: Any) -> None:
    wrong = {"all": ["gate_proj", "down_proj"], "some": ["up_proj", "bias_proj"]}
    with pytest.raises(UnsupportedModelError, match="do not share an input group"):
        names.linear(f"{FEED_FORWARD}.all", wrong)
    with pytest.raises(UnsupportedModelError, match="has only"):
        names.linear(f"{FEED_FORWARD}.some", wrong)
