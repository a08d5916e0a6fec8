"""Budgets into levels: the plan of least predicted loss within average bits or bytes.

With b[s, p] the code bytes of input group s at level p and L[s, p] the loss it causes there
(sensitivity.py), minimise sum_s L[s, p_s] under sum_s b[s, p_s] <= B: a multiple-choice knapsack.
Plane sizes have large common divisors (bytes planes: 13,824 bytes on SmolLM2, so 1,920 units in
all), which makes
dynamic programming over the units cheap: it is the optimum, also where losses are not convex in
bytes. The greedy path along the convex hulls was tried first and loses up to a step. Above 65,536
units, sizes are rounded up to coarser ones: still feasible, within one unit an input group of the
optimum.

Where losses of single experts are known, each of them is an s of its own. With many (128 experts
in 48 blocks are 12,288) the table of choices would be gigabytes, and the step that the greedy path
loses is one plane of one expert: there it is the way.

Budgets are average bits (sum_s p_s * weights_s / sum_s weights_s, so that the uniform plan at level
P has average P; b counts p_s bits a weight) or bytes (memory.py: weights of every kind, cache,
activations; b is what the planes of level p take as they are held).

Embedding and head in planes are a tenth to a half of a small model. Where it was measured what
fewer bits of them cost, an average is a budget of bytes for both: what the matrices would take at
it and the tables at the level below it. Every number of bits that the tables can be read with is
tried, the matrices get the rest, and the least sum of losses wins: 3 bits on average may be 3.3 of
matrices and a smaller table. Memory holds tables in eight-bit rows whatever they are read with
(runtime/tables.py), so a budget of memory leaves them alone.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import torch

from dropbydrop.checkpoint import Checkpoint
from dropbydrop.checkpoint.tables import table_bytes
from dropbydrop.kernels.layout import plane_bytes
from dropbydrop.system.errors import MissingPlaneError, PrecisionError

from .levels import Level
from .memory import default_context, parse_bytes
from .plan import Plan, table_choices, usual_table
from .sensitivity import Sensitivity, known_sensitivity

log = logging.getLogger("dropbydrop")
_MAX_UNITS = 1 << 16
_MAX_CHOICES = 1 << 27  # bytes of the table of choices

_Shapes = Sequence[tuple[int, ...]]  # of matrices that share a level, [E, d_out, d_in] of stacks


def make_plan(
    checkpoint: Checkpoint,
    avg_bits: float | None = None,
    memory: str | int | None = None,
    *,
    context: int | None = None,
    dtype: torch.dtype | str | None = None,
    sensitivity: Sensitivity | None = None,
    planes: int | None = None,
) -> Plan:
    """The plan of least predicted loss within a budget. Exactly one budget must be given.

    Args:
        avg_bits: average bits a weight, between the lowest and the highest level.
        memory: bytes, or text such as "1.5GiB": weights, cache for `context` tokens, activations.
        context: tokens; by default 2,048 or what the model takes.
        dtype: type of the activations, as given to `load`.
        sensitivity: by default that of the sidecar, or else of the quantization log.
        planes: plan with the first so many only; by default with those that are in the folder.

    Raises:
        PrecisionError: an infeasible budget; the message names the smallest feasible one.
        MissingPlaneError: the budget needs planes that are absent.
        DropError: no sensitivities are known.
    """
    if (avg_bits is None) == (memory is None):
        raise PrecisionError("give one budget: average bits, or memory.")
    levels = levels_here(checkpoint, planes)
    known = sensitivity or known_sensitivity(checkpoint)
    if sensitivity is None and known.kind == "log":
        log.warning(
            f"{checkpoint.path}: nothing was measured, so this budget is spent by the relative "
            "errors of the quantization log, which can be worse than a mixture of two levels. "
            f"Measure once: dropbydrop plan {checkpoint.path} --measure --avg-bits 2.6"
        )
    if avg_bits is not None:
        check_average(avg_bits, levels, checkpoint.levels)
        size: Callable[[_Shapes, int], int] = _code_bytes
        weights = checkpoint.manifest.quantized_parameters
        budget = math.floor(avg_bits * weights / 8 + 1e-6)
    else:
        tokens = default_context(checkpoint, context)
        budget = _bytes_for_codes(checkpoint, levels[0], parse_bytes(memory or 0), dtype, tokens)
        size = partial(_held_bytes, checkpoint)
    items = list(_items(checkpoint, known))
    costs = [[size(shapes, p) for p in levels] for _, shapes, _ in items]
    losses = [row for _, _, row in items]

    def within(most: int, table: int | None) -> Plan:
        found: dict[str, list[int]] = {}
        for (name, _, _), level in zip(items, allocate(losses, costs, levels, most), strict=True):
            found.setdefault(name, []).append(level)
        chosen: dict[str, Level] = {
            name: tuple(row) if name in known.experts else row[0] for name, row in found.items()
        }
        return Plan(checkpoint.fingerprint, chosen, table)

    if avg_bits is None or not known.tables:
        return within(budget, None)
    usual = table_bytes(checkpoint, usual_table(checkpoint, avg_bits))
    plans = []
    for bits, count in table_choices(checkpoint, levels[-1]).items():
        most = budget + usual - table_bytes(checkpoint, count)
        if bits in known.tables and most >= sum(row[0] for row in costs):
            plan = within(most, bits)
            if bits in table_choices(checkpoint, plan.highest):
                plans.append(plan)
    if not plans:  # what was measured of tables is not enough
        return within(budget, None)
    return min(plans, key=lambda plan: known.predicted(plan, checkpoint))


def _items(
    checkpoint: Checkpoint, known: Sensitivity
) -> Iterator[tuple[str, _Shapes, Mapping[int, float]]]:
    """What gets a level: input groups, and the experts of stacks where they are known one by one.

    Yields its input group, the shapes of its matrices, and level -> loss.
    """
    for group in checkpoint.quantization.input_groups:
        shapes = [checkpoint.shapes[module] for module in group.modules]
        if group.name in known.experts:
            for row in known.experts[group.name]:
                yield group.name, [shape[1:] for shape in shapes], row
        else:
            yield group.name, shapes, known.losses[group.name]


def _bytes_for_codes(
    checkpoint: Checkpoint, lowest: int, wanted: int, dtype: torch.dtype | str | None, tokens: int
) -> int:
    """What `wanted` bytes of memory leave for codes (PrecisionError: less than level `lowest`)."""
    least = Plan.uniform(checkpoint, lowest).memory(checkpoint, dtype, tokens)
    if wanted < least.total:
        raise PrecisionError(
            f"{wanted:,} bytes are too few: {lowest} bits everywhere and {tokens:,} tokens of "
            f"context need {least.total:,} ({least.total / 2**20:.1f} MiB: weights "
            f"{least.weights:,}, key-value cache {least.kv_cache:,}, activations "
            f"{least.activations:,}). Give at least that, or a shorter context."
        )
    return wanted - (least.total - least.codes)


def _code_bytes(shapes: _Shapes, level: int) -> int:
    """Bytes of matrices at a level: so many bits a weight, without any padding."""
    return sum(map(math.prod, shapes)) * level // 8


def _held_bytes(checkpoint: Checkpoint, shapes: _Shapes, level: int) -> int:
    """Bytes of the planes of matrices at a level, as memory holds them (padded)."""
    planes = checkpoint.quantization.planes[: checkpoint.quantization.prefix_of(level)]
    return sum(plane_bytes(plane, *shape) for shape in shapes for plane in planes)


def levels_here(checkpoint: Checkpoint, planes: int | None = None) -> tuple[int, ...]:
    """Levels that the first `planes` planes, or those in the folder, suffice for."""
    if planes is None:
        present = checkpoint.planes_present()
        planes = next(m for m in range(len(present) + 1) if m + 1 not in present)
    if levels := checkpoint.quantization.served_by(planes):
        return levels
    checkpoint.require(checkpoint.levels[0])  # names the file
    raise PrecisionError(
        f"planes={planes} serves no level: the lowest is {checkpoint.levels[0]} bits."
    )


def check_average(bits: float, here: tuple[int, ...], levels: tuple[int, ...]) -> None:
    """Refuse an average that no mixture of the levels that are `here` has.

    Raises:
        MissingPlaneError: higher levels of the checkpoint would do.
        PrecisionError: no level of the checkpoint would.
    """
    if here[-1] < bits <= levels[-1]:
        raise MissingPlaneError(
            f"{bits} bits on average need more planes than are here (those of {here[-1]} bits). "
            f"Fetch more (dropbydrop pull SOURCE DEST --bits {levels[-1]}), read more "
            f"(dropbydrop.load_planes(model, {levels[-1]})), or ask for at most {here[-1]}."
        )
    if not here[0] <= bits <= levels[-1]:
        raise PrecisionError(
            f"{bits} bits on average cannot be met: this checkpoint's levels are "
            f"{', '.join(map(str, levels))}, so the smallest feasible average is {levels[0]} and "
            f"the largest {levels[-1]}."
        )


def allocate(
    losses: Sequence[Mapping[int, float]],
    costs: Sequence[Sequence[int]],
    levels: Sequence[int],
    budget: int,
) -> list[int]:
    """The level of every item of least total loss for at most `budget` bytes.

    Args:
        losses: for every item (an input group, or an expert), level -> loss.
        costs: for every item, its bytes at each of `levels`, ascending.
        levels: ascending; the lowest everywhere fits the budget.
        budget: bytes of codes.
    """
    lowest, highest = levels[0], levels[-1]
    further = [[cost - row[0] for cost in row] for row in costs]  # beyond the lowest level
    spare = budget - sum(row[0] for row in costs)
    if spare >= sum(row[-1] for row in further):
        return [highest] * len(costs)  # whatever rounding to units says
    unit = math.gcd(*itertools.chain(*further))
    if spare // unit > _MAX_UNITS:
        unit = -(-spare // _MAX_UNITS)
    count = spare // unit
    if count * len(costs) > _MAX_CHOICES:
        return _greedy(losses, further, levels, spare)
    units = [[-(-cost // unit) for cost in row] for row in further]
    # best[c]: least loss of the input groups so far for exactly c units beyond the lowest level
    best = np.full(count + 1, np.inf)
    best[0] = 0.0
    choices = np.zeros((len(costs), count + 1), dtype=np.uint8)
    for s, row in enumerate(losses):
        total = best + row[lowest]
        for k, level in enumerate(levels[1:], 1):
            cost = units[s][k]
            if cost <= count:
                other = np.full_like(best, np.inf)
                other[cost:] = best[: count + 1 - cost] + row[level]
                better = other < total
                total[better], choices[s][better] = other[better], k
        best = total
    chosen, c = [lowest] * len(costs), int(np.argmin(best))
    for s in reversed(range(len(costs))):
        k = int(choices[s][c])
        chosen[s] = levels[k]
        c -= units[s][k]
    return chosen


def _greedy(
    losses: Sequence[Mapping[int, float]],
    further: Sequence[Sequence[int]],
    levels: Sequence[int],
    spare: int,
) -> list[int]:
    """`allocate` along the convex hulls of the losses; within one step of the optimum.

    Args:
        further: for every item, its bytes beyond the lowest level at each of `levels`.
        spare: bytes beyond the lowest level everywhere.
    """

    def step(s: int, k: int) -> tuple[float, int, int] | None:
        """The best way up from level k of item s: minus what a byte saves, the item, its level."""
        now, row = losses[s][levels[k]], further[s]
        ways = [
            ((losses[s][levels[j]] - now) / (row[j] - row[k]), s, j)
            for j in range(k + 1, len(levels))
        ]
        return min(ways, default=None)

    chosen = [0] * len(losses)
    heap = [way for s in range(len(losses)) if (way := step(s, 0)) is not None]
    heapq.heapify(heap)
    while heap:
        saved, s, k = heapq.heappop(heap)
        cost = further[s][k] - further[s][chosen[s]]
        if saved >= 0:
            break
        if cost > spare:  # what is cheaper may still fit
            continue
        spare, chosen[s] = spare - cost, k
        if (way := step(s, k)) is not None:
            heapq.heappush(heap, way)
    return [levels[k] for k in chosen]
