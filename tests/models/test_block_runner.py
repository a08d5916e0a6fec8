"""The walk against the model itself: same forward, same statistics, found without names."""

from __future__ import annotations

import json
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import tiny
from dropbydrop.models.block_runner import BlockRunner
from dropbydrop.models.input_groups import group_name
from dropbydrop.models.statistics import add_gram, mirror, token_weights
from dropbydrop.models.weight_files import WeightFiles
from dropbydrop.system.errors import CalibrationError, FormatError, UnsupportedModelError

N, T = 5, 23  # windows; the last batch is shorter than the others


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(0, tiny.VOCAB, (N, T), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module", params=list(tiny.FAMILIES))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_tiny(tmp_path_factory.mktemp("model"), request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_tiny(tmp_path_factory.mktemp("llama"), "llama")


def open_runner(folder: Path, dtype: torch.dtype = torch.float32) -> BlockRunner:
    return BlockRunner.open(folder, dtype, batch_tokens=2 * T)


def gram_ref(xs: list[Tensor], clip: float, weights: Tensor | None = None) -> Tensor:
    """H by its definition, token by token, in float64. xs: one [T, d] a window."""
    d = xs[0].shape[-1]
    total, count = torch.zeros(d, d, dtype=torch.float64), 0
    for w, window in enumerate(xs):
        own = [1.0] * len(window) if weights is None else weights[w].tolist()
        energies = [v * float(x.double() @ x.double()) for v, x in zip(own, window, strict=True)]
        median = sorted(energies)[(len(energies) - 1) // 2]
        for t, x in enumerate(window):
            scale = own[t] * min(1.0, clip * median / energies[t])
            total += scale * torch.outer(x.double(), x.double())
            count += 1
    return total / count


def linear_inputs(model: nn.Module, ids: Tensor) -> dict[str, list[Tensor]]:
    """Inputs of every linear layer over a plain forward of the whole model, by hooks."""
    seen: dict[str, list[Tensor]] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):

            def hook(module: nn.Module, args: tuple, name: str = name) -> None:
                seen.setdefault(name, []).extend(args[0].detach().clone())

            handles.append(module.register_forward_pre_hook(hook))
    with torch.no_grad():
        for row in ids:
            model(row[None])
    for handle in handles:
        handle.remove()
    return seen


def test_block_by_block_equals_forward(folder: Path, ids: Tensor) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = model(ids, output_hidden_states=True)
    runner = open_runner(folder)
    hidden = runner.embed(ids)
    torch.testing.assert_close(hidden, expected.hidden_states[0], rtol=0, atol=1e-6)
    for i in range(runner.num_blocks):
        hidden = runner.forward_block(i, runner.block(i), hidden)
        runner.release(i)
    torch.testing.assert_close(runner.logits(hidden), expected.logits, rtol=0, atol=1e-5)


def test_grams_equal_brute_force(folder: Path, ids: Tensor) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inputs = linear_inputs(model, ids)
    runner, clip = open_runner(folder), 1.0  # half of the tokens are clipped
    hidden, covered = runner.embed(ids), set()
    for i in range(runner.num_blocks):
        block = runner.block(i)
        found = runner.input_groups(i, block, hidden)
        unclipped = runner.collect_statistics(i, block, hidden, clip=float("inf")).grams
        statistics = runner.collect_statistics(i, block, hidden, clip=clip, out=hidden)
        assert statistics.hidden is hidden
        assert statistics.input_groups == found
        assert statistics.tokens == N * T
        for input_group in statistics.input_groups:
            first = inputs[input_group.modules[0]]
            for module in input_group.modules:
                assert model.get_submodule(module).in_features == input_group.d_in
                for one, two in zip(inputs[module], first, strict=True):
                    assert torch.equal(one, two)
            covered.update(input_group.modules)
            close = {"rtol": 1e-4, "atol": 1e-5}
            gram, raw = statistics.grams[input_group.name], unclipped[input_group.name]
            torch.testing.assert_close(gram.double(), gram_ref(first, clip), **close)
            torch.testing.assert_close(raw.double(), gram_ref(first, float("inf")), **close)
            assert not torch.allclose(gram, raw, rtol=1e-3)
            energy = torch.stack(first).square().sum(-1)
            ratio = float((energy.amax(1) / energy.median(1).values).max())
            assert statistics.energy_ratio[input_group.name] == pytest.approx(ratio, rel=1e-4)
    assert covered == set(inputs) - set(runner.head_modules)


def test_sites_of_separate_and_fused_projections(tmp_path: Path, ids: Tensor) -> None:
    expected = {
        "llama": [
            "model.layers.0.self_attn.q_proj+k_proj+v_proj",
            "model.layers.0.self_attn.o_proj",
            "model.layers.0.mlp.gate_proj+up_proj",
            "model.layers.0.mlp.down_proj",
        ],
        "phi3": [
            "model.layers.0.self_attn.qkv_proj",
            "model.layers.0.self_attn.o_proj",
            "model.layers.0.mlp.gate_up_proj",
            "model.layers.0.mlp.down_proj",
        ],
    }
    for family, names in expected.items():
        runner = open_runner(tiny.save_tiny(tmp_path / family, family))
        input_groups = runner.input_groups(0, runner.block(0), runner.embed(ids))
        assert [input_group.name for input_group in input_groups] == names


def test_token_weights_count_before_the_clip(llama: Path, ids: Tensor) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    inputs = linear_inputs(model, ids)
    weights = torch.rand(N, T, generator=torch.Generator().manual_seed(0)) * 2
    runner = open_runner(llama)
    statistics = runner.collect_statistics(
        0, runner.block(0), runner.embed(ids), clip=1.0, weights=weights
    )
    for input_group in statistics.input_groups:
        expected = gram_ref(inputs[input_group.modules[0]], 1.0, weights)
        torch.testing.assert_close(
            statistics.grams[input_group.name].double(), expected, rtol=1e-4, atol=1e-5
        )


def test_massive_first_token_is_clipped() -> None:
    energy = torch.ones(2, 9)
    energy[0, 0], energy[1, 3] = 4e5, 0.0
    weights = token_weights(energy, 20.0)
    assert weights[0, 0] == pytest.approx(20 / 4e5)
    assert bool((weights.flatten()[1:] == 1).all())
    assert bool((token_weights(energy, float("inf")) == 1).all())
    assert bool((token_weights(torch.tensor([[0.0, 0.0, 5.0]]), 20.0) == 1).all())  # median 0


@pytest.mark.parametrize("d", [1, 48, 576, 700])
def test_gram_in_column_blocks(d: int) -> None:
    generator = torch.Generator().manual_seed(d)
    y = torch.randn(64, d, generator=generator)
    total = torch.zeros(d, d)
    add_gram(total, y)
    add_gram(total, y)
    torch.testing.assert_close(mirror(total, 0.5), y.T @ y, rtol=1e-5, atol=1e-4)


def test_site_names() -> None:
    assert group_name(["a.b.q", "a.b.k"]) == "a.b.q+k"
    assert group_name(["a.b.q"]) == "a.b.q"
    assert group_name(["a.attn.q", "a.mlp.up"]) == "a.attn.q+mlp.up"


def test_release_frees_and_block_reloads(llama: Path, ids: Tensor) -> None:
    runner = open_runner(llama)
    block = runner.block(1)
    weight = block.mlp.up_proj.weight
    alive, before = weakref.ref(weight), weight.clone()
    weight.data.zero_()  # what a quantizer does between block() and release()
    assert runner.block(1).mlp.up_proj.weight.abs().sum() == 0, "a loaded block is not read again"
    del weight
    runner.release(1)
    assert alive() is None
    assert all(p.is_meta for p in runner.model.model.layers.parameters())
    assert torch.equal(runner.block(1).mlp.up_proj.weight, before)


def test_recorded_arguments_do_not_pile_up(llama: Path, ids: Tensor) -> None:
    runner = open_runner(llama)
    for t in (5, 6, 7, 8):
        runner.embed(ids[:, :t])
    assert len(runner._block_inputs._calls) <= 2


def test_blocks_need_nothing_outside_once_the_windows_are_embedded(
    folder: Path, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a large vocabulary is not in memory while blocks are quantized."""
    runner = open_runner(folder)
    hidden = runner.embed(ids)
    expected = runner.forward_block(0, runner.block(0), hidden)
    runner.release_outer()
    assert runner.model.get_input_embeddings().weight.is_meta
    monkeypatch.setattr(BlockRunner, "_load", lambda *_: pytest.fail("read again"))
    for _ in range(2):
        assert torch.equal(runner.forward_block(0, runner.block(0), hidden), expected)


def test_only_the_blocks_in_use_are_in_memory(llama: Path, ids: Tensor) -> None:
    runner = open_runner(llama)
    assert all(p.is_meta for p in runner.model.parameters())
    runner.embed(ids)
    assert not runner.model.get_input_embeddings().weight.is_meta
    assert runner.model.lm_head.weight.is_meta, "the head is loaded only for logits"
    assert all(p.is_meta for p in runner.model.model.layers.parameters())


def test_weights_own_their_memory(llama: Path, tmp_path: Path) -> None:
    """A loaded block must not be a view of the file: overwriting the file changes nothing."""
    copy = tmp_path / "model"
    copy.mkdir()
    for file in llama.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    runner = open_runner(copy)
    weight = runner.block(0).mlp.up_proj.weight
    before = weight.clone()
    file = copy / "model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    with open(file, "r+b") as handle:  # same inode
        handle.seek(header)
        handle.write(bytes(file.stat().st_size - header))
    assert torch.equal(weight, before)


def test_tied_and_untied_heads(tmp_path: Path, ids: Tensor) -> None:
    for family, tied in (("llama", False), ("llama-tied", True)):
        runner = open_runner(tiny.save_tiny(tmp_path / family, family))
        assert runner.tied is tied
        assert runner.embedding_modules == ["model.embed_tokens"]
        assert runner.head_modules == ["lm_head"]
        outer = {"model.embed_tokens.weight", "model.norm.weight"}
        assert set(runner.outer_names()) == (outer if tied else outer | {"lm_head.weight"})
        head, embedding = runner.read("lm_head.weight"), runner.read("model.embed_tokens.weight")
        assert torch.equal(head, embedding) is tied


def test_bfloat16_and_shards(tmp_path: Path, ids: Tensor) -> None:
    folder = tiny.save_tiny(tmp_path, "qwen2", dtype=torch.bfloat16, max_shard_size="50KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    runner = open_runner(folder)
    hidden = runner.embed(ids)
    for i in range(runner.num_blocks):
        hidden = runner.forward_block(i, runner.block(i), hidden, out=hidden)
    assert hidden.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(runner.logits(hidden), model(ids).logits, rtol=0, atol=1e-5)
    assert runner.read("model.layers.0.mlp.up_proj.weight").dtype == torch.bfloat16


def test_folder_saved_from_the_base_model(tmp_path: Path, ids: Tensor) -> None:
    """Names without the `model.` prefix are found too."""
    model = tiny.tiny_model("llama-tied")
    model.model.save_pretrained(tmp_path)
    assert "embed_tokens.weight" in set(open_runner(tmp_path).files)
    runner = open_runner(tmp_path)
    with torch.no_grad():
        expected = model(ids, output_hidden_states=True).hidden_states[1]
    got = runner.forward_block(0, runner.block(0), runner.embed(ids))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


# ---- refusals ------------------------------------------------------------------------------


def test_unregistered_experts_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"experts\.input_linear\.weight"):
        BlockRunner.open(tiny.save_tiny(tmp_path, "jetmoe"))


def test_blocks_without_linear_layers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"transformer\.h\.0\.mlp\.c_fc"):
        BlockRunner.open(tiny.save_tiny(tmp_path, "gpt2"))


def test_uncalled_linears_are_refused(llama: Path, ids: Tensor) -> None:
    runner = open_runner(llama)
    block = runner.block(0)
    block.mlp.forward = lambda x: block.mlp.down_proj(block.mlp.up_proj(x))
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.mlp\.gate_proj\.weight"):
        runner.collect_statistics(0, block, runner.embed(ids))


def test_linear_called_twice_is_refused(llama: Path, ids: Tensor) -> None:
    runner = open_runner(llama)
    block = runner.block(0)
    original = block.mlp.forward
    block.mlp.forward = lambda x: original(x) + original(2 * x)
    with pytest.raises(UnsupportedModelError, match=r"mlp\.gate_proj is called more than once"):
        runner.collect_statistics(0, block, runner.embed(ids))


def test_linears_that_see_some_tokens_are_refused(llama: Path, ids: Tensor) -> None:
    """Experts that are linear layers pass the coverage guard; routing shows in their inputs."""
    runner = open_runner(llama)
    block = runner.block(0)
    original = block.mlp.forward

    def routed(x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        out[:, ::2] = original(x[:, ::2])
        return out

    block.mlp.forward = routed
    with pytest.raises(
        UnsupportedModelError, match=r"gate_proj sees 24 rows for 46 tokens.*routed"
    ):
        runner.collect_statistics(0, block, runner.embed(ids))


def test_weights_shared_between_blocks_are_refused(llama: Path) -> None:
    model = open_runner(llama).model
    model.model.layers[2].mlp = model.model.layers[0].mlp
    says = r"layers\.2\.mlp\.gate_proj\.weight and model\.layers\.0\.mlp\.gate_proj\.weight are one"
    with pytest.raises(UnsupportedModelError, match=says):
        BlockRunner(model, WeightFiles(llama), torch.float32, torch.device("cpu"))


def test_input_changed_in_place_is_another_site(llama: Path, ids: Tensor) -> None:
    runner = open_runner(llama)
    block = runner.block(0)
    mlp = block.mlp

    def forward(x: Tensor) -> Tensor:
        gate = mlp.act_fn(mlp.gate_proj(x))
        return mlp.down_proj(gate * mlp.up_proj(x.mul_(2)))

    mlp.forward = forward
    names = [input_group.name for input_group in runner.input_groups(0, block, runner.embed(ids))]
    assert "model.layers.0.mlp.gate_proj" in names
    assert "model.layers.0.mlp.up_proj" in names


def test_sharing_that_changes_between_batches_is_refused(llama: Path, ids: Tensor) -> None:
    runner = open_runner(llama)
    block, calls = runner.block(0), [0]
    mlp = block.mlp

    def forward(x: Tensor) -> Tensor:
        calls[0] += 1
        other = x if calls[0] == 1 else x.clone()
        return mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(other))

    mlp.forward = forward
    with pytest.raises(UnsupportedModelError, match="differently from one batch"):
        runner.collect_statistics(0, block, runner.embed(ids))


def test_arguments_that_depend_on_tokens_are_those_of_the_batch(llama: Path, ids: Tensor) -> None:
    runner, seen = open_runner(llama), []
    base = runner.model.model
    original = base.forward

    def forward(input_ids: Tensor, **kwargs: object) -> object:
        return original(input_ids, per_layer=input_ids.float(), **kwargs)

    base.forward = forward
    hidden, block = runner.embed(ids), runner.block(0)
    block.register_forward_pre_hook(
        lambda _, args, named: seen.append(named["per_layer"]), with_kwargs=True
    )
    runner.forward_block(0, block, hidden[[4, 1, 0]])
    # the hook sees every batch twice: while its arguments are recorded, and when it runs
    assert torch.equal(torch.cat(seen[1::2]), ids[[4, 1, 0]].float())


def test_forward_that_fails_says_what(llama: Path, ids: Tensor) -> None:
    runner = open_runner(llama)

    def forward(input_ids: Tensor) -> object:
        raise TypeError("missing 1 required argument: 'pixels'")

    runner.model.model.forward = forward
    with pytest.raises(UnsupportedModelError, match="pixels"):
        runner.forward_block(0, runner.block(0), torch.zeros(1, T, 48))


def test_tuple_returning_blocks(llama: Path, ids: Tensor) -> None:
    """Families whose blocks return (hidden, ...) and whose model takes element 0."""
    runner, plain = open_runner(llama), open_runner(llama)
    hidden = plain.embed(ids)
    expected = plain.forward_block(0, plain.block(0), hidden)

    def wrap(layer: nn.Module) -> None:
        original = type(layer).__call__

        class Indexing(type(layer)):  # the model's loop sees layer(...)[0], as in such families
            def __call__(self, *args: object, **kwargs: object) -> object:
                return original(self, *args, **kwargs)[0]

        layer.__class__ = Indexing

    for layer in runner.model.model.layers:
        wrap(layer)
    assert torch.equal(runner.embed(ids), hidden)
    assert runner._block_inputs.returns == 1
    for layer in runner.model.model.layers:
        layer.__class__ = type(layer).__mro__[1]
    block = runner.block(0)
    original_forward = block.forward
    block.forward = lambda *a, **k: (original_forward(*a, **k), None)
    torch.testing.assert_close(runner.forward_block(0, block, hidden), expected)


def test_activations_that_overflow_are_refused(llama: Path, ids: Tensor) -> None:
    runner = open_runner(llama)
    hidden = runner.embed(ids)
    hidden[0, 0, 0] = float("nan")
    with pytest.raises(CalibrationError, match="not finite"):
        runner.collect_statistics(0, runner.block(0), hidden)


def test_unknown_model_type_is_refused(tmp_path: Path, llama: Path) -> None:
    for file in llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_type"] = "never-heard-of"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="never-heard-of"):
        BlockRunner.open(tmp_path)


def test_weights_that_do_not_fit_the_config(tmp_path: Path, llama: Path) -> None:
    for file in llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    with pytest.raises(UnsupportedModelError, match=r"first: model\.layers\.3\."):
        BlockRunner.open(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 88}))
    with pytest.raises(FormatError, match="another config"):
        BlockRunner.open(tmp_path).block(0)


def test_missing_and_damaged_weight_files(tmp_path: Path, llama: Path) -> None:
    with pytest.raises(FormatError, match=r"config\.json"):
        BlockRunner.open(tmp_path)
    (tmp_path / "config.json").write_bytes((llama / "config.json").read_bytes())
    with pytest.raises(FormatError, match=r"model\.safetensors"):
        BlockRunner.open(tmp_path)
    data = (llama / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(FormatError, match="damaged"):
        BlockRunner.open(tmp_path)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FormatError, match="lacks 1 of 1"):
        BlockRunner.open(tmp_path)
    index = {"weight_map": {"a": "../elsewhere.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FormatError, match="outside"):
        BlockRunner.open(tmp_path)


def test_weights_outside_of_the_blocks_are_released(tmp_path: Path, ids: Tensor) -> None:
    runner = open_runner(tiny.save_tiny(tmp_path, "llama-tied"))
    hidden = runner.embed(ids)
    expected = runner.logits(hidden)
    runner.release_outer()
    assert all(p.is_meta for p in runner.model.parameters())
    assert torch.equal(runner.embed(ids), hidden)
    assert torch.equal(runner.logits(hidden), expected)
    head = runner.model.get_output_embeddings()
    assert head.weight is runner.model.get_input_embeddings().weight
