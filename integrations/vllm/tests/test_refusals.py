"""What the plugin cannot do is refused by name, before anything is read."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

import tiny
from dropbydrop.checkpoint import Checkpoint
from dropbydrop.runtime.plane_store import PlaneStore
from dropbydrop.system.errors import FormatError, PrecisionError, UnsupportedModelError
from dropbydrop_vllm import loader
from dropbydrop_vllm.config import DropByDropConfig, asked_bits, check_engine
from dropbydrop_vllm.layers import Codes, NestedLinearMethod, RowsMethod


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


@pytest.fixture
def config(stored: dict[str, Any]) -> DropByDropConfig:
    """Of the toy, opened at 3 bits as an engine opens it."""
    made = DropByDropConfig.from_config(stored["config"])
    made.maybe_update_config(str(stored["folder"]))
    made._codes = Codes(PlaneStore(Checkpoint.open(stored["folder"])), 3)
    return made


def test_experts_and_a_head_of_codes(config: DropByDropConfig) -> None:
    def layer(kind: type[Any]) -> Any:
        return kind.__new__(kind)  # it is refused before anything of it is read

    with pytest.raises(UnsupportedModelError, match="mixture of experts"):
        config.get_quant_method(layer(RoutedExperts), "model.layers.0.mlp.experts")
    with pytest.raises(UnsupportedModelError, match="made of codes"):
        config.get_quant_method(layer(ParallelLMHead), config.stored.modules[0])


def test_shapes_of_another_model(config: DropByDropConfig) -> None:
    sizes = (64, [10], 64, 10, torch.float32)
    linear = NestedLinearMethod(config.codes, config.stored.modules[:1])
    with pytest.raises(FormatError, match="vLLM needs"):
        linear.create_weights(torch.nn.Module(), *sizes)
    layer = SimpleNamespace(org_vocab_size=10)
    with pytest.raises(FormatError, match="rows in the checkpoint"):
        RowsMethod(config.codes, "model.embed_tokens").create_weights(layer, *sizes)


def test_a_model_that_the_checkpoint_does_not_fit(
    config: DropByDropConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Model(torch.nn.Module):
        def load_weights(self, weights: Any) -> None:
            raise ValueError(f"no place for {next(iter(weights))[0]}")

    given = SimpleNamespace(quant_config=config)
    monkeypatch.setattr(loader, "get_current_vllm_config", lambda: given)
    made = loader.Loader.__new__(loader.Loader)
    model: Any = SimpleNamespace(quantization="dropbydrop")
    with pytest.raises(UnsupportedModelError, match="Model of vLLM has no layer for"):
        made.load_weights(Model(), model)
    for module in config.stored.modules:
        config.names.linear(module, {})
    with pytest.raises(FormatError, match=r"does not fit Model of vLLM \(no place for"):
        made.load_weights(Model(), model)
