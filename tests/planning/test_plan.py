"""Plans: allocation, bytes, sensitivities, mixed precisions as views of one store."""

from __future__ import annotations

import ctypes
import gc
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import dropbydrop
from dropbydrop import Plan, make_plan
from dropbydrop.checkpoint import Checkpoint
from dropbydrop.checkpoint.pull import pull
from dropbydrop.checkpoint.slice import slice_checkpoint
from dropbydrop.cli import main as cli
from dropbydrop.evaluation.sensitivity_probe import measure
from dropbydrop.kernels.cpu import ops
from dropbydrop.planning.memory import held_bytes, kv_cache, parse_bytes
from dropbydrop.planning.sensitivity import (
    SIDECAR,
    Sensitivity,
    from_log,
    known_sensitivity,
)
from dropbydrop.runtime.modules import NestedLinear
from dropbydrop.runtime.views import plan_of, store_of
from dropbydrop.system.errors import DropError, FormatError, MissingPlaneError, PrecisionError
from tiny import COUNTS, VOCAB, decoded_reference, tiny_llama, write_checkpoint

IDS = torch.randint(3, VOCAB, (3, 24), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, code: str) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("plan") / "out", code=code)


@pytest.fixture(scope="module")
def checkpoint(out: Path) -> Checkpoint:
    return Checkpoint.open(out)


@pytest.fixture(scope="module")
def model(out: Path) -> Any:
    return dropbydrop.load(out)


@pytest.fixture(scope="module")
def known(model: Any, out: Path) -> Sensitivity:
    """Measured once, and saved as the sidecar of `out`."""
    result = measure(model, IDS, progress=False)
    result.save(out)
    return result


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def invented(checkpoint: Checkpoint, seed: int = 0) -> Sensitivity:
    """Losses that fall with the level, not always convex."""
    generator = torch.Generator().manual_seed(seed)
    losses = {}
    for input_group in checkpoint.quantization.input_groups:
        steps = torch.rand(len(checkpoint.levels) - 1, generator=generator).square().tolist()
        row = dict.fromkeys(checkpoint.levels, 0.0)
        for i in range(len(steps) - 1, -1, -1):
            row[checkpoint.levels[i]] = row[checkpoint.levels[i + 1]] + steps[i]
        losses[input_group.name] = row
    return Sensitivity(Plan.uniform(checkpoint, 2).checkpoint, losses, "measured")


