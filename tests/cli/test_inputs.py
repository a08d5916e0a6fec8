"""Whatever a user gives: refused by name before any work, or done; never a traceback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

import dropbydrop
import tiny
from dropbydrop.cli.main import app
from dropbydrop.data.calibration import Calibration
from dropbydrop.data.self_generated import Writing, write_windows, writing_seconds
from dropbydrop.models.model_config import context_length, text_settings
from dropbydrop.models.pretrained import config_of
from dropbydrop.planning.memory import kv_cache
from dropbydrop.quantization.config import QuantizeConfig, check_levels
from dropbydrop.system.console import printable
from dropbydrop.system.errors import CalibrationError, DropError, PrecisionError
from tiny import copy_of

QUICK: dict[str, Any] = {"preset": "fast", "progress": False, "device": "cpu"}
SMALL = {"vocab_size": tiny.VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA = SMALL | {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
}
LINEAR = ["linear_attention", "full_attention"]
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 16}
SELF: dict[str, dict[str, Any]] = {  # state beside keys and values, or odd calls
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 128},
    "qwen3_5_text": {
        "layer_types": LINEAR,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    },
    "doge": {},
    "gemma4_text": {
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 16,
    },
}
OTHER_NAMES: dict[str, dict[str, Any]] = {
    "gptj": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "rotary_dim": 8},
    "mpt": {"d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 256},
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4},
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_tiny(tmp_path_factory.mktemp("hf") / "tiny-llama", "llama")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("ck") / "out")


def refused(*argv: object) -> str:
    result = CliRunner().invoke(app, [str(part) for part in argv])
    assert isinstance(result.exception, DropError), (result.output, result.exception)
    return str(result.exception)


def windows(**description: Any) -> Calibration:
    return Calibration(torch.arange(32).view(2, 16), description)


# ---- from Python -----------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [np.array([2, 4]), torch.tensor([4, 2]), (np.int8(2), 4), {2, 4}])
def test_integers_of_any_library(bits: Any) -> None:
    levels = check_levels(bits)
    assert levels == (2, 4)
    assert [type(p) for p in levels] == [int, int]


@pytest.mark.parametrize("bits", [[True, 4], [2.0, 4.0], 4, "2,4", [], ["2"], None, [0], [2, 9]])
def test_what_is_no_list_of_levels(bits: Any) -> None:
    with pytest.raises(PrecisionError, match="such as --bits 2,3,4"):
        check_levels(bits)


def test_other_arguments(llama: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    with pytest.raises(DropError, match="save_pretrained"):
        dropbydrop.quantize(model, tmp_path / "out", **QUICK)
    with pytest.raises(CalibrationError, match="Calibration"):
        dropbydrop.quantize(llama, tmp_path / "out", calibration=torch.ones(2, 16), **QUICK)
    ready = windows(file=Path("x"))
    with pytest.raises(CalibrationError, match="JSON"):
        dropbydrop.quantize(llama, tmp_path / "out", calibration=ready, **QUICK)
    with pytest.raises(PrecisionError):
        dropbydrop.quantize(llama, tmp_path / "out", 4, calibration=windows(), **QUICK)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [-1, 1 << 32, 1 << 63, 1.5, True, "x"])
def test_seeds(seed: Any, checkpoint: Path) -> None:
    with pytest.raises(DropError, match="--seed"):
        QuantizeConfig(seed=seed)
    if type(seed) is int:
        sampling = ("--temperature", 1, "--seed", seed)
        assert "--seed" in refused("generate", checkpoint, "--prompt", "a", *sampling)


@pytest.mark.parametrize("temperature", [1e-45, -1, "nan", "inf", 1e30])
def test_temperatures(temperature: Any, checkpoint: Path) -> None:
    asked = ("--prompt", "a", "--temperature", temperature)
    assert "temperature of 0 or between" in refused("generate", checkpoint, *asked)
    assert "temperature of 0 or between" in refused("chat", checkpoint, *asked[2:])


def test_lengths(checkpoint: Path) -> None:
    asked = ("generate", checkpoint, "--prompt", "a", "--max-new-tokens")
    assert "at least one token" in refused(*asked, 0)
    assert "at least one token" in refused(*asked, 10**20)
    result = CliRunner().invoke(app, [*map(str, asked), str(10**9), "--json"])
    made = json.loads(result.stdout.splitlines()[-1])
    context = dropbydrop.load(checkpoint).config.max_position_embeddings
    assert made["prompt_tokens"] + made["new_tokens"] <= context


def test_numbers_of_settings() -> None:
    config = QuantizeConfig(seed=np.int64(3), windows=np.int64(2))  # type: ignore[arg-type]
    assert json.dumps(config.to_dict())
    with pytest.raises(DropError, match="whole number"):
        QuantizeConfig(windows=2.5)  # type: ignore[arg-type]


def test_devices(llama: Path, tmp_path: Path) -> None:
    for device in ("mps", "xpu:1", "meta", "gpu"):
        assert "choose auto" in refused("quantize", llama, tmp_path / "out", "--device", device)


def test_home_is_expanded(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    dropbydrop.quantize(llama, "~/out", (2, 3, 4), calibration=windows(), **QUICK)
    assert (tmp_path / "out/config.json").is_file()
    assert not (tmp_path / "~").exists()
    dropbydrop.load("~/out")


# ---- texts and prompts -----------------------------------------------------------------------


def test_half_a_character(llama: Path, checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "a.jsonl"
    text.write_text('{"text": "\\ud800' + "abc" * 300 + '"}\n')
    given = ("--calibration", text, "--windows", 2, "--seq-len", 16)
    assert "half a character" in refused("quantize", llama, tmp_path / "out", *given)
    assert "half a character" in refused("generate", checkpoint, "--prompt", "a\udcffb")


def with_tokenizer_of(source: Path, out: Path, **more: bytes) -> Path:
    files: dict[str, Any] = {file.name: file for file in source.glob("tokenizer*")} | more
    return tiny.write_checkpoint(out, extra_files=files, tokenizer=False)


def test_tokens_beyond_the_embedding(llama: Path, tmp_path: Path) -> None:
    source = copy_of(llama, tmp_path / "model")
    known = json.loads((source / "tokenizer.json").read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    new = {"id": tiny.VOCAB + 9, "content": "<new>", "special": True, **flags}
    known["added_tokens"].append(new)
    known["model"]["vocab"]["<new>"] = new["id"]
    (source / "tokenizer.json").write_text(json.dumps(known))
    out = with_tokenizer_of(source, tmp_path / "ck")
    text = tmp_path / "text.txt"
    text.write_text("the river <new> runs past the mill " * 90)
    assert "embeds" in refused("generate", out, "--prompt", "a<new>b")
    assert "embeds" in refused("eval", out, "--text", text, "--seq-len", 16)
    given = ("--calibration", text, "--windows", 20, "--seq-len", 16, "--preset", "fast")
    assert "embeds" in refused("quantize", source, tmp_path / "new", *given)


def test_prompts(llama: Path, checkpoint: Path, tmp_path: Path) -> None:
    assert "this model takes 1 to" in refused("generate", checkpoint, "--prompt", "a b" * 3000)
    source = copy_of(llama, tmp_path / "model")
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    template = {"chat_template.jinja": b"{{ raise_exception('alternate!') }}"}
    with_tokenizer_of(source, tmp_path / "ck", **template)
    given = ["generate", str(tmp_path / "ck"), "--prompt", "ab", "--max-new-tokens", "2"]
    assert CliRunner().invoke(app, given).exit_code == 0
    assert "alternate!" in refused(*given, "--chat")


# ---- families --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SELF)
def test_every_family_writes_its_own_text(kind: str, tmp_path: Path) -> None:
    config = AutoConfig.for_model(kind, **{**LLAMA, **SELF[kind]})
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    ids = write_windows(tmp_path, tiny.tiny_tokenizer(), 3, 20, 0, Writing(), progress=False)
    assert ids.shape == (3, 20)
    assert len(ids.unique()) > 10
    assert writing_seconds(tmp_path, 3, 20, Writing()) > 0


@pytest.mark.parametrize("kind", OTHER_NAMES)
def test_configs_with_names_of_their_own(kind: str, tmp_path: Path) -> None:
    config = AutoConfig.for_model(kind, **{**SMALL, **OTHER_NAMES[kind]})
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    longest = None if kind == "bloom" else 256
    for form in (stored, config_of(tmp_path)):
        assert context_length(form) == longest
        assert text_settings(form)["num_hidden_layers"] == 2
        assert kv_cache(text_settings(form), 10, 2) == 2 * 2 * 4 * 16 * 10 * 2
    assert context_length({"max_position_embeddings": -1}) is None


def test_bench_within_the_context(checkpoint: Path) -> None:
    given = ("--bits", "2", "--rounds", 1, "--tokens", 2)
    assert "this model takes" in refused("bench", checkpoint, *given, "--prompt", 5000)


def test_matrices_of_zeros(llama: Path, tmp_path: Path) -> None:
    source = copy_of(llama, tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"):
        tensors[name].zero_()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    done = dropbydrop.quantize(
        source, tmp_path / "out", (2, 3, 4), calibration=windows(kind="x"), **QUICK
    )
    json.dumps(done.to_dict(), allow_nan=False)
    assert "inf" not in (tmp_path / "out/README.md").read_text().split("|", 1)[1]
    for line in (tmp_path / "out/quantize-log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


# ---- terminals -------------------------------------------------------------------------------


def test_control_characters(tmp_path: Path) -> None:
    assert printable("a\x1b]0;x\x07b\r\u202e\ud800") == "a\\x1b]0;x\\x07b\\r\\u202e\\ud800"
    assert printable("日本\té\n👩\u200d👧") == "日本\té\n👩\u200d👧"
    (tmp_path / "config.json").write_text("{}")
    said = CliRunner().invoke(app, ["info", str(tmp_path) + "\x1b[31m"])
    assert "\x1b" not in said.output
