"""Plans with a level for each expert of a stack: what is decoded, held, read, counted, refused."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import dropbydrop
from dropbydrop.checkpoint import Checkpoint
from dropbydrop.checkpoint.checked_file import CheckedFile
from dropbydrop.checkpoint.slice import slice_checkpoint
from dropbydrop.cli.main import app
from dropbydrop.coding.encoder import Effort
from dropbydrop.evaluation.sensitivity_probe import measure
from dropbydrop.planning import solver
from dropbydrop.planning.levels import of_expert
from dropbydrop.planning.memory import estimate, held_bytes
from dropbydrop.planning.plan import Plan
from dropbydrop.planning.sensitivity import Sensitivity, known_sensitivity
from dropbydrop.quantization import job as jobs
from dropbydrop.quantization.pipeline import quantize
from dropbydrop.runtime.experts import NestedStack
from dropbydrop.runtime.load import load_views
from dropbydrop.runtime.views import store_of
from dropbydrop.system.errors import FormatError, MissingPlaneError, PrecisionError
from naive_experts import naive_expert
from tiny import VOCAB, save_tiny

IDS = torch.randint(5, VOCAB, (2, 19), generator=torch.Generator().manual_seed(3))
UP, DOWN = (f"model.layers.1.mlp.experts.{leaf}_proj" for leaf in ("gate_up", "down"))


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, code: str) -> Path:
    folder = tmp_path_factory.mktemp("moe")
    source = save_tiny(folder / "source", "qwen3-moe", num_hidden_layers=2)
    text = folder / "text.txt"
    text.write_text(" ".join(str(i * 7919 % 1000) for i in range(1500)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "EFFORTS", dict.fromkeys(jobs.EFFORTS, Effort(2, 1, 0)))
        settings: dict[str, Any] = {"windows": 3, "seq_len": 32, "progress": False}
        return quantize(source, folder / "out", calibration=text, code=code, **settings).out


@pytest.fixture(scope="module")
def checkpoint(out: Path) -> Checkpoint:
    return Checkpoint.open(out)


@pytest.fixture(scope="module")
def plan(checkpoint: Checkpoint) -> Plan:
    """Every level in both stacks, and one of them with planes that no expert lacks."""
    levels: dict[str, Any] = dict(Plan.uniform(checkpoint, 3).levels)
    group = checkpoint.quantization.group_index
    names = [g.name for g in checkpoint.quantization.input_groups]
    levels[names[group[UP]]] = (2, 4, 3, 2)
    levels[names[group[DOWN]]] = [4, 3, 4, 3]
    return Plan(checkpoint.fingerprint, levels)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int | None]]]:
    """Tensors that were read meanwhile, and the row where it was one."""
    seen: list[tuple[str, int | None]] = []
    tensor = CheckedFile.tensor

    def spied(self: CheckedFile, name: str, row: int | None = None) -> Tensor:
        seen.append((name, row))
        return tensor(self, name, row)

    monkeypatch.setattr(CheckedFile, "tensor", spied)
    return seen


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(ids).logits.float()


def stack(model: Any, name: str) -> NestedStack:
    found = model.get_submodule(name)
    assert isinstance(found, NestedStack)
    return found


def test_every_expert_has_the_weights_of_its_level(out: Path, plan: Plan) -> None:
    """Bit for bit those of a model at that level, and those of the naive decoder."""
    model = dropbydrop.load(out, plan=plan, dtype=torch.float32)
    checkpoint = store_of(model).checkpoint
    levels = plan.levels_by_module(checkpoint)
    for name in (UP, DOWN):
        dense = stack(model, name).dense_weight()
        for e in range(4):
            level = of_expert(levels[name], e)
            other = dropbydrop.load(out, bits=level, dtype=torch.float32)
            assert torch.equal(dense[e], stack(other, name).dense_weight()[e])
            rows = range(4)
            expected = naive_expert(checkpoint, name, e, level, rows)
            torch.testing.assert_close(dense[e, :4].double(), expected, rtol=0, atol=1e-5)
    assert dropbydrop.plan_of(model) == plan
    assert dropbydrop.precision(model) == plan.average_bits(checkpoint)


def test_products_are_those_of_the_decoded_weights(out: Path, plan: Plan) -> None:
    model = dropbydrop.load(out, plan=plan, dtype=torch.float32)
    dense = dropbydrop.view(model, plan=plan).dequantize()
    for n, share in ((38, 1e-4), (5, 2e-2), (1, 2e-2)):
        for row in IDS:  # one token hits experts of several levels
            ids = row[None, :n] if n < 38 else IDS
            found, expected = logits(model, ids), logits(dense, ids)
            assert float((found - expected).abs().max() / expected.abs().max()) < share
    tokens = model.generate(IDS[:1], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert tokens.shape == (1, IDS.shape[1] + 4)


def test_what_is_held_is_what_was_reckoned(out: Path, plan: Plan) -> None:
    model = dropbydrop.load(out, plan=plan, dtype=torch.float32)
    checkpoint = store_of(model).checkpoint
    memory = estimate(checkpoint, plan.planes_by_module(checkpoint), torch.float32)
    assert held_bytes(model) == memory.total - memory.shared
    base = dropbydrop.load(out, dtype=torch.float32)
    assert held_bytes(dropbydrop.view(base, plan=plan)) == held_bytes(model) < held_bytes(base)
    # bits: level 3 everywhere, and what these eight matrices have more or less
    q, up, down = checkpoint.quantization, checkpoint.shapes[UP], checkpoint.shapes[DOWN]
    at = [q.prefix_of(level) for level in checkpoint.levels]  # planes of levels 2, 3, 4
    less = sum(plane.nbytes(*up[1:]) for plane in q.planes[at[0] : at[1]])
    more_up = sum(plane.nbytes(*up[1:]) for plane in q.planes[at[1] : at[2]])
    more_down = sum(plane.nbytes(*down[1:]) for plane in q.planes[at[1] : at[2]])
    bytes_more = more_up - 2 * less + 2 * more_down
    weights = checkpoint.manifest.quantized_parameters
    uniform = Plan.uniform(checkpoint, 3)
    # the highest level counts codebooks of all its planes
    books = sum(plane.codebook_bytes for plane in q.planes[at[1] : at[2]])
    more = 8 * (bytes_more + books) / weights
    assert plan.true_bits(checkpoint) == pytest.approx(uniform.true_bits(checkpoint) + more)
    expected = 3 + (math.prod(up[1:]) * (1 - 2) + math.prod(down[1:]) * 2) / weights
    assert plan.average_bits(checkpoint) == pytest.approx(expected)
    files = sum(checkpoint.manifest.files[n].size for n in checkpoint.manifest.tensor_files(at[2]))
    unread = sum(
        plane.nbytes(*checkpoint.shapes[name][-2:])
        for name, count in plan.planes_by_module(checkpoint).items()
        for e in range(4 if len(checkpoint.shapes[name]) == 3 else 1)
        for plane in q.planes[of_expert(count, e) : at[2]]
    )
    assert plan.bytes_read(checkpoint) == files - unread


def test_only_the_planes_of_hot_experts_are_read(
    out: Path, plan: Plan, read: list[tuple[str, int | None]]
) -> None:
    model = dropbydrop.load(out, plan=plan, dtype=torch.float32)
    checkpoint = store_of(model).checkpoint
    at = [checkpoint.quantization.prefix_of(level) for level in checkpoint.levels]
    codes = {(name, row) for name, row in read if ".codes." in name and "experts" in name}
    upper = {(f"{UP}.codes.{m}", 1) for m in range(at[0] + 1, at[2] + 1)}
    upper |= {(f"{UP}.codes.{m}", 2) for m in range(at[0] + 1, at[1] + 1)}
    upper |= {(f"{DOWN}.codes.{m}", None) for m in range(at[0] + 1, at[1] + 1)}
    upper |= {(f"{DOWN}.codes.{m}", e) for m in range(at[1] + 1, at[2] + 1) for e in (0, 2)}
    # the first planes of all experts are read by transformers; block 0 has no experts
    others = {(n, row) for n, row in codes if not n.startswith((UP, DOWN))}
    assert codes - others == upper
    # ... and what further levels add is the rest, nothing twice
    read.clear()
    dropbydrop.load_planes(model, 4)
    added = {(n, row) for n, row in read if n.startswith((UP, DOWN)) and ".codes." in n}
    lacking = {(f"{UP}.codes.{m}", e) for m in range(at[0] + 1, at[1] + 1) for e in (0, 3)}
    lacking |= {(f"{UP}.codes.{m}", e) for m in range(at[1] + 1, at[2] + 1) for e in (0, 2, 3)}
    lacking |= {(f"{DOWN}.codes.{m}", e) for m in range(at[1] + 1, at[2] + 1) for e in (1, 3)}
    assert added == lacking
    assert len(read) == len(set(read))
    whole = dropbydrop.load(out, dtype=torch.float32)
    assert torch.equal(logits(dropbydrop.view(model, 4)), logits(whole))
    assert held_bytes(dropbydrop.view(model, 4)) == held_bytes(whole)


def test_bytes_of_a_row_are_those_of_the_file(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row of a tensor compares and reads its own bytes alone."""
    checked: list[tuple[int, int]] = []
    monkeypatch.setattr(CheckedFile, "check", lambda self, a, b: checked.append((a, b)))
    whole = checkpoint.read_codes(UP, 1)
    ((start, stop),) = checked
    for e in range(4):
        assert torch.equal(checkpoint.read_codes(UP, 1, e), whole[e])
        share = (stop - start) // 4
        assert checked[-1] == (start + e * share, start + (e + 1) * share)


