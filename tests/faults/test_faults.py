"""No fault of a file operation loses anything: a deterministic sample of `fault_campaign.py`.

After each fault OUT is the old one or the new one, whole; the same command then succeeds with the
same bytes, and nothing hidden is left.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from fault_campaign import FAULTS, Trial
from fault_works import make_source, works

from tiny import CODES

NAMES = (
    "quantize",
    "quantize --resume",
    "tune",
    "slice",
    "export",
    "pull",
    "plan --save",
    "compare",
)


@pytest.fixture(scope="module", params=CODES)
def trial(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, Path], Trial]:
    place = tmp_path_factory.mktemp("faults")
    source = make_source(place / "source", code=request.param)
    old = make_source(place / "old", seed=1, code=request.param)
    by_name = {work.name: work for work in works(source)}
    assert set(by_name) == set(NAMES)
    return lambda name, folder: Trial(by_name[name], old, folder)


@pytest.mark.parametrize("name", NAMES)
def test_whoever_dies_leaves_the_old_or_the_new(
    trial: Callable[[str, Path], Trial], tmp_path: Path, name: str
) -> None:
    tried = trial(name, tmp_path)
    random = Random(name)
    for replacing in tried.starts:
        count = len(tried.operations(replacing))
        assert count > 3
        # the last operations put OUT in its place and clean up: always some of these
        chosen = {
            *random.sample(range(1, count + 1), 3),
            *random.sample(range(max(1, count - 9), count + 1), 2),
        }
        assert tried.deaths(replacing, chosen) >= 2 * len(chosen)


@pytest.mark.parametrize("name", NAMES)
def test_errors_and_signals_leave_the_old_or_the_new(
    trial: Callable[[str, Path], Trial], tmp_path: Path, name: str
) -> None:
    tried = trial(name, tmp_path)
    random = Random(name)
    for replacing in tried.starts:
        count = len(tried.operations(replacing))
        for fault in FAULTS:
            tried.disturb(replacing, random.randint(1, count), fault)
