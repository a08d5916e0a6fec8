"""Mutated checkpoints are refused, or load: never another exception, never a crash.

A sample of what `scripts/fuzz_checkpoints.py` does; its counts stand in docs/security.md.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import campaign
import mutants
from mutants import Files

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[Files]:
    return mutants.make_corpus(tmp_path_factory.mktemp("corpus"))


def test_the_corpus_itself(corpus: list[Files], tmp_path: Path) -> None:
    """What is not changed opens with its sidecars, and loads."""
    for files in corpus:
        folder = mutants.Mutant(dict(files)).write(tmp_path / "whole")
        assert campaign.opened(folder) == "opened"
        assert campaign.loaded(folder, mutants.Mutant(files)) == "loaded"


def test_the_campaign_notices(
    corpus: list[Files], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that compares nothing would not get through."""
    from dropbydrop.checkpoint.checked_file import CheckedFile

    monkeypatch.setattr(CheckedFile, "check", lambda *args, **kwargs: None)
    done = campaign.open_mutants(corpus, range(60), tmp_path / "opens")
    assert any("differs from the manifest was accepted" in text for text in done.failures)


def test_opens(corpus: list[Files], tmp_path: Path) -> None:
    done = campaign.open_mutants(corpus, range(800), tmp_path / "opens")
    assert not done.failures, "\n".join(done.failures[:5])
    assert done.counts["refused"] > 200
    assert sum(n for outcome, n in done.counts.items() if outcome.startswith("opened")) > 60


def test_loads(corpus: list[Files], tmp_path: Path) -> None:
    done = campaign.load_mutants(corpus, 0, 600, tmp_path / "loads")
    assert not done.failures, "\n".join(done.failures[:5])
    assert done.counts["refused"] > 30
    assert done.counts["loaded"] > 12
