"""GGUF files tensor by tensor: what transformers makes of them, in less memory."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from dropbydrop.models import gguf_files
from dropbydrop.models.gguf_files import convert_gguf
from dropbydrop.system.errors import FormatError
from tiny import close_gguf, gguf_writer

gguf = pytest.importorskip("gguf")

SIZES = {"d": 64, "ff": 96, "heads": 4, "kv": 2, "layers": 2}
FAMILIES: dict[str, tuple[str, str, bool]] = {  # arch of the file, config, an output matrix
    "llama": ("llama", "LlamaConfig", True),
    "llama-tied": ("llama", "LlamaConfig", False),
    "mistral": ("llama", "MistralConfig", True),
    "qwen2": ("qwen2", "Qwen2Config", False),
    "qwen3": ("qwen3", "Qwen3Config", True),
    "phi3": ("phi3", "Phi3Config", True),
    "gemma2": ("gemma2", "Gemma2Config", False),
    "gemma3": ("gemma3", "Gemma3TextConfig", False),
}
HEAD_DIM = {"qwen3": 128}  # transformers does not read it from such a file
TYPES = ("F32", "F16", "Q8_0", "Q4_0")  # of matrices, in turn


def model_of(name: str, vocab: int) -> Any:
    _, config, output = FAMILIES[name]
    settings = {
        "vocab_size": vocab, "hidden_size": SIZES["d"], "intermediate_size": SIZES["ff"],
        "num_hidden_layers": SIZES["layers"], "num_attention_heads": SIZES["heads"],
        "num_key_value_heads": SIZES["kv"], "tie_word_embeddings": not output,
        "head_dim": HEAD_DIM.get(name, SIZES["d"] // SIZES["heads"]), "pad_token_id": 0,
    }  # fmt: skip
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(
            getattr(transformers, config)(**settings)
        )


def write_family(
    file: Path, name: str, vocab: int = 384, types: tuple[str, ...] = TYPES, skip: str = "-"
) -> Path:
    """A GGUF of a family with random weights of several types; without tensors called `skip`."""
    arch, _, output = FAMILIES[name]
    number = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}[arch]
    table = gguf.get_tensor_name_map(number, SIZES["layers"])
    writer = gguf_writer(file, arch, SIZES, vocab)
    if name == "mistral":
        writer.add_name("mistral")
    writer.add_pad_token_id(0)
    writer.add_key_length(SIZES["d"] // SIZES["heads"])
    writer.add_rope_dimension_count(SIZES["d"] // SIZES["heads"])
    if arch.startswith("gemma"):
        writer.add_sliding_window(8)
        writer.add_unk_token_id(3)  # or there is no tokenizer
    random = np.random.default_rng(0)
    for i, (parameter, value) in enumerate(model_of(name, vocab).state_dict().items()):
        path, _, leaf = parameter.rpartition(".")
        stored = f"{table.get_name(path)}.{leaf}"
        if (stored == "output.weight" and not output) or skip in stored:
            continue
        kind = gguf.GGMLQuantizationType[types[i % len(types)] if value.dim() > 1 else "F32"]
        numbers = random.standard_normal(tuple(value.shape), dtype=np.float32)
        writer.add_tensor(stored, gguf.quants.quantize(numbers, kind), raw_dtype=kind)
    close_gguf(writer)
    return file


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "mistral"])
def test_the_folder_is_the_one_that_transformers_gives(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_files, "_PART", 2048)
    file = write_family(tmp_path / "a.gguf", name)
    whole, ours = tmp_path / "whole", tmp_path / "ours"
    whole.mkdir()
    ours.mkdir()
    with gguf_files._alone(file) as place:
        gguf_files._write_whole(place, whole)
        assert gguf_files._write_tensor_by_tensor(place, ours)
    one, other = (load_file(folder / "model.safetensors") for folder in (ours, whole))
    assert one.keys() == other.keys()
    for parameter, value in one.items():
        assert torch.equal(value, other[parameter]), parameter
    for written in whole.glob("*.json"):
        assert json.loads((ours / written.name).read_text()) == json.loads(written.read_text())
    ids = torch.arange(12)[None]
    plain = transformers.AutoModelForCausalLM.from_pretrained(ours)
    assert plain.dtype == torch.float32
    assert plain(ids).logits.isfinite().all()


def test_a_mistral_file_is_a_llama_file_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tensors are a Llama's; transformers 5.23 knows no table of names for it."""
    monkeypatch.setenv("DROPBYDROP_CACHE", str(tmp_path / "cache"))
    mistral, llama = (
        convert_gguf(write_family(tmp_path / f"{name}.gguf", name)) for name in ("mistral", "llama")
    )
    assert json.loads((mistral / "config.json").read_text())["model_type"] == "mistral"
    other = load_file(llama / "model.safetensors")
    found = load_file(mistral / "model.safetensors")
    assert found.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in found.items())


def test_others_go_through_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DROPBYDROP_CACHE", str(tmp_path / "cache"))
    file = write_family(tmp_path / "a.gguf", "qwen3")
    by_tensors = load_file(convert_gguf(file) / "model.safetensors")
    monkeypatch.setenv("DROPBYDROP_CACHE", str(tmp_path / "other"))
    monkeypatch.delitem(gguf_files._FAMILIES, "qwen3")
    whole = load_file(convert_gguf(file) / "model.safetensors")
    assert all(torch.equal(value, whole[name]) for name, value in by_tensors.items())
    lacking = write_family(tmp_path / "b.gguf", "llama", skip="blk.1.ffn_up")
    with gguf_files._alone(lacking) as place:
        assert not gguf_files._write_tensor_by_tensor(place, tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_a_tensor_of_another_size_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DROPBYDROP_CACHE", str(tmp_path / "cache"))
    sizes = dict(SIZES)
    file = write_family(tmp_path / "a.gguf", "gemma3")
    sizes["ff"] = 128  # what the header says now
    content = file.read_bytes()
    key = b"gemma3.feed_forward_length" + (4).to_bytes(4, "little")
    at = content.index(key) + len(key)
    file.write_bytes(content[:at] + (128).to_bytes(4, "little") + content[at + 4 :])
    with pytest.raises(FormatError, match=r"ffn_gate.weight has 6,144 values, not \(128, 64\)"):
        convert_gguf(file)
    assert list((tmp_path / "cache").iterdir()) == []


def test_memory_is_that_of_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is most of all its embedding: numpy's memory is a small part of it."""
    monkeypatch.setattr(gguf_files, "_PART", 1 << 17)
    monkeypatch.setitem(SIZES, "d", 1024)
    file = write_family(tmp_path / "a.gguf", "qwen2", vocab=2048, types=("Q8_0",))
    (tmp_path / "out").mkdir()
    with gguf_files._alone(file) as place:
        gguf_files._empty_model(place)  # imports take memory once
        tracemalloc.start()
        try:
            assert gguf_files._write_tensor_by_tensor(place, tmp_path / "out")
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert size > 30 << 20
    assert peak < size / 4
