"""End to end on a tiny model: quantize, store, load, evaluate; and doing it wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import dropbydrop
from dropbydrop.checkpoint import Checkpoint
from dropbydrop.checkpoint.config import LOG_FILE
from dropbydrop.cli import main as cli
from dropbydrop.coding.encoder import Effort
from dropbydrop.coding.objective import weighted_errors
from dropbydrop.data.calibration import Calibration, load_windows
from dropbydrop.data.text_files import text_windows
from dropbydrop.models.block_runner import BlockRunner
from dropbydrop.models.sources import load_tokenizer
from dropbydrop.quantization import job as jobs
from dropbydrop.quantization import pipeline as quantize
from dropbydrop.quantization.config import QuantizeConfig
from dropbydrop.runtime.modules import NestedLinear
from dropbydrop.system.errors import CalibrationError, DropError, PrecisionError
from tiny import save_tiny

QUICK = {"windows": 4, "seq_len": 64, "progress": False}


@pytest.fixture(scope="module", autouse=True)
def small_effort():
    """The presets' search effort is for real models."""
    patch = pytest.MonkeyPatch()
    patch.setattr(jobs, "EFFORTS", dict.fromkeys(jobs.EFFORTS, Effort(4, 1, 1)))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("model")
    save_tiny(root / "llama", "llama-tied")
    (root / "text.txt").write_text(" ".join(str(i * 7919 % 1000) for i in range(3000)))
    return root


@pytest.fixture(scope="module")
def made(folder):
    report = quantize.quantize(
        folder / "llama", folder / "out", [2, 3, 4], calibration=folder / "text.txt", **QUICK
    )
    return report


def run(*argv):
    """The command line in this process; returns the exit status."""
    old, sys.argv = sys.argv, ["dropbydrop", *map(str, argv)]
    try:
        cli.main()
    except SystemExit as stop:
        return stop.code or 0
    finally:
        sys.argv = old
    return 0


def test_every_level_is_closer_to_the_original(folder, made):
    original = AutoModelForCausalLM.from_pretrained(folder / "llama", dtype=torch.float32).eval()
    # Text like that of the calibration: a handful of windows says nothing about other tokens.
    ids, _ = text_windows(folder / "text.txt", load_tokenizer(folder / "llama"), 64, 8)
    with torch.no_grad():
        target = original(ids).logits
        distance = [
            float((dropbydrop.load(made.out, bits=p)(ids).logits - target).square().mean())
            for p in (2, 3, 4)
        ]
    assert distance[0] > distance[1] > distance[2]
    assert distance[2] < 0.2 * float(target.var())


def test_the_log_names_every_matrix_and_its_errors_are_those_of_the_stored_weights(folder, made):
    lines = [json.loads(s) for s in (made.out / LOG_FILE).read_text().splitlines()]
    original = AutoModelForCausalLM.from_pretrained(folder / "llama", dtype=torch.float32)
    loaded = dropbydrop.load(made.out, bits=4)
    names = {n for n, m in loaded.named_modules() if isinstance(m, NestedLinear)}
    assert {line["module"] for line in lines} == names
    runner = BlockRunner.open(folder / "llama")
    ids = load_windows(folder / "text.txt", load_tokenizer(folder / "llama"), 4, 64).ids
    statistics = runner.collect_statistics(0, runner.block(0), runner.embed(ids))
    by_module = {
        m: statistics.grams[input_group.name]
        for input_group in statistics.input_groups
        for m in input_group.modules
    }
    for line in lines[: len(by_module)]:
        w = original.get_submodule(line["module"]).weight.detach()
        w4 = loaded.get_submodule(line["module"]).dense_weight(torch.float32)
        error = weighted_errors(w, [w4], by_module[line["module"]])[0]
        assert line["rel_error"]["4"] == pytest.approx(error, rel=1e-2)


def test_true_bits_count_everything(made):
    checkpoint = Checkpoint.open(made.out)
    model = dropbydrop.load(made.out, bits=2)
    linears = [m for m in model.modules() if isinstance(m, NestedLinear)]
    weights = sum(m.in_features * m.out_features for m in linears)
    stored = sum(
        p.numel() * p.element_size()
        for m in linears
        for n, p in m.state_dict().items()  # as in the files; memory pads rows
        if "codes" in n or "scales" in n
    )
    assert checkpoint.true_bits(2) > 8 * stored / weights
    sizes = [checkpoint.bytes_at(p) for p in (2, 3, 4)]
    assert sizes == sorted(sizes)
    assert made.to_dict()["levels"] == [2, 3, 4]


