"""Plans: another number of planes for every input group, so that any budget can be met exactly.

A plan is an immutable map from input groups to levels. The matrices of an input group (q/k/v;
gate/up) read one input and are fused by many runtimes, so they share one prefix. Each entry is one
of the checkpoint's levels: only those prefixes were supervised.

Allocation. With b[s, p] the code bytes of input group s at level p and L[s, p] the loss it causes
there (sensitivity.py), minimise sum_s L[s, p_s] under sum_s b[s, p_s] <= B: a multiple-choice
knapsack. Plane sizes have large common divisors (13,824 bytes on SmolLM2, so 1,920 units in all),
which makes
dynamic programming over the units cheap: it is the optimum, also where losses are not convex in
bytes. The greedy walk along the convex hulls was tried first and loses up to a step. Above 65,536
units, sizes are rounded up to coarser ones: still feasible, within one unit an input group of the
    optimum.

Budgets are average bits (sum_s p_s * weights_s / sum_s weights_s, so that the uniform plan at level
P has average P) or bytes (memory.py: weights of every kind, cache, activations).
A plan carries the fingerprint of its checkpoint, the SHA-256 of the manifest's canonical form, and
is refused by any other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dropbydrop.checkpoint import Checkpoint
from dropbydrop.checkpoint.config import Fields, check_version
from dropbydrop.checkpoint.files import dump_json, read_json
from dropbydrop.coding.code import GROUP
from dropbydrop.errors import FormatError, MissingPlaneError, PrecisionError

from .memory import Memory, default_context, estimate, parse_bytes, plane_bytes

if TYPE_CHECKING:
    from .sensitivity import Sensitivity

PLAN_FORMAT = "dropbydrop-plan"
_MAX_UNITS = 1 << 16


@dataclass(frozen=True)
class Plan:
    """Site name -> level. Immutable; comparable; belongs to one checkpoint.

    Attributes:
        checkpoint: fingerprint.
        prefixes: one level for every input group of the checkpoint.
    """

    checkpoint: str
    prefixes: Mapping[str, int]

    def __post_init__(self) -> None:
        object.__setattr__(self, "prefixes", MappingProxyType(dict(self.prefixes)))

    def __hash__(self) -> int:
        return hash((self.checkpoint, tuple(sorted(self.prefixes.items()))))

    @staticmethod
    def uniform(checkpoint: Checkpoint, bits: int) -> Plan:
        """Level `bits` everywhere (PrecisionError if it is none)."""
        level = checkpoint.quantization.check_level(bits)
        names = (input_group.name for input_group in checkpoint.quantization.input_groups)
        return Plan(checkpoint.fingerprint, dict.fromkeys(names, level))

    @property
    def lowest(self) -> int:
        """The smallest level in it."""
        return min(self.prefixes.values())

    @property
    def highest(self) -> int:
        """The largest level in it: planes 1..highest must be present."""
        return max(self.prefixes.values())

    def check(self, checkpoint: Checkpoint) -> Plan:
        """This plan, if it is one for `checkpoint`.

        Raises:
            FormatError: made for another checkpoint, or not one level for each of its sites.
        """
        if self.checkpoint != checkpoint.fingerprint:
            raise FormatError(
                f"this plan was made for another checkpoint than {checkpoint.path} (fingerprint "
                f"{self.checkpoint[:12]}…, here {checkpoint.fingerprint[:12]}…). Make one for it: "
                "dropbydrop plan OUT --avg-bits 2.6"
            )
        names = {input_group.name for input_group in checkpoint.quantization.input_groups}
        if set(self.prefixes) != names:
            raise FormatError(
                f"the plan does not name the input groups of the checkpoint: "
                f"{sorted(names ^ set(self.prefixes))[:4]} differ. It was edited; make it again."
            )
        for level in self.prefixes.values():
            checkpoint.quantization.check_level(level)
        return self

    def by_module(self, checkpoint: Checkpoint) -> dict[str, int]:
        """Quantized module -> planes to read."""
        input_groups = checkpoint.quantization.input_groups
        return {module: self.prefixes[s.name] for s in input_groups for module in s.modules}

    def average_bits(self, checkpoint: Checkpoint) -> float:
        """Planes a weight, averaged over all weights of the quantized matrices."""
        shapes = checkpoint.shapes
        weights = {module: d_out * d_in for module, (d_out, d_in) in shapes.items()}
        planes = sum(p * weights[module] for module, p in self.by_module(checkpoint).items())
        return planes / sum(weights.values())

    def true_bits(self, checkpoint: Checkpoint) -> float:
        """Bits a weight of the quantized linears, everything counted (`Checkpoint.true_bits`)."""
        return checkpoint.true_bits(self.highest) - self.highest + self.average_bits(checkpoint)

    def bytes_read(self, checkpoint: Checkpoint) -> int:
        """Bytes that loading by this plan reads: `Checkpoint.bytes_at` less the codes left out."""
        shapes = checkpoint.shapes
        unread = sum(
            (self.highest - p) * shapes[module][0] * shapes[module][1] // GROUP
            for module, p in self.by_module(checkpoint).items()
        )
        return checkpoint.bytes_at(self.highest) - unread

    def memory(
        self, checkpoint: Checkpoint, dtype: torch.dtype | str | None = None, context: int = 0
    ) -> Memory:
        """What a model loaded by this plan takes."""
        return estimate(checkpoint, self.by_module(checkpoint), dtype, context)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "format": PLAN_FORMAT,
            "format_version": 1,
            "checkpoint": self.checkpoint,
            "prefixes": dict(self.prefixes),
        }

    @staticmethod
    def from_dict(data: object, where: str = "plan") -> Plan:
        """Parse and validate; `check` compares it with a checkpoint.

        Raises:
            FormatError: not a plan of this version, or damaged.
        """
        fields = Fields(data, where)
        if fields.data.pop("format", None) != PLAN_FORMAT:
            raise FormatError(f"{where} is no plan. Write one: dropbydrop plan OUT --save FILE")
        check_version(fields.data.pop("format_version", None), where)
        plan = Plan(fields.take("checkpoint", str), fields.take("prefixes", dict))
        fields.done()
        if not plan.prefixes or any(type(p) is not int for p in plan.prefixes.values()):
            raise FormatError(f"{where}: prefixes must be whole numbers. Damaged; make it again.")
        return plan

    def save(self, file: Path | str) -> None:
        """Write the JSON form."""
        Path(file).write_bytes(dump_json(self.to_dict()))

    @staticmethod
    def load(file: Path | str) -> Plan:
        """Read what `save` wrote (FormatError)."""
        path = Path(file)
        if not path.is_file():
            raise FormatError(
                f"there is no plan {path}. Write one: dropbydrop plan OUT --save FILE"
            )
        return Plan.from_dict(read_json(path), str(path))

    def __repr__(self) -> str:
        counts: dict[int, int] = {}
        for p in self.prefixes.values():
            counts[p] = counts.get(p, 0) + 1
        return f"Plan({json.dumps(dict(sorted(counts.items())))} input groups at these levels)"


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
        avg_bits: average planes a weight, between the lowest and the highest level.
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
    from .sensitivity import known_sensitivity

    if (avg_bits is None) == (memory is None):
        raise PrecisionError("give one budget: average bits, or memory.")
    q = checkpoint.quantization
    levels = levels_here(checkpoint, planes)
    known = sensitivity or known_sensitivity(checkpoint)
    weights = sum(d_out * d_in for d_out, d_in in checkpoint.shapes.values())
    lowest = Plan.uniform(checkpoint, levels[0])
    if avg_bits is not None:
        _check_average(avg_bits, levels, q.levels)
        budget, costs = math.floor(avg_bits * weights / GROUP + 1e-6), _plane_costs(checkpoint)
    else:
        tokens = default_context(checkpoint, context)
        wanted, least = parse_bytes(memory or 0), lowest.memory(checkpoint, dtype, tokens)
        budget = wanted - (least.total - least.codes)
        costs = _plane_costs(checkpoint, held=True)
        if wanted < least.total:
            raise PrecisionError(
                f"{wanted:,} bytes are too few: {levels[0]} bits everywhere and {tokens:,} tokens "
                f"of context need {least.total:,} ({least.total / 2**20:.1f} MiB: weights "
                f"{least.weights:,}, key-value cache {least.kv_cache:,}, activations "
                f"{least.activations:,}). Give at least that, or a shorter context."
            )
    return Plan(lowest.checkpoint, _allocate(checkpoint, levels, known, costs, budget))


def _plane_costs(checkpoint: Checkpoint, held: bool = False) -> list[int]:
    """Bytes of one plane of every input group: weights over 8, or as memory holds them (padded)."""
    size = {
        name: plane_bytes(shape) if held else shape[0] * shape[1] // GROUP
        for name, shape in checkpoint.shapes.items()
    }
    return [
        sum(size[m] for m in input_group.modules)
        for input_group in checkpoint.quantization.input_groups
    ]


def levels_here(checkpoint: Checkpoint, planes: int | None = None) -> tuple[int, ...]:
    """Levels that the first `planes` planes, or those in the folder, suffice for."""
    here = range(1, planes + 1) if planes is not None else checkpoint.planes_present()
    levels = tuple(p for p in checkpoint.levels if set(range(1, p + 1)) <= set(here))
    if not levels:
        checkpoint.require(checkpoint.levels[0])  # names the file
    return levels


def _check_average(bits: float, here: tuple[int, ...], levels: tuple[int, ...]) -> None:
    if here[-1] < bits <= levels[-1]:
        raise MissingPlaneError(
            f"{bits} bits on average need more planes than are here (1..{here[-1]}). Fetch more "
            f"(dropbydrop pull SOURCE DEST --bits {levels[-1]}), read more "
            f"(dropbydrop.load_planes(model, {levels[-1]})), or ask for at most {here[-1]}."
        )
    if not here[0] <= bits <= levels[-1]:
        raise PrecisionError(
            f"{bits} bits on average cannot be met: this checkpoint's levels are "
            f"{', '.join(map(str, levels))}, so the smallest feasible average is {levels[0]} and "
            f"the largest {levels[-1]}."
        )


def _allocate(
    checkpoint: Checkpoint,
    levels: tuple[int, ...],
    known: Sensitivity,
    planes: list[int],
    budget: int,
) -> dict[str, int]:
    """Level of every input group for at most `budget` bytes; planes: bytes of a plane of each."""
    input_groups = checkpoint.quantization.input_groups
    left = budget - levels[0] * sum(planes)
    left = min(left, (levels[-1] - levels[0]) * sum(planes))
    unit = math.gcd(*planes)
    if left // unit > _MAX_UNITS:
        unit = -(-left // _MAX_UNITS)
    count = left // unit
    if left == (levels[-1] - levels[0]) * sum(planes):
        return {
            input_group.name: levels[-1] for input_group in input_groups
        }  # whatever rounding says
    # best[c]: least loss of the input groups so far for exactly c units beyond the lowest level
    best = np.full(count + 1, np.inf)
    best[0] = 0.0
    choices = np.zeros((len(input_groups), count + 1), dtype=np.uint8)
    for i, (input_group, plane) in enumerate(zip(input_groups, planes, strict=True)):
        losses = known.losses[input_group.name]
        total = best + losses[levels[0]]
        for k, level in enumerate(levels[1:], 1):
            cost = -(-(level - levels[0]) * plane // unit)
            if cost <= count:
                other = np.full_like(best, np.inf)
                other[cost:] = best[: count + 1 - cost] + losses[level]
                better = other < total
                total[better], choices[i][better] = other[better], k
        best = total
    prefixes, c = {}, int(np.argmin(best))
    for i in range(len(input_groups) - 1, -1, -1):
        level = levels[choices[i][c]]
        prefixes[input_groups[i].name] = level
        c -= -(-(level - levels[0]) * planes[i] // unit)
    return {input_group.name: prefixes[input_group.name] for input_group in input_groups}
