"""`quantize` with tuning: what it writes, what it refuses, and what is left of it."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dropbydrop.checkpoint import Checkpoint
from dropbydrop.checkpoint import journal as resume
from dropbydrop.cli import main as cli
from dropbydrop.coding.encoder import Effort
from dropbydrop.data.calibration import Calibration
from dropbydrop.quantization import fingerprint, tuned
from dropbydrop.quantization import job as jobs
from dropbydrop.quantization import pipeline as quantize
from dropbydrop.quantization.config import QuantizeConfig
from dropbydrop.quantization.log import Report
from dropbydrop.system.errors import CalibrationError, DropError, UnsupportedModelError
from dropbydrop.tuning import distill
from dropbydrop.tuning.config import EPOCHS
from dropbydrop.tuning.pipeline import tune
from kills import SERVER, die_at, die_at_operation
from tiny import save_tiny

SETTINGS: dict[str, Any] = {"windows": 3, "seq_len": 32, "device": "cpu", "progress": False}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, one with experts, and texts, of which the short one is too short to tune on
    by default."""
    root = tmp_path_factory.mktemp("tuned")
    save_tiny(root / "model", "qwen2", max_position_embeddings=32, num_hidden_layers=2)
    save_tiny(root / "experts", "mixtral", max_position_embeddings=32)
    (root / "text.txt").write_text(" ".join(str(i * 7919 % 1000) for i in range(1500)))
    (root / "short.txt").write_text(" ".join(str(i * 7919 % 1000) for i in range(100)))
    return root


def run(place: Path, out: Path, **changes: Any) -> Report:
    """A run in this process, with a search effort for toys and a state of tuning every 4 steps."""
    settings = {**SETTINGS, "calibration": place / "text.txt", "tune": True, **changes}
    before, threads = jobs.EFFORTS, torch.get_num_threads()
    jobs.EFFORTS = dict.fromkeys(before, Effort(2, 1, 0))
    torch.set_num_threads(1)
    try:
        return quantize.quantize(settings.pop("model", place / "model"), out, **settings)
    finally:
        jobs.EFFORTS = before
        torch.set_num_threads(threads)


def ready() -> Calibration:
    """Windows of the caller's: few, so that a run is short."""
    generator = torch.Generator().manual_seed(0)
    return Calibration(torch.randint(0, 384, (8, 24), generator=generator), {"kind": "mine"})


