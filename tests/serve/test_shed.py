"""The ladder, with loads and clocks of our own making."""

from __future__ import annotations

import pytest

from dropbydrop.serve.shed import (
    DEFAULT,
    FLEX,
    HOLD,
    PINNED,
    Costs,
    Ladder,
    Load,
    Meter,
    level_at,
    predicted,
    rungs,
    step_seconds,
)

LEVELS = (2, 3, 4)
SECONDS = {2: 0.010, 3: 0.015, 4: 0.020}
COSTS = Costs(SECONDS)


def many(n: int, may: str = DEFAULT, asked: float = 4) -> list[Load]:
    return [Load(asked, may)] * n


def test_flex_pays_first() -> None:
    assert rungs(LEVELS) == [(4, 4), (3, 4), (2, 4), (2, 3), (2, 2)]
    assert rungs((3,)) == [(3, 3)]


def test_the_highest_level_that_meets_the_target() -> None:
    for n, level in [(1, 4), (2, 4), (3, 3), (4, 2), (5, 2), (9, 2)]:
        ladder = Ladder(LEVELS, target=20.0)  # 50 ms a token
        ladder.update(many(n), COSTS, now=0.0)
        assert ladder.rung[1] == level, n


def test_without_a_target_nothing_moves() -> None:
    ladder = Ladder(LEVELS, None)
    ladder.update(many(100), COSTS, 0.0)
    assert ladder.rung == (4, 4)
    assert ladder.room(many(100), Load(4, DEFAULT), COSTS)


def test_pinned_requests_keep_their_precision_and_cost_others() -> None:
    ladder = Ladder(LEVELS, target=20.0)
    ladder.update(many(2, PINNED) + many(1), COSTS, 0.0)  # 40 ms are pinned, 10 are left
    assert ladder.rung == (2, 2)
    assert level_at(ladder.rung, Load(4, PINNED)) == 4
    assert level_at(ladder.rung, Load(3, FLEX)) == 2
    assert level_at(ladder.rung, Load(4, DEFAULT)) == 2


def test_flex_goes_before_the_others() -> None:
    ladder = Ladder(LEVELS, target=20.0)
    ladder.update(many(1, FLEX) + many(2), COSTS, 0.0)
    assert ladder.rung == (2, 4)
    assert predicted(ladder.rung, many(1, FLEX) + many(2), COSTS) == pytest.approx(0.050)


def test_a_request_is_never_raised_above_what_it_asked_for() -> None:
    assert level_at((4, 4), Load(2.5, DEFAULT)) == 2.5
    assert level_at((4, 3), Load(2, FLEX)) == 2


def test_down_at_once_up_only_after_a_calm_time() -> None:
    ladder = Ladder(LEVELS, target=20.0)
    ladder.update(many(4), COSTS, 0.0)
    assert ladder.rung == (2, 2)
    ladder.update(many(1), COSTS, 1.0)
    ladder.update(many(1), COSTS, 1.0 + HOLD / 2)
    assert ladder.rung == (2, 2)
    ladder.update(many(3), COSTS, 1.1 + HOLD / 2)  # 45 ms at 3 bits: above the margin
    ladder.update(many(1), COSTS, 1.2 + HOLD / 2)  # so the calm begins anew
    ladder.update(many(1), COSTS, 1.1 + HOLD)
    assert ladder.rung == (2, 2)
    ladder.update(many(1), COSTS, 1.3 + 1.5 * HOLD)
    assert ladder.rung == (4, 4)


def test_no_oscillation_near_the_limit() -> None:
    """3 requests need 60 ms at 4 bits and 45 at 3: it stays at 3 for as long as they are there."""
    ladder, seen = Ladder(LEVELS, target=20.0), set()
    for i in range(200):
        ladder.update(many(3), COSTS, i * 0.1)
        seen.add(ladder.rung)
    assert seen == {(2, 3)}


def test_room_counts_with_everybody_at_the_lowest() -> None:
    ladder = Ladder(LEVELS, target=20.0)
    assert ladder.room([], Load(4, PINNED), Costs({4: 9.0}))  # alone even on a slow machine
    assert ladder.room(many(4), Load(4, DEFAULT), COSTS)
    assert not ladder.room(many(5), Load(4, DEFAULT), COSTS)
    assert not ladder.room(many(4), Load(4, PINNED), COSTS)


def test_costs_between_levels() -> None:
    assert step_seconds(2.5, SECONDS) == pytest.approx(0.0125)
    assert step_seconds(5, SECONDS) == 0.020
    assert step_seconds(4, {}) == 0.0


def test_requests_in_a_pass_share_it() -> None:
    """Ten requests at 4 bits in one pass cost 20 * (1 + 9 / 4) ms; two passes share nothing."""
    costs = Costs(SECONDS, row=0.25)
    assert predicted((4, 4), many(10), costs) == pytest.approx(0.020 * 3.25)
    mixed = many(2, FLEX) + many(3)
    assert predicted((2, 4), mixed, costs) == pytest.approx(SECONDS[2] * 1.25 + 0.020 * 1.5)
    assert predicted((4, 4), many(10), COSTS) == pytest.approx(0.200)
    shared = Costs(SECONDS, row=0.25, mixed=True)
    assert predicted((4, 4), many(10), shared) == pytest.approx(0.020 * 3.25)
    others = 0.25 * (2 * SECONDS[2] + 2 * 0.020)
    assert predicted((2, 4), mixed, shared) == pytest.approx(0.020 + others)


def test_what_is_done_between_steps_counts() -> None:
    """15 ms a round for prompts: two requests of 20 ms no longer meet 20 tokens a second."""
    ladder = Ladder(LEVELS, 20.0)
    ladder.update(many(2), COSTS, 0.0)
    assert ladder.rung == (4, 4)
    ladder.update(many(2), Costs(SECONDS, beside=0.015), 0.1)
    assert ladder.rung == (2, 3)


def test_a_level_that_looked_too_dear_is_tried_again() -> None:
    """2 bits measured while something else ran: a server must not stay alone with one request."""
    meter = Meter({2: 0.100, 3: 0.015, 4: 0.020}, row=0.25)
    assert meter.costs().seconds == {2: 0.015, 3: 0.015, 4: 0.020}
    assert Ladder(LEVELS, 20.0).room(many(1), many(1)[0], meter.costs())


def test_levels_follow_the_one_that_is_used() -> None:
    meter = Meter(SECONDS, row=0.25)
    for _ in range(100):  # the machine becomes half as fast
        meter.note([4], 2 * SECONDS[4])
    found = meter.costs().seconds
    assert found == pytest.approx({bits: 2 * s for bits, s in SECONDS.items()}, rel=1e-3)
    meter.note([4], 1000.0)  # one interruption
    assert meter.costs().seconds[4] <= 1.31 * found[4]
    before = meter.costs()
    meter.note([2.5], 1.0)
    meter.note([2.5, 4], 1.0)
    assert meter.costs() == before


def test_further_rows_of_a_pass_are_measured_against_their_own_steps() -> None:
    meter = Meter({2: 0.010, 4: 0.020})
    for _ in range(100):
        meter.note([4, 2, 2], 0.020 + 0.25 * 0.020)
    assert meter.costs().row == pytest.approx(0.25, abs=1e-3)
    assert meter.costs().seconds == {2: 0.010, 4: 0.020}
