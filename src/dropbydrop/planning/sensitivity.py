"""What it costs to run an input group at a lower level: KL to the full model, in nats a token.

Embedding and head in planes are no input group, and can be read with bits of their own: what fewer
of them cost is measured at every level, and interpolated between two.

Measured losses are a sidecar, sensitivity.json, beside the checkpoint and not in its manifest; it
carries the checkpoint's fingerprint and is refused by any other. They are measured in
evaluation/sensitivity_probe.py. Without a sidecar, the log of the quantization serves: every
relative error of a matrix counts the same. That knows how well a matrix was encoded, but not how
much it matters.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
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
    """

    checkpoint: str
    losses: Mapping[str, Mapping[int, float]]
    kind: str
    kl: Mapping[int, float] = field(default_factory=dict)
    description: Mapping[str, Any] = field(default_factory=dict)
    tables: Mapping[int, Mapping[int, float]] = field(default_factory=dict)

    def of_table(self, bits: int, average_bits: float) -> float:
        """What `bits` of embedding and head cost at an average between two levels."""
        row = self.tables[bits]
        levels = sorted(next(iter(self.losses.values())))
        return float(np.interp(average_bits, levels, [row.get(p, 0.0) for p in levels]))

    def predicted(self, plan: Plan, checkpoint: Checkpoint) -> float:
        """Loss of a plan: the sum over its input groups, and the table's."""
        matrices = sum(self.losses[name][p] for name, p in plan.levels.items())
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
            "losses": {s: {str(p): v for p, v in row.items()} for s, row in self.losses.items()},
            "kl": {str(p): v for p, v in self.kl.items()},
            "description": dict(self.description),
        }
        if self.tables:
            data["tables"] = {
                str(b): {str(p): v for p, v in row.items()} for b, row in self.tables.items()
            }
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
            losses = {
                str(input_group): {int(p): float(v) for p, v in row.items()}
                for input_group, row in fields.take("losses", dict).items()
            }
            kl = {int(p): float(v) for p, v in fields.take("kl", dict).items()}
            tables = {
                int(bits): {int(p): float(v) for p, v in row.items()}
                for bits, row in fields.data.pop("tables", {}).items()
            }
        except (TypeError, ValueError, AttributeError) as error:
            raise FormatError(f"{path} is damaged ({error}). {again}") from error
        about = fields.take("description", dict)
        result = Sensitivity(found, losses, "measured", kl, about, tables)
        fields.done()
        input_groups = {input_group.name for input_group in checkpoint.quantization.input_groups}
        rows_fit = all(set(row) == set(checkpoint.levels) for row in losses.values())
        values = [v for row in (*losses.values(), *tables.values()) for v in row.values()]
        known = set(tables) <= set(checkpoint.quantization.embeddings.choices)
        if (
            set(losses) != input_groups
            or not (rows_fit and known)
            or not all(0 <= v < math.inf for v in values)
        ):
            raise FormatError(
                f"{path} does not have one loss for every input group and level. {again}"
            )
        return result


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
    """Losses of an input group: the sum of its matrices' relative errors; None without a log."""
    path = checkpoint.path / LOG_FILE
    if not path.is_file():
        return None
    errors: dict[str, dict[int, float]] = {}
    try:
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            errors[entry["module"]] = {int(p): float(e) for p, e in entry["rel_error"].items()}
        losses = {
            input_group.name: {
                p: sum(errors[m][p] - errors[m][checkpoint.levels[-1]] for m in input_group.modules)
                for p in checkpoint.levels
            }
            for input_group in checkpoint.quantization.input_groups
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return Sensitivity(checkpoint.fingerprint, losses, "log")
