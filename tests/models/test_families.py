"""Any dense decoder: quantize, store, load, and compare with the decoded weights, per family."""

from __future__ import annotations

import copy
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import dropbydrop
from dropbydrop.checkpoint import Checkpoint
from dropbydrop.checkpoint.export import export
from dropbydrop.coding.encoder import Effort
from dropbydrop.models.block_runner import BlockRunner
from dropbydrop.models.embeddings import output_scale
from dropbydrop.quantization import job as jobs
from dropbydrop.quantization import pipeline as quantize
from dropbydrop.runtime import lora
from dropbydrop.runtime.int8_modules import NestedEmbedding, NestedHead
from dropbydrop.runtime.modules import NestedLinear
from dropbydrop.system.errors import DropError, UnsupportedModelError
from tiny import FAMILIES, OTHERS, VOCAB, save_tiny

QUICK: dict[str, Any] = {"windows": 3, "seq_len": 32, "progress": False}
IDS = torch.randint(5, VOCAB, (2, 19), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module", autouse=True)
def small_effort():
    """The presets' search effort is for real models."""
    patch = pytest.MonkeyPatch()
    patch.setattr(jobs, "EFFORTS", dict.fromkeys(jobs.EFFORTS, Effort(2, 1, 0)))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(" ".join(str(i * 7919 % 1000) for i in range(1500)))
    return file


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits.float()


def dense_twin(folder: Path, loaded: nn.Module) -> Any:
    """The original model with the weights that `loaded` decodes to, set one by one."""
    twin = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, module in loaded.named_modules():
            if isinstance(module, NestedLinear | NestedEmbedding | NestedHead):
                twin.get_submodule(name).weight.copy_(module.dense_weight())
                # what is not quantized must have come through untouched
                bias = getattr(module, "bias", None)
                if bias is not None:
                    assert torch.equal(twin.get_submodule(name).bias, bias.float())
        for name, parameter in loaded.named_parameters():
            if parameter.is_floating_point():
                assert torch.equal(twin.get_parameter(name), parameter.float()), name
    return twin


def check_levels(source: Path, out: Path) -> None:
    """Logits at every level are those of the decoded dense weights, and the levels differ."""
    whole = dropbydrop.load(out, dtype=torch.float32)
    seen = []
    for p in Checkpoint.open(out).levels:
        model = dropbydrop.load(out, bits=p, dtype=torch.float32)
        found = logits(model)
        torch.testing.assert_close(found, logits(dense_twin(source, model)), rtol=2e-4, atol=2e-4)
        torch.testing.assert_close(found, logits(dropbydrop.view(whole, p)), rtol=1e-5, atol=1e-5)
        seen.append(found)
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    errors = [float((x - logits(original)).square().mean()) for x in seen]
    assert all(low > high > 0 for low, high in pairwise(errors))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_level_equals_the_decoded_weights(tmp_path: Path, text: Path, family: str) -> None:
    source = save_tiny(tmp_path / "source", family, bos=family.startswith("gemma"))
    report = quantize.quantize(source, tmp_path / "out", calibration=text, **QUICK)
    check_levels(source, report.out)
    checkpoint = Checkpoint.open(report.out)
    assert checkpoint.verify() == []
    model = AutoModelForCausalLM.from_pretrained(source)
    tied = {id(p) for p in model.parameters()}
    assert checkpoint.manifest.total_parameters == sum(
        p.numel() for p in model.parameters() if id(p) in tied
    )
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    assert set(checkpoint.quantization.modules) == linears
    assert checkpoint.quantization.embeddings.tied is bool(model.config.tie_word_embeddings)


@pytest.mark.parametrize("family", ["qwen2", "gemma3", "phi3"])
def test_bfloat16_in_several_files(tmp_path: Path, text: Path, family: str) -> None:
    source = save_tiny(tmp_path / "source", family, dtype=torch.bfloat16, max_shard_size="100KB")
    assert len(list(source.glob("model-*.safetensors"))) > 1
    report = quantize.quantize(source, tmp_path / "out", calibration=text, head_bits=16, **QUICK)
    check_levels(source, report.out)
    model = dropbydrop.load(report.out, bits=2)
    assert model.dtype == torch.bfloat16
    wide = logits(dropbydrop.load(report.out, bits=2, dtype=torch.float32))
    assert (logits(model) - wide).abs().max() < 0.1 * wide.abs().max()


def test_biases_and_odd_heights(tmp_path: Path, text: Path) -> None:
    source = save_tiny(
        tmp_path / "source",
        attention_bias=True,
        mlp_bias=True,
        head_dim=6,  # one key/value head of 6 rows: fewer than any vector of the search
        num_key_value_heads=1,
    )
    report = quantize.quantize(source, tmp_path / "out", calibration=text, **QUICK)
    checkpoint = Checkpoint.open(report.out)
    assert checkpoint.shapes["model.layers.0.self_attn.k_proj"] == (6, 48)
    assert "model.layers.2.mlp.down_proj.bias" in checkpoint.rest
    check_levels(source, report.out)


@pytest.mark.parametrize("bits", [(3, 4, 5), (1, 2, 3, 4), tuple(range(1, 9))])
def test_other_levels(tmp_path: Path, text: Path, bits: tuple[int, ...]) -> None:
    """Through search, store, load, views and kernels, up to eight planes."""
    source = save_tiny(tmp_path / "source", "llama-tied")
    report = quantize.quantize(source, tmp_path / "out", bits, calibration=text, **QUICK)
    checkpoint = Checkpoint.open(report.out)
    assert checkpoint.levels == bits
    assert checkpoint.verify() == []
    check_levels(source, report.out)


def test_learned_codebooks(tmp_path: Path, text: Path) -> None:
    """A set for each input group, through store, load, at, kernels and export."""
    source = save_tiny(tmp_path / "source", "qwen3")
    made = quantize.quantize(
        source, tmp_path / "out", calibration=text, codebooks="learned", **QUICK
    )
    checkpoint = Checkpoint.open(made.out)
    assert checkpoint.verify() == []
    input_groups = checkpoint.quantization.input_groups
    assert len({input_group.codebooks for input_group in input_groups}) == len(input_groups) == 12
    first, second = (
        checkpoint.read_set(input_group.codebooks).entries[0] for input_group in input_groups[:2]
    )
    assert not torch.equal(first, second)
    check_levels(source, made.out)
    plain = quantize.quantize(source, tmp_path / "plain", calibration=text, **QUICK)
    weights = checkpoint.manifest.quantized_parameters
    for p in (2, 3, 4):  # eleven more sets of 4 KiB * p / 2
        more = checkpoint.true_bits(p) - Checkpoint.open(plain.out).true_bits(p)
        assert more == pytest.approx(11 * p * 128 * 8 * 16 / weights)
        assert made.errors[p] < plain.errors[p]
    dense = export(made.out, tmp_path / "dense", 3, dtype="float32")
    exported = AutoModelForCausalLM.from_pretrained(dense["out"]).eval()
    level = dropbydrop.load(made.out, bits=3, dtype=torch.float32)
    torch.testing.assert_close(logits(exported), logits(level), rtol=2e-4, atol=2e-4)
    with pytest.raises(DropError, match="universal, learned"):
        quantize.quantize(source, tmp_path / "no", codebooks="k-means", **QUICK)


# ----------------------------------------------------------------------- scaled embeddings


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3"])
def test_scaled_embeddings_stay_scaled(tmp_path: Path, text: Path, family: str) -> None:
    """Gemma multiplies the look-up by sqrt(d): in every type, and after dequantize()."""
    source = save_tiny(tmp_path / "source", family)
    out = quantize.quantize(source, tmp_path / "out", calibration=text, **QUICK).out
    for dtype in (torch.float32, torch.bfloat16):
        model = dropbydrop.load(out, bits=3, dtype=dtype)
        embedding = model.get_input_embeddings()
        assert isinstance(embedding, NestedEmbedding)
        twin = AutoModelForCausalLM.from_pretrained(source, dtype=dtype).get_input_embeddings()
        assert output_scale(twin) == pytest.approx(48**0.5)
        with torch.no_grad():
            twin.weight.copy_(embedding.dense_weight(dtype))
        assert torch.equal(embedding(IDS), twin(IDS))
        cast = copy.deepcopy(embedding).to(torch.float16)
        assert cast(IDS).dtype == torch.float16
        before = logits(model)
        model.dequantize()
        assert type(model.get_input_embeddings()) is type(twin)
        worst = (logits(model) - before).abs().max() / before.abs().max()
        assert worst < (1e-4 if dtype == torch.float32 else 0.1)


class Strange(nn.Embedding):
    """A look-up that computes something of its own."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids).tanh()


def test_unknown_embeddings_are_refused_before_anything_starts(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_tiny(tmp_path / "source")
    runner = BlockRunner.open(source)
    runner.model.get_input_embeddings().__class__ = Strange
    monkeypatch.setattr(jobs.BlockRunner, "open", lambda *args, **kwargs: runner)
    monkeypatch.setattr(jobs, "load_windows", _not_reached)
    with pytest.raises(UnsupportedModelError, match=r"embed_tokens .*Strange.*--head-bits 16"):
        quantize.quantize(source, tmp_path / "out", calibration=text, **QUICK)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


# ---------------------------------------------------------------------------------- refused


def _not_reached(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("calibration started")


def test_groups_that_do_not_divide_are_refused_before_calibration(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_tiny(tmp_path / "odd", intermediate_size=84)
    monkeypatch.setattr(jobs, "load_windows", _not_reached)
    with pytest.raises(UnsupportedModelError, match=r"layers.0.mlp.down_proj.* 84 .*multiple of 8"):
        quantize.quantize(source, tmp_path / "out", calibration=text, **QUICK)
    assert [p.name for p in tmp_path.iterdir()] == ["odd"]


REFUSED = {
    "jetmoe": r"self_attention\.experts\.input_linear\.weight .*none of transformers' registered",
    "gpt2": r"c_attn.*use another model",
}


@pytest.mark.parametrize("family", OTHERS)
def test_other_architectures_are_refused_by_name(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    says = REFUSED[family]
    monkeypatch.setattr(jobs, "load_windows", _not_reached)
    source = save_tiny(tmp_path / "source", family)
    with pytest.raises(UnsupportedModelError, match=says):
        quantize.quantize(source, tmp_path / "out", calibration=text, **QUICK)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_an_unknown_architecture_is_refused_with_what_was_found(tmp_path: Path, text: Path) -> None:
    source = save_tiny(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "model_type": "perceptron9000"}))
    with pytest.raises(UnsupportedModelError, match="perceptron9000"):
        quantize.quantize(source, tmp_path / "out", calibration=text, **QUICK)


# ------------------------------------------------------------------------------------- LoRA


@pytest.mark.parametrize(
    ("family", "code"), [("llama-tied", "bytes"), ("phi3", "bytes"), ("llama-tied", "trellis")]
)
def test_lora_on_a_view(tmp_path: Path, text: Path, family: str, code: str) -> None:
    """Adapters on a view learn; the planes and the other views do not change."""
    peft = pytest.importorskip("peft")
    source = save_tiny(tmp_path / "source", family)
    out = quantize.quantize(source, tmp_path / "out", calibration=text, code=code, **QUICK).out
    base = dropbydrop.load(out, dtype=torch.float32)
    before = logits(base)
    view = dropbydrop.view(base, 2)
    start = logits(view)
    config = peft.LoraConfig(r=4, target_modules=["o_proj", "down_proj"], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="NestedLinear"):  # by name, not some wrong adapter
        peft.get_peft_model(dropbydrop.view(base, 2), copy.copy(config))
    model = peft.get_peft_model(view, lora.adapt(config))
    torch.testing.assert_close(logits(model), start, rtol=1e-5, atol=1e-5)  # adapters start at 0
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) > 0
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(IDS, labels=IDS).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    assert torch.equal(logits(base), before)
    saved = tmp_path / "adapter"
    model.save_pretrained(saved)
    after = logits(model.eval())
    stored = lora.adapt(peft.LoraConfig.from_pretrained(saved))
    again = peft.PeftModel.from_pretrained(dropbydrop.view(base, 2), saved, config=stored)
    torch.testing.assert_close(logits(again.eval()), after, rtol=1e-5, atol=1e-5)
    with pytest.raises(DropError, match="cannot be merged"):
        model.merge_and_unload()
    for wrong in ({"use_dora": True}, {"init_lora_weights": "pissa"}):
        other = peft.LoraConfig(target_modules=["o_proj"], **wrong)
        with pytest.raises(DropError, match=r"(use_dora|pissa).*dense weight.*export"):
            lora.adapt(other)