def plane_bytes(checkpoint: Checkpoint) -> dict[str, int]:
    shapes = checkpoint.shapes
    return {
        s.name: sum(shapes[m][0] * shapes[m][1] // 8 for m in s.modules)
        for s in checkpoint.quantization.input_groups
    }


# ------------------------------------------------------------------------------- allocation


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_allocation_against_all_plans(checkpoint: Checkpoint, seed: int) -> None:
    """8 input groups, 3 levels: every one of the 6,561 plans."""
    table, cost = invented(checkpoint, seed), plane_bytes(checkpoint)
    names = list(cost)
    every = [
        (sum(cost[n] * p for n, p in zip(names, ps, strict=True)),
         sum(table.losses[n][p] for n, p in zip(names, ps, strict=True)))
        for ps in itertools.product(checkpoint.levels, repeat=len(names))
    ]  # fmt: skip
    one = sum(cost.values())
    for average in (2.0, 2.2, 2.5, 2.6, 3.0, 3.3, 3.5, 3.9, 4.0):
        plan = make_plan(checkpoint, average, sensitivity=table)
        spent = sum(cost[n] * p for n, p in plan.levels.items())
        loss = sum(table.losses[n][p] for n, p in plan.levels.items())
        assert spent <= average * one + 1e-6
        assert plan.average_bits(checkpoint) == pytest.approx(spent / one)
        best = min(other for size, other in every if size <= average * one + 1e-6)
        assert loss == pytest.approx(best, abs=1e-12)
    assert make_plan(checkpoint, 2.0, sensitivity=table) == Plan.uniform(checkpoint, 2)
    assert make_plan(checkpoint, 4.0, sensitivity=table) == Plan.uniform(checkpoint, 4)


def test_allocation_in_coarse_units(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, cost = invented(checkpoint), plane_bytes(checkpoint)
    one = sum(cost.values())

    def loss(plan: Plan) -> float:
        return sum(table.losses[n][p] for n, p in plan.levels.items())

    fine = [make_plan(checkpoint, 2 + i / 10, sensitivity=table) for i in range(21)]
    monkeypatch.setattr("dropbydrop.planning.solver._MAX_UNITS", 40)
    for i, exact in enumerate(fine):
        plan = make_plan(checkpoint, 2 + i / 10, sensitivity=table)
        assert sum(cost[n] * p for n, p in plan.levels.items()) <= (2 + i / 10) * one + 1e-6
        assert loss(exact) <= loss(plan) + 1e-12 <= loss(exact) + 0.6


def test_a_useless_level_is_left_out(checkpoint: Checkpoint) -> None:
    """3 bits are useless to the first input group here: it goes from 2 to 4, or stays."""
    table = invented(checkpoint)
    first = checkpoint.quantization.input_groups[0].name
    table.losses[first].update({2: 5.0, 3: 4.99, 4: 0.0})  # type: ignore[attr-defined]
    plans = [make_plan(checkpoint, 2 + i / 10, sensitivity=table) for i in range(21)]
    assert {plan.levels[first] for plan in plans} == {2, 4}


def test_infeasible_budgets(checkpoint: Checkpoint) -> None:
    table = invented(checkpoint)
    for bits in (1.9, 4.1, -1.0, float("nan")):
        with pytest.raises(PrecisionError, match="smallest feasible average is 2"):
            make_plan(checkpoint, bits, sensitivity=table)
    with pytest.raises(PrecisionError, match="one budget"):
        make_plan(checkpoint, 2.5, "1GiB", sensitivity=table)
    with pytest.raises(PrecisionError, match="one budget"):
        make_plan(checkpoint, sensitivity=table)
    with pytest.raises(DropError, match="no amount of memory"):
        make_plan(checkpoint, memory="much", sensitivity=table)
    with pytest.raises(DropError, match="1 to 256"):
        make_plan(checkpoint, memory="1GiB", context=257, sensitivity=table)
    for none in (0, -1):
        with pytest.raises(PrecisionError, match="serves no level: the lowest is 2 bits"):
            make_plan(checkpoint, 2.5, sensitivity=table, planes=none)
    least = Plan.uniform(checkpoint, 2).memory(checkpoint, context=64).total
    with pytest.raises(PrecisionError, match=f"need {least:,}"):
        make_plan(checkpoint, memory=least - 1, context=64, sensitivity=table)
    assert make_plan(checkpoint, memory=least, context=64, sensitivity=table).highest == 2
    assert make_plan(checkpoint, memory="1GiB", sensitivity=table).lowest == 4
    middle = make_plan(checkpoint, memory=least + 8000, context=64, sensitivity=table)
    assert least + 6000 < middle.memory(checkpoint, context=64).total <= least + 8000


def byte_storages() -> dict[int, int]:
    """Address and size of every storage of bytes that is alive on the CPU."""
    gc.collect()
    alive = [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter)]
    plain = [t for t in alive if t.dtype == torch.uint8 and t.device.type == "cpu"]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in plain}


def test_planes_are_held_once(checkpoint: Checkpoint, out: Path) -> None:
    """Also after products of one row and of many, decoding, and views of every level."""
    plan = mixed(checkpoint, 4)
    before = byte_storages()
    model = dropbydrop.load(out, plan=plan)
    views = [model, dropbydrop.view(model, 2)]
    for view in views:
        view.generate(IDS[:1, :4], max_new_tokens=2, do_sample=False, pad_token_id=0)
        logits(view)
        view.model.layers[0].mlp.up_proj.dense_weight()
    derived = store_of(model)._derived.items()
    books = [v for key, v in derived if key[0] == "books"]
    small = {t.data_ptr() for v in books for t in v.prepared}
    small |= {t.data_ptr() for v in books for part in v.set.parts for t in part.values()}
    # what the kernels are called with, of every matrix and input group
    structure = ctypes.sizeof(ops.GroupStruct)
    new = {
        p: n
        for p, n in byte_storages().items()
        if p not in before.keys() | small and n != structure
    }
    assert sum(new.values()) == plan.memory(checkpoint).codes > 0


