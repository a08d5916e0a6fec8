"""Each hook of transformers that is overridden, against the transformers that is installed."""

from __future__ import annotations

import importlib
import json
import logging
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaForCausalLM,
)
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import dropbydrop
from dropbydrop.checkpoint.tensor_files import METADATA
from dropbydrop.runtime.hf import DropByDropConfig, DropByDropQuantizer, register
from dropbydrop.runtime.int8_modules import NestedHead
from dropbydrop.runtime.modules import NestedLinear
from dropbydrop.system.errors import DropError, FormatError, MissingPlaneError, PrecisionError
from tiny import VOCAB, sign, tiny_llama, write_checkpoint

dropbydrop.register()

IDS = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, code: str) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("hf") / "out", code=code)


@pytest.fixture
def copied(out: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(out, tmp_path / "out"))


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def test_registered_once() -> None:
    register()
    importlib.reload(dropbydrop)
    assert AUTO_QUANTIZER_MAPPING["dropbydrop"] is DropByDropQuantizer
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["dropbydrop"] is DropByDropConfig


def test_every_hook_we_override_exists() -> None:
    """A hook that transformers renames would be silently ignored."""
    ours = {n for n, v in vars(DropByDropQuantizer).items() if callable(v) or type(v) is property}
    assert ours - set(dir(HfQuantizer)) == set()
    assert "requires_calibration" in vars(HfQuantizer)


def test_lean_import() -> None:
    code = """
        import sys, dropbydrop
        heavy = {"torch", "transformers", "numpy", "matplotlib", "rich", "typer", "gguf"}
        print(sorted(heavy & set(sys.modules)), set(dropbydrop.__all__) <= set(dir(dropbydrop)))
        for name in set(dropbydrop.__all__) - {"quantize"}:
            assert getattr(dropbydrop, name) is not None
        import torch
        assert not torch.cuda.is_initialized()
        print(sorted((heavy - {"torch", "transformers", "numpy"}) & set(sys.modules)))
    """
    assert _python(code).stdout.splitlines() == ["[] True", "[]"]


# ------------------------------------------------------------------------- from_pretrained


