"""Plans that also say with how many bits embedding and head in planes are read."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import dropbydrop
from dropbydrop import Plan, make_plan
from dropbydrop.checkpoint import Checkpoint
from dropbydrop.checkpoint.tables import dense_table
from dropbydrop.coding import tables
from dropbydrop.evaluation.sensitivity_probe import measure
from dropbydrop.planning.plan import table_choices
from dropbydrop.planning.sensitivity import SIDECAR, Sensitivity
from dropbydrop.runtime.views import plan_of
from dropbydrop.system.errors import FormatError, MissingPlaneError
from tiny import VOCAB, write_checkpoint

EMBEDDING = "model.embed_tokens"
IDS = torch.randint(3, VOCAB, (2, 16), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, code: str) -> Path:
    """Planes of 2, 1, 1 and 1 bits; the levels 2, 3, 4 read 4, 5, 5 of them."""
    patch = pytest.MonkeyPatch()
    patch.setattr(tables, "ROWS", 80)
    folder = tmp_path_factory.mktemp("table-plans") / "out"
    yield write_checkpoint(folder, code=code, embedding_bits=(4, 5, 5))
    patch.undo()


@pytest.fixture(scope="module")
def checkpoint(out: Path) -> Checkpoint:
    return Checkpoint.open(out)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def stored(checkpoint: Checkpoint, bits: int) -> int:
    """Bytes of the planes of a table that make up `bits`, from the headers alone."""
    found = {name: info.nbytes for m in range(1, 5) for name, info in planes(checkpoint, m)}
    return sum(found[f"{EMBEDDING}.codes.{k}"] for k in range(1, bits))  # 2, 1, 1, 1 bits


def planes(checkpoint: Checkpoint, m: int) -> Any:
    from safetensors import safe_open

    file = checkpoint.path / f"plane-{m}.safetensors"
    if not file.is_file():
        return []
    with safe_open(file, "pt") as opened:
        names = [name for name in opened.keys() if name.startswith(EMBEDDING)]  # noqa: SIM118
        return [(name, opened.get_tensor(name)) for name in names]


def test_choices_are_the_prefixes_that_a_level_holds(checkpoint: Checkpoint) -> None:
    assert table_choices(checkpoint, 2) == {2: 1, 3: 2, 4: 3}
    assert table_choices(checkpoint, 4) == {2: 1, 3: 2, 4: 3, 5: 4}


def test_a_model_reads_the_table_of_its_plan(out: Path, checkpoint: Checkpoint) -> None:
    whole = dropbydrop.load(out)
    before = logits(whole)
    for level, bits in itertools.product((2, 4), (3, 4)):
        plan = replace(Plan.uniform(checkpoint, level), table=bits)
        alone, view = dropbydrop.load(out, plan=plan), dropbydrop.view(whole, plan=plan)
        assert torch.equal(logits(alone), logits(view))
        assert plan_of(view) == plan_of(alone)
        assert plan_of(view).table_planes(checkpoint) == bits - 1
        module = alone.get_input_embeddings()
        dense = dense_table(checkpoint, EMBEDDING, bits - 1)
        step = module.row_scales.float()[:, None]
        exact = module.source.turns(torch.device("cpu")).forward.apply_weight(dense)
        assert ((module.rows.float() * step - exact).abs() <= 0.51 * step).all()
        usual = checkpoint.bytes_at(level)
        assert plan.bytes_read(checkpoint) - usual == stored(checkpoint, bits) - stored(
            checkpoint, 4 if level == 2 else 5
        )
    assert torch.equal(logits(whole), before)


def test_a_plan_keeps_its_table_in_a_file(checkpoint: Checkpoint, tmp_path: Path) -> None:
    plan = replace(Plan.uniform(checkpoint, 3), table=3)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert len({plan, Plan.uniform(checkpoint, 3)}) == 2


def test_bits_that_are_not_there_are_refused(checkpoint: Checkpoint, code: str) -> None:
    for level, bits in ((2, 5), (4, 6), (4, 1)):
        with pytest.raises(FormatError, match=f"with {bits} bits"):
            replace(Plan.uniform(checkpoint, level), table=bits).check(checkpoint)


def test_eight_bit_tables_have_no_choice(tmp_path: Path) -> None:
    eight = Checkpoint.open(write_checkpoint(tmp_path / "out"))
    assert table_choices(eight, 4) == {}
    with pytest.raises(FormatError, match="none of them"):
        replace(Plan.uniform(eight, 2), table=4).check(eight)


def test_what_is_measured_comes_back(out: Path, checkpoint: Checkpoint) -> None:
    model = dropbydrop.load(out, dtype=torch.float32)
    known = measure(model, IDS, progress=False)
    assert set(known.tables) == {2, 3, 4, 5}
    assert set(known.tables[2]) == set(known.tables[3]) == {2, 3, 4}
    assert set(known.tables[4]) == {3, 4}  # it is what level 2 reads
    assert known.tables[5] == {}
    low, high = (
        dropbydrop.view(model, plan=replace(Plan.uniform(checkpoint, 3), table=b)) for b in (2, 5)
    )
    reference = torch.log_softmax(logits(model), -1)
    cost = [
        (reference.exp() * (reference - torch.log_softmax(logits(m), -1))).sum(-1)[:, :-1].mean()
        for m in (low, high)
    ]
    assert known.tables[2][3] == pytest.approx(max(0.0, float(cost[0] - cost[1])), rel=0.02)
    assert known.of_table(2, 2.5) == pytest.approx((known.tables[2][2] + known.tables[2][3]) / 2)
    known.save(out)
    try:
        assert Sensitivity.load(checkpoint) == known
    finally:
        (out / SIDECAR).unlink()


def test_tables_that_were_not_all_measured(checkpoint: Checkpoint) -> None:
    known = Sensitivity(
        checkpoint.fingerprint,
        {g.name: {2: 1.0, 3: 0.5, 4: 0.0} for g in checkpoint.quantization.input_groups},
        "measured",
        tables={5: {}},
    )
    assert make_plan(checkpoint, avg_bits=2.0, sensitivity=known).table is None


@pytest.mark.parametrize("weight", [0.0, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("avg_bits", [2.0, 2.4, 3.3])
def test_the_best_of_all_plans_and_tables(
    checkpoint: Checkpoint, weight: float, avg_bits: float
) -> None:
    """Against all plans, with all tables, for the bytes that the average stands for."""
    generator = torch.Generator().manual_seed(round(10 * avg_bits))
    groups = checkpoint.quantization.input_groups
    losses = {}
    for group in groups:
        a, b = torch.rand(2, generator=generator).tolist()
        losses[group.name] = {2: a + b, 3: b, 4: 0.0}
    rows = {2: dict.fromkeys((2, 3, 4), 3.0 * weight), 3: dict.fromkeys((2, 3, 4), weight)}
    rows |= {4: {3: 0.3 * weight, 4: 0.2 * weight}, 5: {}}
    known = Sensitivity(checkpoint.fingerprint, losses, "measured", tables=rows)
    found = make_plan(checkpoint, avg_bits, sensitivity=known)

    sizes = [sum(math.prod(checkpoint.shapes[m]) for m in group.modules) for group in groups]
    tables_of = {bits: stored(checkpoint, bits) for bits in (2, 3, 4, 5)}
    usual = tables_of[4 if avg_bits < 3 else 5]
    budget = math.floor(avg_bits * sum(sizes) / 8 + 1e-6) + usual
    choices = {level: table_choices(checkpoint, level) for level in (2, 3, 4)}
    best = math.inf
    for chosen in itertools.product((2, 3, 4), repeat=len(groups)):
        bits_spent = sum(p * size for p, size in zip(chosen, sizes, strict=True))
        plain = sum(losses[g.name][p] for g, p in zip(groups, chosen, strict=True))
        for bits in choices[max(chosen)]:
            if plain < best and bits_spent // 8 + tables_of[bits] <= budget:
                best = min(best, plain + known.of_table(bits, bits_spent / sum(sizes)))
    # the cost of a table at an average is known once the rest is settled: a hair from the best
    assert known.predicted(found, checkpoint) <= best * 1.1 + 1e-9
    assert found.bytes_read(checkpoint) <= Plan.uniform(checkpoint, 4).bytes_read(checkpoint)
    if weight == 0:
        assert found.table == 2
    if weight == 10 and avg_bits > 3:
        assert found.table == 5


def test_absent_planes_of_a_table(out: Path, checkpoint: Checkpoint, tmp_path: Path) -> None:
    from dropbydrop.checkpoint.slice import slice_checkpoint

    slice_checkpoint(out, tmp_path / "two", 2)
    small = Checkpoint.open(tmp_path / "two")
    plan = replace(Plan.uniform(checkpoint, 2), table=3)
    dropbydrop.load(small.path, plan=replace(plan, checkpoint=small.fingerprint))
    higher = replace(Plan.uniform(checkpoint, 3), table=5)
    with pytest.raises(MissingPlaneError):
        dropbydrop.load(small.path, plan=replace(higher, checkpoint=small.fingerprint))
