"""Plans: another level for every input group, so that any budget can be met exactly.

A plan is an immutable map from input groups to levels. The matrices of an input group (q/k/v;
gate/up) read one input and are fused by many runtimes, so they share one level. Each entry is one
of the checkpoint's levels: only those were supervised. What it reads is counted in planes.

A stack of experts may have a level for each of them: experts that many tokens are routed to get
more planes, and the upper planes of the others are not read. Experts are multiplied one by one, so
nothing is fused that this would take apart.

A plan carries the fingerprint of its checkpoint (`Checkpoint.fingerprint`) and is refused by any
other. Which plan fits a budget is decided in solver.py, what one takes in memory in memory.py.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from dropbydrop.checkpoint import Checkpoint
from dropbydrop.checkpoint.fields import Fields, check_version
from dropbydrop.checkpoint.files import dump_json, read_json
from dropbydrop.checkpoint.tables import table_bytes
from dropbydrop.system.atomic_folder import write_whole
from dropbydrop.system.errors import FormatError
from dropbydrop.system.file_errors import file_errors
from dropbydrop.system.paths import given

from .levels import Level, canonical, each, mapped, matrices
from .memory import Memory, estimate

PLAN_FORMAT = "dropbydrop-plan"


@dataclass(frozen=True)
class Plan:
    """Input group -> level. Immutable; comparable; belongs to one checkpoint.

    Attributes:
        checkpoint: fingerprint.
        levels: one for every input group of the checkpoint ("prefixes" in the JSON form), of a
            stack of experts also E of them.
        table: bits a weight of embedding and head where they are in planes; None: those of the
            highest level that is not above the average, so that a table grows with the matrices.
    """

    checkpoint: str
    levels: Mapping[str, Level]
    table: int | None = None

    def __post_init__(self) -> None:
        levels = {name: canonical(level) for name, level in self.levels.items()}
        object.__setattr__(self, "levels", MappingProxyType(levels))

    def __hash__(self) -> int:
        return hash((self.checkpoint, frozenset(self.levels.items()), self.table))

    @staticmethod
    def uniform(checkpoint: Checkpoint, bits: int) -> Plan:
        """Level `bits` everywhere (PrecisionError if it is none)."""
        level = checkpoint.quantization.check_level(bits)
        names = (input_group.name for input_group in checkpoint.quantization.input_groups)
        return Plan(checkpoint.fingerprint, dict.fromkeys(names, level))

    @property
    def lowest(self) -> int:
        """The smallest level in it."""
        return min(p for level in self.levels.values() for p in each(level))

    @property
    def highest(self) -> int:
        """The largest level in it, whose planes must be present."""
        return max(p for level in self.levels.values() for p in each(level))

    def check(self, checkpoint: Checkpoint) -> Plan:
        """This plan, if it is one for `checkpoint`.

        Raises:
            FormatError: made for another checkpoint, not one level for each of its input groups, or
                bits of a table that the planes of its highest level do not hold.
        """
        if self.checkpoint != checkpoint.fingerprint:
            raise FormatError(
                f"this plan was made for another checkpoint than {checkpoint.path} (fingerprint "
                f"{self.checkpoint[:12]}…, here {checkpoint.fingerprint[:12]}…). Make one for it: "
                "dropbydrop plan OUT --avg-bits 2.6"
            )
        groups = {group.name: group for group in checkpoint.quantization.input_groups}
        if set(self.levels) != set(groups):
            raise FormatError(
                f"the plan does not name the input groups of the checkpoint: "
                f"{sorted(set(groups) ^ set(self.levels))[:4]} differ. It was edited; make it "
                "again."
            )
        for name, level in self.levels.items():
            _check_experts(name, level, groups[name].experts)
            for one in each(level):
                checkpoint.quantization.check_level(one)
        choices = table_choices(checkpoint, self.highest)
        if self.table is not None and self.table not in choices:
            raise FormatError(
                f"the plan reads embedding and head with {self.table} bits; the planes of level "
                f"{self.highest} hold {sorted(choices) or 'none of them'}. It was edited; make it "
                "again."
            )
        return self

    def levels_by_module(self, checkpoint: Checkpoint) -> dict[str, Level]:
        """Quantized module -> level, or that of each expert."""
        input_groups = checkpoint.quantization.input_groups
        return {module: self.levels[s.name] for s in input_groups for module in s.modules}

    def planes_by_module(self, checkpoint: Checkpoint) -> dict[str, Level]:
        """Quantized module -> number of planes to read, of a stack perhaps of each expert."""
        count, levels = checkpoint.quantization.prefix_of, self.levels_by_module(checkpoint)
        return {name: mapped(level, count) for name, level in levels.items()}

    def table_planes(self, checkpoint: Checkpoint) -> int:
        """Planes that embedding and head read, where they are in planes; else 0."""
        q = checkpoint.quantization
        if self.table is not None:
            return q.embeddings.choices[self.table]
        return usual_table(checkpoint, self.average_bits(checkpoint))

    def average_bits(self, checkpoint: Checkpoint) -> float:
        """The levels, averaged over all weights of the quantized matrices."""
        return average(self.levels_by_module(checkpoint), checkpoint)

    def true_bits(self, checkpoint: Checkpoint) -> float:
        """Bits a weight of the quantized linears, everything counted (`Checkpoint.true_bits`)."""
        weights = checkpoint.manifest.quantized_parameters
        return checkpoint.true_bits(self.highest) - 8 * self._unread(checkpoint, False) / weights

    def bytes_read(self, checkpoint: Checkpoint) -> int:
        """Bytes that loading by this plan reads: `Checkpoint.bytes_at` less the codes left out."""
        return checkpoint.bytes_at(self.highest) - self._unread(checkpoint)

    def _unread(self, checkpoint: Checkpoint, tables: bool = True) -> int:
        """Bytes of codes that the highest level of the plan reads and the plan does not."""
        planes = checkpoint.quantization.planes
        all_of_it = checkpoint.quantization.prefix_of(self.highest)
        codes = sum(
            plane.nbytes(*matrix)
            for module, counts in self.planes_by_module(checkpoint).items()
            for matrix, count in matrices(checkpoint.shapes[module], counts)
            for plane in planes[count:all_of_it]
        )
        if not tables or not checkpoint.quantization.tables:
            return codes
        most = table_bytes(checkpoint, checkpoint.quantization.table_prefix(all_of_it))
        return codes + most - table_bytes(checkpoint, self.table_planes(checkpoint))

    def memory(
        self, checkpoint: Checkpoint, dtype: torch.dtype | str | None = None, context: int = 0
    ) -> Memory:
        """What a model loaded by this plan takes."""
        return estimate(checkpoint, self.planes_by_module(checkpoint), dtype, context)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; levels of experts are a list."""
        levels = {n: p if isinstance(p, int) else list(p) for n, p in self.levels.items()}
        return {
            "format": PLAN_FORMAT,
            "format_version": 1,
            "checkpoint": self.checkpoint,
            "prefixes": levels,
            **({} if self.table is None else {"table": self.table}),
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
        table = fields.take("table", int, default=None)
        fingerprint, levels = fields.take("checkpoint", str), fields.take("prefixes", dict)
        fields.done()
        numbers = [p if isinstance(p, list) else [p] for p in levels.values()]
        if not levels or not all(row and all(type(p) is int for p in row) for row in numbers):
            raise FormatError(f"{where}: prefixes must be whole numbers. Damaged; make it again.")
        return Plan(fingerprint, levels, table)

    def save(self, file: Path | str) -> None:
        """Write the JSON form, whole or not at all; a device or pipe is written to as it is.

        Raises:
            DropError: the file cannot be written.
        """
        path = Path(os.path.realpath(given(file)))
        with file_errors(path):
            if path.exists() and not path.is_file():
                path.write_bytes(dump_json(self.to_dict()))
            else:
                write_whole(path, dump_json(self.to_dict()))

    @staticmethod
    def load(file: Path | str) -> Plan:
        """Read what `save` wrote (FormatError)."""
        path = given(file)
        if not path.is_file():
            raise FormatError(
                f"there is no plan {path}. Write one: dropbydrop plan OUT --save FILE"
            )
        return Plan.from_dict(read_json(path), str(path))

    def __repr__(self) -> str:
        counts = Counter(p for level in self.levels.values() for p in each(level))
        what = (
            "input groups"
            if all(isinstance(p, int) for p in self.levels.values())
            else ("input groups and experts")
        )
        return f"Plan({json.dumps(dict(sorted(counts.items())))} {what} at these levels)"


def usual_table(checkpoint: Checkpoint, average_bits: float) -> int:
    """Planes of tables in planes of the highest level that is not above an average."""
    below = [level for level in checkpoint.levels if level <= average_bits]
    lowest = below[-1] if below else checkpoint.levels[0]
    return checkpoint.quantization.table_prefix(checkpoint.quantization.prefix_of(lowest))


def table_choices(checkpoint: Checkpoint, level: int) -> dict[int, int]:
    """Bits -> planes of tables in planes, of all that the plane files of a level hold."""
    q = checkpoint.quantization
    most = q.table_prefix(q.prefix_of(level))
    return {bits: count for bits, count in q.embeddings.choices.items() if count <= most}


def _check_experts(name: str, level: Level, experts: int) -> None:
    """Several levels are for as many experts (else FormatError)."""
    if not isinstance(level, int) and len(level) != experts:
        raise FormatError(
            f"the plan has {len(level)} levels for {name}, which holds "
            f"{f'{experts} experts' if experts else 'no experts'}. It was edited; make it again."
        )


def average(levels: Mapping[str, Level], checkpoint: Checkpoint) -> float:
    """Mean of the levels of these modules, by their numbers of weights."""
    found = [
        (math.prod(matrix), one)
        for name, level in levels.items()
        for matrix, one in matrices(checkpoint.shapes[name], level)
    ]
    return sum(weights * one for weights, one in found) / sum(weights for weights, _ in found)