def test_same_seed_same_bytes_other_seed_other_bytes(folder, made):
    kw = {"calibration": folder / "text.txt", **QUICK}
    again = quantize.quantize(folder / "llama", folder / "again", [2, 3, 4], **kw)
    other = quantize.quantize(folder / "llama", folder / "other", [2, 3, 4], seed=1, **kw)
    plane = "plane-1.safetensors"
    assert (again.out / plane).read_bytes() == (made.out / plane).read_bytes()
    assert (other.out / plane).read_bytes() != (made.out / plane).read_bytes()


@pytest.mark.parametrize("bits", [[3, 4, 5], [1, 2], [4]])
def test_other_levels(folder, bits, monkeypatch):
    from dropbydrop.coding import codebooks as universal

    # Real sets for rare levels take a while to train; the path is the same with a quick one.
    monkeypatch.setattr(universal, "TRAINING", {"samples": 2048, "rounds": 1, "beam": 1, "seed": 0})
    monkeypatch.setenv("DROPBYDROP_CACHE", str(folder / "cache"))
    universal.universal_set.cache_clear()
    out = folder / ("levels" + "".join(map(str, bits)))
    try:
        report = quantize.quantize(
            folder / "llama", out, bits, calibration=folder / "text.txt", **QUICK
        )
    finally:
        universal.universal_set.cache_clear()
    assert list(report.levels) == bits
    assert dropbydrop.precision(dropbydrop.load(out)) == bits[-1]
    unsupervised = next(p for p in range(1, 9) if p not in bits)
    with pytest.raises(PrecisionError, match=str(bits[0])):
        dropbydrop.load(out, bits=unsupervised)


def test_ready_windows(folder, made):
    """Windows that the caller made or chose: the same bytes as from the text they come from."""
    tokenizer = load_tokenizer(folder / "llama")
    text = load_windows(folder / "text.txt", tokenizer, QUICK["windows"], QUICK["seq_len"])
    again = quantize.quantize(
        folder / "llama", folder / "ready", [2, 3, 4], calibration=text, progress=False
    )
    for plane in (f"plane-{p}.safetensors" for p in (1, 2, 3, 4)):
        assert (again.out / plane).read_bytes() == (made.out / plane).read_bytes()
    kept = json.loads((again.out / "config.json").read_text())["quantization_config"]
    assert kept["provenance"]["calibration"] == text.description
    for ids, says in (
        (text.ids[0], r"shape \[64\]"),
        (text.ids.float(), "float32"),
        (text.ids[:, :1], r"T from 2 to the 256"),
        (text.ids + 9000, "vocabulary of 384"),
    ):
        with pytest.raises(CalibrationError, match=says):
            quantize.quantize(folder / "llama", folder / "no", calibration=Calibration(ids, {}))
    with pytest.raises(CalibrationError, match="5 are asked for"):
        quantize.quantize(folder / "llama", folder / "no", calibration=text, windows=5)
    assert not (folder / "no").exists()


def test_head_bits(folder):
    kw = {"calibration": folder / "text.txt", **QUICK}
    report = quantize.quantize(folder / "llama", folder / "h16", [2, 3, 4], head_bits=16, **kw)
    kept = {k["name"]: k["bits"] for k in report.kept}
    assert kept["model.embed_tokens"] == 16
    model = dropbydrop.load(report.out, bits=2)
    original = AutoModelForCausalLM.from_pretrained(folder / "llama", dtype=torch.float32)
    want = original.get_input_embeddings().weight
    torch.testing.assert_close(
        model.get_input_embeddings().weight.float(), want, rtol=1e-3, atol=1e-4
    )


