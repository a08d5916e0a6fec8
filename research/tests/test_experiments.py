"""The scripts in research/experiments run end to end on tiny models, and go on where they were."""

from __future__ import annotations

import importlib.util
import json
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from dropbydrop.coding.encoder import EFFORTS, Effort
from dropbydrop.data.self_generated import Writing
from dropbydrop.quantization import pipeline as quantize
from dropbydrop.quantization.config import QuantizeConfig
from dropbydrop.system.errors import DropError
from dropbydrop_research.baselines.additive import Training
from dropbydrop_research.theory.output_metric import between_rows, bounds, choose, damped, left
from tiny import save_tiny

FOLDER = Path(__file__).parents[1] / "experiments"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("benchmarks")
    save_tiny(root / "model", "llama-tied", chat=True)
    for name, step in (("one", 7919), ("two", 104729)):
        numbers = " ".join(str(i * step % 1000) for i in range(8000))
        (root / f"{name}.txt").write_text(numbers)
    return root


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a benchmark as from the command line; its JSON and everything that it printed."""
    monkeypatch.setitem(EFFORTS, "fast", Effort(2, 1, 0))
    threads = torch.get_num_threads()

    def start(module: ModuleType, *argv: object) -> tuple[dict[str, Any], str]:
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, argv)])
        module.main()
        printed = capsys.readouterr().out
        return json.loads(printed.splitlines()[-1]), printed

    yield start
    torch.set_num_threads(threads)


# ------------------------------------------------------------------------------- data_free


def test_variants() -> None:
    bench = load("data_free")
    assert bench.parse("default") == (0, Writing())
    found = bench.parse("temperature=0.8,seed=2,text_tokens=64")
    assert found == (2, Writing(temperature=0.8, text_tokens=64))
    for variant in bench.VARIANTS:
        bench.parse(variant)
    for wrong in ("heat=1", "temperature=hot", "temperature", "temperature=-1"):
        with pytest.raises(DropError, match="variant"):
            bench.parse(wrong)


def test_data_free(place: Path, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = load("data_free")
    argv = [place / "model", "--in-domain", place / "one.txt", "--text", place / "two.txt",
            "--folder", tmp_path / "work", "--windows", 3, "--seq-len", 32,
            "--eval-windows", 4]  # fmt: skip
    result, printed = run(bench, *argv, "--variants", "default", "temperature=0.5,text_tokens=8")
    names = ["in-domain", "default", "temperature=0.5,text_tokens=8"]
    assert [row["variant"] for row in result["rows"]] == names
    assert result["rows"][0]["excess_ratio"] == pytest.approx(1)
    assert result["rows"][0]["kl_ratio_interval"] == pytest.approx([1, 1])
    assert all(row["kl"] > 0 for row in result["rows"])
    assert sum(line.startswith("| ") for line in printed.splitlines()) == 4
    lines = [json.loads(x) for x in (tmp_path / "work" / "results.jsonl").read_text().splitlines()]
    assert lines[0]["calibration"]["kind"] == "text"
    assert lines[2]["calibration"]["temperature"] == 0.5
    assert lines[0]["reference"] == lines[2]["reference"], "the same windows of the same model"
    assert list((tmp_path / "work").glob("*.checkpoint")) == []

    before = quantize.quantize  # finished variants are not made again, a new one is
    made = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        made.append(args[1].name)
        return before(*args, **kwargs)

    monkeypatch.setattr(bench, "quantize", counted)
    again, _ = run(bench, *argv, "--variants", "default", "seed=1")
    assert made == ["seed=1.checkpoint"]
    assert again["rows"][:3] == result["rows"]
    assert again["rows"][3]["kl"] != result["rows"][1]["kl"]
    with pytest.raises(SystemExit, match="other settings"):
        run(bench, *argv, "--level", 2)


# ---------------------------------------------------------------------------------- layers


def test_layers(place: Path, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = load("layers")
    monkeypatch.setattr(bench, "WINDOWS", 4)
    monkeypatch.setattr(bench, "SEQ_LEN", 32)
    monkeypatch.setattr(bench, "Training", lambda: Training(kmeans_iterations=3, steps=3, epochs=2))
    anchors, out = tmp_path / "anchors.jsonl", tmp_path / "rows.jsonl"
    known = {"layer": 1, "kind": "q", "M": 3, "rel": [0.5, 0.2, 0.1]}
    anchors.write_text(json.dumps(known) + "\n")
    argv = [place / "model", "--text", place / "one.txt", "--anchors", anchors, "--out", out,
            "--preset", "fast"]  # fmt: skip
    result, printed = run(bench, *argv, "--matrices", "1 q,0 o")
    one, two = result["rows"]
    assert [(r["matrix"], r["group"]) for r in (one, two)] == [("1 q", "ordinary"),
                                                              ("0 o", "outliers")]  # fmt: skip
    for row in (one, two):
        for errors in (*row["nested"].values(), *row["aqlm"].values()):
            assert 1 > errors[0] > errors[1] > errors[2] > 0
        assert all(b < e for b, e in zip(row["bound"], row["nested"]["own"], strict=True))
        assert all(a > b > p for a, b, p in zip(
            row["aqlm_true_bits"], row["true_bits"], (2, 3, 4), strict=True))  # fmt: skip
    ratio = one["nested"]["own"][1] / one["aqlm"]["own"][1]
    assert result["means"]["ordinary"]["own"][1] == pytest.approx(ratio)
    assert sum("published AQLM 0.100000" in line for line in printed.splitlines()) == 1

    monkeypatch.setattr(bench, "measure", None)  # nothing is left to be measured
    again, _ = run(bench, *argv, "--matrices", "0 o,1 q")
    assert again["rows"] == [two, one]
    with pytest.raises(SystemExit, match="other settings"):
        run(bench, *argv, "--no-aqlm")


def test_layers_statistics_leave_the_first_tokens_out(place: Path) -> None:
    bench = load("layers")
    runner = bench.BlockRunner.open(place / "model")
    ids = torch.randint(0, 100, (6, 16), generator=torch.Generator().manual_seed(0))
    module = f"{runner.block_prefix(1)}.{bench.NAMES['up']}"
    found = bench.statistics(runner, ids, {module})[module]
    inputs: list[torch.Tensor] = []
    model = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    model.get_submodule(module).register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
    with torch.no_grad():
        model(ids)
    x = inputs[0]  # [6, 16, d_in]
    for gram, part, count in ((found.raw, x[:3], 48), (found.held_out, x[3:], 48),
                              (found.held_out_later, x[3:, 1:], 48)):  # fmt: skip
        rows = part.flatten(0, 1)
        torch.testing.assert_close(gram, rows.T @ rows / count, rtol=1e-4, atol=1e-5)
    energy = found.clipped.trace()
    assert 0 < float(energy) <= float(found.raw.trace())


# ------------------------------------------------------------------- rotations and codebooks


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Windows of 32 tokens instead of 1,024."""

    def shorten(module: ModuleType) -> ModuleType:
        real = module.load_windows
        monkeypatch.setattr(
            module, "load_windows", lambda f, t, n, _, **kw: real(f, t, n, 32, **kw)
        )
        return module

    return shorten


