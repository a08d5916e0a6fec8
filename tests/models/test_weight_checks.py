"""Folders whose files and config contradict each other are refused, not quantized in silence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tiny
from dropbydrop.models.block_runner import BlockRunner
from dropbydrop.models.weight_checks import check_values, check_weights, dtype_of
from dropbydrop.models.weight_files import WeightFiles
from dropbydrop.system.errors import DropError, FormatError, UnsupportedModelError
from tiny import copy_of

Tensors = dict[str, Tensor]
UP, NORM = "model.layers.2.mlp.up_proj.weight", "model.norm.weight"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_tiny(tmp_path_factory.mktemp("hf") / "tiny-llama", "llama")


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_tiny(tmp_path_factory.mktemp("hf") / "tied", "llama-tied")


def edited(folder: Path, to: Path, change: Callable[[Tensors], object], **config: object) -> Path:
    """A copy of a folder with other weights."""
    copy_of(folder, to, **config)
    tensors = load_file(to / "model.safetensors")
    change(tensors)
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    return to


def check(folder: Path, head_bits: int = 8) -> None:
    runner = BlockRunner.open(folder)
    check_weights(runner)
    check_values(runner, head_bits)


def test_what_is_right_passes(llama: Path, tied: Path, tmp_path: Path) -> None:
    check(llama)
    check(tied)
    head = load_file(tied / "model.safetensors")["model.embed_tokens.weight"]
    check(edited(tied, tmp_path / "a", lambda t: t.update({"lm_head.weight": head.clone()})))
    ignored = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}  # of old releases
    check(edited(llama, tmp_path / "b", lambda t: t.update(ignored)))


def test_a_tied_config_over_a_head_of_its_own(tied: Path, tmp_path: Path) -> None:
    other = {"lm_head.weight": torch.randn(tiny.VOCAB, 48)}
    with pytest.raises(FormatError, match=r"two different tensors.*tie_word_embeddings to false"):
        check(edited(tied, tmp_path / "a", lambda t: t.update(other)))
    check(edited(tied, tmp_path / "b", lambda t: t.update(other), tie_word_embeddings=False))


def float8(tensors: Tensors) -> None:
    for name in [name for name in tensors if "proj" in name]:
        scale = tensors[name].abs().max() / 448
        tensors[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale[None]


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (float8, UnsupportedModelError, "look like scales.*lost its quantization_config"),
        (lambda t: t.update({UP: t[UP].char()}), UnsupportedModelError, "stored as I8"),
        (lambda t: t.update({UP: t[UP].to(torch.float8_e4m3fn)}), UnsupportedModelError, "F8_E4M3"),
        (lambda t: t.update(adapter=torch.ones(2)), UnsupportedModelError, r"\(first: adapter\)"),
        (lambda t: t.update({UP: t[UP][:-8].clone()}), FormatError, "its config asks for"),
        (lambda t: t[UP].view(-1)[7:8].fill_(float("nan")), FormatError, f"{UP} .*not finite"),
        (lambda t: t[NORM][3:4].fill_(float("inf")), FormatError, f"{NORM} .*not finite"),
        (lambda t: t[UP].view(-1)[7:8].fill_(1e5), FormatError, "too large for float16"),
        (lambda t: t["lm_head.weight"].view(-1)[7:8].fill_(1e8), FormatError, "too large"),
        (lambda t: t[UP].mul_(1e-5), FormatError, "too small for float16"),
        (lambda t: t["lm_head.weight"].mul_(1e-4), FormatError, "too small for float16"),
    ],
)
def test_refused(
    llama: Path, tmp_path: Path, change: Callable[[Tensors], object], error: type, match: str
) -> None:
    with pytest.raises(error, match=match):
        check(edited(llama, tmp_path, change))


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight", NORM])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nan_anywhere(llama: Path, tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    def change(tensors: Tensors) -> None:
        tensors[name] = tensors[name].to(dtype)
        tensors[name].view(-1)[-1] = float("nan")

    with pytest.raises(FormatError, match=f"{name} .*not finite"):
        check(edited(llama, tmp_path, change))


def test_a_head_beyond_float16(llama: Path, tmp_path: Path) -> None:
    large = edited(llama, tmp_path, lambda t: t["lm_head.weight"].view(-1)[7:8].fill_(1e5))
    check(edited(llama, tmp_path / "rows", lambda t: t["lm_head.weight"][1:].mul_(1e-9)))
    check(edited(llama, tmp_path / "none", lambda t: t[UP].zero_()))
    check(large, head_bits=8)  # the scale of a row is a 127th of it
    with pytest.raises(FormatError, match="too large"):
        check(large, head_bits=16)


def test_what_may_be_small(tmp_path: Path) -> None:
    """A dead expert, and what is not quantized."""
    folder = tiny.save_tiny(tmp_path / "moe", "qwen2-moe")

    def shrink(tensors: Tensors) -> None:
        small = [n for n in tensors if "experts.0." in n or "shared_expert_gate" in n]
        assert len(small) > 3
        for name in small:
            tensors[name].mul_(1e-6)

    check(edited(folder, tmp_path / "edited", shrink))


def test_more_layers_than_the_config(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"layers\.2.*fewer layers"):
        check(copy_of(llama, tmp_path, num_hidden_layers=2))


def test_two_sets_of_weights(llama: Path, tmp_path: Path) -> None:
    folder = tiny.save_tiny(tmp_path / "shards", "llama", max_shard_size="60KB")
    WeightFiles(folder)
    newer = (llama / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(newer)
    with pytest.raises(FormatError, match="two sets of weights"):
        WeightFiles(folder)
    (folder / "model.safetensors").unlink()
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    del index["weight_map"][NORM]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FormatError, match=f"disagree about 1 tensors.*{NORM}"):
        WeightFiles(folder)
    for wrong in ("[]", '{"weight_map": 3}', '{"weight_map": null}', "[" * 100_000):
        (folder / "model.safetensors.index.json").write_text(wrong)
        with pytest.raises(DropError, match="index"):
            WeightFiles(folder)


def test_the_type_of_most_weights(tmp_path: Path) -> None:
    half = tiny.save_tiny(tmp_path, "llama", dtype=torch.bfloat16)
    kept = edited(half, tmp_path, lambda t: t.update({NORM: t[NORM].float()}))
    assert dtype_of(BlockRunner.open(kept)) == "bfloat16"
