"""What it costs to run an input group at a lower level: KL to the full model, in nats a token.

Embedding and head in planes are no input group, and can be read with bits of their own: what fewer
of them cost is measured at every level, and interpolated between two.

Measured losses are a sidecar, sensitivity.json, beside the checkpoint and not in its manifest; it
carries the checkpoint's fingerprint and is refused by any other. They are measured in
evaluation/sensitivity_probe.py. Without a sidecar, the log of the quantization serves: every
relative error of a matrix counts the same. That knows how well a matrix was encoded, but not how
much it matters.

Of a stack of experts both know each expert: measured losses are sums over the tokens that were
routed to it, those of the log relative errors, weighted by its share of calibration's tokens.
The loss of the stack is their sum.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dropbydrop.checkpoint import Checkpoint
from dropbydrop.checkpoint.config import LOG_FILE
from dropbydrop.checkpoint.fields import Fields, check_version
from dropbydrop.checkpoint.files import dump_json, read_json
from dropbydrop.system.atomic_folder import write_whole
from dropbydrop.system.errors import DropError, FormatError

from .plan import Plan

SIDECAR = "sensitivity.json"
SIDECAR_FORMAT = "dropbydrop-sensitivity"


@dataclass(frozen=True)
class Sensitivity:
    """Losses of every input group at every level.

    Attributes:
        checkpoint: fingerprint.
        losses: input group name -> level -> expected KL to the highest level, nats a token; 0 at
            the highest. From a log the unit is arbitrary.
        kind: "measured" or "log".
        kl: level -> measured KL of the uniform level (empty from a log).
        description: what it was measured on.
        tables: bits of embedding and head in planes -> level -> what it costs to read so few of
            them where the matrices are at that level; none where the level has no more.
        experts: input group of a stack -> level -> loss of each expert; without an entry its
            experts share a level.
    """

    checkpoint: str
    losses: Mapping[str, Mapping[int, float]]
    kind: str
    kl: Mapping[int, float] = field(default_factory=dict)
    description: Mapping[str, Any] = field(default_factory=dict)
    tables: Mapping[int, Mapping[int, float]] = field(default_factory=dict)
    experts: Mapping[str, Sequence[Mapping[int, float]]] = field(default_factory=dict)

    def of_table(self, bits: int, average_bits: float) -> float:
        """What `bits` of embedding and head cost at an average between two levels."""
        row = self.tables[bits]
        levels = sorted(next(iter(self.losses.values())))
        return float(np.interp(average_bits, levels, [row.get(p, 0.0) for p in levels]))

    def predicted(self, plan: Plan, checkpoint: Checkpoint) -> float:
        """Loss of a plan: the sum over its input groups and experts, and the table's."""
        matrices = sum(
            self.losses[name][level]
            if isinstance(level, int)
            else sum(row[p] for row, p in zip(self.experts[name], level, strict=True))
            for name, level in plan.levels.items()
        )
        if plan.table is None or plan.table not in self.tables:
            return matrices
        return matrices + self.of_table(plan.table, plan.average_bits(checkpoint))

    def save(self, folder: Path) -> Path:
        """Write the sidecar into the checkpoint's folder.

        Raises:
            DropError: the folder cannot be written to.
        """
        data = {
            "format": SIDECAR_FORMAT,
            "format_version": 1,
            "checkpoint": self.checkpoint,
            "losses": {s: _to_json(row) for s, row in self.losses.items()},
            **(
                {"experts": {s: [*map(_to_json, rows)] for s, rows in self.experts.items()}}
                if self.experts
                else {}
            ),
            "kl": _to_json(self.kl),
            "description": dict(self.description),
        }
        if self.tables:
            data["tables"] = {str(b): _to_json(row) for b, row in self.tables.items()}
        target = folder / SIDECAR
        try:
            write_whole(target, dump_json(data))
        except OSError as error:
            raise DropError(
                f"{target} cannot be written ({error.strerror}); copy the checkpoint to a folder "
                "of your own to plan with it."
            ) from error
        return target

    @staticmethod
    def load(checkpoint: Checkpoint) -> Sensitivity | None:
        """The sidecar of a checkpoint, or None if there is none.

        Raises:
            FormatError: of another checkpoint, or damaged.
        """
        path = checkpoint.path / SIDECAR
        if not path.is_file():
            return None
        fields = Fields(read_json(path), str(path))
        again = f"Remove it, or measure again: dropbydrop plan {checkpoint.path} --measure"
        if fields.data.pop("format", None) != SIDECAR_FORMAT:
            raise FormatError(f"{path} is no table of sensitivities. {again}")
        check_version(fields.data.pop("format_version", None), str(path))
        found = fields.take("checkpoint", str)
        if found != checkpoint.fingerprint:
            raise FormatError(f"{path} was measured on another checkpoint. {again}")
        try:
            losses = {str(s): _from_json(row) for s, row in fields.take("losses", dict).items()}
            experts = {
                str(s): [*map(_from_json, rows)]
                for s, rows in fields.take("experts", dict, default={}).items()
            }
            kl = _from_json(fields.take("kl", dict))
            tables = {
                int(bits): _from_json(row)
                for bits, row in fields.take("tables", dict, default={}).items()
            }
        except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
            raise FormatError(f"{path} is damaged ({error}). {again}") from error
        about = fields.take("description", dict)
        fields.done()
        groups = {group.name: group.experts for group in checkpoint.quantization.input_groups}
        rows = [*losses.values(), *(row for each in experts.values() for row in each)]
        if (
            set(losses) != set(groups)
            or any(not groups.get(name) == len(each) > 0 for name, each in experts.items())
            or any(set(row) != set(checkpoint.levels) for row in rows)
            or not set(tables) <= set(checkpoint.quantization.embeddings.choices)
            or not all(0 <= v < math.inf for row in (*rows, *tables.values()) for v in row.values())
        ):
            raise FormatError(
                f"{path} does not have one loss for every input group and level. {again}"
            )
        return Sensitivity(found, losses, "measured", kl, about, tables, experts)


