"""Mixtures of experts: walk, quantize, store, load and export, per family."""

from __future__ import annotations

import copy
import json
import re
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import dropbydrop
from dropbydrop.checkpoint import Checkpoint, QuantizationConfig
from dropbydrop.checkpoint.export import export
from dropbydrop.checkpoint.slice import slice_checkpoint
from dropbydrop.coding.encoder import Effort
from dropbydrop.models.block_runner import BlockRunner
from dropbydrop.models.experts import FORCED, is_experts, stacks
from dropbydrop.models.statistics import CLIP, token_weights
from dropbydrop.planning.memory import estimate, held_bytes
from dropbydrop.quantization import job as jobs
from dropbydrop.quantization.estimate import estimate as dry_run
from dropbydrop.quantization.pipeline import quantize
from dropbydrop.runtime import fused_decode
from dropbydrop.runtime.experts import NestedExperts, NestedStack
from dropbydrop.runtime.int8_modules import NestedEmbedding, NestedHead
from dropbydrop.runtime.modules import NestedLinear
from dropbydrop.runtime.views import store_of
from dropbydrop.system.errors import FormatError, MissingPlaneError, UnsupportedModelError
from naive_experts import naive_expert
from tiny import EXPERTS, VOCAB, save_tiny, tiny_model, tiny_tokenizer

QUICK: dict[str, Any] = {"windows": 3, "seq_len": 32, "progress": False}
IDS = torch.randint(5, VOCAB, (2, 19), generator=torch.Generator().manual_seed(3))
OLD = Version(transformers.__version__) < Version("5.17")
TRELLIS = {"qwen3-moe", "gpt-oss", "nemotron-h"}  # the kinds of layout; the others in bytes


@pytest.fixture(scope="module", autouse=True)
def small_effort():
    patch = pytest.MonkeyPatch()
    patch.setattr(jobs, "EFFORTS", dict.fromkeys(jobs.EFFORTS, Effort(2, 1, 0)))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(" ".join(str(i * 7919 % 1000) for i in range(1500)))
    return file


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, text: Path, code: str) -> Path:
    folder = tmp_path_factory.mktemp("moe")
    source = save_tiny(folder / "source", "qwen3-moe")
    return quantize(source, folder / "out", calibration=text, code=code, **QUICK).out


def original(folder: Path) -> Any:
    """transformers' own model, with its own loop over experts."""
    kind: Any = AutoModelForCausalLM
    settings = {"dtype": torch.float32, "experts_implementation": "eager"}
    return kind.from_pretrained(folder, **settings).eval()


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(ids).logits.float()


def decoded(folder: Path, loaded: nn.Module) -> Any:
    """The original model with the weights that `loaded` decodes to; all else must be the same."""
    twin = original(folder)
    with torch.no_grad():
        for name, module in loaded.named_modules():
            if isinstance(module, NestedStack):
                owner, _, leaf = name.rpartition(".")
                place, weight = twin.get_submodule(owner), module.dense_weight()
                weight = weight.transpose(1, 2) if place.is_transposed else weight
                getattr(place, leaf).copy_(weight)
                if module.bias is not None:
                    assert torch.equal(getattr(place, f"{leaf}_bias"), module.bias)
            elif isinstance(module, NestedLinear | NestedEmbedding | NestedHead):
                twin.get_submodule(name).weight.copy_(module.dense_weight())
        for name, parameter in loaded.named_parameters():
            if parameter.is_floating_point() and not name.endswith("_proj.bias"):
                assert torch.equal(twin.get_parameter(name), parameter.float()), name
    return twin


def close(found: Tensor, expected: Tensor, share: float) -> bool:
    return bool((found - expected).abs().max() <= share * expected.abs().max())


