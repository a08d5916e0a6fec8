"""One request for a precision: a level, an average, or a plan. Each has a name, none is guessed.

    Precision(bits=3)           level 3: its planes of every input group
    Precision(avg_bits=2.6)     the plan of least predicted loss with 2.6 bits a weight on average
    Precision(plan=plan)        this plan

`bits=3` and `bits=3.0` would be the same number to a JSON client, so the type of a number decides
nothing here: a float given as bits is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real

from dropbydrop.checkpoint import Checkpoint
from dropbydrop.system.errors import PrecisionError

from .plan import Plan
from .solver import make_plan


@dataclass(frozen=True)
class Precision:
    """What was asked for. Immutable; belongs to no checkpoint before it is resolved.

    Attributes:
        bits: a level of the checkpoint.
        avg_bits: average bits a weight, between the lowest and the highest level.
        plan: a level for every input group.

    Raises:
        PrecisionError: not exactly one of them is given, or bits is no whole number.
    """

    bits: int | None = None
    avg_bits: float | None = None
    plan: Plan | None = None

    def __post_init__(self) -> None:
        given: object = self.bits
        if isinstance(given, float):
            raise PrecisionError(
                f"bits={given!r} is no level: levels are whole numbers. For an average over the "
                f"weights, give avg_bits={given!r}."
            )
        if isinstance(given, Plan):
            raise PrecisionError("bits is a level, and this is a plan: give it as plan=.")
        average: object = self.avg_bits
        if average is not None and (isinstance(average, bool) or not isinstance(average, Real)):
            raise PrecisionError(f"avg_bits={average!r:.80} is no number.")
        if self.plan is not None and not isinstance(self.plan, Plan):
            raise PrecisionError(
                f"plan={self.plan!r:.80} is no plan: Plan.load reads one from a file."
            )
        if sum(x is not None for x in (self.bits, self.avg_bits, self.plan)) != 1:
            raise PrecisionError(
                "give one precision: bits (a level), avg_bits (an average) or plan."
            )

    def resolve(self, checkpoint: Checkpoint, planes: int | None = None) -> Plan:
        """The level of every input group of `checkpoint`.

        Args:
            planes: an average is planned with the first so many planes only; by default with those
                that are in the folder.

        Raises:
            PrecisionError: not a level of the checkpoint, or an infeasible average.
            MissingPlaneError: the average needs planes that are absent.
            FormatError: a plan for another checkpoint.
            DropError: an average, but no sensitivities are known.
        """
        if self.plan is not None:
            return self.plan.check(checkpoint)
        if self.bits is not None:
            return Plan.uniform(checkpoint, self.bits)
        return make_plan(checkpoint, self.avg_bits, planes=planes)
