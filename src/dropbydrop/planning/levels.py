"""A level, or planes, of what a plan decides about: one number, or one for each expert of a stack.

Plans, stores and modules speak of "3" and of "(2, 4, 3, 2)" alike; what tells the two apart is
here. A tuple whose numbers are all the same is the number (`canonical`), so that equal plans are
equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

Level = int | tuple[int, ...]


def canonical(level: int | Iterable[int]) -> Level:
    """3 -> 3; [2, 4, 3] -> (2, 4, 3); [3, 3, 3] -> 3."""
    if isinstance(level, int):
        return level
    found = tuple(level)
    return found[0] if len(set(found)) == 1 else found


def each(level: Level) -> tuple[int, ...]:
    """The number, or those of the experts."""
    return (level,) if isinstance(level, int) else level


def of_expert(level: Level, e: int) -> int:
    """The number of expert e."""
    return level if isinstance(level, int) else level[e]


def mapped(level: Level, change: Callable[[int], int]) -> Level:
    """`change` of the number, or of each."""
    return change(level) if isinstance(level, int) else canonical(map(change, level))


def matrices(shape: tuple[int, ...], level: Level) -> Iterator[tuple[tuple[int, ...], int]]:
    """Shapes and their numbers: the whole module's with one number, else each expert's.

    shape: (d_out, d_in), or (E, d_out, d_in) of a stack.
    """
    if isinstance(level, int):
        yield shape, level
    else:
        yield from ((shape[1:], one) for one in level)
