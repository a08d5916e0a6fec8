"""The registry of methods: each serves an input group, and says what it costs."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from dropbydrop.coding import codebooks as universal
from dropbydrop.coding.codebook_set import BytesSet, CodebookSet
from dropbydrop.coding.objective import weighted_errors
from dropbydrop.system.errors import DropError
from dropbydrop_research import baselines
from dropbydrop_research.baselines import METHODS, Problem, choose
from dropbydrop_research.compare.config import ALL
from problems import SHORT, matrix_and_gram


@lru_cache
def quick_set(
    levels: tuple[int, ...], lambdas: tuple[float, ...], code: str = "bytes", window: int = 12
) -> CodebookSet:
    """A universal set that is trained in no time, or one that ships."""
    if code == "trellis":
        return universal.universal_set(levels, None, code, window)
    return BytesSet.of(universal.train(levels, lambdas, samples=2048, rounds=1, beam=2))


@pytest.mark.parametrize("name", ALL)  # the others have test_llama.py
def test_every_method_serves_an_input_group(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines.drop, "universal_set", quick_set)
    for module in (baselines.aqlm, baselines.aqlm_drop, baselines.paper):
        one = getattr(module, module.__name__.rpartition(".")[2])
        monkeypatch.setattr(one, "__defaults__", (SHORT, 0))
    weight, h = matrix_and_gram(96, 80)
    problem, method = (
        Problem({"a": weight, "b": weight[:64] * 2}, h, preset="fast"),
        METHODS[name],
    )
    levels = method.serves([2, 3, 4])
    suites = method.encode(problem, levels)
    assert list(suites) == ["a", "b"]
    for module, suite in suites.items():
        assert sorted(suite.levels) == levels
        assert len(suite.files) == (1 if method.nested else len(levels))
        assert suite.stored >= suite.levels[4].bytes
        decoded = [suite.levels[p].weight for p in levels]
        errors = weighted_errors(problem.weights[module], decoded, h)
        if name != "paper-weights":  # its levels between are what its codes give
            assert errors == sorted(errors, reverse=True)
        assert errors[-1] < min(0.03, errors[0])
        for p in levels:
            assert suite.levels[p].weight.shape == problem.weights[module].shape
            assert suite.levels[p].true_bits > p
    assert method.sources()


def test_bytes_of_our_codes_are_those_of_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines.drop, "universal_set", quick_set)
    weight, h = matrix_and_gram(16, 48)
    problem = Problem({"a": weight, "b": weight[:8]}, h, preset="fast")
    suites = METHODS["drop"].encode(problem, [1, 2])
    inputs = 48  # signs and factors, once an input group
    assert suites["a"].levels[2].bytes == 2 * 16 * 6 + 2 * 16 + inputs
    assert suites["b"].levels[2].bytes == 2 * 8 * 6 + 2 * 8
    assert suites["b"].levels[1].bytes == 8 * 6 + 2 * 8
    # 128 stored entries of 8 float16 values a plane; odd factors 3 and 5 in float32
    assert METHODS["drop"].shared(2, {48, 96, 80, 64}) == 2 * 128 * 8 * 2 + 4 * (9 + 25)
    alone = METHODS["dedicated"].encode(problem, [1, 2])
    for p in (1, 2):
        assert alone["a"].levels[p].bytes == suites["a"].levels[p].bytes
    assert torch.equal(alone["a"].levels[1].weight,
                       METHODS["drop"].encode(problem, [1])["a"].levels[1].weight)  # fmt: skip


def test_bytes_of_trellis_codes_are_those_of_a_checkpoint() -> None:
    weight, h = matrix_and_gram(40, 48)
    problem = Problem({"a": weight, "b": weight[:32]}, h, preset="fast")
    suites = METHODS["trellis"].encode(problem, [2, 3, 4])
    row = 2 * 40 + 48  # scales; signs and factors, once an input group
    assert [suites["a"].levels[p].bytes - row for p in (2, 3, 4)] == [480, 720, 960]
    assert suites["b"].levels[3].bytes == 48 * (8 + 4) + 2 * 32
    # 64 values, a scale and up to 17 taps a plane; the odd factor 3
    assert METHODS["trellis"].shared(4, {48}) == 3 * (64 + 4 + 17) + 4 * 9
    alone = METHODS["trellis-dedicated"].encode(problem, [2, 4])
    for p in (2, 4):
        assert alone["a"].levels[p].bytes == suites["a"].levels[p].bytes
    error = [weighted_errors(weight, [s["a"].levels[2].weight], h)[0] for s in (suites, alone)]
    assert error[1] < error[0]


def test_weights_of_the_paper_are_on_the_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = []

    def remember(levels: tuple[int, ...], lambdas: tuple[float, ...], *_: object) -> CodebookSet:
        trained.append((levels, lambdas))
        return quick_set(levels, lambdas)

    monkeypatch.setattr(baselines.drop, "universal_set", remember)
    weight, h = matrix_and_gram(48, 64)
    problem = Problem({"a": weight}, h, preset="fast")
    suite = METHODS["paper-weights"].encode(problem, [2, 3, 4])["a"]
    METHODS["paper-weights"].prepare([4, 2, 3])
    assert trained == [((2, 4), (0.5, 0.5))] * 2
    # nested: decoded level 3 lies between the others, one plane apart
    assert [suite.levels[p].bytes - suite.levels[2].bytes for p in (3, 4)] == [48 * 8, 2 * 48 * 8]
    default = METHODS["drop"].encode(problem, [2, 3, 4])["a"]
    errors = [weighted_errors(weight, [s.levels[p].weight for p in (2, 3, 4)], h)
              for s in (suite, default)]  # fmt: skip
    assert errors[0][0] < errors[1][0]  # one half on raw errors favours the lowest level
    METHODS["paper-weights"].prepare([3])
    assert trained[-1] == ((3,), (1.0,))


def test_unknown_methods_and_missing_levels_are_named() -> None:
    assert [m.name for m in choose(["rtn", "gptq", "rtn"], [2])] == ["rtn", "gptq"]
    with pytest.raises(DropError, match=r"vptq: choose from drop, .*matryoshka"):
        choose(["rtn", "vptq"], [2])
    with pytest.raises(DropError, match="any-precision starts at 3 bits"):
        choose(["any-precision"], [2])
