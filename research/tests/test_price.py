"""The price of nesting, from rows of a comparison made by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dropbydrop_research.compare.price import paired_ratio, price_of_nesting

BASE = [3.0, 2.0, 2.5]


def row(true_bits: float, excess: list[float], kl: list[float]) -> dict[str, Any]:
    nll = [b + e for b, e in zip(BASE, excess, strict=True)]
    return {
        "true_bits": true_bits,
        "kl": sum(kl) / len(kl),
        "per_window": {"nll": nll, "kl": kl},
    }


def rows(factor: float) -> dict[str, Any]:
    """Excess 1, 1/4, 1/16 at 2, 3, 4 bits, and KL twice that, times `factor`."""
    found = {}
    for p in (2, 3, 4):
        excess = [factor * e * 4.0 ** (2 - p) for e in (0.9, 1.0, 1.1)]
        found[str(p)] = row(p + 0.025, excess, [2 * e for e in excess])
    return {"bits": found}


def test_ratios_and_bits() -> None:
    found = price_of_nesting({"drop": rows(2.0), "gptq": rows(9.0), "dedicated": rows(1.0)}, BASE)
    assert found is not None
    assert list(found) == ["drop"]
    assert list(found["drop"]) == ["2", "3", "4"]
    for price in found["drop"].values():
        assert price["excess"] == pytest.approx(2)
        assert price["kl"] == pytest.approx(2)
        assert price["kl_interval"] == pytest.approx([2, 2])  # paired: the windows cancel
        assert price["bits"] == pytest.approx(0.5)  # KL falls by 4 a bit


def test_a_code_that_costs_less_than_nothing() -> None:
    found = price_of_nesting({"drop": rows(0.5), "dedicated": rows(1.0)}, BASE)
    assert found is not None
    assert found["drop"]["3"]["bits"] == pytest.approx(-0.5)


def test_each_kind_has_its_price() -> None:
    every = {"drop": rows(2.0), "dedicated": rows(1.0), "trellis": rows(0.6)}
    assert list(price_of_nesting(every, BASE) or {}) == ["drop"]
    found = price_of_nesting({**every, "trellis-dedicated": rows(0.5)}, BASE)
    assert found is not None
    assert found["trellis"]["4"]["kl"] == pytest.approx(1.2)
    assert found["drop"]["4"]["kl"] == pytest.approx(2)


def test_where_there_is_no_answer() -> None:
    assert price_of_nesting({"drop": rows(1.0)}, BASE) is None
    assert price_of_nesting({"dedicated": rows(1.0)}, BASE) is None
    one = {"bits": {"3": rows(1.0)["bits"]["3"]}}
    found = price_of_nesting({"drop": one, "dedicated": one}, BASE)
    assert found is not None
    assert found["drop"]["3"]["bits"] is None
    flat = {"bits": {p: row(float(p), [1.0] * 3, [1.0] * 3) for p in "23"}}
    found = price_of_nesting({"drop": flat, "dedicated": flat}, BASE)
    assert found is not None
    assert found["drop"]["3"]["bits"] is None


def test_ratio_is_paired() -> None:
    base = torch.rand(20, dtype=torch.float64) + 0.5
    found, interval = paired_ratio(1.1 * base, base)
    assert found == pytest.approx(1.1)
    assert interval == pytest.approx([1.1, 1.1])
    assert paired_ratio(base[:1], base[:1]) == (1.0, None)