@pytest.mark.parametrize("family", EXPERTS)
def test_every_family(tmp_path: Path, text: Path, family: str) -> None:
    """(a) The walk is the model's forward. (b) Every level is its decoded weights, by views, too.
    (c) An export is the level as an ordinary model."""
    source = save_tiny(tmp_path / "source", family)
    own = original(source)
    if OLD and not any(map(is_experts, own.modules())):  # Granite's, up to 5.8 at least
        with pytest.raises(UnsupportedModelError, match="in no linear layer"):
            BlockRunner.open(source)
        pytest.skip(f"transformers {transformers.__version__} has code of its own for {family}")
    runner = BlockRunner.open(source)
    hidden = runner.embed(IDS)
    for i in range(runner.num_blocks):
        hidden = runner.forward_block(i, runner.block(i), hidden)
    assert close(runner.logits(hidden), logits(own), 1e-6)

    code = "trellis" if family in TRELLIS else "bytes"
    made = quantize(source, tmp_path / "out", calibration=text, code=code, **QUICK)
    checkpoint = Checkpoint.open(made.out)
    assert checkpoint.verify() == []
    stored = {t.data_ptr(): t.numel() for t in own.state_dict().values()}  # buffers count, too
    assert checkpoint.manifest.total_parameters == sum(stored.values())
    coded = set(checkpoint.quantization.modules)
    expected = {f"{n}.{s}" for n, m in own.named_modules() if is_experts(m) for s in stacks(m)}
    assert expected
    assert expected <= coded
    routing = [n for n in coded if {"gate", "router", "shared_expert_gate"} & {*n.split(".")}]
    assert routing == []

    whole, errors = dropbydrop.load(made.out, dtype=torch.float32), []
    for p in (2, 4):
        model = dropbydrop.load(made.out, bits=p, dtype=torch.float32)
        found, twin = logits(model), decoded(source, model)
        assert close(found, logits(twin), 1e-4)
        assert torch.equal(found, logits(dropbydrop.view(whole, p)))
        for n in (1, 5):  # one product for all experts, and one for each
            assert close(logits(model, IDS[:1, :n]), logits(twin, IDS[:1, :n]), 2e-2)
        errors.append(float((found - logits(own)).square().mean()))
    assert errors[0] > errors[1] > 0
    assert "through torch" in fused_decode.how(whole)
    assert not fused_decode.native(whole)
    dense = export(made.out, tmp_path / "dense", 2, dtype="float32", progress=False)
    two = dropbydrop.view(whole, 2)
    assert close(logits(original(Path(dense["out"]))), logits(two), 1e-4)
    before = logits(two)
    two.dequantize()
    assert not any(isinstance(m, NestedExperts) for m in two.modules())
    assert close(logits(two), before, 1e-4)


# --------------------------------------------------------------------------------- statistics


def test_h_of_each_expert_against_a_naive_sum(tmp_path: Path) -> None:
    """Token by token, from the router's choice as the model's own class makes it."""
    source = save_tiny(tmp_path / "source", "mixtral")
    runner = BlockRunner.open(source)
    block, hidden = runner.block(0), runner.embed(IDS)
    seen: list[tuple[Tensor, Tensor]] = []
    moe: Any = block.mlp
    hook = moe.experts.register_forward_pre_hook(lambda m, args: seen.append((args[0], args[1])))
    found = runner.collect_statistics(0, block, hidden)
    hook.remove()
    ((x, index),) = seen
    name = "model.layers.0.mlp.experts."
    per_token = x.view(*IDS.shape, -1)
    weights = token_weights(per_token.square().sum(-1), CLIP).view(-1, 1)
    gate_up = (x * weights).T @ x / len(x)
    torch.testing.assert_close(found.grams[f"{name}gate_up_proj"], gate_up, rtol=1e-4, atol=1e-6)

    def neurons(e: int, tokens: list[int]) -> Tensor:
        gate, up = (x[tokens] @ moe.experts.gate_up_proj[e].T).chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up

    def total(h: Tensor) -> Tensor:
        weights = token_weights(h.square().sum(-1), CLIP)
        return (h * weights[:, None]).T @ h

    some = torch.linspace(0, len(x) - 1, FORCED).long().tolist()
    for e in range(4):
        tokens = [t for t in range(len(x)) if e in index[t]]
        assert found.routed[f"{name}down_proj"][e] == len(tokens)
        a = 80 / (80 + len(tokens))
        h = total(neurons(e, tokens)) / len(tokens) * (1 - a)
        h += total(neurons(e, some)) / len(some) * a
        torch.testing.assert_close(found.grams[f"{name}down_proj"][e], h, rtol=1e-3, atol=1e-6)


def test_starved_and_dead_experts(tmp_path: Path, text: Path) -> None:
    """An expert that is never chosen is coded by its forced sample; zeros do no harm."""
    source = save_tiny(tmp_path / "source", "minimax-m2")
    file = source / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if "correction_bias" in name:
            tensor[3] = -1e4
        if ".layers.1." in name and re.search(r"experts\.1\.w[13]\.weight", name):
            tensor.zero_()
    save_file(tensors, file, metadata={"format": "pt"})
    made = quantize(source, tmp_path / "out", calibration=text, **QUICK)
    lines = [line for line in made.log if "tokens" in line]
    assert [line["tokens"][3] for line in lines] == [0, 0, 0]
    assert made.starved == {line["module"]: sum(n < 80 for n in line["tokens"]) for line in lines}
    assert all(0 <= e < 1 for line in made.log for e in line["rel_error"].values())
    model = dropbydrop.load(made.out, dtype=torch.float32)
    assert close(logits(model), logits(decoded(source, model)), 1e-4)
    # the expert that calibration never met is as good as the others
    name = "model.layers.0.mlp.experts.down_proj"
    weight = original(source).get_parameter(name).detach()
    errors = (model.get_submodule(name).dense_weight() - weight).square().mean((1, 2))
    assert float(errors[3]) < 3 * float(errors[:3].mean())