def test_views_and_upgrades_add_what_is_missing(out: Path, plan: Plan) -> None:
    model = dropbydrop.load(out, plan=plan, dtype=torch.float32)
    for bits in (3, 4):
        with pytest.raises(MissingPlaneError):
            dropbydrop.view(model, bits)
    assert torch.equal(
        logits(dropbydrop.view(model, 2)), logits(dropbydrop.load(out, 2, dtype=torch.float32))
    )
    other = dataclasses.replace(plan, levels={**plan.levels, **swapped(plan)})
    with pytest.raises(MissingPlaneError, match="needs plane"):
        dropbydrop.view(model, plan=other)
    assert dropbydrop.upgrade(model).wait(4, timeout=60)
    found = dropbydrop.view(model, plan=other)
    assert torch.equal(logits(found), logits(dropbydrop.load(out, plan=other, dtype=torch.float32)))
    # the view holds what the model holds, not copies of it
    mine = {p.data_ptr() for p in model.get_submodule(UP).parameters()}
    again = dropbydrop.view(found, plan=plan)
    assert {p.data_ptr() for p in again.get_submodule(UP).parameters()} == mine
    assert torch.equal(logits(again), logits(model))
    both = load_views(store_of(model).checkpoint, {"a": precision_of(plan), "b": precision_of(3)})
    assert both["a"][0] == plan