def test_rotations(place: Path, run: Any, small_windows: Any) -> None:
    bench = small_windows(load("rotations"))
    text = place / "one.txt"
    result, _ = run(bench, place / "model", "--text", text, "--windows", 2, "--blocks", "0,2")
    assert sum(row["matrices"] for row in result["rows"] if row["variant"] == "full") / 3 == 14
    for row in result["rows"]:
        assert 0 < row["error"] < 1
        assert row["true_bits"] > row["level"]
    assert set(result["seconds"]) == set(bench.VARIANTS)


def test_rotations_of_a_whole_model(
    place: Path, run: Any, small_windows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = small_windows(load("rotations"))
    real = bench.text_windows
    monkeypatch.setattr(bench, "text_windows", lambda f, t, _, n: real(f, t, 32, n))
    result, _ = run(bench, place / "model", "--text", place / "one.txt", "--windows", 2,
                    "--whole", place / "two.txt", "--eval-windows", 2)  # fmt: skip
    figures = result["whole"]["bits"]
    assert set(figures) == {f"{v}, {p} bits" for v in bench.VARIANTS for p in (2, 3, 4)}
    for variant in bench.VARIANTS:
        kl = [figures[f"{variant}, {p} bits"]["kl"] for p in (2, 3, 4)]
        assert kl[0] > kl[1] > kl[2] > 0


def test_codebooks(place: Path, run: Any, small_windows: Any) -> None:
    bench = small_windows(load("codebooks"))
    result, _ = run(bench, place / "model", "--text", place / "one.txt", "--windows", 2,
                    "--random", "64x64,64x128", "--preset", "fast")  # fmt: skip
    input_groups = list(dict.fromkeys(row["input_group"] for row in result["rows"]))
    assert input_groups[:2] == ["random 64 x 64", "random 64 x 128"]
    assert len(input_groups) == 6
    for row in result["rows"]:
        assert row["ratio"] < 1.0001
        assert row["bits_cost"] == 16 * row["level"] * 128 * 8 / row["weights"]


# ------------------------------------------------------- plans, speculation, progressive loading


@pytest.fixture(scope="module")
def out(place: Path) -> Path:
    """A checkpoint of the tiny model."""
    config = QuantizeConfig(
        calibration=str(place / "one.txt"), preset="fast", windows=4, seq_len=32
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(EFFORTS, "fast", Effort(2, 1, 0))
        quantize.quantize(place / "model", place / "out", config=config, progress=False)
    return place / "out"


def test_plans(place: Path, out: Path, tmp_path: Path, run: Any) -> None:
    pytest.importorskip("matplotlib")
    result, printed = run(
        load("plans"), out, "--text", place / "two.txt", "--reference", place / "model",
        "--averages", "2.5", "--windows", 3, "--seq-len", 32, "--picture", tmp_path / "plans",
    )  # fmt: skip
    rows = result["rows"]
    assert [row["uniform"] for row in rows] == [True, False, True, True]
    for row in rows:
        assert row["kl"] > 0
        if row["uniform"]:  # a level lies on the line
            assert row["saved"] == pytest.approx(0)
    assert rows[0]["bits"] < rows[1]["bits"] <= 2.5
    assert rows[-1]["predicted_to_highest"] < rows[0]["predicted_to_highest"]
    assert sum("%" in line for line in printed.splitlines()[1:-1]) == 1
    assert (tmp_path / "plans.svg").is_file()


def test_speculation(place: Path, out: Path, run: Any) -> None:
    result, _ = run(
        load("speculation"), out, "--text", place / "two.txt", "--drafts", 2, "--lengths", "2,0",
        "--prompts", 2, "--prompt", 8, "--tokens", 12,
    )  # fmt: skip
    assert [row["k"] for row in result["rows"]] == [2, "chosen"]
    assert all(row["equal"] == row["prompts"] == 2 for row in result["rows"])


def test_acceptance_needed() -> None:
    module = load("speculation")
    needed = module.acceptance_needed(0.5, 0.05)
    for shift, reached in ((0.001, True), (-0.001, False)):
        costs = module.Costs(needed + shift, 0.5, 0.05)
        assert (costs.speedup(costs.best()) >= 1.2) is reached
    assert module.acceptance_needed(1.0, 0.0) is None


def test_progressive(out: Path, run: Any) -> None:
    result, _ = run(load("progressive"), out, "--mb-per-s", 1)
    seconds = [row["seconds"] for row in result["levels"]]
    assert [row["bits"] for row in result["levels"]] == [2, 3, 4]
    assert seconds == sorted(seconds)
    assert result["levels"][-1]["token"] == result["all_first"]["token"]


# ----------------------------------------------------------------------------- output_side


def test_output_side(place: Path, run: Any) -> None:
    """End to end; whether it gains is measured on a real model (docs/log.md)."""
    save_tiny(place / "wide", "llama-tied", intermediate_size=352)
    bench = load("output_side")
    result, printed = run(
        bench, place / "wide", "--text", place / "one.txt", "--eval", place / "two.txt",
        "--windows", 4, "--eval-windows", 1, "--rows", 12, "--gate", 10,
    )  # fmt: skip
    without, with_metric = (result["kl"][name]["two.txt"] for name in ("without", "with"))
    assert without != with_metric
    for low, high in (*pairwise(without), *pairwise(with_metric)):
        assert 0 < high < low
    assert printed.count("two.txt") == 4


def test_between_rows_factors_the_metric() -> None:
    g = torch.randn(90, 40, generator=torch.Generator().manual_seed(0))
    metric = damped(g.T @ g, 0.1)
    for block in (1, 12, 40, 64):
        feedback, weights = between_rows(metric, block)
        eye = torch.eye(40, dtype=torch.float64)
        inverse = torch.linalg.inv(eye + feedback)
        d = inverse @ metric @ inverse.T
        torch.testing.assert_close(d.diagonal(), weights)
        edges = bounds(40, block)
        for first, last in pairwise(edges):
            assert not feedback[first:, first:last].any()
            torch.testing.assert_close(d[first:last, last:], 0 * d[first:last, last:])


def test_what_is_left_on_other_tokens() -> None:
    """Rows that err together: feedback that one half teaches helps the other, noise does not."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.eye(64) + 0.7 * torch.randn(64, 64, generator=generator) / 8
    halves = []
    for _ in range(2):
        g = torch.randn(4000, 64, generator=generator) @ mix
        halves.append(g.T @ g / len(g))
    assert choose(halves, 8)[1] < 0.9
    noise = [x.T @ x for x in torch.randn(2, 70, 64, generator=generator)]
    assert left(*noise, 0.1, 8) > 1