def files(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


# ------------------------------------------------------------------------------ what is written


def test_it_is_quantize_and_then_tune(
    place: Path, tmp_path: Path, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """File by file, the provenance and the model card too."""
    monkeypatch.setitem(EPOCHS, "distill", 1)
    run(place, tmp_path / "plain", tune=None, code=code)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    after = tune(
        tmp_path / "plain", tmp_path / "expected", model=place / "model", device="cpu",
        calibration=place / "text.txt", progress=False,
    )  # fmt: skip
    torch.set_num_threads(threads)
    report = run(place, tmp_path / "out", code=code)
    assert files(tmp_path / "out") == files(tmp_path / "expected")
    assert report.tuning is not None
    assert report.tuning.loss == after.loss
    assert report.to_dict()["tuning"]["steps"] == after.steps
    assert {p.name for p in tmp_path.iterdir()} == {"plain", "expected", "out"}
    plain, out = (Checkpoint.open(tmp_path / name) for name in ("plain", "out"))
    assert "tuning" not in plain.quantization.provenance
    assert "tune" not in plain.quantization.provenance
    done = out.quantization.provenance["tuning"]
    assert [step["method"] for step in done] == ["distill"]
    assert {int(p): pair for p, pair in done[0]["loss"].items()} == after.loss
    assert "## Tuned: distill" in (out.path / "README.md").read_text()
    planes = [name for names in plain.manifest.planes for name in names]
    assert all(files(plain.path)[name] == files(out.path)[name] for name in planes)
    assert files(plain.path)["model.safetensors"] != files(out.path)["model.safetensors"]


def test_ready_windows_are_tuned_on(place: Path, tmp_path: Path) -> None:
    report = run(place, tmp_path / "out", calibration=ready(), windows=None)
    assert report.tuning is not None
    done = Checkpoint.open(report.out).quantization.provenance["tuning"][0]
    sizes = {"windows": 8, "seq_len": 24, "tokens": 192}
    assert done["calibration"] == {"kind": "mine", **sizes}
    config = QuantizeConfig(tune=True, device="cpu", preset="fast")
    long = Calibration(torch.arange(70 * 30).remainder(384).view(70, 30), {})
    asked = jobs.prepare(place / "model", config, ready=long)
    settings, windows = asked.tuning()
    assert windows is not None
    assert (settings.windows, settings.seq_len) == (64, 30)
    assert torch.equal(windows.ids, long.ids[:64])
    with pytest.raises(CalibrationError, match="sets one apart"):
        jobs.prepare(place / "model", config, ready=Calibration(long.ids[:1], {}))


def test_an_old_checkpoint_is_replaced_at_the_end(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    old = files(run(place, out, tune=False).out)
    with pytest.raises(DropError, match="exists"):
        run(place, out)
    assert files(out) == old
    run(place, out, calibration=ready(), windows=None, overwrite=True)
    assert "tuning" in Checkpoint.open(out).quantization.provenance
    assert list(tmp_path.iterdir()) == [out]


# ----------------------------------------------------------------------- when it is done, and not


def settled(
    place: Path, patch: pytest.MonkeyPatch, gpu: bool, reason: str = "", **changes: Any
) -> jobs.Job:
    """A request that was checked; with `gpu`, as on a device that there is not here.

    reason: why there are no gradients.
    """
    patch.setattr(jobs, "EFFORTS", dict.fromkeys(jobs.EFFORTS, Effort(2, 1, 0)))
    if gpu or reason:
        patch.setattr(jobs, "try_gradients", lambda runner: reason)
    settings = {**SETTINGS, "calibration": str(place / "text.txt"), **changes}
    settings.pop("progress")
    job = jobs.prepare(place / settings.pop("model", "model"), QuantizeConfig(**settings))
    if not gpu:
        return job

    class Runner:
        """The runner, on another device by its own word."""

        device = torch.device("cuda:0")

        def __getattr__(self, name: str) -> Any:
            return getattr(job.runner, name)

    asked = replace(job.config, tune=changes.get("tune"))
    pretended: Any = Runner()
    return jobs._settle_tuning(replace(job, config=asked, runner=pretended))


@pytest.mark.parametrize(
    ("gpu", "preset", "asked", "tunes"),
    [
        (False, "best", None, False),
        (False, "best", True, True),
        (False, "fast", True, True),
        (True, "best", None, True),
        (True, "best", False, False),
        (True, "balanced", None, False),
    ],
)
def test_when_it_is_done(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    gpu: bool,
    preset: str,
    asked: bool | None,
    tunes: bool,
) -> None:
    job = settled(place, monkeypatch, gpu, preset=preset, tune=asked)
    assert bool(job.config.tune) is tunes
    assert job.untuned == ""


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"model": "experts"}, UnsupportedModelError, "experts"),
        ({"processes": "2"}, DropError, "one process"),
        ({"calibration": "short.txt"}, CalibrationError, "short.txt"),
        ({"reason": "it has no backward pass"}, UnsupportedModelError, "no backward.*--no-tune"),
    ],
)
def test_what_cannot_be_tuned_is_refused_before_the_search_or_left_out(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    error: type[DropError],
    says: str,
) -> None:
    changes = dict(changes)
    monkeypatch.setenv("WORLD_SIZE", changes.pop("processes", "1"))
    if "calibration" in changes:
        changes = {"calibration": str(place / changes["calibration"])}
    with pytest.raises(error, match=says):
        settled(place, monkeypatch, False, tune=True, **changes)
    job = settled(place, monkeypatch, True, preset="best", **changes)
    assert not job.config.tune
    assert job.untuned
    assert not settled(place, monkeypatch, False, preset="best", **changes).untuned