def _to_json(row: Mapping[int, float]) -> dict[str, float]:
    return {str(p): v for p, v in row.items()}


def _from_json(row: Mapping[str, Any]) -> dict[int, float]:
    return {int(p): float(v) for p, v in row.items()}


def known_sensitivity(checkpoint: Checkpoint) -> Sensitivity:
    """The sidecar if there is one, else what the quantization log tells.

    Raises:
        DropError: there is neither.
        FormatError: the sidecar is damaged or of another checkpoint.
    """
    known = Sensitivity.load(checkpoint) or from_log(checkpoint)
    if known is None:
        raise DropError(
            f"{checkpoint.path} has neither {SIDECAR} nor {LOG_FILE}, so nothing is known about "
            f"which matrices matter. Measure it: dropbydrop plan {checkpoint.path} --measure "
            "--avg-bits 2.6"
        )
    return known


def from_log(checkpoint: Checkpoint) -> Sensitivity | None:
    """Losses of an input group: the sum of its matrices' relative errors; None without a log.

    Of experts, weighted by their shares of the tokens that calibration routed; one is added to
    every count, so that what calibration has not met is rare, not impossible.
    """
    path = checkpoint.path / LOG_FILE
    if not path.is_file():
        return None
    errors: dict[str, dict[int, float]] = {}
    by_expert: dict[str, dict[int, list[float]]] = {}
    tokens: dict[str, list[int]] = {}  # module of experts -> tokens of each
    levels, top = checkpoint.levels, checkpoint.levels[-1]
    try:
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            errors[entry["module"]] = _from_json(entry["rel_error"])
            if "expert_errors" in entry:
                each = {int(p): list(map(float, row)) for p, row in entry["expert_errors"].items()}
                by_expert[entry["module"]] = each
            if "tokens" in entry:
                tokens[entry["module"].rpartition(".")[0]] = list(map(int, entry["tokens"]))
        losses, experts = {}, {}
        for group in checkpoint.quantization.input_groups:
            if group.experts and group.modules[0] in by_expert:
                (module,) = group.modules
                counts = [count + 1 for count in tokens[module.rpartition(".")[0]]]
                found = by_expert[module]
                rows = [
                    {p: counts[e] / sum(counts) * (found[p][e] - found[top][e]) for p in levels}
                    for e in range(group.experts)
                ]
                losses[group.name] = {p: sum(row[p] for row in rows) for p in levels}
                experts[group.name] = rows
                continue
            losses[group.name] = {
                p: sum(errors[m][p] - errors[m][top] for m in group.modules) for p in levels
            }
        if not all(math.isfinite(v) for row in losses.values() for v in row.values()):
            return None
    except (ValueError, LookupError, TypeError, ArithmeticError, AttributeError, RecursionError):
        return None
    return Sensitivity(checkpoint.fingerprint, losses, "log", experts=experts)
