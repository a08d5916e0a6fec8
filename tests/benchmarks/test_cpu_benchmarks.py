"""The scripts of benchmarks/cpu run end to end on tiny shapes."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

import random_model
from dropbydrop.checkpoint import Checkpoint
from dropbydrop.system.native_library import library
from tiny import CODES, write_checkpoint

FOLDER = Path(__file__).parents[2] / "benchmarks" / "cpu"
TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "tie_word_embeddings": False,
}
native = pytest.mark.skipif(library() is None, reason="the native kernels are not built")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a script as from the command line; returns the JSON of its last line."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setitem(random_model.SIZES, "tiny", TINY)
    threads = torch.get_num_threads()

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
        spec.loader.exec_module(module)
        return module

    def start(name: str, *argv: object) -> dict[str, Any]:
        module = load(name)
        monkeypatch.setattr(sys, "argv", [name, *map(str, argv)])
        assert module.main() in (0, None)
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    yield start
    torch.set_num_threads(threads)


@native
def test_decode(run: Any, tmp_path: Path) -> None:
    short = ["--prompt", 3, "--tokens", 2, "--prefill", 4, "--rounds", 1, "--threads", 1]
    result = run("decode", "--size", "tiny", "--folder", tmp_path, "--eager", *short)
    names = [row["name"] for row in result["results"]]
    assert names == ["2 bits", "2 bits, eager", "3 bits", "3 bits, eager", "4 bits",
                     "4 bits, eager", "torch bfloat16", "torch float32"]  # fmt: skip
    assert all(row["tokens_per_second"] > 0 for row in result["results"])
    ours = ["--torch", "", "--bits", "2", *short]
    one = run("decode", "--model", tmp_path / "random-tiny", *ours)
    assert [row["name"] for row in one["results"]] == ["2 bits"]
    assert one["results"][0]["true_bits"] == result["results"][0]["true_bits"]
    both = run("decode", "--size", "tiny", "--folder", tmp_path, "--code", "bytes,trellis", *ours)
    assert [row["name"] for row in both["results"]] == ["bytes 2 bits", "trellis 2 bits"]


@native
def test_speeds_over_the_peer_are_of_one_run(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    decode = importlib.import_module("decode")
    rows = [
        {"name": "ours", "seconds": [1.0, 3.0, 2.0]},
        {"name": "it", "seconds": [2.0, 3.0, 8.0]},
    ]
    decode.add_ratios(rows, None)
    assert decode.ratios(rows[0]) == ""
    decode.add_ratios(rows, "it")
    assert rows[0]["times"] == {"of": "it", "best": 2.0, "median": 2.0}
    assert decode.ratios(rows[1]) == "1.00 (1.00)"


def test_matvec(run: Any) -> None:
    small = ["--shapes", "64x64", "--rounds", 1, "--megabytes", 1]
    assert {row["shape"][0] for row in run("matvec", *small)["results"]} == {64}
    both = ["--code", "bytes,trellis", *small]
    names = [row["name"].split()[-2:] for row in run("matvec", *both)["results"]]
    assert ["bytes", "P=4"] in names
    assert ["trellis", "P=2"] in names
    errors = run("matvec", "--errors", *both)["results"]
    assert {row["code"] for row in errors} == {"bytes", "trellis"}
    assert all(row["gaussian"] < 0.05 for row in errors)
    assert run("matvec", "--crossover", *both)["results"][-1]["dense_us"] > 0


@native
@pytest.mark.parametrize("code", CODES)
def test_greedy(run: Any, tmp_path: Path, code: str) -> None:
    out = write_checkpoint(tmp_path / "out", code=code)
    result = run("greedy", out, "--bits", "2", "--tokens", 4, "--tie", 1e-3)
    assert result["bits"]["2"]["differences"] == []


@pytest.mark.parametrize("code", CODES)
def test_memory(run: Any, tmp_path: Path, code: str) -> None:
    out = random_model.sized_checkpoint(tmp_path / "out", "tiny", code)
    row = run("memory", out, "--one", "2.5", "--context", 16)
    assert row["held"] == row["predicted_weights"]
    assert row["bits"] <= 2.5


def test_a_sized_checkpoint_is_valid_and_written_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(random_model.SIZES, "tiny", TINY)
    out = random_model.sized_checkpoint(tmp_path / "folder" / "out", "tiny")
    checkpoint = Checkpoint.open(out)
    assert checkpoint.verify() == []
    assert checkpoint.levels == (2, 3, 4)
    before = (out / "config.json").stat().st_mtime_ns
    assert random_model.sized_checkpoint(out, "tiny") == out
    assert (out / "config.json").stat().st_mtime_ns == before


def test_gguf_of_a_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = pytest.importorskip("gguf")
    monkeypatch.syspath_prepend(str(FOLDER))
    from llama_cpp_peer import random_gguf

    path = random_gguf(tmp_path / "tiny.gguf", LlamaConfig(**TINY))
    shapes = {tensor.name: tuple(tensor.shape) for tensor in gguf.GGUFReader(str(path)).tensors}
    assert shapes["blk.1.ffn_down.weight"] == (96, 64)
    assert shapes["output.weight"] == shapes["token_embd.weight"] == (64, 300)
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.gguf"]
