"""`dropbydrop compare` on a tiny model: figures, resuming, refusals, plots."""

from __future__ import annotations

import json
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from dropbydrop.cli import main as cli
from dropbydrop.coding import codebooks as universal
from dropbydrop.coding.codebook_set import BytesSet, CodebookSet
from dropbydrop.coding.codebooks import default_lambdas
from dropbydrop.evaluation.perplexity import evaluate
from dropbydrop.quantization.pipeline import quantize
from dropbydrop.system.errors import DropError, FormatError
from dropbydrop_research import baselines
from dropbydrop_research.baselines import METHODS
from dropbydrop_research.baselines.additive import Training
from dropbydrop_research.cli import compare as command
from dropbydrop_research.compare import run as module
from dropbydrop_research.compare.config import ALL, CompareConfig
from dropbydrop_research.compare.folder import Folder, Record
from dropbydrop_research.compare.job import prepare
from dropbydrop_research.compare.run import Substituted, compare
from dropbydrop_research.study.style import SERIES
from tiny import save_tiny

SHORT = Training(kmeans_iterations=5, steps=5, epochs=2)
ORDER: dict[str, Any] = {"calibration_windows": 4, "seq_len": 64, "windows": 3, "preset": "fast"}


@lru_cache
def quick_set(
    levels: tuple[int, ...], lambdas: tuple[float, ...], code: str = "bytes", window: int = 12
) -> CodebookSet:
    if code == "trellis":
        return universal.universal_set(levels, None, code, window)
    return BytesSet.of(universal.train(levels, lambdas, samples=2048, rounds=1, beam=2))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little effort, the same everywhere."""
    monkeypatch.setattr(baselines.drop, "universal_set", quick_set)
    for one in (baselines.aqlm.aqlm, baselines.aqlm_drop.aqlm_drop, baselines.paper.paper):
        monkeypatch.setattr(one, "__defaults__", (SHORT, 0))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("compare")
    save_tiny(root / "model", "llama-tied", num_hidden_layers=2, max_position_embeddings=64)
    (root / "text.txt").write_text(" ".join(str(i * 7919 % 1000) for i in range(1500)))
    return root


def job(root: Path, methods: str = "rtn,gptq", levels: tuple[int, ...] = (2, 4), **changes: Any):
    options = {**ORDER, "calibration": str(root / "text.txt"), **changes}
    config = CompareConfig(tuple(methods.split(",")), levels, **options)
    return prepare(str(root / "model"), root / "text.txt", config)


def without_times(result: dict[str, Any]) -> dict[str, Any]:
    """What must not depend on interruptions."""
    bare = json.loads(json.dumps(result))
    bare.pop("calibration_seconds")
    for method in bare["methods"].values():
        del method["seconds"], method["peak_gib"]
    return bare


def run(*argv: object) -> int:
    """The command line in this process; returns the exit status."""
    old, sys.argv = sys.argv, ["dropbydrop", "compare", *map(str, argv)]
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.argv = old
    return 0


# ---- figures -----------------------------------------------------------------------------------


def test_all_methods_in_one_table(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [f"--{k.replace('_', '-')}={v}" for k, v in ORDER.items()]
    text = root / "text.txt"
    status = run(
        root / "model", "--text", text, "--calibration", text, "--bits=2,4", *options,
        "--out", tmp_path / "out", "--json",
    )  # fmt: skip
    printed = capsys.readouterr()
    assert status == 0, printed.err
    result = json.loads(printed.out.splitlines()[-1])
    assert list(result["methods"]) == list(ALL)
    assert (result["blocks"], result["of_blocks"]) == (2, 2)
    for name, method in result["methods"].items():
        levels = [2, 4] if name != "any-precision" else [4]
        assert list(method["bits"]) == [str(p) for p in levels]
        assert method["lacks"] == [p for p in (2, 4) if p not in levels]
        assert method["checkpoints"] == (1 if METHODS[name].nested else 2)
        assert method["seconds"] > 0
        assert 0 < method["peak_gib"] < 64
        for p, row in method["bits"].items():
            assert row["true_bits"] > int(p)
            low, high = row["kl_interval"]
            assert low <= row["kl"] <= high
            assert row["excess"] == pytest.approx(row["nll"] - result["reference"]["nll"])
        if "baselines/additive.py" not in METHODS[name].code:  # 256 entries learn these by heart
            kl = [row["kl"] for row in method["bits"].values()]
            assert kl[-1] > 0
            assert kl == sorted(kl, reverse=True), name
        # A nested suite is one file, its highest level; a dedicated one is all of its levels.
        sizes = [row["bytes"] for row in method["bits"].values()]
        assert method["disk_bytes"] == (sizes[-1] if METHODS[name].nested else sum(sizes))
    for name in ("rtn", "any-precision"):
        assert name in printed.err
    assert "none" in printed.err
    assert list(result["price_of_nesting"]) == ["drop", "trellis"]
    assert all(list(prices) == ["2", "4"] for prices in result["price_of_nesting"].values())
    assert printed.err.count("price of nesting") == 4
    assert json.loads((tmp_path / "out" / "result.json").read_text()) == result
    for plot in ("loss", "cost"):
        assert (tmp_path / "out" / f"{plot}.png").read_bytes()[:4] == b"\x89PNG"
        svg = (tmp_path / "out" / f"{plot}.svg").read_text()
        assert "<svg" in svg
    assert len(SERIES) >= len(METHODS)
    assert len({json.dumps(style, default=str) for style in SERIES}) == len(SERIES)
    assert tuple(name for name in METHODS if not name.startswith("llama-")) == ALL


def test_figures_are_those_of_the_model_with_the_weights_in_it(root: Path) -> None:
    todo = job(root, "gptq", (3,))
    result = compare(todo, None, progress=False)
    model = AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.float32).eval()
    original = AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.float32).eval()
    runner = todo.runner
    hidden = runner.embed(todo.calibration().ids)
    bytes_read = values = 0
    for i in range(runner.num_blocks):
        statistics = runner.collect_statistics(i, runner.block(i), hidden, out=hidden)
        for group in statistics.input_groups:
            for name in group.modules:
                parameter = model.get_parameter(f"{name}.weight")
                suite = baselines.gptq.gptq(parameter.data, statistics.grams[group.name], [3])
                parameter.data = suite.levels[3].weight
                bytes_read += suite.levels[3].bytes
                values += parameter.numel()
    expected = evaluate({"3": model}, original, todo.ids, progress=False)
    row, plain = result["methods"]["gptq"]["bits"]["3"], expected["bits"]["3"]
    assert result["reference"]["nll"] == expected["reference"]["nll"]
    # Weights were rounded to float16 on the way.
    assert row["kl"] == pytest.approx(plain["kl"], rel=0.02)
    assert row["ppl"] == pytest.approx(plain["ppl"], rel=0.01)
    assert row["true_bits"] == 8 * bytes_read / values
    total = sum(p.numel() for p in original.parameters())
    assert row["bytes"] == bytes_read + 2 * (total - values)
    assert row["true_bits_whole"] == pytest.approx(8 * row["bytes"] / total)


def test_drop_is_the_checkpoint_that_quantize_writes(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dropbydrop.checkpoint import Checkpoint
    from dropbydrop.checkpoint.export import export

    monkeypatch.setattr(
        "dropbydrop.quantization.job.universal_set",
        lambda p, *_: quick_set(p, tuple(default_lambdas(p))),
    )
    quantize(root / "model", tmp_path / "out", [2, 4], calibration=root / "text.txt",
             preset="fast", windows=4, head_bits=16, progress=False)  # fmt: skip
    todo = job(root, "drop")
    result = compare(todo, None, progress=False)
    checkpoint = Checkpoint.open(tmp_path / "out")
    original = AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.float32).eval()
    views = {}
    for p in (2, 4):
        export(tmp_path / "out", tmp_path / f"dense{p}", p, dtype="float32", progress=False)
        views[str(p)] = AutoModelForCausalLM.from_pretrained(tmp_path / f"dense{p}").eval()
    expected = evaluate(views, original, todo.ids, progress=False)
    for p in (2, 4):
        row = result["methods"]["drop"]["bits"][str(p)]
        assert row["true_bits"] == checkpoint.true_bits(p)
        assert row["kl"] == pytest.approx(expected["bits"][str(p)]["kl"], rel=0.02)


def test_only_the_first_blocks(root: Path, tmp_path: Path) -> None:
    whole = compare(job(root, "rtn"), tmp_path / "out", progress=False)
    made = (tmp_path / "out" / "rtn" / "block-000.safetensors").stat().st_mtime_ns
    one = compare(job(root, "rtn", blocks=1), tmp_path / "out", progress=False)
    assert (one["blocks"], one["of_blocks"]) == (1, 2)
    for p in ("2", "4"):
        few, all_of_it = (r["methods"]["rtn"]["bits"][p] for r in (one, whole))
        assert few["kl"] < all_of_it["kl"]
        assert few["true_bits"] == all_of_it["true_bits"]
        assert few["true_bits_whole"] > all_of_it["true_bits_whole"]
    assert (tmp_path / "out" / "rtn" / "block-000.safetensors").stat().st_mtime_ns == made
    again = compare(job(root, "rtn", blocks=1), None, progress=False)
    assert without_times(again) == without_times(one)


def test_weights_come_back_after_every_call(root: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.float32).eval()
    name = "model.layers.0.mlp.down_proj"
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        before = model(ids).logits
        changed = Substituted(model, {name: torch.zeros(48, 80).half()})
        assert not torch.allclose(changed(ids).logits, before)
        assert torch.equal(model(ids).logits, before)
        broken = Substituted(model, {name: torch.zeros(3, 3).half()})
        with pytest.raises(RuntimeError):
            broken(ids)
        assert torch.equal(model(ids).logits, before)


# ---- going on ----------------------------------------------------------------------------------


def test_an_interrupted_comparison_goes_on_where_it_was(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = compare(job(root, "rtn,gptq,matryoshka"), None, progress=False)
    out, real, calls = tmp_path / "out", module._encode_block, []

    def stopping(*args: Any) -> Any:
        calls.append(args[1].name)
        if calls == ["rtn", "rtn", "gptq", "gptq"]:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(module, "_encode_block", stopping)
    with pytest.raises(KeyboardInterrupt):
        compare(job(root, "rtn,gptq,matryoshka"), out, progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_capture", fail_if_captured(module._capture, patch))
        result = compare(job(root, "rtn,gptq,matryoshka"), out, progress=False)
    assert calls[4:] == ["gptq", "matryoshka", "matryoshka"]
    assert without_times(result) == without_times(undisturbed)
    # All is done: nothing is encoded or evaluated again, in another order and for fewer methods.
    with monkeypatch.context() as patch:
        for name in ("_encode_block", "evaluate"):
            patch.setattr(module, name, lambda *a, **k: pytest.fail("done twice"))
        again = compare(job(root, "matryoshka,rtn"), out, progress=False)
    assert list(again["methods"]) == ["matryoshka", "rtn"]
    assert again["methods"]["rtn"] == result["methods"]["rtn"]


def fail_if_captured(real: Any, patch: pytest.MonkeyPatch) -> Any:
    """The real `_capture` where the model must not read the calibration again."""

    def collect_statistics(todo: Any, *args: Any) -> Any:
        patch.setattr(todo.runner, "embed", lambda *a: pytest.fail("captured again"))
        return real(todo, *args)

    return collect_statistics


def test_statistics_that_were_interrupted(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = compare(job(root, "gptq"), None, progress=False)
    out, real = tmp_path / "out", Folder.write_grams

    def stopping(self: Folder, i: int, *args: Any) -> None:
        if i == 1:
            raise KeyboardInterrupt
        real(self, i, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "write_grams", stopping)
        with pytest.raises(KeyboardInterrupt):
            compare(job(root, "gptq"), out, progress=False)
    kept = sorted(p.name for p in (out / "grams").iterdir())
    assert kept == ["block-000.safetensors", "block-000.safetensors.sha256"]
    result = compare(job(root, "gptq"), out, progress=False)
    assert without_times(result) == without_times(undisturbed)


def test_another_text_is_evaluated_without_encoding(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = compare(job(root, "rtn"), tmp_path / "out", progress=False)
    monkeypatch.setattr(module, "_encode_block", lambda *a: pytest.fail("encoded again"))
    second = compare(job(root, "rtn", windows=2), tmp_path / "out", progress=False)
    rows = [r["methods"]["rtn"]["bits"]["2"] for r in (first, second)]
    assert len(rows[1]["per_window"]["kl"]) == 2
    assert rows[1]["per_window"]["kl"] == rows[0]["per_window"]["kl"][:2]


def test_a_method_whose_code_changed_is_made_again_and_no_other(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare(job(root), tmp_path / "out", progress=False)
    (tmp_path / "new.py").write_text("# another implementation")
    real, calls, sources = module._encode_block, [], baselines.Method.sources

    def changed(self: baselines.Method) -> list[Path]:
        return [*sources(self), *([tmp_path / "new.py"] if self.name == "gptq" else [])]

    def counting(*args: Any) -> Any:
        calls.append(args[1].name)
        return real(*args)

    monkeypatch.setattr(baselines.Method, "sources", changed)
    monkeypatch.setattr(module, "_encode_block", counting)
    compare(job(root), tmp_path / "out", progress=False)
    assert calls == ["gptq", "gptq"]


def test_sources_name_the_files_a_method_depends_on() -> None:
    for name, method in METHODS.items():
        names = {path.name for path in method.sources()}
        ours = {"drop": "encoder.py", "trellis": "trellis-2-3-4-12.safetensors"}
        ours["trellis-dedicated"] = "dedicated.py"
        ours |= {found: "llama.py" for found in METHODS if found.startswith("llama-")}
        expected = ours.get(name, f"{name.replace('-', '_')}.py")
        assert expected in names
        assert "suite.py" in names
    assert "additive.py" in {p.name for p in METHODS["aqlm-drop"].sources()}
    assert "gptq.py" not in {p.name for p in METHODS["rtn"].sources()}


# ---- refusals ----------------------------------------------------------------------------------


def test_what_cannot_work_is_refused_before_any_work(root: Path, tmp_path: Path) -> None:
    with pytest.raises(DropError, match="choose from drop"):
        job(root, "rtn,awq")
    with pytest.raises(DropError, match="starts at 3 bits"):
        job(root, "any-precision", (2,))
    with pytest.raises(DropError, match="has 1 to 2 blocks"):
        job(root, blocks=3)
    with pytest.raises(DropError, match="choose one of fast"):
        job(root, preset="slow")
    with pytest.raises(DropError, match="longer than the model's context of 64"):
        job(root, seq_len=65)
    with pytest.raises(DropError, match="windows of 64"):
        job(root, windows=100000)


def test_a_folder_of_something_else_is_refused(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("x")
    with pytest.raises(DropError, match=r"other files than a comparison \(thesis.tex\)"):
        compare(job(root), out, progress=False)
    assert [p.name for p in out.iterdir()] == ["thesis.tex"]
    compare(job(root, "rtn"), tmp_path / "other", progress=False)
    with pytest.raises(DropError, match=r"what differs: bits \(\[2, 4\] then, \[3\] now\)"):
        compare(job(root, "rtn", (3,)), tmp_path / "other", progress=False)
    with (
        Folder(tmp_path / "locked", {}),
        pytest.raises(DropError, match="another process is comparing"),
        Folder(tmp_path / "locked", {}),
    ):
        pass


def test_damaged_files_are_named(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    undisturbed = compare(job(root, "rtn"), out, progress=False)
    block = out / "rtn" / "block-001.safetensors"
    grams, result = out / "grams" / "block-000.safetensors", out / "rtn" / "result.json"
    whole = {path: path.read_bytes() for path in (block, grams, result)}
    flipped = {path: raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:] for path, raw in whole.items()}
    other = (out / "rtn" / "block-000.safetensors").read_bytes()
    for path, raw in [(block, whole[block][:100]), (block, other), *flipped.items()]:
        path.write_bytes(raw)
        with pytest.raises(FormatError, match=rf"{path.name} is not what was written.*Remove it"):
            compare(job(root, "rtn"), out, progress=False)
        path.write_bytes(whole[path])
    seal = block.with_name(f"{block.name}.sha256")  # a block in the place of another, hash and all
    kept = seal.read_bytes()
    seal.write_bytes((out / "rtn" / "block-000.safetensors.sha256").read_bytes())
    block.write_bytes(other)
    with pytest.raises(FormatError, match=r"block-001.safetensors is not what was written"):
        compare(job(root, "rtn"), out, progress=False)
    block.write_bytes(whole[block])
    seal.write_bytes(kept)
    for path in (block, seal):  # not finished: made again
        path.unlink()
        again = compare(job(root, "rtn"), out, progress=False)
        assert without_times(again) == without_times(undisturbed)
        assert block.is_file()
        assert seal.is_file()
    for damage in ("{", "[1]", "[" * 200_000):
        (out / "compare.json").write_text(damage)
        with pytest.raises(FormatError, match=r"compare.json is damaged"):
            compare(job(root, "rtn"), out, progress=False)


@pytest.mark.parametrize("device", ["cuda:99", "mps", "x"])
def test_devices_that_are_not_there(root: Path, device: str) -> None:
    with pytest.raises(DropError, match="--device"):
        job(root, device=device)


def test_records_survive_json() -> None:
    record = Record(1.5, 10, {2: 3, 4: 5}, [5], 16, [8], {2: 0.5, 4: 0.25}, 1)
    assert Record.from_json(record.to_json()) == record


def test_numbers_for_the_table() -> None:
    assert [command.short(x) for x in (0.5, -0.25, 1.5, 10.0, None)] == [
        ".500", "-.250", "1.500", "10.000", "",
    ]  # fmt: skip
    assert command.interval([0.1, 1.2]) == ".100–1.200"
    assert command.interval(None) == ""