def precision_of(given: Any) -> Any:
    from dropbydrop.planning.precision import Precision

    return Precision(plan=given) if isinstance(given, Plan) else Precision(given)


def swapped(plan: Plan) -> dict[str, Any]:
    """The stacks of a plan with their experts in the other order."""
    return {n: p[::-1] for n, p in plan.levels.items() if not isinstance(p, int)}


def test_a_state_dict_and_another_device(out: Path, plan: Plan) -> None:
    model = dropbydrop.load(out, plan=plan, dtype=torch.float32)
    checkpoint = store_of(model).checkpoint
    m = checkpoint.quantization.prefix_of(4)
    saved = model.state_dict()
    assert torch.equal(saved[f"{UP}.codes.{m}-1"], checkpoint.read_codes(UP, m)[1])
    assert f"{UP}.codes.{m}-0" not in saved
    before = logits(model)
    model.load_state_dict(saved)
    assert torch.equal(logits(model), before)
    moved = dropbydrop.view(model, plan=plan).to("meta").get_submodule(UP).codes
    assert {p.device.type for p in moved.parameters()} == {"meta"}
    assert moved.to_stored()[-1].shape == saved[f"{UP}.codes.{m}-1"].shape


# --------------------------------------------------------------------------------------- plans


def test_the_json_form(plan: Plan, checkpoint: Checkpoint, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    read = Plan.load(tmp_path / "plan.json")
    assert read == plan
    assert hash(read) == hash(plan)
    assert read.check(checkpoint) == plan
    same = {n: (p if isinstance(p, int) else (3,) * 4) for n, p in plan.levels.items()}
    assert Plan(checkpoint.fingerprint, same) == Plan.uniform(checkpoint, 3)
    assert "experts" in repr(plan)
    assert (plan.lowest, plan.highest) == (2, 4)
    data = json.loads((tmp_path / "plan.json").read_text())
    for wrong in ([], [2, "3", 4, 2], [2, True, 4, 2], {"0": 2}, 2.0):
        data["prefixes"][next(n for n in plan.levels if not isinstance(plan.levels[n], int))] = (
            wrong
        )
        with pytest.raises(FormatError, match="whole numbers"):
            Plan.from_dict(data)


def test_levels_that_a_group_cannot_have(plan: Plan, checkpoint: Checkpoint) -> None:
    stacked = next(n for n, p in plan.levels.items() if not isinstance(p, int))
    dense = next(n for n, p in plan.levels.items() if isinstance(p, int))
    for name, level, error, words in (
        (stacked, (2, 3, 4), FormatError, "3 levels for .*4 experts"),
        (dense, (2, 3), FormatError, "2 levels for .*no experts"),
        (stacked, (2, 3, 5, 2), PrecisionError, "5"),
    ):
        wrong = Plan(checkpoint.fingerprint, {**plan.levels, name: level})
        with pytest.raises(error, match=words):
            wrong.check(checkpoint)


def test_plans_of_a_slice(out: Path, plan: Plan, tmp_path: Path) -> None:
    """A slice is the same checkpoint: plans whose planes it has are good for it."""
    slice_checkpoint(out, tmp_path / "three", 3)
    with pytest.raises(MissingPlaneError, match="is missing"):
        dropbydrop.load(tmp_path / "three", plan=plan)
    levels = {
        n: p if isinstance(p, int) else tuple(min(one, 3) for one in p)
        for n, p in plan.levels.items()
    }
    lower = Plan(plan.checkpoint, levels)
    assert lower.highest == 3
    found = dropbydrop.load(tmp_path / "three", plan=lower, dtype=torch.float32)
    assert torch.equal(logits(found), logits(dropbydrop.load(out, plan=lower, dtype=torch.float32)))


# -------------------------------------------------------------------------------------- budgets


def test_losses_of_experts_by_the_log(out: Path, checkpoint: Checkpoint) -> None:
    """By hand: share of the tokens, one added to each count, times the relative error beyond 4."""
    lines = [json.loads(line) for line in (out / "quantize-log.jsonl").read_text().splitlines()]
    by_name = {line["module"]: line for line in lines}
    known = known_sensitivity(checkpoint)
    group = checkpoint.quantization.input_groups[checkpoint.quantization.group_index[UP]]
    counts = [n + 1 for n in by_name[DOWN]["tokens"]]  # gate and up are routed the same
    for e, row in enumerate(known.experts[group.name]):
        errors = {p: by_name[UP]["expert_errors"][str(p)][e] for p in (2, 3, 4)}
        for p in (2, 3, 4):
            assert row[p] == pytest.approx(counts[e] / sum(counts) * (errors[p] - errors[4]))
    for p in (2, 3, 4):
        assert known.losses[group.name][p] == sum(row[p] for row in known.experts[group.name])
        each = by_name[UP]["expert_errors"][str(p)]
        assert sum(each) / 4 == pytest.approx(by_name[UP]["rel_error"][str(p)], rel=1e-3)


def test_hot_experts_get_the_planes(out: Path, checkpoint: Checkpoint) -> None:
    known = known_sensitivity(checkpoint)
    name = checkpoint.quantization.input_groups[checkpoint.quantization.group_index[UP]].name
    rows = [dict(row) for row in known.experts[name]]
    rows[1] = {p: 100 * loss for p, loss in rows[1].items()}
    rows[3] = dict.fromkeys(rows[3], 0.0)
    hot = dataclasses.replace(known, experts={**known.experts, name: rows})
    plan = solver.make_plan(checkpoint, 3, sensitivity=hot)
    levels = plan.levels[name]
    assert of_expert(levels, 1) == 4
    assert of_expert(levels, 3) == 2
    assert plan.average_bits(checkpoint) <= 3
    per_stack = dataclasses.replace(known, experts={})
    coarse = solver.make_plan(checkpoint, 2.6, sensitivity=per_stack)
    assert all(isinstance(level, int) for level in coarse.levels.values())
    fine = solver.make_plan(checkpoint, 2.6, sensitivity=known)
    assert known.predicted(fine, checkpoint) <= known.predicted(coarse, checkpoint)
    held = fine.memory(checkpoint, torch.float32, 64).total
    by_memory = solver.make_plan(
        checkpoint, memory=held, context=64, dtype=torch.float32, sensitivity=known
    )
    assert by_memory.memory(checkpoint, torch.float32, 64).total <= held
    model = dropbydrop.load(out, avg_bits=2.6, dtype=torch.float32)
    assert any(not isinstance(level, int) for level in dropbydrop.plan_of(model).levels.values())


def test_the_greedy_path_is_within_a_step_of_the_optimum(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    levels = (2, 3, 4)
    for _ in range(20):
        drops = torch.rand(40, 2, generator=generator).sort(descending=True).values.tolist()
        losses = [{2: a + b, 3: b, 4: 0.0} for a, b in drops]
        costs = [[2, 3, 4]] * 40
        budget = 80 + int(torch.randint(0, 81, (), generator=generator))
        best = solver.allocate(losses, costs, levels, budget)
        with monkeypatch.context() as patch:
            patch.setattr(solver, "_MAX_CHOICES", 0)
            found = solver.allocate(losses, costs, levels, budget)
        for chosen in (best, found):
            assert sum(chosen) <= budget
        loss = [sum(row[p] for row, p in zip(losses, one, strict=True)) for one in (best, found)]
        assert loss[0] - 1e-9 <= loss[1] <= loss[0] + 1


def test_a_sidecar_with_experts(checkpoint: Checkpoint, tmp_path: Path) -> None:
    known = known_sensitivity(checkpoint)
    rows = {n: [{p: abs(v) for p, v in r.items()} for r in e] for n, e in known.experts.items()}
    losses = {n: {p: abs(v) for p, v in row.items()} for n, row in known.losses.items()}
    measured = Sensitivity(checkpoint.fingerprint, losses, "measured", experts=rows)
    path = measured.save(checkpoint.path)
    try:
        assert Sensitivity.load(checkpoint) == measured
        data = json.loads(path.read_text())
        next(iter(data["experts"].values())).pop()
        path.write_text(json.dumps(data))
        with pytest.raises(FormatError, match="one loss for every"):
            Sensitivity.load(checkpoint)
    finally:
        path.unlink()


def test_the_command_line(out: Path, tmp_path: Path) -> None:
    file, text = tmp_path / "plan.json", tmp_path / "text.txt"
    text.write_text(" ".join(str(i * 104729 % 1000) for i in range(400)))
    base = ["plan", str(out), "--avg-bits", "2.6", "--no-measure", "--save", str(file)]
    shown = CliRunner().invoke(app, base)
    assert shown.exit_code == 0, shown.output
    assert re.search(r"\d-\d, \d\.\d\d", shown.output)
    made = json.loads(CliRunner().invoke(app, [*base, "--json"]).stdout)
    assert any(isinstance(level, list) for level in made["prefixes"].values())
    assert made["average_bits"] <= 2.6
    more = ["--text", str(text), "--windows", "1", "--seq-len", "32", "--json"]
    done = CliRunner().invoke(app, ["eval", str(out), "--plan", str(file), *more])
    assert done.exit_code == 0, done.output
    row = json.loads(done.stdout)["bits"][str(file)]
    assert row["true_bits"] == pytest.approx(Plan.load(file).true_bits(Checkpoint.open(out)))


# ------------------------------------------------------------------------------------- measured


def naive_losses(model: Any, ids: Tensor) -> dict[tuple[str, int, int], float]:
    """(stack, expert, level) -> 1/2 mean_t (g_t . dW x_t)^2, by autograd on dense experts.

    The experts are transformers' own, run one by one here so that their inputs and outputs show.
    """
    dense = {p: dropbydrop.view(model, p) for p in (2, 3, 4)}
    weights = {(n, p): stack(dense[p], n).dense_weight() for n in (UP, DOWN) for p in dense}
    plain = dropbydrop.view(model, 4).dequantize()
    experts = plain.get_submodule(UP.rpartition(".")[0])
    seen: list[tuple[str, int, Tensor, Tensor]] = []

    def forward(x: Tensor, index: Tensor, shares: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(4):
            tokens, places = (index == e).nonzero(as_tuple=True)
            up = x[tokens] @ experts.gate_up_proj[e].T
            gate, value = up.chunk(2, dim=-1)
            h = torch.nn.functional.silu(gate) * value
            down = h @ experts.down_proj[e].T
            for name, inputs, y in ((UP, x[tokens], up), (DOWN, h, down)):
                y.retain_grad()
                seen.append((name, e, inputs.detach(), y))
            out = out.index_add(0, tokens, down * shares[tokens, places, None])
        return out

    experts.forward = forward
    generator, found = torch.Generator().manual_seed(0), dict[tuple[str, int, int], float]()
    for window in ids:
        seen.clear()
        embedded = plain.get_input_embeddings()(window[None]).detach().requires_grad_()
        log_p = torch.log_softmax(plain(inputs_embeds=embedded).logits[0], -1)
        labels = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
        log_p.gather(1, labels).sum().backward()
        for name, e, x, y in seen:
            for p in (2, 3):
                change = weights[name, p][e] - weights[name, 4][e]
                inner = (y.grad * (x @ change.T)).sum(-1)
                before = found.get((name, e, p), 0.0)
                found[name, e, p] = before + 0.5 * float(inner.square().sum()) / ids.numel()
    return found


def test_measured_losses_of_experts_against_a_naive_computation(out: Path) -> None:
    model = dropbydrop.load(out, dtype=torch.float32)
    checkpoint = store_of(model).checkpoint
    ids = torch.cat([IDS, IDS.flip(0, 1)])
    known, naive = measure(model, ids, progress=False), naive_losses(model, ids)
    ratios = {2: [], 3: []}  # what scales the form to the measured KL, the same for all of a level
    for name in (UP, DOWN):
        group = checkpoint.quantization.input_groups[checkpoint.quantization.group_index[name]]
        rows = known.experts[group.name]
        for p in (2, 3):
            ratios[p] += [row[p] / naive[name, e, p] for e, row in enumerate(rows)]
            assert known.losses[group.name][p] == pytest.approx(sum(row[p] for row in rows))
        assert all(row[4] == 0 for row in rows)
    for found in ratios.values():
        assert max(found) == pytest.approx(min(found), rel=5e-3)
    for p in (2, 3):
        assert sum(row[p] for row in known.losses.values()) == pytest.approx(known.kl[p])
    plan = solver.make_plan(checkpoint, 2.6, sensitivity=known)
    assert plan.average_bits(checkpoint) <= 2.6
    assert known.predicted(plan, checkpoint) <= known.kl[2]


def test_a_copy_is_not_the_original(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Biases of experts, which may change, are a model's own."""
    monkeypatch.setattr(jobs, "EFFORTS", dict.fromkeys(jobs.EFFORTS, Effort(2, 1, 0)))
    source = save_tiny(tmp_path / "source", "gpt-oss", num_hidden_layers=1)
    (tmp_path / "text.txt").write_text(" ".join(str(i * 7919 % 1000) for i in range(1500)))
    settings: dict[str, Any] = {"windows": 2, "seq_len": 32, "progress": False}
    out = quantize(source, tmp_path / "out", calibration=tmp_path / "text.txt", **settings).out

    @torch.no_grad()
    def token(model: Any) -> Any:
        return model(IDS[:1, :1]).logits

    first, found = token(dropbydrop.load(out)), []
    for ran_before in (True, False):
        base = dropbydrop.load(out)
        if ran_before:
            token(base)
        twin = copy.deepcopy(base)
        for name, bias in twin.named_parameters():
            if "experts" in name and name.endswith("bias"):
                bias.data.add_(1)
        found.append(token(twin))
        assert torch.equal(token(base), first)
    assert torch.equal(*found)
    assert not torch.equal(found[0], first)
