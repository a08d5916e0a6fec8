"""The price of nesting: one code for all levels against a code of the same kind for each level.

For `drop` and `dedicated`, and for `trellis` and `trellis-dedicated`, at every level that both
have, on the same windows:

    excess, kl   nested over dedicated, 1 being free, with 95 % intervals of a bootstrap that draws
                 the same windows for both
    bits         how many true bits fewer a dedicated code would need for the nested code's KL: log
                 of the ratio of KL over the slope of log KL in true bits of the dedicated codes,
                 from this level to the next lower one (for the lowest, to the next higher)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

PAIRS = {"drop": "dedicated", "trellis": "trellis-dedicated"}

Prices = dict[str, dict[str, Any]]
"""Level -> {"excess", "excess_interval", "kl", "kl_interval", "bits"}; an interval is None for one
window, "bits" for one level or where the KL does not fall from level to level."""


def price_of_nesting(
    methods: Mapping[str, Any], reference: Sequence[float]
) -> dict[str, Prices] | None:
    """Nested method -> prices, JSON-able; None if no pair is there.

    Args:
        methods: rows of a comparison (run.py), each level with its "per_window" figures.
        reference: nll of the original in nats a token, by window.
    """
    found = {
        one: _prices(methods[one]["bits"], methods[other]["bits"], reference)
        for one, other in PAIRS.items()
        if one in methods and other in methods
    }
    return found or None


def _prices(
    nested: Mapping[str, Any], dedicated: Mapping[str, Any], reference: Sequence[float]
) -> Prices:
    """Of the levels that both have."""
    ascending = sorted((p for p in nested if p in dedicated), key=int)
    base = torch.tensor(reference, dtype=torch.float64)
    found = {}
    for i, p in enumerate(ascending):
        one, other = (
            {k: torch.tensor(row["per_window"][k], dtype=torch.float64) for k in ("nll", "kl")}
            for row in (nested[p], dedicated[p])
        )
        excess, excess_interval = paired_ratio(one["nll"] - base, other["nll"] - base)
        kl, kl_interval = paired_ratio(one["kl"], other["kl"])
        near = ascending[i - 1] if i else ascending[min(1, len(ascending) - 1)]
        found[p] = {
            "excess": excess,
            "excess_interval": excess_interval,
            "kl": kl,
            "kl_interval": kl_interval,
            "bits": _in_bits(kl, dedicated[p], dedicated[near]),
        }
    return found


def _in_bits(ratio: float, here: Mapping[str, Any], near: Mapping[str, Any]) -> float | None:
    bits = here["true_bits"] - near["true_bits"]
    if bits == 0 or min(here["kl"], near["kl"], ratio) <= 0:
        return None
    slope = math.log(here["kl"] / near["kl"]) / bits  # below 0
    return math.log(ratio) / -slope if slope < 0 else None


def paired_ratio(
    one: Tensor, other: Tensor, resamples: int = 2000
) -> tuple[float, list[float] | None]:
    """mean(one) / mean(other) of values [n] by window, and its 95 % interval; None for n = 1."""
    ratio = float(one.mean() / other.mean())
    if len(one) < 2:
        return ratio, None
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(0, len(one), (resamples, len(one)), generator=generator)
    drawn = one[index].mean(1) / other[index].mean(1)
    ends = torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=drawn.dtype))
    return ratio, ends.tolist()
