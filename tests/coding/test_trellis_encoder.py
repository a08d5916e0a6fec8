"""The encoder with trellis planes, against the definitions."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

from dropbydrop.coding import trellis
from dropbydrop.coding.codebook_set import set_of
from dropbydrop.coding.codebooks import default_lambdas, universal_set
from dropbydrop.coding.encoder import Effort, encode_group, group_rotation
from dropbydrop.coding.objective import Coded, condition, objective, weighted_errors
from dropbydrop.coding.planes import counts_of, family_of, trellis_planes
from dropbydrop.coding.refit import refit_scales
from dropbydrop.system.errors import PrecisionError
from naive_trellis import naive_search, normal_set, stream, table, viterbi

LEVELS = (2, 3, 4)
LAMBDAS = default_lambdas(LEVELS)
QUICK = Effort(beam=4, sweeps=1, rounds=1, window=8)


@pytest.fixture
def naive(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The naive search in the place of the real one; what it is called with."""
    calls: list[dict[str, Any]] = []

    def remember(w: Any, row_weights: Any, *rest: Any, **options: Any) -> Any:
        calls.append({"w": w, "row_weights": row_weights, **options})
        return naive_search(w, row_weights, *rest, **options)

    monkeypatch.setattr(trellis, "search", remember)
    return calls


def gram(d_in: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * d_in, d_in, generator=generator)
    x = x @ torch.randn(d_in, d_in, generator=generator)
    return x.T @ x / len(x)


def problem(d_in: int = 16) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    spread = torch.rand(20, 1, generator=generator) + 0.2
    weights = {"a": torch.randn(20, d_in, generator=generator) * spread,
               "b": torch.randn(9, d_in, generator=generator)}  # fmt: skip
    return weights, gram(d_in)


@pytest.mark.parametrize("bits", [1, 2])
def test_viterbi_is_the_best_of_all_rings(bits: int) -> None:
    books, rows = normal_set((bits,), 8), 10 // bits  # a ring that no checkpoint has: it is short
    values, mask = table(books, 0), (1 << 8) - 1
    generator = torch.Generator().manual_seed(0)
    pull = torch.randn(rows, generator=generator).double()
    weights = torch.rand(rows, generator=generator).double()

    def cost(windows: torch.Tensor) -> float:
        c = values[windows]
        return float((weights * (1.5 * c.square() - 2 * pull * c)).sum())

    best = torch.inf
    for path in product(range(1 << bits), repeat=rows):
        window, windows = 0, []
        for new in path * 2:  # the second time round, the first is before it
            window = ((window << bits) | new) & mask
            windows.append(window)
        best = min(best, cost(torch.tensor(windows[rows:])))
    found = viterbi(values, bits, 1.5, pull, weights)
    assert cost(found) == pytest.approx(best)


def test_naive_codes_decode_to_the_values_of_the_path() -> None:
    books, generator = normal_set((2, 3)), torch.Generator().manual_seed(0)
    for m, plane in enumerate(books.planes):
        ring = 24 // plane.bits  # three bytes
        pull, weights = torch.randn(2, ring, generator=generator).double()
        values = table(books, m)
        found = viterbi(values, plane.bits, 1.0, pull, weights.abs())
        decoded = books.entries[m][books.index(m, stream(found[:, None], plane.bits), ring).long()]
        assert torch.equal(decoded[:, 0, 0].double(), values[found])


def test_errors_are_those_of_what_is_stored(naive: list[dict[str, Any]]) -> None:
    weights, h = problem()
    rotation, books = group_rotation(weights, h, 1), normal_set(LEVELS)
    out = encode_group(weights, h, rotation, books, LEVELS, LAMBDAS, QUICK)
    for name, code in out.items():
        d_out = len(weights[name])
        shapes = [plane.shape(d_out, 16) for plane in books.planes]
        assert [tuple(c.shape) for c in code.codes] == shapes
        assert code.scales.dtype == torch.float16
        decoded = [
            rotation.transpose(books.decode(code.codes, code.scales, count)) for count in (1, 2, 3)
        ]
        assert weighted_errors(weights[name], decoded, h) == pytest.approx(code.errors, rel=1e-2)
        assert 0.2 > code.errors[0] > code.errors[1] > code.errors[2]
    assert len(naive) == 2  # a start for each matrix: without sweeps a round refits scales alone


