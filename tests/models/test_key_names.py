"""Parameters put together from stored tensors one by one, against transformers' own loader."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from accelerate import init_empty_weights
from packaging.version import Version
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.core_model_loading import Chunk, WeightConverter

import family_models
from dropbydrop.models import key_names
from dropbydrop.models.key_names import KeyNames, ModuleNames, Recipe
from dropbydrop.models.weight_files import WeightFiles
from dropbydrop.system.errors import FormatError

EXPERT = "model.layers.1.mlp.experts"


def on_meta(config: object, auto: type = AutoModelForCausalLM) -> PreTrainedModel:
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = auto.from_config(config, dtype=torch.float32)
    return model


def saved(folder: Path, family: str) -> tuple[PreTrainedModel, WeightFiles]:
    """A model on the meta device and its folder, with the keys that transformers writes."""
    auto = AutoModelForImageTextToText if family in family_models.WRAPPERS else AutoModelForCausalLM
    family_models.save(folder, family)
    return on_meta(family_models.config_of(family), auto), WeightFiles(folder)


@pytest.mark.parametrize("family", family_models.RENAMED)
def test_every_tensor_is_what_from_pretrained_loads(family: str, tmp_path: Path) -> None:
    model, files = saved(tmp_path, family)
    names = KeyNames(model, files)
    wanted = type(model).from_pretrained(tmp_path).state_dict()
    ties, differs = model.all_tied_weights_keys, 0
    for name, tensor in wanted.items():
        if name in ties:
            continue
        assert torch.equal(names.read(name, files.read), tensor), name
        recipe = names.recipe(name)
        assert recipe is not None
        differs += recipe != Recipe((name,))
    assert differs, "nothing is renamed: this family tests nothing"
    assert not names.unused


def test_experts_are_merged_in_their_order(tmp_path: Path) -> None:
    model, files = saved(tmp_path, "qwen3_moe")
    names = KeyNames(model, reversed(list(files)))  # the order of the files does not matter
    recipe = names.recipe(f"{EXPERT}.gate_up_proj")
    assert recipe is not None
    assert recipe.operations == ("MergeModulelist", "Concatenate")
    assert len(recipe.sources) == 6
    read: list[str] = []

    def fetch(key: str) -> Tensor:
        read.append(key)
        return files.read(key)

    down = names.read(f"{EXPERT}.down_proj", fetch)
    assert sorted(read) == [f"{EXPERT}.{e}.down_proj.weight" for e in range(3)]  # and no more
    for e in range(3):
        assert torch.equal(down[e], files.read(f"{EXPERT}.{e}.down_proj.weight"))


def test_an_expert_of_another_size_is_refused(tmp_path: Path) -> None:
    model, files = saved(tmp_path, "qwen3_moe")
    names = KeyNames(model, files)

    def fetch(key: str) -> Tensor:
        return files.read(key)[: 8 if ".2." in key else None]

    with pytest.raises(FormatError, match="cannot be put together"):
        names.read(f"{EXPERT}.gate_up_proj", fetch)


def test_keys_that_belong_to_nothing_are_listed(tmp_path: Path) -> None:
    model, files = saved(tmp_path, "gemma3_text")
    names = KeyNames(model, [*files, "model.layers.7.extra.weight"])
    assert names.unused == ["model.layers.7.extra.weight"]
    assert "model.layers.7.extra.weight" not in names
    assert names.recipe("model.layers.7.extra.weight") is None


def test_a_folder_of_the_base_model_lacks_its_prefix(tmp_path: Path) -> None:
    config = family_models.config_of("gemma3_text")
    model = family_models.fill(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    model.model.save_pretrained(tmp_path)
    files = WeightFiles(tmp_path)
    recipe = KeyNames(on_meta(config), files).recipe("model.norm.weight")
    assert recipe == Recipe(("norm.weight",))


def test_modules_of_a_wrapper_in_its_text_decoder() -> None:
    config = family_models.config_of("qwen3_5")
    if Version(transformers.__version__) < Version("5.17"):
        pytest.skip(f"transformers {transformers.__version__} builds no text class of a wrapper")
    names = ModuleNames(on_meta(config))  # the class of text alone
    here = "model.layers.0.mlp.down_proj"
    assert names.find("model.language_model.layers.0.mlp.down_proj") == here
    assert names.find(here) == here


def test_one_key_that_becomes_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, files = saved(tmp_path, "gemma3_text")
    parts = ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
    converter = WeightConverter(
        source_patterns=["mlp.gate_up.weight"], target_patterns=parts, operations=[Chunk(dim=0)]
    )
    monkeypatch.setattr(key_names, "get_model_conversion_mapping", lambda model: [converter])
    stored = {key: files.read(key) for key in files}
    for layer in ("model.layers.0.", "model.layers.1."):
        stored[f"{layer}mlp.gate_up.weight"] = torch.cat([stored.pop(layer + p) for p in parts])
    names = KeyNames(model, stored)
    for name in (f"model.layers.1.{part}" for part in parts):
        read = names.read(name, stored.__getitem__)
        assert torch.equal(read, files.read(name))
        assert read.untyped_storage().nbytes() == read.nbytes  # not a part of what was split
        assert names.recipe(name) == Recipe(("model.layers.1.mlp.gate_up.weight",), ("Chunk",))
