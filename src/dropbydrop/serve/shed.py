"""Which precision a server can afford: a pure function of measurements.

One worker runs a pass for all requests, or one for each precision in use where they cannot share
it, so a token of any request takes the sum of all passes. A pass takes the time of its dearest
request alone, and for each other one the share `Costs.row` of its own time, since a plane is read
once for all that need it. Prompts are read between passes (`Costs.beside`). The sum must stay below
1 / `target` seconds. What can be changed is the level of requests that allow it, and there is an
order in which they pay: first `flex` requests go down, level by level, then the others. The pairs
(level of flex, level of the others) along this order are the rungs of a ladder,

    (4, 4)  (3, 4)  (2, 4)  (2, 3)  (2, 2)

and a `Ladder` stands on the highest rung whose predicted time meets the target. It goes down at
once. It goes up only when the better rung would use at most `MARGIN` of the time, and has done so
for `HOLD` seconds: else a load near the limit would change precisions at every token.

Related: NestedFP (arXiv 2506.02024) switches one copy between FP8 and FP16 under load, for a whole
server; here every request has a precision of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

MARGIN = 0.7
HOLD = 2.0  # seconds
_NEW = 0.1  # weight of a new measurement
PINNED, DEFAULT, FLEX = "pinned", "default", "flex"  # what may happen to a request


@dataclass(frozen=True)
class Costs:
    """What was measured.

    Attributes:
        seconds: of a step of one request, by level.
        row: what each further request in a pass adds, as a share of its own step; 1 where every
            request has one.
        mixed: whether requests at different precisions share a pass.
        beside: seconds of a round that are no steps: prompts that are read, mostly.
    """

    seconds: Mapping[float, float]
    row: float = 1.0
    beside: float = 0.0
    mixed: bool = False


class Meter:
    """What steps are seen to cost, by a server that uses one level or two of many at a time.

    A level that is not in use is not measured, and one that looks too dear would never be used: so
    all levels follow the one that is measured, as whatever slows it slows them too, and none is
    taken to be dearer than a higher one, which reads more.
    """

    def __init__(
        self, seconds: Mapping[float, float] | None = None, row: float = 1.0, mixed: bool = False
    ) -> None:
        """As in `Costs`, to begin with."""
        self._seconds, self._row, self._mixed = dict(seconds or {}), row, mixed

    def note(self, levels: Sequence[float], seconds: float) -> None:
        """Take in the duration of a pass, with the precision of each request in it.

        One that was interrupted for long counts only a little, one with an average not at all.
        """
        if any(bits not in self._seconds for bits in levels):
            return
        times = [self._seconds[bits] for bits in levels]
        first = max(times)
        if len(levels) == 1:
            change = 1 + _NEW * (min(seconds / first, 4) - 1)
            self._seconds = {bits: known * change for bits, known in self._seconds.items()}
        else:
            row = (seconds - first) / (sum(times) - first)
            self._row += _NEW * (min(max(row, 0.0), 1.0) - self._row)

    def costs(self) -> Costs:
        known, least, found = self._seconds, float("inf"), {}
        for bits in sorted(known, reverse=True):
            found[bits] = least = min(least, known[bits])
        return Costs(found, self._row, mixed=self._mixed)


@dataclass(frozen=True)
class Load:
    """A request as the ladder sees it.

    Attributes:
        asked: the precision that it asked for, its highest.
        may: PINNED keeps it, DEFAULT may go down, FLEX goes down first.
    """

    asked: float
    may: str


def rungs(levels: Sequence[int]) -> list[tuple[int, int]]:
    """(level of flex, level of the others), the best first."""
    down = sorted(levels, reverse=True)
    return [(p, down[0]) for p in down] + [(down[-1], p) for p in down[1:]]


def level_at(rung: tuple[int, int], load: Load) -> float:
    """The precision of a request on a rung."""
    if load.may == PINNED:
        return load.asked
    return min(load.asked, rung[0] if load.may == FLEX else rung[1])


def predicted(rung: tuple[int, int], loads: Sequence[Load], costs: Costs) -> float:
    """Seconds a token of each running request takes on a rung."""
    passes: dict[float, list[float]] = {}
    for load in loads:
        bits = level_at(rung, load)
        seconds = step_seconds(bits, costs.seconds)
        passes.setdefault(0 if costs.mixed else bits, []).append(seconds)
    steps = sum(max(x) + costs.row * (sum(x) - max(x)) for x in passes.values())
    return steps + costs.beside


def step_seconds(bits: float, seconds: Mapping[float, float]) -> float:
    """Seconds of a step at a precision; between measured levels on the line through them."""
    if bits in seconds or not seconds:
        return seconds.get(bits, 0.0)
    known = sorted(seconds)
    low = max((p for p in known if p < bits), default=known[0])
    high = min((p for p in known if p > bits), default=known[-1])
    if low == high:
        return seconds[low]
    return seconds[low] + (seconds[high] - seconds[low]) * (bits - low) / (high - low)


class Ladder:
    """The rung of a server. All times are given, so tests need no clock."""

    def __init__(self, levels: Sequence[int], target: float | None) -> None:
        """`target`: tokens a second that each request should get; None is no target."""
        self.rungs, self.target, self.at = rungs(levels), target, 0
        self._calm_since: float | None = None

    @property
    def rung(self) -> tuple[int, int]:
        return self.rungs[self.at]

    def update(self, loads: Sequence[Load], costs: Costs, now: float) -> None:
        """Move to the rung that the load needs.

        Args:
            now: seconds on any clock that does not go back.
        """
        if self.target is None:
            return
        limit = 1 / self.target
        times = [predicted(rung, loads, costs) for rung in self.rungs]
        needed = next((i for i, t in enumerate(times) if t <= limit), len(times) - 1)
        if needed >= self.at:
            self.at, self._calm_since = needed, None
            return
        calm = next(i for i, t in enumerate(times) if t <= MARGIN * limit or i == self.at)
        if calm == self.at:
            self._calm_since = None
        elif self._calm_since is None:
            self._calm_since = now
        elif now - self._calm_since >= HOLD:
            self.at, self._calm_since = calm, None

    def room(self, loads: Sequence[Load], more: Load, costs: Costs) -> bool:
        """Whether one more request can run within the target, others at the lowest if need be.

        An empty server always has room: a slow machine answers one at a time.
        """
        if self.target is None or not loads:
            return True
        return predicted(self.rungs[-1], [*loads, more], costs) <= 1 / self.target
