"""A request for a precision says which kind it is, and is refused where it means two things."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import dropbydrop
from dropbydrop import Plan
from dropbydrop.checkpoint import Checkpoint
from dropbydrop.cli.options import parse_precision
from dropbydrop.planning.precision import Precision
from dropbydrop.system.errors import PrecisionError
from tiny import write_checkpoint


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, code: str) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("precision") / "out", code=code)


def test_exactly_one_is_given(out: Path) -> None:
    plan = Plan.uniform(Checkpoint.open(out), 3)
    wrong: list[dict[str, Any]] = [{}, {"bits": 3, "avg_bits": 2.5}, {"bits": 3, "plan": plan}]
    for given in wrong:
        with pytest.raises(PrecisionError, match="give one precision: bits"):
            Precision(**given)
    for name, value in (("avg_bits", "2.5"), ("avg_bits", [2.5]), ("plan", {}), ("plan", "x")):
        with pytest.raises(PrecisionError, match=f"{name}=.* is no "):
            Precision(**{name: value})
    assert Precision(bits=3).resolve(Checkpoint.open(out)) == plan
    assert Precision(plan=plan).resolve(Checkpoint.open(out)) is plan
    with pytest.raises(PrecisionError, match="it has 2, 3, 4"):
        Precision(bits=5).resolve(Checkpoint.open(out))


@pytest.mark.parametrize("bits", [3.0, 2.6])
def test_a_float_is_no_level(out: Path, bits: Any) -> None:
    """3.0 and 3 are one number to a JSON client: the name tells an average, never the type."""
    model = dropbydrop.load(out, bits=2)
    for use in (
        Precision,
        lambda b: dropbydrop.load(out, b),
        lambda b: dropbydrop.load(out, bits=b, upgrade=True),
        lambda b: dropbydrop.view(model, b),
        lambda b: dropbydrop.load_planes(model, b),
    ):
        with pytest.raises(PrecisionError, match=f"give avg_bits={bits}"):
            use(bits)
    with pytest.raises(PrecisionError, match="give it as plan="):
        Precision(Plan.uniform(Checkpoint.open(out), 3))  # type: ignore[arg-type]


def test_text_of_the_command_line(out: Path, tmp_path: Path) -> None:
    plan = Plan.uniform(Checkpoint.open(out), 3)
    plan.save(tmp_path / "plan.json")
    assert parse_precision("3") == Precision(bits=3)
    assert parse_precision("3.0") == Precision(avg_bits=3.0)
    assert parse_precision(str(tmp_path / "plan.json")) == Precision(plan=plan)
    with pytest.raises(PrecisionError, match="give a level"):
        parse_precision("much")