# ------------------------------------------------------------------------------ around a model


def test_planes_of_experts_against_a_naive_decoder(out: Path) -> None:
    """Entry by entry: expert e's codes are those of a matrix of its own."""
    checkpoint = Checkpoint.open(out)
    name, e = "model.layers.1.mlp.experts.down_proj", 2
    assert checkpoint.read(f"{name}.scales").shape == (4, 48)
    assert checkpoint.shapes[name] == (4, 48, 32)
    expected = naive_expert(checkpoint, name, e, 3, range(48))
    model = dropbydrop.load(out, bits=3, dtype=torch.float32)
    found = model.get_submodule(name).dense_weight()[e]
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


def test_views_share_the_storage_of_experts(out: Path) -> None:
    model = dropbydrop.load(out, dtype=torch.float32)
    view = dropbydrop.view(model, 2)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    base, other = model.get_submodule(name), view.get_submodule(name)
    assert len(other.codes) < len(base.codes)
    assert other.codes[1].data_ptr() == base.codes[1].data_ptr()
    assert {p.data_ptr() for p in view.parameters()} <= {p.data_ptr() for p in model.parameters()}
    two = dropbydrop.load(out, bits=2, dtype=torch.float32)
    with pytest.raises(MissingPlaneError):
        dropbydrop.view(two, 4)
    handle = dropbydrop.upgrade(two)
    assert handle.wait(4, timeout=60)
    assert torch.equal(logits(dropbydrop.view(two, 4)), logits(model))


def test_a_plan_gives_every_stack_its_level(out: Path) -> None:
    model = dropbydrop.load(out, avg_bits=2.6, dtype=torch.float32)
    plan = dropbydrop.plan_of(model)
    assert len(set(plan.levels.values())) > 1
    assert "model.layers.1.mlp.experts.down_proj" in plan.levels
    checkpoint = store_of(model).checkpoint
    assert plan.average_bits(checkpoint) <= 2.6
    assert close(logits(model), logits(decoded(out.parent / "source", model)), 1e-4)
    predicted = estimate(checkpoint, plan.planes_by_module(checkpoint), torch.float32)
    assert predicted.total - predicted.shared == held_bytes(model)


def test_true_bits_count_every_expert(out: Path) -> None:
    checkpoint = Checkpoint.open(out)
    q = checkpoint.quantization
    stored = 0
    for m in range(1, q.prefix_of(3) + 1):
        stored += sum(t.numel() for t in load_file(out / f"plane-{m}.safetensors").values())
    rest = load_file(out / "model.safetensors")
    kept = ("input_groups.", "rotations.")
    stored += sum(t.nbytes for n, t in rest.items() if n.endswith(".scales") or n.startswith(kept))
    stored += sum(plane.codebook_bytes for plane in q.planes[: q.prefix_of(3)])
    assert checkpoint.true_bits(3) == pytest.approx(8 * stored / q_weights(checkpoint))


def q_weights(checkpoint: Checkpoint) -> int:
    model = original(checkpoint.path.parent / "source")
    names = set(checkpoint.quantization.modules)
    return sum(p.numel() for n, p in model.named_parameters() if n.removesuffix(".weight") in names)


def test_stacks_in_the_config(out: Path) -> None:
    """The schema and the reader agree on what a stack is."""
    schema = Path(__file__).parents[2] / "docs" / "format.config.schema.json"
    valid = jsonschema.Draft202012Validator(json.loads(schema.read_text())).is_valid
    config = Checkpoint.open(out).quantization.to_dict()
    assert valid(config)
    assert QuantizationConfig.from_dict(config).to_dict() == config
    at = next(i for i, group in enumerate(config["input_groups"]) if "experts" in group)
    assert config["input_groups"][at]["experts"] == 4
    for change in ({"experts": 0}, {"layout": "round"}, {"layout": None}):
        wrong = copy.deepcopy(config)
        group = wrong["input_groups"][at] | change
        wrong["input_groups"][at] = {k: v for k, v in group.items() if v is not None}
        assert not valid(wrong)
        with pytest.raises(FormatError):
            QuantizationConfig.from_dict(wrong)


