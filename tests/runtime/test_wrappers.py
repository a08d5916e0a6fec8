"""Models of text and images: the text decoder is quantized, the folder loads as what it was."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import dropbydrop
import family_models
from dropbydrop.data.calibration import Calibration
from dropbydrop.runtime.int8_modules import NestedEmbedding, NestedHead
from dropbydrop.runtime.modules import NestedLinear

FILES = ("preprocessor_config.json", "processor_config.json", "chat_template.jinja")


def inputs(family: str) -> dict[str, Tensor]:
    """Tokens with one image among them, as the family's processor would give them."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 90, (1, 12), generator=generator)
    pixels = torch.randn(1, 3, 16, 16, generator=generator)
    if family == "gemma3":
        ids[0, 2:6] = 95
        return {"input_ids": ids, "pixel_values": pixels, "token_type_ids": (ids == 95).long()}
    if family == "qwen3_vl":
        ids[0, 1], ids[0, 2] = 93, 95
        patches = torch.randn(4, 3 * 2 * 8 * 8, generator=generator)
        grid = torch.tensor([[1, 2, 2]])
        kinds = (ids == 95).long()
        return {"input_ids": ids, "pixel_values": patches, "image_grid_thw": grid,
                "mm_token_type_ids": kinds}  # fmt: skip
    ids[0, 2:6] = 95  # llava: four patches
    return {"input_ids": ids, "pixel_values": pixels}


@pytest.fixture(scope="module", params=["gemma3", "llava", "qwen3_vl"])
def quantized(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Any, Path]:
    """A family, its model, and a checkpoint of it."""
    family, place = request.param, tmp_path_factory.mktemp(request.param)
    model = family_models.save(place / "model", family)
    for name in FILES:
        (place / "model" / name).write_text("{}")
    ids = torch.randint(3, 90, (2, 16), generator=torch.Generator().manual_seed(1))
    windows = Calibration(ids, {})
    dropbydrop.quantize(
        place / "model", place / "out", preset="fast", calibration=windows, progress=False
    )
    shutil.rmtree(place / "model")
    return family, model, place / "out"


def decoded(model: nn.Module, loaded: nn.Module) -> nn.Module:
    """The reference: the original class with the dense weights that `loaded` decodes to."""
    state = model.state_dict()
    for name, module in loaded.named_modules():
        if isinstance(module, (NestedLinear, NestedEmbedding, NestedHead)):
            state[f"{name}.weight"] = module.dense_weight()
    model.load_state_dict(state)
    model.tie_weights()  # type: ignore[operator]
    return model


def test_texts_and_images_give_what_the_decoded_weights_give(
    quantized: tuple[str, Any, Path],
) -> None:
    family, model, out = quantized
    with torch.no_grad():
        original = model(**inputs(family)).logits
    loaded = dropbydrop.load(out, bits=4)
    assert type(loaded) is type(model)
    linears = [n for n, m in loaded.named_modules() if isinstance(m, NestedLinear)]
    assert len(linears) == 14
    assert not any("vis" in name for name in linears)
    for name, parameter in loaded.named_parameters():
        if "vis" in name:  # tower and projector, bit for bit
            assert torch.equal(parameter, model.get_parameter(name)), name
    reference = decoded(model, loaded)
    text = {"input_ids": inputs(family)["input_ids"] % 90}
    for given in (text, inputs(family)):
        with torch.no_grad():
            expected, got = reference(**given).logits, loaded(**given).logits
        torch.testing.assert_close(got, expected, rtol=0, atol=5e-3)
    with torch.no_grad():
        changed = loaded(**{**inputs(family), "pixel_values": -inputs(family)["pixel_values"]})
    assert not torch.allclose(changed.logits, got, atol=1e-2)  # the image is looked at
    assert float((got - original).norm() / original.norm()) < 0.5  # 4 bits are near the original


def test_rows_of_an_embedding_that_are_read_without_a_call(tmp_path: Path) -> None:
    """Gemma 4 with per-layer inputs takes the padding token's row of the weight."""
    model = family_models.save(tmp_path / "model", "gemma4")
    ids = torch.randint(3, 90, (2, 16), generator=torch.Generator().manual_seed(1))
    windows = Calibration(ids, {})
    dropbydrop.quantize(
        tmp_path / "model", tmp_path / "out", preset="fast", calibration=windows, progress=False
    )
    loaded = dropbydrop.load(tmp_path / "out")
    embedding = loaded.get_input_embeddings()
    assert isinstance(embedding, NestedEmbedding)
    dense = embedding.dense_weight()
    for index in (3, (3, slice(None)), slice(2, 5), torch.tensor([[1, 2]]), (None, slice(4), 5)):
        assert torch.equal(embedding.weight[index], dense[index])
    reference = decoded(model, loaded)
    with torch.no_grad():
        expected, got = reference(input_ids=ids).logits, loaded(input_ids=ids).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=5e-3)


def test_every_door_gives_the_same(quantized: tuple[str, Any, Path]) -> None:
    family, _, out = quantized
    dropbydrop.register()
    with torch.no_grad():
        expected = dropbydrop.load(out, bits=3)(**inputs(family)).logits
        two = dropbydrop.view(dropbydrop.load(out), bits=3)
        other = AutoModelForImageTextToText.from_pretrained(out)
        assert torch.equal(two(**inputs(family)).logits, expected)
        assert other.config.quantization_config.bits == 4
        assert other(**inputs(family)).logits.isfinite().all()
    assert all((out / name).is_file() for name in FILES)


def test_the_text_decoder_of_a_wrapper_alone(tmp_path: Path) -> None:
    """transformers builds a class of text alone for this config when asked for a causal LM."""
    family_models.save(tmp_path / "model", "qwen3_5")
    ids = torch.randint(3, 90, (2, 16), generator=torch.Generator().manual_seed(1))
    dropbydrop.quantize(
        tmp_path / "model", tmp_path / "out", preset="fast", calibration=Calibration(ids, {}),
        progress=False,
    )  # fmt: skip
    whole = dropbydrop.load(tmp_path / "out")
    text = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(whole) is not type(text)
    with torch.no_grad():
        torch.testing.assert_close(text(ids).logits, whole(input_ids=ids).logits, rtol=0, atol=1e-4)
