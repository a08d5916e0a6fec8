"""What cannot be loaded or run afterwards is refused before any work, whatever its family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import dropbydrop
import tiny
from dropbydrop.data.calibration import Calibration
from dropbydrop.quantization.config import QuantizeConfig
from dropbydrop.quantization.job import prepare
from dropbydrop.system.errors import FormatError, KernelError, UnsupportedModelError

QUICK: dict[str, Any] = {"windows": 2, "seq_len": 16, "device": "cpu"}
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
FAMILIES: dict[str, dict[str, Any]] = {
    "nanochat": LLAMA,  # `_init_weights` reads a linear
    "gpt_bigcode": SMALL | {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "mamba2": SMALL  # and a forward that reads the embedding
    | {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_heads": 8,
        "head_dim": 16,
        "state_size": 16,
        "n_groups": 2,
        "chunk_size": 16,
    },
    "olmo2": LLAMA,
    "falcon_h1": LLAMA
    | {
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_d_ssm": 128,
        "mamba_d_state": 16,
        "mamba_chunk_size": 16,
    },
}


def save(folder: Path, kind: str) -> Path:
    config = AutoConfig.for_model(kind, **FAMILIES[kind])
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tiny.tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "head_bits", "fails"),
    [
        ("nanochat", 8, "cannot be loaded"),
        ("gpt_bigcode", 16, "cannot be loaded"),
        ("mamba2", 8, "cannot be run"),
        ("mamba2", 16, "cannot be loaded"),
        ("olmo2", 8, ""),
        ("falcon_h1", 8, ""),
    ],
)
def test_families(tmp_path: Path, kind: str, head_bits: int, fails: str) -> None:
    source, config = save(tmp_path / "model", kind), QuantizeConfig(head_bits=head_bits, **QUICK)
    if fails:
        with pytest.raises(UnsupportedModelError, match=f"{fails}.*weight"):
            prepare(source, config)
    else:
        job = prepare(source, config)
        on_meta = [p.is_meta for p in job.runner.model.parameters()]
        assert all(on_meta), "the trial leaves nothing in memory"


def test_what_is_refused_is_what_cannot_be_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trial is no more severe than loading: without it the same error comes at the end."""
    monkeypatch.setattr("dropbydrop.quantization.job.try_model", lambda *args: None)
    source, text = save(tmp_path / "model", "nanochat"), Calibration(torch.ones(2, 16).long(), {})
    dropbydrop.quantize(
        source, tmp_path / "out", (2, 3, 4), calibration=text, preset="fast", progress=False
    )
    with pytest.raises(FormatError, match="weight"):
        dropbydrop.load(tmp_path / "out")


def test_an_unknown_backend(tmp_path: Path) -> None:
    with pytest.raises(KernelError, match=r"'nope'.*choose one of"):
        prepare(tiny.save_tiny(tmp_path), QuantizeConfig(backend="nope", **QUICK))


def test_tokenizers_in_any_file_are_copied(tmp_path: Path) -> None:
    source = tiny.save_tiny(tmp_path / "model", "llama")
    (source / "tokenizer.json").unlink()
    letters = [chr(i) for i in range(33, 127)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{x}" for x in letters)]
    (source / "vocab.txt").write_text("\n".join(words))
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": False}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    others = ("preprocessor_config.json", "LICENSE.txt", "USE_POLICY.md", "license.py", "x.py")
    for name in others:
        (source / name).write_text("{}")
    text = Calibration(torch.ones(2, 16).long(), {})
    out = tmp_path / "out"
    dropbydrop.quantize(source, out, (2, 3, 4), calibration=text, preset="fast", progress=False)
    found = AutoTokenizer.from_pretrained(out)("hello world").input_ids
    assert found == AutoTokenizer.from_pretrained(source)("hello world").input_ids
    assert len(set(found)) > 5
    assert {name for name in others if (out / name).exists()} == set(others[:3])


def test_a_tokenizer_that_copies_would_not_give(tmp_path: Path) -> None:
    source = tiny.save_tiny(tmp_path, "llama")
    text = (source / "tokenizer.json").read_text()
    (source / "tokenizer.json").unlink()
    (source / "words.dat").write_text(text)
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings["tokenizer_file"] = "words.dat"
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(FormatError, match="tokenizer"):
        prepare(source, QuantizeConfig(**QUICK))


def test_the_dtype_of_the_source(tmp_path: Path) -> None:
    source = tiny.save_tiny(tmp_path / "model", "llama", dtype=torch.bfloat16)
    config = json.loads((source / "config.json").read_text())
    del config["dtype"]
    (source / "config.json").write_text(json.dumps(config))
    text = Calibration(torch.ones(2, 16).long(), {})
    dropbydrop.quantize(
        source, tmp_path / "out", (2, 3, 4), calibration=text, preset="fast", progress=False
    )
    assert AutoModelForCausalLM.from_pretrained(source).dtype == torch.bfloat16
    assert dropbydrop.load(tmp_path / "out").dtype == torch.bfloat16