def test_a_slice_holds_the_planes_of_experts(out: Path, tmp_path: Path) -> None:
    slice_checkpoint(out, tmp_path / "two", 2)
    two = dropbydrop.load(tmp_path / "two", dtype=torch.float32, bits=2)
    assert torch.equal(logits(two), logits(dropbydrop.load(out, bits=2, dtype=torch.float32)))


def test_bfloat16_and_generation(out: Path) -> None:
    model = dropbydrop.load(out, bits=3, dtype=torch.bfloat16)
    wide = dropbydrop.load(out, bits=3, dtype=torch.float32)
    assert close(logits(model), logits(wide), 0.1)
    tokens = wide.generate(IDS[:1], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert tokens.shape == (1, IDS.shape[1] + 4)


def test_resumed_runs_have_the_same_bytes(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_tiny(tmp_path / "source", "mixtral")
    whole = quantize(source, tmp_path / "whole", calibration=text, **QUICK)
    from dropbydrop.quantization import encode_blocks

    encode, calls = encode_blocks.BlockEncoder.encode_block, []

    def interrupted(self: Any, i: int, *rest: Any) -> None:
        calls.append(i)
        if len(calls) == 3:
            raise KeyboardInterrupt
        encode(self, i, *rest)

    monkeypatch.setattr(encode_blocks.BlockEncoder, "encode_block", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "out", calibration=text, resume=True, **QUICK)
    resumed = quantize(source, tmp_path / "out", calibration=text, resume=True, **QUICK)
    assert resumed.resumed == 2
    for file in sorted(whole.out.iterdir()):
        assert (resumed.out / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_dry_run_knows_the_size(tmp_path: Path, text: Path) -> None:
    source = save_tiny(tmp_path / "source", "gpt-oss")
    config = jobs.QuantizeConfig(calibration=str(text), windows=3, seq_len=32)
    expected = dry_run(jobs.prepare(source, config), tmp_path / "out")
    made = quantize(source, tmp_path / "out", config=config, progress=False)
    size = sum(file.stat().st_size for file in made.out.iterdir())
    assert 0.7 * size < expected.bytes_out < 1.3 * size
    shutil.rmtree(made.out)


# ------------------------------------------------------------------------------------ refused


def test_what_experts_cannot_have_is_refused_by_name(tmp_path: Path, text: Path) -> None:
    source = save_tiny(tmp_path / "source", "mixtral")
    with pytest.raises(UnsupportedModelError, match="--codebooks learned with a mixture"):
        quantize(source, tmp_path / "no", calibration=text, codebooks="learned", **QUICK)
    narrow = save_tiny(tmp_path / "narrow", "qwen3-moe", moe_intermediate_size=36)
    with pytest.raises(UnsupportedModelError, match=r"experts\.down_proj has 36 inputs.*of 8"):
        quantize(narrow, tmp_path / "no", calibration=text, **QUICK)


def test_levels_of_one_checkpoint_come_closer(out: Path) -> None:
    source = original(out.parent / "source")
    errors = []
    for p in (2, 3, 4):
        found = logits(dropbydrop.load(out, bits=p, dtype=torch.float32))
        errors.append(float((found - logits(source)).square().mean()))
    assert all(low > high > 0 for low, high in pairwise(errors))


# ------------------------------------------------------------------------------------ trained


def trained(folder: Path, family: str, ids: Tensor) -> Any:
    """A tiny model after some steps on windows `ids`, written to `folder`."""
    model: Any = tiny_model(family, gain=0.8, num_hidden_layers=2).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        batch = ids[torch.randint(0, len(ids), (8,), generator=generator)]
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


def test_a_trained_mixture_loses_less_with_more_bits(tmp_path: Path, text: Path) -> None:
    """KL to the original falls with the bits, as that of a dense model does."""
    tokens = tiny_tokenizer()(text.read_text())["input_ids"]
    ids = torch.tensor(tokens[: len(tokens) // 32 * 32]).view(-1, 32)
    falls = {}
    for family in ("qwen3", "qwen3-moe"):
        source = tmp_path / family
        model = trained(source, family, ids[:-4])
        with torch.no_grad():
            expected = model(ids[-4:]).logits.log_softmax(-1)
        made = quantize(source, tmp_path / f"{family}-q", calibration=text, **QUICK)
        kl = []
        for p in (2, 3, 4):
            found = logits(dropbydrop.load(made.out, bits=p, dtype=torch.float32), ids[-4:])
            difference = expected - found.log_softmax(-1)
            kl.append(float((expected.exp() * difference).sum(-1).mean()))
        falls[family] = kl
        assert kl[0] > 1.5 * kl[1] > 2.2 * kl[2] > 0
    assert falls["qwen3-moe"][2] < 10 * falls["qwen3"][2]
