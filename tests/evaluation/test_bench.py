"""`dropbydrop bench` and what it reports: what is counted, not how fast it is."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import dropbydrop
from dropbydrop import kernels
from dropbydrop.cli import main as cli
from dropbydrop.evaluation import bench
from dropbydrop.planning.memory import held_bytes
from dropbydrop.runtime import fused_decode
from dropbydrop.system.errors import DropError
from tiny import tiny_llama, write_checkpoint


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, code: str) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("bench") / "out", code=code)


def test_command(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--prompt", 4, "--tokens", 3, "--prefill", 20, "--rounds", 2, "--threads", 1]
    monkeypatch.setattr(bench, "_STREAM_BYTES", 1 << 16)
    monkeypatch.setattr(sys, "argv", ["dropbydrop", "bench", str(out), *map(str, sizes), "--json"])
    threads = torch.get_num_threads()
    try:
        cli.main()
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr()
    result = json.loads(printed.out.splitlines()[-1])
    assert result["kernel"] == kernels.select().name
    assert result["threads"] == 1
    assert result["kernel"] in printed.err  # the table is beside the JSON
    model = dropbydrop.load(out)
    for bits in (2, 3, 4):
        row = result["bits"][str(bits)]
        assert row["held_bytes"] == held_bytes(dropbydrop.view(model, bits))
        assert [len(row["seconds"][x]) for x in ("decode", "prefill")] == [2, 2]
        assert row["decode_tokens_per_second"] == 1 / min(row["seconds"]["decode"])
        assert row["prefill_tokens_per_second"] == 20 / min(row["seconds"]["prefill"])
        assert row["decoding"] == fused_decode.how(model)
    assert result["topology"] == bench.topology()


def test_bytes_that_a_token_reads(tmp_path: Path, out: Path) -> None:
    """The rows of the input embedding count only where they are the head's too."""
    tied = dropbydrop.load(out, bits=2)
    assert bench.read_bytes(tied) == held_bytes(tied)
    path = write_checkpoint(tmp_path / "untied", tiny_llama(tie_word_embeddings=False))
    untied = dropbydrop.load(path, bits=2)
    embedding = untied.get_input_embeddings()
    rows = embedding.rows.nbytes + embedding.row_scales.nbytes
    assert held_bytes(untied) - bench.read_bytes(untied) == rows > 0


def test_nothing_to_measure(out: Path) -> None:
    model = dropbydrop.load(out, bits=2)
    with pytest.raises(DropError, match="at least one"):
        bench.bench(model, [2], tokens=0)
    with pytest.raises(DropError, match="at least one"):
        bench.bench(model, [])


def test_info_tells_how_tokens_are_decoded(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["dropbydrop", "info", "--kernels", str(out), "--json"])
    cli.main()
    told = json.loads(capsys.readouterr().out.splitlines()[-1])["decoding"]
    assert told == fused_decode.how_config({"model_type": "llama"})
    assert ("native step" in told) == kernels.select().native
    assert fused_decode.how_config({"model_type": "gpt_neox"}).startswith("through torch")
    monkeypatch.setenv(kernels.registry.VARIABLE, "torch")
    assert "'torch'" in fused_decode.how_config(None)
