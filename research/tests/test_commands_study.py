"""`dropbydrop study …` end to end on a tiny model and a tiny checkpoint, in this process."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import dropbydrop
from dropbydrop.checkpoint import Checkpoint
from dropbydrop.cli import main as cli
from dropbydrop.coding import codebooks as universal
from dropbydrop.coding.codebook_set import BytesSet
from dropbydrop.coding.codebooks import default_lambdas, train
from dropbydrop.coding.encoder import Effort
from dropbydrop.models.block_runner import BlockRunner
from dropbydrop.models.sources import Source, load_tokenizer
from dropbydrop.models.statistics import CLIP
from dropbydrop.quantization import job as jobs
from dropbydrop.quantization import pipeline as quantize
from dropbydrop.system.cache import cache_dir
from dropbydrop.system.errors import CalibrationError, DropError, FormatError
from dropbydrop_research.study import cache, encode, gaussian, paper
from dropbydrop_research.study.cache import GramOptions, find_grams, grams_for
from dropbydrop_research.study.checkpoint import reconstruction
from dropbydrop_research.study.data import read_weight
from dropbydrop_research.study.rows import read_results
from dropbydrop_research.theory import weighted_distortion
from tiny import save_tiny, sign

SIZES = ("--windows", "8", "--seq-len", "64")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a text, a checkpoint of the model, and a cache of its own."""
    root = tmp_path_factory.mktemp("study")
    save_tiny(root / "llama", "llama-tied")
    (root / "text.txt").write_text(" ".join(str(i * 7919 % 1000) for i in range(3000)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "EFFORTS", dict.fromkeys(jobs.EFFORTS, Effort(4, 1, 1)))
        quantize.quantize(
            root / "llama", root / "out", [2, 3, 4], calibration=root / "text.txt",
            windows=8, seq_len=64, progress=False,
        )  # fmt: skip
    return root


@pytest.fixture(autouse=True)
def own_cache(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DROPBYDROP_CACHE", str(root / "cache"))


def run(*argv: object) -> int:
    """The command line in this process; returns the exit status."""
    old, sys.argv = sys.argv, ["dropbydrop", "study", *map(str, argv)]
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.argv = old
    return 0


def last_json(capsys: pytest.CaptureFixture[str]) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


# ---- statistics and their cache ---------------------------------------------------------------


def test_statistics_are_measured_once_and_named_by_what_decides_them(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Source("tiny", root / "llama")
    options = GramOptions(str(root / "text.txt"), None, 8, 64, 0)
    first = grams_for(source, options, tmp_path)
    group = next(iter(first))
    assert group.tokens == 8 * 64
    assert group.clip == CLIP
    assert group.held is not None
    assert not torch.equal(group.held, group.gram)
    assert find_grams(source.folder, tmp_path).folder == first.folder
    with monkeypatch.context() as patch:
        patch.setattr(cache, "collect", lambda *a, **k: pytest.fail("measured again"))
        assert grams_for(source, options, tmp_path).folder == first.folder
    copy = tmp_path / "same.txt"  # another path, the same text
    copy.write_bytes((root / "text.txt").read_bytes())
    same = GramOptions(str(copy), None, 8, 64, 0)
    assert grams_for(source, same, tmp_path).folder == first.folder
    for change in ({"windows": 7}, {"seed": 1}, {"seq_len": 32}, {"held_out": str(copy)}):
        other = GramOptions(**(options.__dict__ | change))
        assert cache._key(other) != cache._key(options)
    with pytest.raises(CalibrationError, match="absent"):
        grams_for(source, GramOptions("absent.txt"), tmp_path)


def test_held_out_windows_are_not_those_of_the_calibration(root: Path) -> None:
    """Calibration ids are those that `quantize` draws; held-out ones differ from all of them."""
    from dropbydrop.data.calibration import load_windows

    source = Source("tiny", root / "llama")
    text = str(root / "text.txt")
    ids, held = cache._tokens(source, GramOptions(text, None, 8, 64, 3))
    want = load_windows(text, load_tokenizer(source.folder), 8, 64, 3).ids
    assert torch.equal(ids, want)
    assert held.shape == (2, 64)
    assert not (held[:, None] == ids[None]).all(-1).any()
    ids, held = cache._tokens(source, GramOptions("self", None, 4, 16, 3))
    assert (ids.shape, held.shape) == ((4, 16), (1, 16))
    assert not (held[:, None] == ids[None]).all(-1).any()


# ---- the commands -----------------------------------------------------------------------------


@pytest.fixture
def few_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing panels is what takes time."""
    monkeypatch.setattr(gaussian, "_spread", lambda matrices: matrices[:2])


def test_gaussian(
    root: Path, tmp_path: Path, few_panels: None, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    empty = ("--cache", tmp_path / "none")
    assert run("gaussian", root / "llama", "--json", *empty) == 0
    result = last_json(capsys)
    assert result["model"] == "llama"
    assert len(result["matrices"]) == 21
    assert result["massive_activations"] is None
    out = tmp_path / "plots"
    assert run("gaussian", root / "llama", "--calibration", root / "text.txt", *SIZES,
               "--out", out) == 0  # fmt: skip
    shown = capsys.readouterr().out
    assert "massive activations: token energy" in shown
    assert "negentropy" in shown
    written = json.loads((out / "gaussian.json").read_text())
    assert len(written["massive_activations"]) == 12
    stems = ("figure-3", "figure-9", "figure-9b")
    for name in (f"{s}.{kind}" for s in stems for kind in ("png", "svg")):
        assert (out / name).stat().st_size > 1000
    assert run("gaussian", root / "llama", "--json") == 0  # finds what was measured
    assert last_json(capsys)["massive_activations"] == written["massive_activations"]


def test_bound_of_a_model(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("bound", root / "llama", "--bits", "1,3", "--calibration", root / "text.txt",
               *SIZES, "--json") == 0  # fmt: skip
    statistics = capsys.readouterr()
    result = json.loads(statistics.out.splitlines()[-1])
    assert result["rates"] == {"1": 1.0, "3": 3.0}
    assert result["summary"]["1"]["reached"] is None
    assert "hardest matrices" in statistics.err
    for row in result["matrices"]:
        assert 0 < row["levels"]["3"]["bound"] < row["levels"]["1"]["bound"] < 1


def test_bound_of_a_checkpoint_with_trellis_planes(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside its own floor, and nearer to the bound than byte planes."""
    quantize.quantize(
        root / "llama", tmp_path / "trellis", [2, 4], calibration=root / "text.txt", windows=8,
        seq_len=64, code="trellis", preset="fast", progress=False,
    )  # fmt: skip
    gaps = []
    for out in (tmp_path / "trellis", root / "out"):
        assert run("bound", out, "--model", root / "llama", "--calibration", root / "text.txt",
                   "--bits", "2,4", "--json") == 0  # fmt: skip
        result = last_json(capsys)
        gaps.append([result["summary"][level]["gap_db"] for level in ("2", "4")])
        floor = result["structural_db"][result["structural"]]["2"]
        assert floor == pytest.approx({"trellis": 0.445, "dedicated": 1.8}[result["structural"]],
                                      abs=0.01)  # fmt: skip
    assert all(one < other for one, other in zip(*gaps, strict=True))


def test_bound_of_a_checkpoint(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """True bits as rates; reached errors are those of the stored weights; sizes as recorded."""
    pytest.importorskip("matplotlib")
    out = tmp_path / "plots"
    assert run("bound", root / "out", "--model", root / "llama", "--calibration",
               root / "text.txt", "--bits", "4,2", "--out", out) == 0  # fmt: skip
    shown = capsys.readouterr().out
    for said in ("holds for the Gaussian ensemble", "not for the", "most left to gain", "premise"):
        assert said in shown
    result = json.loads((out / "bound.json").read_text())
    checkpoint = Checkpoint.open(root / "out")
    assert result["rates"] == {str(p): checkpoint.true_bits(p) for p in (2, 4)}
    assert result["matrices"][0]["tokens"] == 8 * 64  # 8 windows of 64, from the provenance
    assert (out / "bound.svg").is_file()
    assert (out / "bound-4.png").is_file()
    ranking = result["ranking"]["2"]
    assert len(ranking) == 21
    loaded = dropbydrop.load(root / "out", bits=2)
    runner = BlockRunner.open(root / "llama")
    options = GramOptions(str(root / "text.txt"), None, 8, 64, 0)
    grams = {m: s.gram for s in grams_for(Source("", root / "llama"), options) for m in s.modules}
    for row in ranking[:3]:
        w = read_weight(runner, row["module"])
        w_hat = loaded.get_submodule(row["module"]).dense_weight(torch.float32)
        h = grams[row["module"]]
        error = weighted_distortion(w, w_hat, h) / weighted_distortion(w, 0 * w, h)
        assert row["reached"] == pytest.approx(error, rel=1e-6)
        assert row["gap_db"] > 0


def test_reconstruction_serves_every_level_from_one_model(root: Path) -> None:
    w = reconstruction(root / "out", [2, 4])
    name = "model.layers.1.mlp.down_proj"
    for p in (4, 2):
        want = dropbydrop.load(root / "out", bits=p).get_submodule(name)
        assert torch.equal(w(name, p), want.dense_weight(torch.float32))


def small_sets(levels: tuple[int, ...]) -> BytesSet:
    return BytesSet.of(train(levels, default_lambdas(levels), samples=2048, rounds=2, beam=2))


def test_refinement_with_codebooks_of_the_cache(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(universal, "TRAINING", {"samples": 2048, "rounds": 2, "beam": 2, "seed": 0})
    monkeypatch.setattr(universal, "_FOLDER", tmp_path)  # nothing ships
    universal.universal_set.cache_clear()
    options = ("--levels", "1,2", "--width", 24, "--preset", "fast", "--json")
    assert run("refinement", *options) == 0
    universal.universal_set.cache_clear()
    statistics = capsys.readouterr()
    result = json.loads(statistics.out.splitlines()[-1])
    assert [case["case"] for case in result["cases"]] == ["square", "wide", "deficient"]
    assert all(case["decreasing"] for case in result["cases"])
    assert result["overhead"] == pytest.approx(2 / 3)
    assert "nested: one code" in statistics.err
    sets = list((cache_dir() / "universal").iterdir())
    assert len(sets) == 3  # 1-2, 1 and 2


def test_the_page(
    root: Path,
    tmp_path: Path,
    few_panels: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(encode, "universal_set", small_sets)
    monkeypatch.setattr(  # all of them are drawn in test_study_refinement.py
        paper, "_FIGURES", [e for e in paper._FIGURES if e.name in ("3", "6", "8", "12", "bound")]
    )
    evaluated = tmp_path / "eval.json"
    evaluated.write_text("a table\n" + json.dumps(EVALUATION) + "\n")
    assert run("paper", root / "llama", "--checkpoint", root / "out", "--calibration",
               root / "text.txt", "--results", evaluated, "--levels", "1,2", "--width", 16,
               "--preset", "fast", "--out", tmp_path / "page", "--json") == 0  # fmt: skip
    report = last_json(capsys)
    assert set(report["missing"]) == {"8"}
    page = (tmp_path / "page" / "index.html").read_text()
    for said in ("Figure 3", "Figure 12", "Distance of the model"):
        assert said in page
    assert json.loads((tmp_path / "page" / "bound.json").read_text())["model"] == "out"


# ---- saved results ----------------------------------------------------------------------------

EVALUATION = {
    "bits": {"2": {"ppl": 31.0, "true_bits": 2.1}, "3": {"ppl": 22.0, "true_bits": 3.1}},
    "reference": {"ppl": 19.0},
    "tasks": {
        "models": {
            "reference": {"mean": {"acc": 0.5, "acc_stderr": 0.01}},
            "2": {"mean": {"acc": 0.4, "acc_stderr": 0.01}, "true_bits": 2.1},
        }
    },
}


def test_rows_of_saved_results(tmp_path: Path) -> None:
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    one.write_text(json.dumps(EVALUATION))
    cost = {"seconds": {"total": 90.0}, "bits": {"2": {"bytes": 5}, "3": {"bytes": 7}}}
    two.write_text("noise\n" + json.dumps(cost | {"method": "other"}))
    rows = read_results([one, two, one])
    assert rows["cost"] == [{"method": "other", "seconds": 90.0, "bytes": 7}]
    assert rows["perplexity"] == [
        {"method": "Drop-by-Drop", "bits": 2.1, "ppl": 31.0},
        {"method": "Drop-by-Drop", "bits": 3.1, "ppl": 22.0},
        {"method": "full precision", "bits": None, "ppl": 19.0},
    ]
    assert [(r["method"], r["bits"]) for r in rows["accuracy"]] == [
        ("full precision", None),
        ("Drop-by-Drop", 2.1),
    ]
    unfit = ('"y"', "NaN", "Infinity", "true", "1" + "0" * 400)
    for bad in (
        "",
        "no json",
        "[1]",
        "{}",
        *(f'{{"bits": {{"2": {{"ppl": {x}}}}}}}' for x in unfit),
    ):
        one.write_text(bad)
        with pytest.raises(FormatError, match=r"one\.json"):
            read_results([one])


def test_two_at_once_do_not_measure_the_same(root: Path, tmp_path: Path) -> None:
    source, options = (
        Source("tiny", root / "llama"),
        GramOptions(str(root / "text.txt"), None, 8, 64),
    )
    first = grams_for(source, options, tmp_path)
    shutil.rmtree(first.folder)
    with (
        cache._alone(first.folder),
        pytest.raises(DropError, match="another process is measuring"),
    ):
        grams_for(source, options, tmp_path)
    assert len(grams_for(source, options, tmp_path)) == len(first)
    assert [path.name for path in tmp_path.iterdir()] == [first.folder.name]


def test_a_matrix_of_one_number_is_left_out(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "llama", tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    tensors[f"{name}.weight"].fill_(0.5)
    save_file(tensors, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    assert gaussian.run(tmp_path / "m")["skipped"] == [name]


@pytest.mark.parametrize("recorded", ["x", {"windows": "x"}, {"seq_len": 1.5}, {"seed": [1]}])
def test_provenance_of_others_is_not_believed(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], recorded: Any
) -> None:
    shutil.copytree(root / "out", tmp_path / "q")
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    config["quantization_config"]["provenance"]["calibration"] = recorded
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    sign(tmp_path / "q")
    assert run("bound", str(tmp_path / "q"), "--model", str(root / "llama")) == 2
    assert "provenance" in capsys.readouterr().err


# ---- wrong use --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["gaussian", "{r}/nowhere"], "nowhere"),
        (["bound", "{m}", "--bits", "0,2"], "from 1 to 8"),
        (["bound", "{m}", "--bits", "two"], "whole numbers"),
        (["bound", "{m}", "--model", "{m}"], "not a dropbydrop checkpoint"),
        (["bound", "{o}"], "Name its folder with --model"),
        (["bound", "{o}", "--model", "{r}/other"], "another model"),
        (["bound", "{o}", "--model", "{r}/heads"], "not the model"),
        (["bound", "{o}", "--model", "{m}", "--bits", "5"], "2, 3, 4"),
        (["bound", "{m}", "--calibration", "{r}/none.txt"], "none.txt"),
        (["bound", "{m}", "--calibration", "{r}/text.txt", "--windows", "9999"], "tokens"),
        (["refinement", "--preset", "heroic"], "heroic"),
        (["refinement", "--width", "20"], "multiple of 8"),
        (["refinement", "--width", str(10**20)], "less than or equal to 8192"),
        (["refinement", "--seed", str(2**64)], "less than or equal to 4294967295"),
        (["gaussian", "{m}", "--seed", "-1"], "greater than or equal to 0"),
        (["refinement", "--out", "{r}/text.txt"], "cannot be a folder"),
        (["paper", "{m}", "--results", "{r}/text.txt", "--out", "{r}/page"], "JSON line"),
    ],
)
def test_wrong_use_says_what(
    root: Path, capsys: pytest.CaptureFixture[str], argv: list[str], says: str
) -> None:
    others = {"other": {"intermediate_size": 96}, "heads": {"num_key_value_heads": 4}}
    for name, changes in others.items():
        if f"{{r}}/{name}" in argv:
            save_tiny(root / name, "llama-tied", **changes)
    if importlib.util.find_spec("matplotlib") is None and "--out" in argv:
        pytest.skip("matplotlib is not installed")
    names = {"m": root / "llama", "o": root / "out", "r": root}
    assert run(*[a.format(**names) for a in argv]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert says in error.replace("\n", " ")


@pytest.mark.parametrize("file", ["tokenizer.json", "model.safetensors", "config.json"])
def test_statistics_of_another_model_are_not_taken_from_the_cache(
    root: Path, tmp_path: Path, file: str
) -> None:
    """Each file that decides them is compared as a whole: one changed byte is another model."""
    folder = tmp_path / "model"
    shutil.copytree(root / "llama", folder)
    options = GramOptions(str(root / "text.txt"), None, 8, 64, 0)
    grams_for(Source("tiny", folder), options, tmp_path / "cache")
    assert find_grams(folder, tmp_path / "cache") is not None
    raw = (folder / file).read_bytes()
    (folder / file).write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    assert find_grams(folder, tmp_path / "cache") is None