@pytest.mark.parametrize("value", ["yes", 2])
def test_a_setting_that_is_none(value: object) -> None:
    with pytest.raises(DropError, match=f"--tune {value!r}"):
        QuantizeConfig(tune=value)  # type: ignore[arg-type]


def test_the_command(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(jobs, "EFFORTS", dict.fromkeys(jobs.EFFORTS, Effort(2, 1, 0)))
    argv = ["dropbydrop", "quantize", place / "model", tmp_path / "out", "--tune", "--json",
            "--calibration", place / "text.txt", "--windows", 3, "--seq-len", 32,
            "--device", "cpu"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", [str(a) for a in argv])
    cli.main()
    captured = capsys.readouterr()
    told = json.loads(captured.out.splitlines()[-1])
    assert told["tuning"]["method"] == "distill"
    assert set(told["tuning"]["loss"]) == {"2", "3", "4"}
    assert told["seconds"]["tune"] > 0
    assert "KL before" in captured.err


# ------------------------------------------------------------------------------- when it fails


class Stop(Exception):
    pass


def test_a_failure_in_tuning_leaves_the_old_checkpoint(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    old = files(run(place, out, tune=False).out)
    calls = []

    def failing(*args: Any) -> None:
        calls.append((out.parent / ".out.partial" / tuned.UNTUNED / "config.json").is_file())
        raise Stop

    monkeypatch.setattr(distill, "last_hidden", failing)
    with pytest.raises(Stop):
        run(place, out, calibration=ready(), windows=None, overwrite=True)
    assert calls == [True]  # the search was through
    assert files(out) == old
    assert list(tmp_path.iterdir()) == [out]
    with pytest.raises(Stop):
        run(place, tmp_path / "new", calibration=ready(), windows=None)
    assert list(tmp_path.iterdir()) == [out]


def kept(place: Path, out: Path, **changes: Any) -> Report:
    return run(place, out, **{"calibration": ready(), "windows": None, "resume": True, **changes})


@pytest.fixture(scope="module")
def undisturbed(place: Path) -> dict[str, str]:
    """Names and hashes of the files of a run without --resume."""
    return files(kept(place, place / "undisturbed", resume=False).out)


def test_kept_work_of_both_stages(
    place: Path, tmp_path: Path, undisturbed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted in the search, in tuning and by a damaged file; other options are refused."""
    out = tmp_path / "out"

    def stopped(module: Any, name: str, calls: int) -> None:
        """The function does its work so many times, and is interrupted then."""
        real, left = getattr(module, name), [calls]

        def counted(*args: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(module, name, counted)
            with pytest.raises(KeyboardInterrupt) as caught:
                kept(place, out)
            said.append(str(caught.value))
        assert not out.exists()

    said: list[str] = []
    monkeypatch.setattr(distill, "KEEP", 1)
    stopped(quantize.BlockEncoder, "encode_block", 1)
    assert "1 finished blocks" in said[-1]
    stopped(distill, "last_hidden", 0)
    assert f"{tmp_path / '.out.resume'}: the search. Give" in said[-1]
    stopped(distill, "_add_gradients", 2)
    assert "the search and 2 finished steps" in said[-1]
    work = resume.work_folder(out)
    assert {p.name for p in work.iterdir()} > {"untuned", "windows.safetensors"}
    assert not list(work.glob("*plane*")) + list(work.glob("*weights*")) + [*work.glob("search")]
    for changes in ({"tune": False}, {"tune": None}, {"seed": 1}):
        with pytest.raises(DropError, match=f"{next(iter(changes))} .* then, .* now"):
            kept(place, out, **changes)
    for name in ("plane-1.safetensors", "README.md", "quantize-log.jsonl", "manifest.json"):
        part = work / "untuned" / name
        content = part.read_bytes()
        part.write_bytes(content[:-1] + b"?")
        with pytest.raises(
            DropError, match=rf"untuned(/{name})? is not what .*Remove .*\.out\.resume"
        ):
            kept(place, out)
        part.unlink()
        with pytest.raises(DropError, match=r"is not what the search wrote"):
            kept(place, out)
        part.write_bytes(content)
    (work / "untuned").rename(tmp_path / "elsewhere")
    (work / "untuned").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DropError, match=r"is not what the search wrote"):
        kept(place, out)
    (work / "untuned").unlink()
    (tmp_path / "elsewhere").rename(work / "untuned")
    report = kept(place, out)
    assert report.resumed == 2
    assert report.tuning is not None
    assert report.tuning.resumed == 2
    assert [line["module"] for line in report.log]  # the books of the search are there
    assert report.errors.keys() == {2, 3, 4}
    assert files(out) == undisturbed
    assert list(tmp_path.iterdir()) == [out]


# ---------------------------------------------------------------------------------- killed runs


def child(place: Path, out: Path, kill: int | str, resumes: bool) -> None:
    """A run that is killed right before its `kill`-th file operation, or as a stage has begun."""
    fingerprint.code_digest = lambda *rooms: "the same code"  # others may be editing it
    distill.KEEP = 1
    if kill == "search":
        die_at(2, (quantize.BlockEncoder, "encode_block"))
    elif kill == "tuning":
        die_at(2, (distill, "_add_gradients"))
    else:
        assert isinstance(kill, int)
        die_at_operation(kill)
    kept(place, out, resume=resumes)


def attempt(place: Path, out: Path, kill: int | str, resumes: bool = True) -> bool:
    """Whether a run that was to be killed finished before that."""
    process = SERVER.Process(target=child, args=(place, out, kill, resumes))
    process.start()
    process.join(120)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode == 0


def stage(out: Path) -> str:
    """Where a killed run with a journal was."""
    journal = resume.work_folder(out) / resume.JOURNAL
    lines = journal.read_text().splitlines() if journal.exists() else []
    steps = [json.loads(line) for line in lines[1:]]
    if any("stage" in step for step in steps):
        return "tuning" if "stage" not in steps[-1] else "between"
    return "search" if steps else "start"


@pytest.mark.slow
def test_killed_in_each_stage(place: Path, tmp_path: Path, undisturbed: dict[str, str]) -> None:
    out = tmp_path / "out"
    for where in ("search", "tuning"):
        assert not attempt(place, out, where)
        assert stage(out) == where
        assert not out.exists()
    assert attempt(place, out, 0)
    assert files(out) == undisturbed
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.slow
def test_killed_again_and_again(place: Path, tmp_path: Path, undisturbed: dict[str, str]) -> None:
    """Every attempt is killed a little later and starts from what the last one left."""
    out, kill, seen = tmp_path / "out", 0, set()
    while True:
        kill += 15
        done = attempt(place, out, kill)
        if out.exists():  # whole or not at all
            assert files(out) == undisturbed
        if done:
            break
        seen.add(stage(out))
    assert seen >= {"search", "tuning"}
    assert files(out) == undisturbed
    assert list(tmp_path.iterdir()) == [out]


def test_what_a_dead_run_left_is_swept(
    place: Path, tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    """Without --resume, by the next run on the same OUT, tuned or not."""
    out, left = tmp_path / "out", tmp_path / ".out.partial"
    assert not attempt(place, out, "tuning", resumes=False)
    assert (left / tuned.UNTUNED).is_dir()
    assert not out.exists()
    shutil.copytree(left, tmp_path / "copy")
    assert files(kept(place, out, resume=False).out) == undisturbed
    assert not left.exists()
    shutil.rmtree(out)
    (tmp_path / "copy").rename(left)
    assert "tuning" not in Checkpoint.open(run(place, out, tune=False).out).quantization.provenance
    assert not left.exists()
