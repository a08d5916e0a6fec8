"""Engines of vLLM on toy checkpoints answer what transformers answers at every level."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import tiny
from dropbydrop.system.errors import DropError, MissingPlaneError, PrecisionError
from engines import NEW, PROMPTS, ask, check, engine, toy

LONG = [[1, *[3 + (7 * i + j) % 370 for j in range(90)]] for i in range(3)]


@pytest.fixture(scope="module", params=tiny.CODES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy of each kind of planes."""
    return toy(tmp_path_factory.mktemp(request.param) / "toy", "llama-tied", request.param)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_eight_requests_at_once(folder: Path, bits: int) -> None:
    with engine(folder, bits) as llm:
        answers = ask(llm)
        assert ask(llm, PROMPTS[:1])[0].tokens == answers[0].tokens  # whoever else is served
    assert all(len(answer.tokens) == NEW for answer in answers)
    check(answers, folder, bits)


def test_levels_differ(folder: Path) -> None:
    """The checks above would notice a wrong level."""
    with engine(folder, 2) as llm:
        answers = ask(llm)
    with pytest.raises(AssertionError):
        check(answers, folder, 3)


def test_the_default_is_the_highest_level(folder: Path) -> None:
    with engine(folder) as llm:
        check(ask(llm), folder, 4)


def test_compiled(folder: Path) -> None:
    with engine(folder, 3, enforce_eager=False) as llm:
        check([*ask(llm), *ask(llm, LONG)], folder, 3)


@pytest.mark.parametrize("prefixes", [True, False])
def test_chunked_prefill_and_prefix_caching(folder: Path, prefixes: bool) -> None:
    """Prompts in pieces of 32 tokens; again, from the cache or not."""
    settings = {"max_num_batched_tokens": 32, "enable_chunked_prefill": True, "block_size": 32}
    with engine(folder, 3, enable_prefix_caching=prefixes, **settings) as llm:
        first, again = ask(llm, LONG), ask(llm, LONG)
    check([*first, *again], folder, 3)
    assert [answer.cached > 0 for answer in again] == [prefixes] * len(LONG)


def test_only_planes_of_the_level_are_read(folder: Path, tmp_path: Path) -> None:
    part = shutil.copytree(folder, tmp_path / "part")
    planes = json.loads((part / "manifest.json").read_text())["planes"]
    for name in planes[tiny.COUNTS["bytes" if len(planes) == 4 else "trellis"][2] :]:
        (part / name[0]).unlink()
    with engine(part, 2) as llm:
        check(ask(llm, PROMPTS[:2]), part, 2)
    with pytest.raises(MissingPlaneError, match="plane"), engine(part, 3):
        pass


def test_damage_is_found(folder: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(folder, tmp_path / "broken")
    plane = broken / "plane-1.safetensors"
    content = bytearray(plane.read_bytes())
    content[-5] ^= 1
    plane.write_bytes(content)
    with pytest.raises(DropError, match=r"plane-1\.safetensors"), engine(broken, 2):
        pass


def test_what_is_not_a_level_is_refused(folder: Path) -> None:
    with pytest.raises(PrecisionError, match="has 2, 3, 4"), engine(folder, 5):
        pass
    unknown = {"additional_config": {"dropbydrop": {"level": 3}}}
    with pytest.raises(PrecisionError, match="level"), engine(folder, **unknown):
        pass


@pytest.mark.parametrize(
    "family", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3"]
)
def test_families(family: str, tmp_path: Path) -> None:
    """Untied heads, biases, norms of heads, windows, scaled embeddings, linears merged on disk."""
    made = toy(tmp_path / "toy", family)
    with engine(made, 3) as llm:
        answers = ask(llm, [*PROMPTS[:2], LONG[0]])
    check(answers, made, 3)