def test_the_command_line(folder, made, capsys):
    out = folder / "cli"
    text = folder / "text.txt"
    assert run("quantize", folder / "llama", out, "--calibration", text, "--windows", 4,
               "--seq-len", 64, "--preset", "fast", "--json") == 0  # fmt: skip
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(result["bits"]) == {"2", "3", "4"}
    assert result["peak_gib"] > 0
    assert run("info", out, "--json") == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["levels"]["2"]["loadable"] is True
    assert result["findings"] == []
    assert run("eval", out, "--text", text, "--seq-len", 64, "--windows", 3, "--bits", "2,4",
               "--reference", folder / "llama", "--json") == 0  # fmt: skip
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["text"] == "text.txt"
    assert result["seq_len"] == 64
    assert result["windows"] == 3
    assert result["bits"]["2"]["kl"] > result["bits"]["4"]["kl"] > 0
    assert {"ppl", "nll", "kl", "true_bits", "true_bits_whole", "bytes"} <= set(result["bits"]["2"])
    assert result["reference"]["ppl"] > 1
    assert run("generate", out, "--bits", 3, "--prompt", "12 34", "--max-new-tokens", 4,
               "--json") == 0  # fmt: skip
    assert "text" in json.loads(capsys.readouterr().out.splitlines()[-1])
    assert run("info", "--kernels") == 0
    assert "torch" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["quantize", "{m}", "{new}", "--bits", "two"], "whole numbers"),
        (["quantize", "{m}", "{new}", "--bits", "2,9"], "1 to 8"),
        (["quantize", "{m}", "{new}", "--preset", "heroic"], "heroic"),
        (["quantize", "{m}", "{new}", "--head-bits", "6"], "8, 16"),
        (["quantize", "{r}/nowhere", "{new}"], "nowhere"),
        (["quantize", "{m}", "{new}", "--calibration", "{r}/none.txt"], "none.txt"),
        (["quantize", "{m}", "{new}", "--calibration", "{r}/text.txt", "--windows", "9999"],
         "tokens"),
        (["quantize", "{m}", "{o}", "--calibration", "{r}/text.txt"], "exist"),
        (["info", "{m}"], "not"),
        (["info"], "checkpoint folder"),
        (["eval", "{o}", "--text", "{r}/text.txt", "--bits", "5"], "5"),
        (["eval", "{o}", "--text", "{r}/text.txt", "--seq-len", "9999"], "9,?999"),
        (["generate", "{o}", "--prompt", "a", "--bits", "1"], "2, 3, 4"),
    ],
)  # fmt: skip
def test_wrong_use_says_what_and_leaves_nothing(folder, made, capsys, argv, says):
    import re

    names = {"m": folder / "llama", "o": made.out, "r": folder, "new": folder / "new"}
    before = sorted(p.name for p in folder.iterdir())
    assert run(*[a.format(**names) for a in argv]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert re.search(says, error), error
    assert sorted(p.name for p in folder.iterdir()) == before


def test_without_progress_nothing_is_shown(folder, tmp_path, capsys):
    """Not even of the text that the model writes."""
    options = {"windows": 2, "seq_len": 16}
    for progress in (True, False):
        quantize.quantize(folder / "llama", tmp_path / str(progress), progress=progress, **options)
        shown = capsys.readouterr().err
        assert ("writing calibration text" in shown) == progress
    assert not shown


def test_an_unwritable_place_and_an_error_in_the_middle_leave_nothing(folder, monkeypatch):
    def broken(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("dropbydrop.quantization.encode_blocks.encode_group", broken)
    before = sorted(p.name for p in folder.iterdir())
    with pytest.raises(KeyboardInterrupt):
        quantize.quantize(
            folder / "llama", folder / "broken", calibration=folder / "text.txt", **QUICK
        )
    assert sorted(p.name for p in folder.iterdir()) == before
    with pytest.raises(DropError):
        quantize.quantize(
            folder / "llama",
            folder / "no" / "such" / "out",
            calibration=folder / "text.txt",
            **QUICK,
        )


def test_dimensions_that_groups_do_not_divide_are_refused_by_name(tmp_path):
    save_tiny(tmp_path / "odd", "llama", intermediate_size=84)
    (tmp_path / "text.txt").write_text(" ".join(map(str, range(3000))))
    with pytest.raises(DropError, match="down_proj"):
        quantize.quantize(
            tmp_path / "odd", tmp_path / "out", calibration=tmp_path / "text.txt", **QUICK
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_a_terminated_command_leaves_nothing(folder):
    before = sorted(p.name for p in folder.iterdir())
    argv = ["quantize", str(folder / "llama"), str(folder / "ended"), "--bits", "1,2",
            "--calibration", str(folder / "text.txt"), "--windows", "4"]  # fmt: skip
    code = (  # ends itself in the middle of the work
        "import os, signal, sys; from dropbydrop.cli import main as cli\n"
        "from dropbydrop.quantization import encode_blocks as run\n"
        "run.encode_group = lambda *a, **k: os.kill(os.getpid(), signal.SIGTERM)\n"
        f"sys.argv[1:] = {argv!r}; cli.main()"
    )
    environment = {k: v for k, v in os.environ.items() if k != "RANK"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.returncode == 130, done.stderr
    assert "nothing was left half-written" in done.stderr
    assert sorted(p.name for p in folder.iterdir()) == before


def test_the_installed_command_starts():
    done = subprocess.run(
        [sys.executable, "-m", "dropbydrop", "--help"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0
    for command in ("quantize", "info", "eval", "generate"):
        assert command in done.stdout
    assert Path(dropbydrop.__file__).name == "__init__.py"


@pytest.mark.parametrize("wrong", [{"windows": 0}, {"windows": -1}, {"seq_len": 1}])
def test_windows_out_of_range_are_refused_with_the_settings(wrong):
    with pytest.raises(DropError, match="give 1 or more, of 2 to"):
        QuantizeConfig(**wrong)
