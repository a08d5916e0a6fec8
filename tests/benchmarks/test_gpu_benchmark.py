"""benchmarks/gpu.py runs with tiny shapes, keeps its state, and knows its targets."""

import importlib.util
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from gpu import device
from gpu.timing import REAL
from tiny import save_tiny

PATH = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("gpu_benchmark", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_plan_covers_the_targets(bench, capsys):
    found = bench.main(["--plan", "--device", "cpu"])
    assert json.loads(capsys.readouterr().out) == found
    assert found["steps"] == list(bench.STEPS)
    assert {"8192x28672", "4096x4096"} <= set(found["shapes"])
    assert {2, 4} <= set(found["bits"])
    for count, (d_out, d_in) in zip(found["matrices_of_a_shape_in_bf16"], REAL.matvec, strict=True):
        assert count * 2 * d_out * d_in > 200e6


@pytest.mark.slow
def test_every_step_runs_and_is_not_repeated(bench, tmp_path, capsys, monkeypatch):
    state, text = tmp_path / "state.json", tmp_path / "text.txt"
    text.write_text("plain words " * 100)
    model = save_tiny(tmp_path / "model")
    argv = ["--smoke", "--device", "cpu", "--state", str(state), "--model", str(model)]
    argv += ["--text", str(text), "--work", str(tmp_path / "work")]
    results = bench.main(argv)
    failed = {name: results[name]["error"] for name in bench.STEPS if "error" in results[name]}
    assert not failed
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == json.loads(json.dumps(results))
    rows = results["matvec"]["40x64"]["planes"]
    assert {row["kernel"] for row in rows} == set(results["machine"]["kernels"])
    assert all(row["us"] > 0 for row in rows)
    for code in ("bytes", "trellis"):
        assert any(key.startswith("extrapolated") for key in results["quantize"][code])
        errors = results["search"][code]["relative_errors"]
        assert sorted(errors, reverse=True) == errors
    assert set(results["smollm2"]["bits"]) == {"2", "3", "4"}
    if "skipped" in results["tuned"]:
        assert "no fine-tuning" in results["tuned"]["skipped"]
        del results["tuned"]  # would be tried again
        state.write_text(json.dumps(json.loads(state.read_text()) | {"tuned": {}}))
    capsys.readouterr()

    def refuse(b):
        raise AssertionError("a finished step is repeated")

    monkeypatch.setattr(bench, "STEPS", dict.fromkeys(bench.STEPS, refuse))
    again = bench.main(argv)
    assert again["matvec"] == json.loads(json.dumps(results["matvec"]))


def test_a_failing_step_stops_no_other(bench, tmp_path, monkeypatch):
    def fails(b):
        raise RuntimeError("out of memory")

    steps = {"copy": fails, "prefill": lambda b: {"8x8": {"share": 0.1}}}
    monkeypatch.setattr(bench, "STEPS", steps)
    state = tmp_path / "state.json"
    argv = ["--smoke", "--device", "cpu", "--only", "copy,prefill", "--state", str(state)]
    results = bench.main(argv)
    assert results["copy"] == {"error": "RuntimeError: out of memory"}
    assert results["prefill"] == {"8x8": {"share": 0.1}}
    steps["copy"] = lambda b: {"gb_per_s": 1.0}
    assert bench.main(argv)["copy"] == {"gb_per_s": 1.0}


def test_a_failed_step_is_repeated_only_by_name(bench, tmp_path, monkeypatch):
    calls = []

    def fails(b):
        calls.append(b)
        raise RuntimeError("no")

    monkeypatch.setattr(bench, "STEPS", {"copy": fails})
    argv = ["--smoke", "--device", "cpu", "--state", str(tmp_path / "state.json")]
    bench.main(argv)
    assert "error" in bench.main(argv)["copy"]
    assert len(calls) == 1
    bench.main([*argv, "--only", "copy"])
    assert len(calls) == 2


def test_what_does_not_fit_is_left_for_the_next_run(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "STEPS", {"copy": lambda b: {"gb_per_s": 1.0}})
    argv = ["--smoke", "--device", "cpu", "--state", str(tmp_path / "state.json")]
    assert "run again" in bench.main([*argv, "--minutes", "0"])["copy"]["skipped"]
    assert bench.main(argv)["copy"] == {"gb_per_s": 1.0}


def test_a_step_that_loses_the_device_starts_the_script_again(bench, tmp_path, monkeypatch):
    """The rest runs in a new process; the failed step is on record there."""

    class Lost:
        cuda = True

    def fails(b):
        b.partial["found"] = 1
        raise RuntimeError("an illegal memory access was encountered")

    def gone():
        raise RuntimeError("the device is lost")

    begun = []
    monkeypatch.setattr(bench, "STEPS", {"copy": fails})
    monkeypatch.setattr(bench.torch.cuda, "synchronize", gone)
    monkeypatch.setattr(bench, "again", begun.append)
    monkeypatch.setattr(bench.torch.cuda, "empty_cache", lambda: None)
    state = bench.State(tmp_path / "state.json", {})
    bench.run_step(Lost(), "copy", state, 12.0)
    assert begun == [12.0]
    entry = json.loads((tmp_path / "state.json").read_text())["copy"]
    assert "illegal" in entry["error"]
    assert entry["found"] == 1


def test_the_best_kernel_counts(bench):
    rows = [
        {"kernel": "a", "bits": 2, "times_bf16": 1.5, "codes_gb_per_s": 100.0},
        {"kernel": "b", "bits": 2, "times_bf16": 3.6, "codes_gb_per_s": 240.0},
    ]
    found = bench.targets({"copy": {"gb_per_s": 480.0}, "matvec": {"8x8": {"planes": rows}}})
    assert found["matvec 8x8 2 bits, times bf16"] == {"value": 3.6, "kernel": "b"}
    share = found["matvec 8x8 2 bits, share of the fastest read"]
    assert share == {"value": 0.5, "kernel": "b"}
    fast = {"8x8": {"bf16_gb_per_s": 960.0, "planes": rows}}
    found = bench.targets({"copy": {"gb_per_s": 480.0}, "matvec": fast})
    assert found["matvec 8x8 2 bits, share of the fastest read"]["value"] == 0.25
    found = bench.targets({"prefill": {"8x8": {"share": 0.1}}, "decode": {"planes": rows}})
    assert found["prefill 8x8, share of the product"] == {"value": 0.1}
    assert found["decode 2 bits, times bf16"] == {"value": 3.6, "kernel": "b"}
    assert bench.targets({"matvec": {"error": "none"}}) == {}


def fake(folder, name, script, monkeypatch):
    """A program on the PATH."""
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_counters_are_optional(bench, tmp_path, monkeypatch):
    """No ncu; one that fails, prints nothing, takes too long; and one that does as it should."""
    argv = ["--smoke", "--device", "cpu", "--only", "counters"]
    monkeypatch.setattr(device.shutil, "which", lambda name: None)
    assert "no ncu" in bench.main(argv)["counters"]["skipped"]
    monkeypatch.undo()
    fake(tmp_path, "ncu", "echo ERR_NVGPUCTRPERM; exit 1", monkeypatch)
    assert "ERR_NVGPUCTRPERM" in bench.main(argv)["counters"]["error"]
    fake(tmp_path, "ncu", "echo ==PROF== nothing", monkeypatch)
    assert "ended with 0" in bench.main(argv)["counters"]["error"]
    fake(tmp_path, "ncu", "exec sleep 30", monkeypatch)
    monkeypatch.setattr(device, "COUNTERS_SECONDS", 0.2)
    assert "not done" in bench.main(argv)["counters"]["error"]
    rows = ["ID,Kernel Name,Metric Name,Metric Value", "0,product,a.sum,1", "0,product,b.sum,2"]
    rows = ["==PROF== text", *(",".join(f'"{x}"' for x in row.split(",")) for row in rows)]
    (tmp_path / "printed").write_text("\n".join([*rows, '"1","product","a.sum","3,000"']))
    fake(tmp_path, "ncu", f"cat {tmp_path / 'printed'}", monkeypatch)
    monkeypatch.setattr(device, "COUNTERS_SECONDS", 40)
    found = bench.main(argv)["counters"]
    assert found["launches"] == [
        {"kernel": "product", "a.sum": "1", "b.sum": "2"},
        {"kernel": "product", "a.sum": "3,000"},
    ]
    assert ["bytes", bench.main(["--plan", *argv])["machine"]["kernels"][0], 2] in found["ways"]


def test_the_tests_step_counts_what_ran(bench, tmp_path, monkeypatch):
    (tmp_path / "tests" / "kernels").mkdir(parents=True)
    for name in ("coding", "runtime"):
        (tmp_path / "tests" / name).mkdir()
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    lines = ["import pytest, time", "@pytest.mark.gpu", "def test_good(): pass", "@pytest.mark.gpu",
             "@pytest.mark.parametrize('n', [1, 2])", "def test_bad(n): assert n == 1",
             "def test_other(): assert False"]  # fmt: skip
    (tmp_path / "tests" / "kernels" / "test_it.py").write_text("\n".join(lines))
    monkeypatch.setattr(device, "ROOT", tmp_path)
    found = device.tests(SimpleNamespace(cuda=True))
    assert found == {"passed": 2, "failed": ["tests/kernels/test_it.py::test_bad[2]"]}
    (tmp_path / "tests" / "kernels" / "test_it.py").write_text("import nothing_there")
    with pytest.raises(RuntimeError, match="nothing_there"):
        device.tests(SimpleNamespace(cuda=True))
    argv = ["--smoke", "--device", "cpu", "--only", "tests"]
    assert "CUDA" in bench.main(argv)["tests"]["skipped"]


def test_one_call_of_ten_minutes_reaches_the_block(bench):
    """What comes before the steps of models fits, and one of these after it."""
    assert (
        sum(bench.SECONDS.values())
        - sum(bench.SECONDS[name] for name in ("generate", "smollm2", "tuned"))
        < 9.5 * 60
    )
    assert list(bench.SECONDS) == list(bench.STEPS)


def test_wrong_steps_are_refused(bench, capsys):
    with pytest.raises(SystemExit):
        bench.main(["--only", "everything"])
    assert "no step everything" in capsys.readouterr().err