def test_rows_count_by_the_square_of_their_scales(naive: list[dict[str, Any]]) -> None:
    weights, h = problem()
    rotation = group_rotation(weights, h, 1)
    encode_group(weights, h, rotation, normal_set(LEVELS), LEVELS, LAMBDAS, QUICK)
    rotated = rotation.apply_weight(weights["a"])
    rms = rotated.square().mean(1).sqrt()
    torch.testing.assert_close(naive[0]["row_weights"], rms.square(), rtol=2e-3, atol=0)
    torch.testing.assert_close(naive[0]["w"] * rms[:, None], rotated, rtol=2e-3, atol=1e-6)
    lower = naive[0]["lower"]
    conditioned = condition(rotation.apply_gram(h), 0.2).float()
    torch.testing.assert_close(lower @ lower.T, conditioned, rtol=1e-3, atol=1e-4)


def test_scales_of_a_trellis_are_the_optimum() -> None:
    weights, h = problem()
    books, w = normal_set(LEVELS), weights["a"]
    scales = w.square().mean(1).sqrt() * 1.1
    lower = torch.linalg.cholesky(h.double()).float()
    codes = naive_search(w / scales[:, None], scales.square(), books, (1, 2, 3), LAMBDAS,
                         lower=lower)  # fmt: skip
    rest = (h, books, (1, 2, 3), LAMBDAS)
    best = refit_scales(Coded(w, scales, codes), *rest)
    value = objective(Coded(w, best, codes), *rest)
    assert value < objective(Coded(w, scales, codes), *rest)
    for row, factor in product(range(len(w)), (0.98, 1.02)):  # every row is at its own optimum
        other = best.clone()
        other[row] *= factor
        assert objective(Coded(w, other, codes), *rest) > value


def test_a_level_can_be_supervised_alone(naive: list[dict[str, Any]]) -> None:
    """On the first planes of the nested set: what that level would be without the others."""
    weights, h = problem()
    rotation, books = group_rotation(weights, h, 1), normal_set(LEVELS)
    nested = encode_group(weights, h, rotation, books, LEVELS, LAMBDAS, QUICK)["a"].errors
    for i, level in enumerate(LEVELS):
        alone = encode_group(weights, h, rotation, books.first(i + 1), (level,), [1.0], QUICK)
        assert len(alone["a"].codes) == i + 1
        assert alone["a"].errors[0] < (1.5 if i else 1.0) * nested[i]


def test_a_set_survives_its_names() -> None:
    books = universal_set(LEVELS, None, "trellis", 12)
    again = set_of(books.planes, books.named())
    assert all(torch.equal(*pair) for pair in zip(books.entries, again.entries, strict=True))
    assert sorted(books.named()) == sorted(
        f"{m}{suffix}" for m in (1, 2, 3) for suffix in ("", ".scale", ".taps")
    )


def test_sets_that_do_not_ship_are_refused_by_name() -> None:
    with pytest.raises(PrecisionError, match=r"2,7 with --code trellis.*2,3,4, or 3,4,5"):
        universal_set((2, 7), None, "trellis")
    with pytest.raises(PrecisionError, match=r"up to 9 bits.*trellis-2-3-4-12"):
        universal_set((2, 3), None, "trellis", 9)
    thirteen = universal_set((2, 3), None, "trellis", 13)  # the longest that ships up to it
    assert thirteen.planes == trellis_planes((2, 3), 12)


@pytest.mark.parametrize(
    ("levels", "bits", "prefixes"),
    [((4,), [2, 1, 1], (3,)), ((2,), [2], (1,)), ((2, 4), [2, 1, 1], (1, 3)),
     ((3, 5), [2, 1, 1, 1], (2, 4)), ((1, 3), [1, 1, 1], (1, 3))],
)  # fmt: skip
def test_some_levels_of_a_family_have_its_first_planes(
    levels: tuple[int, ...], bits: list[int], prefixes: tuple[int, ...]
) -> None:
    books = universal_set(levels, None, "trellis", 12)
    assert [plane.bits for plane in books.planes] == bits
    assert counts_of(books.planes, levels) == prefixes
    whole = universal_set(family_of(levels), None, "trellis", 12)
    for one, other in zip(books.parts, whole.parts, strict=False):
        assert all(torch.equal(one[suffix], other[suffix]) for suffix in one)