def test_default_precision_is_the_highest(out: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(out)
    assert dropbydrop.precision(model) == 4
    assert torch.equal(logits(model), logits(dropbydrop.load(out, bits=4)))


def test_precision_by_config(out: Path) -> None:
    config = AutoConfig.from_pretrained(out)
    config.quantization_config["bits"] = 3
    model = AutoModelForCausalLM.from_pretrained(out, config=config)
    assert dropbydrop.precision(model) == 3
    assert model.config.quantization_config.bits == 3
    assert torch.equal(logits(model), logits(dropbydrop.load(out, bits=3)))
    config.quantization_config["bits"] = 5
    with pytest.raises(PrecisionError, match="it has 2, 3, 4"):
        AutoModelForCausalLM.from_pretrained(out, config=config)


def test_config_of_another_checkpoint(out: Path) -> None:
    config = AutoConfig.from_pretrained(out)
    config.quantization_config["input_groups"][0]["codebooks"] = "learned"
    with pytest.raises(FormatError, match="only 'bits' may be changed"):
        AutoModelForCausalLM.from_pretrained(out, config=config)


@pytest.mark.parametrize("device_map", [None, "cpu", "auto", {"": "cpu"}])
@pytest.mark.parametrize("dtype", ["auto", torch.bfloat16, torch.float16])
def test_device_maps_and_dtypes(out: Path, device_map: Any, dtype: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(out, device_map=device_map, dtype=dtype)
    reference = dropbydrop.load(out)
    state, expected = model.state_dict(), reference.state_dict()
    assert list(state) == list(expected)
    for name, tensor in state.items():
        if not name.endswith("norm.weight"):
            assert torch.equal(tensor, expected[name]), name
            assert tensor.dtype == expected[name].dtype, name
    assert model.dtype == (torch.float32 if dtype == "auto" else dtype)


def test_loading_is_quiet(out: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = logging.getLogger("transformers")
    before, root.propagate = root.propagate, True
    try:
        with caplog.at_level(logging.INFO):
            dropbydrop.load(out, bits=2)
            AutoModelForCausalLM.from_pretrained(out)
    finally:
        root.propagate = before
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == []


def test_bare_decoder_and_other_heads(out: Path, tmp_path: Path) -> None:
    whole = dropbydrop.load(out)
    bare = AutoModel.from_pretrained(out)
    with torch.no_grad():
        expected = whole.model(IDS).last_hidden_state
        assert torch.equal(bare(IDS).last_hidden_state, expected)
        classifier = AutoModelForSequenceClassification.from_pretrained(out)
        assert torch.equal(classifier.model(IDS).last_hidden_state, expected)
    assert dropbydrop.precision(dropbydrop.view(bare, 2)) == 2
    untied = write_checkpoint(tmp_path / "untied", tiny_llama(tie_word_embeddings=False))
    AutoModel.from_pretrained(untied)
    AutoModelForSequenceClassification.from_pretrained(untied)


def test_pipeline(out: Path) -> None:
    from transformers import pipeline

    generate = pipeline("text-generation", model=str(out), device="cpu")
    result = generate("ab", max_new_tokens=3, do_sample=False)
    assert result[0]["generated_text"].startswith("ab")


def test_damage_is_found_by_from_pretrained_too(copied: Path) -> None:
    two, three = copied / "plane-2.safetensors", copied / "plane-3.safetensors"
    two.rename(copied / "aside")
    three.rename(two)
    (copied / "aside").rename(three)
    with pytest.raises(FormatError, match="does not hold plane 2"):
        AutoModelForCausalLM.from_pretrained(copied)
    three.unlink()
    with pytest.raises(FormatError, match="plane 2"):
        AutoModelForCausalLM.from_pretrained(copied)
    three.write_bytes(two.read_bytes())
    two.unlink()
    with pytest.raises(MissingPlaneError, match="plane 2 is needed"):
        AutoModelForCausalLM.from_pretrained(copied)


def test_config_of_another_model(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    for change, message in (
        ({"intermediate_size": 64}, r"mlp.gate_proj is a matrix of \[96, 64\] in the checkpoint"),
        ({"num_hidden_layers": 1}, r"model.layers.1.* LlamaForCausalLM has no such module"),
        ({"tie_word_embeddings": False}, "does not .tie_word_embeddings"),
    ):
        (copied / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(
            FormatError, match=r"config.json (has \d+ bytes, the|is not what the) manifest says"
        ):
            dropbydrop.load(copied)
        sign(copied, "config.json")
        with pytest.raises(FormatError, match=message):
            dropbydrop.load(copied)


def test_a_parameter_that_nobody_stored(copied: Path) -> None:
    """Never a random weight: transformers would initialise what it does not find."""
    path = copied / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.input_layernorm.weight"]
    save_file(tensors, path, METADATA)
    sign(copied, path.name)
    with pytest.raises(FormatError, match=r"lacks \['model.layers.1.input_layernorm.weight'\]"):
        dropbydrop.load(copied)


def test_codes_that_transformers_did_not_read(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the list of files were copied before it is read, no plane would be loaded."""
    place = DropByDropQuantizer._process_model_before_weight_loading

    def on_a_copy(self: Any, model: Any, **kwargs: Any) -> None:
        place(self, model, **{**kwargs, "checkpoint_files": list(kwargs["checkpoint_files"])})

    monkeypatch.setattr(DropByDropQuantizer, "_process_model_before_weight_loading", on_a_copy)
    with pytest.raises(DropError, match=r"q_proj.codes.1 was not loaded"):
        AutoModelForCausalLM.from_pretrained(out)
    with pytest.raises(DropError, match=r"q_proj.codes.1 was not loaded"):
        dropbydrop.load(out)


def test_state_dict_and_disk_offload_are_refused(out: Path) -> None:
    quantizer = DropByDropQuantizer(DropByDropConfig(**_quantization(out)))
    with pytest.raises(FormatError, match="not from a state_dict"):
        quantizer._process_model_before_weight_loading(tiny_llama(), checkpoint_files=None)
    with pytest.raises(DropError, match="to disk"):
        AutoModelForCausalLM.from_pretrained(
            out, device_map={"model": "cpu", "lm_head": "disk"}, offload_folder="nowhere"
        )


def test_code_from_a_checkpoint_is_refused(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (copied / "config.json").write_text(json.dumps(config))
    (copied / "evil.py").write_text("raise SystemExit('executed')")
    with pytest.raises(FormatError, match="never carry code"):
        dropbydrop.load(copied)
    with pytest.raises(FormatError, match="never carry code"):
        AutoModelForCausalLM.from_pretrained(copied, trust_remote_code=False)


# -------------------------------------------------------------------------- configuration


def _quantization(out: Path) -> dict[str, Any]:
    return json.loads((out / "config.json").read_text())["quantization_config"]


def test_config_value(out: Path) -> None:
    data = _quantization(out)
    config = DropByDropConfig.from_dict(data)
    assert config.to_dict() == dict(config) == data
    assert config.with_bits(2).bits == 2
    assert config.bits == 4
    assert json.loads(config.to_json_string()) == data
    assert config.update(bits=2, other=1) == {"bits": 2, "other": 1}
    assert DropByDropConfig.from_dict(data, return_unused_kwargs=True, x=1)[1] == {"x": 1}
    with pytest.raises(PrecisionError):
        config.bits = 2


def test_config_survives_the_model(out: Path) -> None:
    model = dropbydrop.load(out, bits=3)
    data = json.loads(model.config.to_json_string())["quantization_config"]
    assert data == {**_quantization(out), "bits": 3}


# --------------------------------------------------------------------------- after loading


def test_save_pretrained_refuses_and_says_what_to_do(
    out: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = dropbydrop.load(out, bits=2)
    logger = logging.getLogger("transformers")
    before, logger.propagate = logger.propagate, True
    try:
        with pytest.raises(ValueError, match="dropbydrop and is not serializable"):
            model.save_pretrained(tmp_path / "saved")
    finally:
        logger.propagate = before
    assert f"Copy the folder {out} instead" in caplog.text
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("tied", [True, False])
def test_dequantize_gives_an_ordinary_model(tmp_path: Path, tied: bool) -> None:
    out = write_checkpoint(tmp_path / "out", tiny_llama(tie_word_embeddings=tied))
    model = dropbydrop.load(out, bits=3)
    expected = logits(model)
    model.dequantize()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    model.save_pretrained(tmp_path / "dense")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert type(again) is LlamaForCausalLM
    assert not hasattr(again.config, "quantization_config")
    assert torch.equal(logits(again), logits(model))


def test_tying_again_changes_nothing(out: Path) -> None:
    """lm-eval and others call tie_weights() on a loaded model."""
    model = dropbydrop.load(out)
    before = logits(model)
    model.tie_weights()
    head = model.get_output_embeddings()
    assert isinstance(head, NestedHead)
    assert head.rows is model.get_input_embeddings().rows
    assert torch.equal(logits(model), before)
    assert not any(name.startswith("lm_head.row_scales") for name in model.state_dict())


def test_training_flags(tmp_path: Path) -> None:
    base = tiny_llama(attention_bias=True, mlp_bias=True)
    model = dropbydrop.load(write_checkpoint(tmp_path / "out", base))
    assert not model.hf_quantizer.is_trainable
    for module in model.modules():
        if isinstance(module, (NestedLinear, NestedHead)):
            assert not any(parameter.requires_grad for parameter in module.parameters())
    x = torch.randn(2, 64, requires_grad=True)
    model.model.layers[0].mlp.up_proj(x).sum().backward()  # adapters before it can learn
    assert x.grad is not None


# -------------------------------------------------------------------------------- the guard


def test_stock_transformers_refuses(out: Path) -> None:
    """Without our import it would warn, and go on with random weights."""
    run = _python(
        f"""
        from transformers import AutoModel, AutoModelForCausalLM
        for loader in (AutoModel, AutoModelForCausalLM):
            try:
                loader.from_pretrained({str(out)!r})
                print("LOADED RANDOM WEIGHTS")
            except RuntimeError as error:
                print("refused:", error)
        """
    )
    lines = run.stdout.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert line.startswith("refused: You set `ignore_mismatched_sizes` to `False`")
    assert "q_proj.weight" in run.stderr
    assert "call_dropbydrop_register_before_loading" in run.stderr  # the way out, where one looks


def test_plain_torch_refuses(out: Path) -> None:
    with pytest.raises(RuntimeError, match=r"size mismatch for model.layers.0.self_attn.q_proj"):
        tiny_llama().load_state_dict(load_file(out / "model.safetensors"), strict=False)


def _python(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True
    )
