"""Families beyond the plain decoder: run block by block, they give the model's own logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

import family_models
from dropbydrop.models import structure
from dropbydrop.models.block_runner import BlockRunner
from dropbydrop.models.block_state import Axes, BlockState
from dropbydrop.models.input_groups import GROUP_SIZE, codable
from dropbydrop.system.errors import UnsupportedModelError

N, T = 3, 11


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(3, 90, (N, T), generator=torch.Generator().manual_seed(3))


def opened(folder: Path, family: str) -> tuple[PreTrainedModel, BlockRunner]:
    model = family_models.save(folder, family)
    return model, BlockRunner.open(folder, batch_tokens=2 * T)


@pytest.mark.parametrize("family", family_models.DENSE)
def test_block_by_block_equals_forward(family: str, tmp_path: Path, ids: Tensor) -> None:
    model, runner = opened(tmp_path, family)
    assert type(runner.model) is type(model)
    inputs: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if name.startswith(runner.blocks_name) and isinstance(module, nn.Linear):
            module.register_forward_pre_hook(
                lambda _, args, name=name: inputs.__setitem__(name, args[0])
            )
    expected = model(input_ids=ids).logits
    hidden, coded = runner.embed(ids), set()
    for i in range(runner.num_blocks):
        block = runner.block(i)
        weights = {name: m.weight for name, m in codable(block, runner.block_prefix(i)).items()}
        # in place, as the pipeline does it: what blocks share stays where it was
        statistics = runner.collect_statistics(i, block, hidden, clip=float("inf"), out=hidden)
        for group in statistics.input_groups:
            coded |= set(group.modules)
            for module in group.modules:
                assert torch.equal(weights[module], model.get_submodule(module).weight)
            x = inputs[group.modules[0]].reshape(-1, group.d_in).double()
            gram = statistics.grams[group.name].double()
            torch.testing.assert_close(gram, x.T @ x / len(x), rtol=1e-4, atol=1e-5)
        runner.release(i)
    assert coded
    torch.testing.assert_close(runner.logits(hidden), expected, rtol=0, atol=2e-5)


def test_towers_of_images_are_not_read(tmp_path: Path, ids: Tensor) -> None:
    _, runner = opened(tmp_path, "gemma3")
    runner.logits(runner.embed(ids))
    tower = runner.model.get_submodule("model.vision_tower")
    assert all(p.is_meta for p in tower.parameters())
    stored = [name for name in runner.outer_names() if name.startswith("model.vision_tower.")]
    assert stored  # and yet they are among what a checkpoint keeps
    assert runner.read(stored[0]).isfinite().all()


def test_stored_buffers_of_a_block_are_read(tmp_path: Path) -> None:
    model, runner = opened(tmp_path, "gemma4_text")
    scalars = [float(block.layer_scalar) for block in model.model.layers]
    assert 1.0 not in scalars
    assert [float(runner.block(i).layer_scalar) for i in range(2)] == scalars


def test_windows_keep_their_own_state(tmp_path: Path, ids: Tensor) -> None:
    """Tokens and shared keys travel with the windows, whoever reorders or splits them."""
    _, runner = opened(tmp_path, "gemma4_e")
    whole, parts = runner.embed(ids), runner.embed(ids[[2, 0]])
    for i in range(runner.num_blocks):
        block = runner.block(i)
        whole = runner.forward_block(i, block, whole)
        parts = runner.forward_block(i, block, parts)
    torch.testing.assert_close(parts, whole[[2, 0]], rtol=0, atol=1e-5)
    assert not torch.allclose(whole[0], whole[2], atol=0.1)


def test_the_state_is_packed_without_loss() -> None:
    streams, keys = Axes(1, 2, (3, 8)), Axes(0, 2, (2, 4))
    state = BlockState(streams, ids=True, side={"local": (keys, keys)})
    hidden = torch.randn(3, 2, 5, 8).to(torch.bfloat16)  # three streams of two windows
    ids = torch.tensor([[0, 255, 256, 65_536, 16_777_215]] * 2)
    pair = tuple(torch.randn(2, 2, 5, 4).to(torch.bfloat16) for _ in range(2))
    packed = state.pack(hidden, ids, {"local": pair})
    assert packed.shape == (2, 5, 3 * 8 + 3 + 2 * 8)
    back, tokens, side = state.unpack(packed)
    assert torch.equal(back, hidden)
    assert torch.equal(tokens, ids)
    assert all(map(torch.equal, side["local"], pair))
    assert not state.unpack(state.pack(hidden, ids))[2]["local"][0].any()  # not written yet


def test_axes_are_told_apart_by_two_sizes() -> None:
    assert Axes.between(torch.Size([2, 7, 7]), torch.Size([3, 9, 7])) == Axes(0, 1, (7,))
    assert Axes.between(torch.Size([4, 7, 2]), torch.Size([4, 9, 3])) == Axes(2, 1, (4,))
    assert Axes.between(torch.Size([2, 7]), torch.Size([2, 9])) is None


@pytest.mark.parametrize("kind", structure.REFUSED)
def test_families_are_refused_with_the_reason(kind: str) -> None:
    family_models.require(kind)
    config = AutoConfig.for_model(kind)
    with pytest.raises(UnsupportedModelError, match=f"'{kind}' are not supported: "):
        structure.refuse_by_name(config)


def test_what_generates_no_text_is_refused(tmp_path: Path) -> None:
    AutoConfig.for_model("siglip_vision_model").save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="siglip_vision_model"):
        structure.build_model(tmp_path, torch.float32, "cpu")


def test_the_size_of_a_group_is_that_of_the_code() -> None:
    from dropbydrop.coding.code import GROUP

    assert GROUP == GROUP_SIZE