def test_amounts_of_memory() -> None:
    assert parse_bytes("1.5GiB") == 3 << 29
    assert parse_bytes("900 MB") == 900_000_000
    with pytest.raises(DropError, match="no amount of memory"):
        parse_bytes("9" * 400)
    assert parse_bytes(12) == parse_bytes("12") == 12
    for text in ("", "0", "-1GiB", "1.5 GiBs", "1e9"):
        with pytest.raises(DropError, match="no amount of memory"):
            parse_bytes(text)


# ------------------------------------------------------------------------------------ plans


def test_a_plan_is_an_immutable_value(checkpoint: Checkpoint, tmp_path: Path) -> None:
    plan = make_plan(checkpoint, 2.6, sensitivity=invented(checkpoint))
    with pytest.raises(TypeError):
        plan.levels["x"] = 2  # type: ignore[index]
    with pytest.raises(AttributeError):
        plan.checkpoint = ""  # type: ignore[misc]
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == plan
    assert hash(again) == hash(plan)
    assert again.check(checkpoint) is again
    assert again != Plan.uniform(checkpoint, 2)


def test_plans_that_do_not_fit(out: Path, model: Any, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(out)
    plan = Plan.uniform(checkpoint, 3)
    other = Checkpoint.open(write_checkpoint(tmp_path / "other", seed=1))
    for use in (
        lambda: plan.check(other),
        lambda: dropbydrop.load(other.path, plan=plan),
        lambda: dropbydrop.view(model, plan=Plan.uniform(other, 3)),
    ):
        with pytest.raises(FormatError, match="made for another checkpoint"):
            use()
    with pytest.raises(FormatError, match="does not name the input groups"):
        Plan(plan.checkpoint, {"x": 2}).check(checkpoint)
    with pytest.raises(PrecisionError, match="precision 5 is not a level"):
        Plan(plan.checkpoint, dict.fromkeys(plan.levels, 5)).check(checkpoint)
    for text, message in [
        ("{", "cannot be read as JSON"),
        ("{}", "is no plan"),
        (json.dumps({**plan.to_dict(), "format_version": 2}), "format_version 2"),
        (json.dumps({**plan.to_dict(), "prefixes": {"a": "b"}}), "whole numbers"),
        (json.dumps({**plan.to_dict(), "more": 1}), "unknown keys"),
    ]:
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(FormatError, match=message):
            Plan.load(tmp_path / "bad.json")
    with pytest.raises(FormatError, match="there is no plan"):
        Plan.load(tmp_path / "none.json")


def mixed(checkpoint: Checkpoint, seed: int) -> Plan:
    generator = torch.Generator().manual_seed(seed)
    names = [input_group.name for input_group in checkpoint.quantization.input_groups]
    draw = torch.randint(len(checkpoint.levels), (len(names),), generator=generator).tolist()
    levels = {name: checkpoint.levels[i] for name, i in zip(names, draw, strict=True)}
    return Plan(Plan.uniform(checkpoint, 2).checkpoint, levels)


def test_several_plans_are_views_of_one_store(out: Path, model: Any) -> None:
    checkpoint = Checkpoint.open(out)
    plans = [mixed(checkpoint, seed) for seed in range(3)]
    before = codes_in_memory(model)
    for plan in plans:
        view = dropbydrop.view(model, plan=plan)
        assert plan_of(view) == plan
        assert dropbydrop.precision(view) == pytest.approx(plan.average_bits(checkpoint))
        reference = decoded_reference(tiny_llama(), view)
        torch.testing.assert_close(logits(view), logits(reference), rtol=1e-4, atol=1e-4)
        for module in linears(view):
            assert module.prefix == plan.planes_by_module(checkpoint)[module.name]
            held = store_of(model).plane(module.name, 1).data
            assert module.codes[1].data_ptr() == held.data_ptr()
        assert torch.equal(logits(view), logits(dropbydrop.load(out, plan=plan)))
    assert codes_in_memory(model) == before
    uniform = dropbydrop.view(model, plan=Plan.uniform(checkpoint, 3))
    assert torch.equal(logits(uniform), logits(dropbydrop.view(model, 3)))
    assert dropbydrop.precision(uniform) == 3
    assert torch.equal(logits(dropbydrop.view(view, 4)), logits(model))  # and back


def linears(model: Any) -> list[NestedLinear]:
    return [m for m in model.modules() if isinstance(m, NestedLinear)]


def codes_in_memory(model: Any) -> int:
    return sum(p.data.numel() for p in store_of(model)._planes.values())


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any], Any]] = {
    "plain": ({}, {}, None),
    "bfloat16": ({}, {}, torch.bfloat16),
    "head in 16 bits": ({}, {"embedding_bits": 16}, None),
    "untied": ({"tie_word_embeddings": False}, {}, None),
    "untied in 16 bits": ({"tie_word_embeddings": False}, {"embedding_bits": 16}, "float16"),
    "biases": ({"attention_bias": True, "mlp_bias": True}, {}, torch.bfloat16),
    "256 entries": ({}, {"sign_symmetric": False}, None),
    "trellis": ({}, {"code": "trellis", "window": 9}, None),
    "trellis, untied": ({"tie_word_embeddings": False}, {"code": "trellis"}, torch.bfloat16),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_bytes_are_as_predicted(tmp_path: Path, variant: str) -> None:
    base, settings, dtype = VARIANTS[variant]
    out = write_checkpoint(tmp_path / "out", tiny_llama(**base), **settings)
    checkpoint = Checkpoint.open(out)
    for plan in (mixed(checkpoint, 3), Plan.uniform(checkpoint, 2), Plan.uniform(checkpoint, 4)):
        model = dropbydrop.load(out, plan=plan, dtype=dtype)
        need = plan.memory(checkpoint, dtype)
        assert held_bytes(model) == need.weights - need.shared
        assert codes_in_memory(model) == need.codes  # nothing is read that is not used
        assert need.shared == sum(
            info.nbytes
            for name, info in checkpoint.rest.items()
            if name.startswith(("codebooks.", "input_groups.", "rotations."))
        )


def test_key_value_cache(out: Path, model: Any) -> None:
    with torch.no_grad():
        cache = model(IDS[:1], use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    config = Checkpoint.open(out).config
    assert kv_cache(config, IDS.shape[1], 4) == held
    window = {**config, "sliding_window": 8, "layer_types": ["sliding_attention", "x"]}
    assert kv_cache(window, 24, 4) == held * (8 + 24) // 48


def test_loading_by_budget(out: Path, code: str, known: Sensitivity, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(out)
    plan = make_plan(checkpoint, 2.6)
    model = dropbydrop.load(out, avg_bits=2.6)
    assert plan_of(model) == plan
    assert model.config.quantization_config.bits == plan.highest
    least = Plan.uniform(checkpoint, 2).memory(checkpoint, context=100).total
    by_memory = dropbydrop.load(out, memory=least + 8000, context=100)
    assert 2 < dropbydrop.precision(by_memory) < 4
    with pytest.raises(PrecisionError, match="at most one of"):
        dropbydrop.load(out, 3, memory="1GiB")
    with pytest.raises(PrecisionError, match="smallest feasible average is 2"):
        dropbydrop.load(out, avg_bits=1.5)
    # a plan asks for planes that a base does not hold
    base = dropbydrop.load(out, 2)
    with pytest.raises(MissingPlaneError, match=r"dropbydrop.load_planes\(model, plan=plan\)"):
        dropbydrop.view(base, plan=plan)
    with pytest.raises(MissingPlaneError, match=r"2\.6 bits on average need more planes"):
        dropbydrop.view(base, avg_bits=2.6)
    dropbydrop.load_planes(base, plan=plan)
    assert torch.equal(logits(dropbydrop.view(base, plan=plan)), logits(model))
    assert codes_in_memory(base) == plan.memory(checkpoint).codes
    dropbydrop.load_planes(base, 4)
    assert plan_of(dropbydrop.view(base, avg_bits=2.6)) == plan
    # partial folders: their own planes suffice for their own budgets
    three = slice_checkpoint(out, tmp_path / "three", 3).path
    assert (three / SIDECAR).is_file()
    assert plan_of(dropbydrop.load(three, avg_bits=2.6)).highest <= 3
    with pytest.raises(MissingPlaneError, match="need more planes"):
        dropbydrop.load(three, avg_bits=3.5)
    with pytest.raises(MissingPlaneError, match=f"plane {COUNTS[code][4]} is needed"):
        dropbydrop.load(three, plan=Plan.uniform(checkpoint, 4))
    copied = pull(three, tmp_path / "copy", 2, progress=False).path
    assert Sensitivity.load(Checkpoint.open(copied)) == Sensitivity.load(checkpoint)


# ---------------------------------------------------------------------------- sensitivities


def test_sidecar(out: Path, code: str, known: Sensitivity, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(out)
    loaded = Sensitivity.load(checkpoint)
    assert loaded == known
    assert known_sensitivity(checkpoint).kind == "measured"
    assert checkpoint.verify() == []  # the published hashes stay
    other = Checkpoint.open(write_checkpoint(tmp_path / "other", seed=1))
    assert Sensitivity.load(other) is None
    with pytest.raises(DropError, match=r"neither sensitivity\.json nor quantize-log"):
        dropbydrop.load(other.path, avg_bits=2.5)
    (other.path / SIDECAR).write_bytes((out / SIDECAR).read_bytes())
    with pytest.raises(FormatError, match="measured on another checkpoint"):
        dropbydrop.load(other.path, avg_bits=2.5)
    good = json.loads((out / SIDECAR).read_bytes())
    first = next(iter(good["losses"]))
    for change, message in [
        ({"losses": {}}, "one loss for every input group"),
        ({"losses": {**good["losses"], first: {"2": 1.0}}}, "one loss for every input group"),
        ({"losses": {**good["losses"], first: {"2": -1.0, "3": 0, "4": 0}}}, "one loss"),
        ({"losses": {**good["losses"], first: {"2": "x"}}}, "damaged"),
        ({"losses": {**good["losses"], first: {"2": 10**400}}}, "damaged"),
        ({"experts": {first: []}}, "one loss for every input group"),
        ({"format": "other"}, "no table of sensitivities"),
        ({"format_version": 9}, "format_version 9"),
        ({"extra": 1}, "unknown keys"),
    ]:
        broken = write_checkpoint(tmp_path / "broken", code=code, overwrite=True)
        (broken / SIDECAR).write_text(json.dumps({**good, **change}))
        with pytest.raises(FormatError, match=message):
            Sensitivity.load(Checkpoint.open(broken))


def test_the_log_serves_without_a_sidecar(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    modules = Checkpoint.open(write_checkpoint(tmp_path / "a")).quantization.modules
    log = "".join(
        json.dumps({"module": m, "rel_error": {"2": 0.1 + i, "3": 0.05 + i / 2, "4": 0.01}}) + "\n"
        for i, m in enumerate(modules)
    )
    out = write_checkpoint(tmp_path / "out", extra_files={"quantize-log.jsonl": log.encode()})
    checkpoint = Checkpoint.open(out)
    found = known_sensitivity(checkpoint)
    assert found.kind == "log"
    input_group = checkpoint.quantization.input_groups[0]
    assert found.losses[input_group.name][2] == pytest.approx(sum(0.09 + i for i in range(3)))
    assert found.losses[input_group.name][4] == 0
    make_plan(checkpoint, avg_bits=2.5, sensitivity=found)  # who gives it knows what it is
    assert "nothing was measured" not in caplog.text
    model = dropbydrop.load(out, avg_bits=2.5)
    assert 2.3 < dropbydrop.precision(model) <= 2.5
    assert "nothing was measured" in caplog.text
    found.save(out)
    caplog.clear()
    dropbydrop.load(out, avg_bits=2.5)
    assert "nothing was measured" not in caplog.text
    (out / SIDECAR).unlink()
    digits = "1" + "0" * 400
    for damaged in (
        log[:50],
        log.replace("0.01", "NaN"),
        log.replace("0.01", digits),
        "[" * 10**5,
        log.replace("{", '{"tokens": [Infinity], ', 1),
    ):
        (out / "quantize-log.jsonl").write_text(damaged)
        assert from_log(checkpoint) is None


def test_the_command(tmp_path: Path, code: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = write_checkpoint(tmp_path / "out", code=code)

    def run(*argv: object) -> tuple[int, str, str]:
        old, sys.argv = sys.argv, ["dropbydrop", "plan", *map(str, argv)]
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            sys.argv = old
        return code, *capsys.readouterr()

    code, _, stderr = run(out, "--avg-bits", 2.5, "--no-measure")
    assert code == 2
    assert "--measure" in stderr
    file = tmp_path / "plan.json"
    small = ("--windows", 2, "--seq-len", 16)
    code, stdout, _ = run(out, "--avg-bits", 2.5, "--save", file, "--json", *small)
    assert code == 0
    result = json.loads(stdout.splitlines()[-1])
    assert result["sensitivity"] == "measured"
    assert 2.2 < result["average_bits"] <= 2.5
    assert (out / SIDECAR).is_file()  # kept for the next time
    plan = Plan.load(file)
    assert result["prefixes"] == dict(plan.levels)
    assert result["memory"] == plan.memory(Checkpoint.open(out), context=256).to_dict()
    assert plan_of(dropbydrop.load(out, plan=plan)) == plan
    code, stdout, _ = run(out, "--memory", "1GiB", "--context", 64)
    assert code == 0
    assert "model.layers.1" in stdout
    assert "kv cache" in stdout
    code, _, stderr = run(out, "--memory", "1kB")
    assert code == 2
    assert "Give at least that" in stderr
    assert run(out)[0] == 2


def test_averages_and_plan_files_on_the_command_line(
    tmp_path: Path, code: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = write_checkpoint(tmp_path / "out", code=code)
    checkpoint = Checkpoint.open(out)
    text, file = tmp_path / "text.txt", tmp_path / "plan.json"
    text.write_text("the river runs past the old mill " * 20)
    uneven = {
        input_group.name: (2, 3, 4)[i % 3]
        for i, input_group in enumerate(checkpoint.quantization.input_groups)
    }
    plan = Plan(Plan.uniform(checkpoint, 2).checkpoint, uneven)
    plan.save(file)
    (out / "quantize-log.jsonl").write_text(
        "".join(
            json.dumps({"module": m, "rel_error": {"2": 0.3, "3": 0.1, "4": 0.03}}) + "\n"
            for m in checkpoint.quantization.modules
        )
    )

    def run(*argv: object) -> tuple[int, str, str]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", ["dropbydrop", *map(str, argv)])
            try:
                cli.main()
                code = 0
            except SystemExit as stop:
                code = int(stop.code or 0)
        return code, *capsys.readouterr()

    sizes = ("--text", text, "--seq-len", 32, "--windows", 2)
    chosen = ("--bits", "2,4", "--avg-bits", "2.5", "--plan", file)
    code, stdout, _ = run("eval", out, *chosen, *sizes, "--json")
    assert code == 0
    rows = json.loads(stdout.splitlines()[-1])["bits"]
    assert list(rows) == ["2", "4", "2.5", str(file)]
    for name, bits in (("2", 2), ("4", 4)):
        assert rows[name]["true_bits"] == pytest.approx(checkpoint.true_bits(bits))
        assert rows[name]["bytes"] == checkpoint.bytes_at(bits)
    average = plan.average_bits(checkpoint)
    assert rows[str(file)]["true_bits"] - average == pytest.approx(checkpoint.true_bits(4) - 4)
    assert rows["2"]["bytes"] < rows["2.5"]["bytes"] < rows["4"]["bytes"]
    assert rows["2.5"]["nll"] not in (rows["2"]["nll"], rows["4"]["nll"])
    half = run("eval", out, "--bits", "2", *sizes, "--dtype", "bfloat16", "--json")[1]
    found = json.loads(half.splitlines()[-1])["bits"]["2"]["nll"]
    assert found != rows["2"]["nll"]
    assert found == pytest.approx(rows["2"]["nll"], rel=0.05)
    code, stdout, _ = run("generate", out, "--avg-bits", 2.5, "--prompt", "the", "--json",
                          "--max-new-tokens", 2)  # fmt: skip
    assert code == 0
    assert 2 < json.loads(stdout.splitlines()[-1])["bits"] <= 2.5
    wrong = ("--bits", "two"), ("--bits", "2.5"), ("--avg-bits", "1.5"), ("--avg-bits", "nan")
    for option, bad in (*wrong, ("--avg-bits", "few")):
        code, _, stderr = run("eval", out, option, bad, *sizes)
        assert code == 2, bad
        assert "bits" in stderr
    assert run("eval", out, "--plan", tmp_path / "none.json", *sizes)[0] == 2
    assert run("generate", out, "--bits", 2, "--avg-bits", 2.5, "--prompt", "the")[0] == 2
    assert run("eval", out, "--bits", "2", *sizes, "--dtype", "int8")[0] == 2
