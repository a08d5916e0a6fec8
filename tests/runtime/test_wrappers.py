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


TEXT = ("model.language_model.", "model.text_model.", "lm_head.")  # where the text decoder is


@pytest.fixture(scope="module", params=[*family_models.WRAPPERS])
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


def cost(model: nn.Module, other: nn.Module, given: dict[str, Tensor]) -> float:
    """How far the logits of two models are apart, relative to the size of the first's."""
    with torch.no_grad():
        expected = model(**given).logits
        return float((other(**given).logits - expected).norm() / expected.norm())


def test_texts_and_images_give_what_the_decoded_weights_give(
    quantized: tuple[str, Any, Path],
) -> None:
    family, model, out = quantized
    given = family_models.image_inputs(family)
    ids = given["input_ids"] % 90
    loaded = dropbydrop.load(out, bits=4)
    # what the image is read with is not coded: it costs what text of the same tokens costs
    text, image, low = (
        cost(model, dropbydrop.view(loaded, bits), each)
        for bits, each in ((4, {"input_ids": ids}), (4, given), (2, given))
    )
    assert 0 < image < 0.75 * low
    assert image < 1.5 * text
    assert type(loaded) is type(model)
    coded = {n: m for n, m in loaded.named_modules() if isinstance(m, NestedLinear)}
    assert all(name.startswith(TEXT) and ".layers." in name for name in coded)
    blocks = [
        p.numel() for n, p in model.named_parameters() if n.startswith(TEXT) and ".layers." in n
        and p.ndim == 2
    ]  # fmt: skip
    assert sum(m.out_features * m.in_features for m in coded.values()) > 0.9 * sum(blocks)
    state = loaded.state_dict()
    kept = [name for name in model.state_dict() if not name.startswith(TEXT)]
    assert len(kept) > 10
    for name in kept:  # tower and projector, bit for bit
        assert torch.equal(state[name], model.state_dict()[name]), name
    reference = decoded(model, loaded)
    # a prompt multiplies decoded matrices; few tokens take the kernels, which round tables of x
    for each, atol in ({"input_ids": ids[:, :9]}, 2e-2), ({"input_ids": ids}, 2e-4), (given, 2e-4):
        with torch.no_grad():
            expected, got = reference(**each).logits, loaded(**each).logits
        torch.testing.assert_close(got, expected, rtol=0, atol=atol)
    with torch.no_grad():
        changed = loaded(**{**given, "pixel_values": -given["pixel_values"]})
    assert not torch.allclose(changed.logits, got, atol=1e-2)  # the image is looked at


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
    with pytest.raises(AttributeError, match="Resize the original model"):
        loaded.resize_token_embeddings(200)
    reference = decoded(model, loaded)
    with torch.no_grad():
        expected, got = reference(input_ids=ids).logits, loaded(input_ids=ids).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=5e-3)


def test_every_door_gives_the_same(quantized: tuple[str, Any, Path]) -> None:
    family, _, out = quantized
    dropbydrop.register()
    with torch.no_grad():
        expected = dropbydrop.load(out, bits=3)(**family_models.image_inputs(family)).logits
        two = dropbydrop.view(dropbydrop.load(out), bits=3)
        other = AutoModelForImageTextToText.from_pretrained(out)
        assert torch.equal(two(**family_models.image_inputs(family)).logits, expected)
        assert other.config.quantization_config.bits == 4
        assert other(**family_models.image_inputs(family)).logits.isfinite().all()
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
