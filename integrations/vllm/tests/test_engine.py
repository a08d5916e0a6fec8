"""Engines of vLLM on toy checkpoints answer what transformers answers at every level."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import tiny
from dropbydrop.system.errors import DropError, MissingPlaneError, PrecisionError
from engines import NEW, PROMPTS, ask, check, engine, toy

LONG = [[1, *[3 + (7 * i + j) % 370 for j in range(90)]] for i in range(3)]


@pytest.fixture(scope="module", params=tiny.CODES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy of each kind of planes."""
    return toy(tmp_path_factory.mktemp(request.param) / "toy", "llama-tied", request.param)


@pytest.mark.parametrize("bits", [2, 3, None])
def test_eight_requests_at_once(folder: Path, bits: int | None) -> None:
    """Without a level the highest; and `check` would notice another one."""
    with engine(folder, bits) as llm:
        answers = ask(llm)
        assert ask(llm, PROMPTS[:1])[0].tokens == answers[0].tokens  # whoever else is served
    assert all(len(answer.tokens) == NEW for answer in answers)
    check(answers, folder, bits or 4)
    with pytest.raises(AssertionError):
        check(answers, folder, 3 if bits == 2 else 2)


@pytest.mark.parametrize(("code", "tables"), [("bytes", 8), ("trellis", (4, 4, 4))])
def test_compiled(code: str, tables: Any, tmp_path: Path) -> None:
    """Requests of several levels, also with embedding and head in planes; then long prompts."""
    made = toy(tmp_path / "toy", "llama-tied", code, tables)
    levels = [2, 3, 4, None, 3, 2, None, 4]
    with engine(made, enforce_eager=False) as llm:
        answers, long = ask(llm, bits=levels), ask(llm, LONG)
    check(long, made, 4)
    for level in (2, 3, 4):
        mine = [a for a, bits in zip(answers, levels, strict=True) if (bits or 4) == level]
        check(mine, made, level)


@pytest.mark.parametrize("prefixes", [True, False])
def test_chunked_prefill_and_prefix_caching(tmp_path: Path, prefixes: bool) -> None:
    """Prompts in pieces of 32 tokens; again, from the cache or not."""
    folder = toy(tmp_path / "toy")
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


def test_damage_is_found(tmp_path: Path) -> None:
    broken = toy(tmp_path / "toy")
    plane = broken / "plane-1.safetensors"
    content = bytearray(plane.read_bytes())
    content[-5] ^= 1
    plane.write_bytes(content)
    with pytest.raises(DropError, match=r"plane-1\.safetensors"), engine(broken, 2):
        pass


def test_what_is_not_a_level_is_refused(tmp_path: Path) -> None:
    """By the engine; the options themselves are tested with the refusals."""
    with pytest.raises(PrecisionError, match="has 2, 3, 4"), engine(toy(tmp_path / "toy"), 5):
        pass


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_tables_in_planes(family: str, tmp_path: Path) -> None:
    """Two of them, and dense ones for a model that asks for no method; a level has its own bits."""
    made = toy(tmp_path / "toy", family, "trellis", embedding_bits=(4, 5, 5))
    with engine(made, 2) as llm:
        check(ask(llm), made, 2)


@pytest.mark.parametrize(
    "family", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3"]
)
def test_families(family: str, tmp_path: Path) -> None:
    """Untied heads, biases, norms of heads, windows, scaled embeddings, linears merged on disk."""
    made = toy(tmp_path / "toy", family)
    with engine(made, 3) as llm:
        answers = ask(llm, [*PROMPTS[:2], LONG[0]])
    check(answers, made, 3)
    with pytest.raises(AssertionError):  # which another level would not pass
        check(answers, made, 2)
