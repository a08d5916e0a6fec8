"""Export of one level: an ordinary folder with the logits of that level, for any runtime."""

from __future__ import annotations

import errno
import json
import resource
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import dropbydrop
from dropbydrop.checkpoint.export import export
from dropbydrop.cli import main as cli
from dropbydrop.coding.encoder import Effort
from dropbydrop.quantization import job as jobs
from dropbydrop.quantization import pipeline as quantize
from dropbydrop.system import atomic_folder as folder_module
from dropbydrop.system.errors import DropError, MissingPlaneError, PrecisionError
from tiny import VOCAB, save_tiny, tiny_llama, write_checkpoint

IDS = torch.randint(5, VOCAB, (2, 17), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, code: str) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("export") / "out", code=code)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits.float()


def stock(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "16-bit head": ({}, {"embedding_bits": 16}),
    "untied": ({"tie_word_embeddings": False}, {}),
    "untied, 16-bit head": ({"tie_word_embeddings": False}, {"embedding_bits": 16}),
    "biases": ({"attention_bias": True, "mlp_bias": True}, {}),
    "256 entries": ({}, {"sign_symmetric": False}),
    "sharded planes": ({}, {"shard_bytes": 2000}),
    "trellis": ({}, {"code": "trellis", "window": 17}),
    "trellis, biases": ({"attention_bias": True, "mlp_bias": True}, {"code": "trellis"}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_the_level(tmp_path: Path, variant: str) -> None:
    changes, settings = VARIANTS[variant]
    base = tiny_llama(**changes)
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    out = write_checkpoint(tmp_path / "out", base, **settings)
    for p in (2, 3, 4):
        export(out, tmp_path / f"dense{p}", p, dtype="float32", progress=False)
        found, ours = stock(tmp_path / f"dense{p}"), dropbydrop.load(out, bits=p)
        torch.testing.assert_close(logits(found), logits(ours), rtol=1e-4, atol=1e-4)
        tied = found.lm_head.weight is found.model.embed_tokens.weight
        assert tied is bool(base.config.tie_word_embeddings)
        module = found.model.layers[1].mlp.down_proj
        dense = ours.model.layers[1].mlp.down_proj.dense_weight()
        torch.testing.assert_close(module.weight, dense, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_sixteen_bits_round_once(out: Path, tmp_path: Path, name: str) -> None:
    result = export(out, tmp_path / "dense", 3, dtype=name, progress=False)
    assert result["bits"] == 3
    dtype = getattr(torch, name)
    export(out, tmp_path / "wide", 3, dtype="float32", progress=False)
    with (
        safe_open(tmp_path / "dense" / "model.safetensors", "pt") as narrow,
        safe_open(tmp_path / "wide" / "model.safetensors", "pt") as wide,
    ):
        assert narrow.metadata() == {"format": "pt"}
        assert list(narrow.keys()) == list(wide.keys())
        assert "lm_head.weight" not in narrow.keys()  # noqa: SIM118 - tied: stored once
        for tensor in narrow.keys():  # noqa: SIM118
            assert torch.equal(narrow.get_tensor(tensor), wide.get_tensor(tensor).to(dtype))
    ours = logits(dropbydrop.load(out, bits=3))
    found = logits(stock(tmp_path / "dense"))
    epsilon = torch.finfo(dtype).eps
    assert (found - ours).abs().max() < 8 * epsilon * ours.abs().max()
    assert json.loads((tmp_path / "dense" / "config.json").read_text())["dtype"] == name


def test_the_folder_is_an_ordinary_one(out: Path, tmp_path: Path) -> None:
    result = export(out, tmp_path / "dense", progress=False)
    assert result["bits"] == 4  # the highest
    dense = tmp_path / "dense"
    config = json.loads((dense / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["architectures"] == ["LlamaForCausalLM"]
    names = {p.name for p in dense.iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "README.md", "model.safetensors"} <= names
    assert not names & {"manifest.json", "plane-1.safetensors", "quantize-log.jsonl"}
    assert (dense / "tokenizer.json").read_bytes() == (out / "tokenizer.json").read_bytes()
    assert result["bytes"] == sum(p.stat().st_size for p in dense.iterdir())
    assert AutoTokenizer.from_pretrained(dense)("hello").input_ids
    assert "level 4" in (dense / "README.md").read_text()
    again = export(out, tmp_path / "again", progress=False)
    for name in again["files"]:
        assert (tmp_path / "again" / name).read_bytes() == (dense / name).read_bytes()


def test_a_runtime_that_knows_nothing_of_us(out: Path, tmp_path: Path) -> None:
    export(out, tmp_path / "dense", 2, progress=False)
    torch.save(IDS, tmp_path / "ids.pt")
    script = f"""
        import sys, torch
        from transformers import AutoModelForCausalLM
        ids = torch.load({str(tmp_path / "ids.pt")!r})
        model, info = AutoModelForCausalLM.from_pretrained(
            {str(tmp_path / "dense")!r}, output_loading_info=True)
        assert not any(info.values()), info
        assert model.dtype == torch.bfloat16
        assert not any(name.startswith("dropbydrop") for name in sys.modules)
        with torch.no_grad():
            torch.save(model(ids).logits.float(), {str(tmp_path / "logits.pt")!r})
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=120)
    found, ours = torch.load(tmp_path / "logits.pt"), logits(dropbydrop.load(out, bits=2))
    assert (found - ours).abs().max() < 0.05 * ours.abs().max()


def test_shards(out: Path, tmp_path: Path) -> None:
    result = export(out, tmp_path / "one", 3, dtype="float32", progress=False)
    export(out, tmp_path / "many", 3, dtype="float32", shard_bytes=40_000, progress=False)
    files = sorted((tmp_path / "many").glob("model-*-of-*.safetensors"))
    assert len(files) > 2
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {p.name for p in files}
    assert len(index["weight_map"]) == result["tensors"]
    whole = stock(tmp_path / "one").state_dict()
    for name, tensor in stock(tmp_path / "many").state_dict().items():
        assert torch.equal(tensor, whole[name])


def test_slabs_do_not_show(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(out, tmp_path / "one", 3, progress=False)
    monkeypatch.setattr("dropbydrop.checkpoint.export._SLAB", 7)
    export(out, tmp_path / "many", 3, progress=False)
    a, b = stock(tmp_path / "one").state_dict(), stock(tmp_path / "many").state_dict()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0.01, atol=1e-6)
    export(out, tmp_path / "last", 3, dtype="float32", progress=False)
    ours = dropbydrop.load(out, bits=3).model.layers[1].mlp.down_proj.dense_weight()
    found = stock(tmp_path / "last").model.layers[1].mlp.down_proj.weight
    torch.testing.assert_close(found, ours, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["gemma2", "phi3", "qwen2"])
def test_families(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scaled embeddings, fused projections, biases: from a quantized model, in its own type."""
    monkeypatch.setattr(jobs, "EFFORTS", {"balanced": Effort(2, 1, 0)})
    source = save_tiny(tmp_path / "source", family, dtype=torch.bfloat16, chat=True)
    (tmp_path / "text.txt").write_text(" ".join(str(i * 7919 % 1000) for i in range(1500)))
    made = quantize.quantize(
        source,
        tmp_path / "out",
        calibration=tmp_path / "text.txt",
        windows=3,
        seq_len=32,
        progress=False,
    )
    export(made.out, tmp_path / "dense", 3, progress=False)
    assert (tmp_path / "dense" / "chat_template.jinja").exists()
    dense = stock(tmp_path / "dense")
    expected = {name: p.shape for name, p in stock(source).named_parameters()}
    assert {name: p.shape for name, p in dense.named_parameters()} == expected
    ours = logits(dropbydrop.load(made.out, bits=3, dtype=torch.float32))
    assert (logits(dense) - ours).abs().max() < 0.1 * ours.abs().max()
    export(made.out, tmp_path / "wide", 3, dtype="float32", progress=False)
    torch.testing.assert_close(logits(stock(tmp_path / "wide")), ours, rtol=1e-3, atol=1e-3)


# ---------------------------------------------------------------------------------- refused


def test_wrong_use(out: Path, tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    with pytest.raises(PrecisionError, match="2, 3, 4"):
        export(out, dense, 5, progress=False)
    with pytest.raises(DropError, match="bfloat16, float16, float32"):
        export(out, dense, 3, dtype="int4", progress=False)
    assert not dense.exists()
    dense.mkdir()
    (dense / "thesis.tex").write_text("years of work")
    with pytest.raises(DropError, match="exists"):
        export(out, dense, 3, progress=False)
    assert [p.name for p in dense.iterdir()] == ["thesis.tex"]


def test_missing_planes_matter_only_when_needed(tmp_path: Path) -> None:
    out = write_checkpoint(tmp_path / "out")
    (out / "plane-4.safetensors").unlink()
    export(out, tmp_path / "three", 3, progress=False)
    with pytest.raises(MissingPlaneError, match="plane 4"):
        export(out, tmp_path / "four", progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "three"]


def test_values_beyond_float16_are_refused(tmp_path: Path) -> None:
    base = tiny_llama()
    with torch.no_grad():
        base.model.norm.weight[3] = 1e6
    out = write_checkpoint(tmp_path / "out", base)
    with pytest.raises(DropError, match=r"model.norm.weight .*float16.*bfloat16"):
        export(out, tmp_path / "dense", dtype="float16", progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    export(out, tmp_path / "dense", progress=False)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EACCES, "no")])
def test_nothing_is_left_after_an_error(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def failing(*args: Any) -> None:
        raise error

    monkeypatch.setattr(folder_module.AtomicFolder, "publish", failing)
    told = DropError if isinstance(error, OSError) else type(error)
    with pytest.raises(told):
        export(out, tmp_path / "dense", 3, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_for_real(out: Path, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(DropError, match="the disk is full"):
            export(out, tmp_path / "dense", 3, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_the_command(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = tmp_path / "dense"
    argv = ["dropbydrop", "export", str(out), str(dense), "--bits", "2", "--json"]
    monkeypatch.setattr(sys, "argv", argv)
    cli.main()
    captured = capsys.readouterr()
    result = json.loads(captured.out.splitlines()[-1])
    assert result["bits"] == 2
    assert result["dtype"] == "bfloat16"
    assert result["bytes"] == sum(p.stat().st_size for p in dense.iterdir())
    with pytest.raises(SystemExit) as stop:
        cli.main()  # the folder exists now
    assert stop.value.code == 2
    assert "exists" in capsys.readouterr().err
