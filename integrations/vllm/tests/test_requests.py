"""Requests of several levels in one batch answer what engines of these levels answer."""

from __future__ import annotations

from pathlib import Path

import pytest
from vllm.exceptions import VLLMValidationError

import tiny
from engines import PROMPTS, ask, check, engine, toy

LEVELS = [2, 3, 4, None, 3, 2, None, 4]
LONG = [1, *[3 + (7 * j) % 370 for j in range(90)]]


@pytest.fixture(scope="module", params=tiny.CODES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy of each kind of planes."""
    return toy(tmp_path_factory.mktemp(request.param) / "toy", "llama-tied", request.param)


def test_levels_side_by_side(folder: Path) -> None:
    """Of different lengths, so that rows move in the batch when the short ones end."""
    with engine(folder) as llm:
        answers = ask(llm, PROMPTS, new=[4, 12, 7, 9, 3, 12, 5, 8], bits=LEVELS)
    for level in (2, 3, 4):
        mine = [a for a, bits in zip(answers, LEVELS, strict=True) if (bits or 4) == level]
        check(mine, folder, level)
        with pytest.raises(AssertionError):
            check(mine, folder, 3 if level == 2 else 2)


def test_prefixes_of_levels_are_apart(folder: Path) -> None:
    settings = {"max_num_batched_tokens": 32, "enable_chunked_prefill": True, "block_size": 32}
    with engine(folder, enable_prefix_caching=True, **settings) as llm:
        for bits, cached in ((2, False), (4, False), (None, True), (2, True), (3, False)):
            (answer,) = ask(llm, [LONG], bits=[bits])
            assert (answer.cached > 0) == cached
            check([answer], folder, bits or 4)


def test_what_is_not_held_is_refused(tmp_path: Path) -> None:
    folder = toy(tmp_path / "toy")
    with engine(folder, 3) as llm:
        for bits in (4, 5, "2", 2.5, [2]):
            with pytest.raises(VLLMValidationError, match="it has 2, 3"):
                ask(llm, PROMPTS[:1], bits=[bits])
        check(ask(llm, PROMPTS[:1], bits=[2]), folder, 2)


def test_tables_in_planes(tmp_path: Path) -> None:
    """Levels that read the same planes of embedding and head are served together, others not."""
    folder = toy(tmp_path / "toy", "llama-tied", "trellis", embedding_bits=(4, 5, 5))
    with engine(folder) as llm:
        check(ask(llm, PROMPTS[:1], bits=[3]), folder, 3)
        with pytest.raises(VLLMValidationError, match="at 2 embedding and head have 4 bits"):
            ask(llm, PROMPTS[:1], bits=[2])
