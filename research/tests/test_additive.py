"""AQLM and its kin against naive, obviously right references on tiny matrices."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from dropbydrop_research.baselines.additive import (
    Additive,
    Training,
    additive_bytes,
    beam_search,
    kmeans,
    loss_and_gradients,
    nearest,
    residual_kmeans,
    train,
)
from dropbydrop_research.baselines.aqlm import aqlm
from dropbydrop_research.baselines.aqlm_drop import aqlm_drop
from dropbydrop_research.baselines.paper import paper
from problems import SHORT, error, matrix_and_gram


def test_kmeans_reaches_the_best_clustering_of_separate_blobs() -> None:
    generator = torch.Generator().manual_seed(0)
    centers = torch.tensor([[0.0, 0], [10, 0], [0, 10]])
    points = centers[torch.arange(7) % 3] + 0.1 * torch.randn(7, 2, generator=generator)

    def cost(own: tuple[int, ...]) -> float:
        parts = [points[torch.tensor(own) == c] for c in set(own)]
        return sum(float((part - part.mean(0)).square().sum()) for part in parts)

    best = min(cost(own) for own in itertools.product(range(3), repeat=7))
    runs = [kmeans(points, 3, 50, torch.Generator().manual_seed(s)) for s in range(5)]
    found = min(cost(tuple(torch.cdist(points, c).argmin(1).tolist())) for c in runs)
    assert found == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("n", [1, 1023, 2500])
def test_an_iteration_of_kmeans_is_that_of_a_loop_over_clusters(n: int) -> None:
    points = torch.randn(n, 8, generator=torch.Generator().manual_seed(n))
    points[n // 2] = points[0]  # and with n < k, centers that are equal: draws
    generator = torch.Generator().manual_seed(0)
    start = points[torch.randperm(n, generator=generator)[:256].repeat(256)[:256]]
    own = nearest(points, start)
    gaps = torch.cdist(points.double(), start.double())
    torch.testing.assert_close(gaps[torch.arange(n), own], gaps.amin(1), rtol=0, atol=1e-6)
    moved = kmeans(points, 256, 1, torch.Generator().manual_seed(0))
    for i in own.unique().tolist():
        torch.testing.assert_close(moved[i], points[own == i].mean(0))
    left = [i for i in range(256) if i not in own]
    assert torch.equal(moved[left], start[left])


def test_residual_kmeans_starts_from_what_the_last_codebook_left() -> None:
    weight, _ = matrix_and_gram(32, 64)
    state = residual_kmeans(weight, 3, Training(), torch.Generator().manual_seed(0))
    rest = (weight / weight.norm(dim=1, keepdim=True)).reshape(-1, 8)
    for book, codes in zip(state.codebooks, state.codes, strict=True):
        distances = torch.cdist(rest.double(), book.double())  # brute force
        picked = distances.gather(1, codes.reshape(-1, 1))[:, 0]
        torch.testing.assert_close(picked, distances.min(1).values, rtol=1e-4, atol=1e-4)
        used = codes.reshape(-1)
        for k in used.unique().tolist()[:20]:  # centers are means of what they code
            torch.testing.assert_close(book[k], rest[used == k].mean(0), rtol=1e-3, atol=1e-4)
        rest = rest - book[used]


def loss_ref(
    weight: Tensor, h: Tensor, codes: Tensor, books: Tensor, scales: Tensor,
    levels: list[int], lambdas: list[float],
) -> Tensor:  # fmt: skip
    """The Drop-by-Drop loss by its definition, differentiable."""
    total = torch.zeros((), dtype=weight.dtype)
    for p, lam in zip(levels, lambdas, strict=True):
        q = sum(books[m][codes[m]] for m in range(p)).reshape(weight.shape)  # type: ignore[union-attr]
        e = weight - scales[:, None] * q
        total = total + lam * torch.trace(e @ h @ e.T) / len(weight)
    return total


def random_state(weight: Tensor, planes: int) -> Additive:
    generator = torch.Generator().manual_seed(1)
    d_out, d_in = weight.shape
    codes = torch.randint(0, 256, (planes, d_out, d_in // 8), generator=generator)
    books = torch.randn(planes, 256, 8, generator=generator) * 0.05
    return Additive(codes, books, torch.rand(d_out, generator=generator) + 0.5)


@pytest.mark.parametrize(("levels", "lambdas"), [([3], [1.0]), ([1, 3], [0.7, 0.2])])
def test_gradients_are_those_of_autograd(levels: list[int], lambdas: list[float]) -> None:
    weight, h = matrix_and_gram(5, 32)
    state = random_state(weight, 3)
    value, by_book, by_scale = loss_and_gradients(weight, h, state, levels, lambdas)
    books, scales = state.codebooks.clone().requires_grad_(), state.scales.clone().requires_grad_()
    expected = loss_ref(weight, h, state.codes, books, scales, levels, lambdas)
    expected.backward()
    assert value == pytest.approx(float(expected.detach()), rel=1e-4)
    torch.testing.assert_close(by_book, books.grad, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(by_scale, scales.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("levels", "lambdas"), [([2], [1.0]), ([1, 2], [0.6, 0.4])])
def test_greedy_pass_takes_the_best_entry_every_time(
    levels: list[int], lambdas: list[float]
) -> None:
    """Code by code in the same random order, each by trying all 256 entries."""
    weight, h = matrix_and_gram(2, 16)
    state = random_state(weight, 2)
    found = beam_search(weight, h, state, levels, lambdas, 1, torch.Generator().manual_seed(4))
    w, big = weight.double(), h.double()
    codes, books, scales = state.codes.clone(), state.codebooks.double(), state.scales.double()
    order = torch.Generator().manual_seed(4)
    for j in torch.randperm(2, generator=order).tolist():
        for m in torch.randperm(2, generator=order).tolist():
            for i in range(2):
                costs = []
                for k in range(256):
                    codes[m, i, j] = k
                    row = slice(i, i + 1)
                    costs.append(
                        float(loss_ref(w[row], big, codes[:, row], books, scales[row], levels,
                                       lambdas))
                    )  # fmt: skip
                codes[m, i, j] = costs.index(min(costs))
    assert torch.equal(found, codes)


@pytest.mark.parametrize(("levels", "lambdas"), [([3], [1.0]), ([2, 3], [0.5, 0.5])])
def test_a_pass_never_loses_and_a_wider_beam_gains(levels: list[int], lambdas: list[float]) -> None:
    weight, h = matrix_and_gram(96, 64)
    state = residual_kmeans(weight, 3, SHORT, torch.Generator().manual_seed(0))

    def after(beam: int) -> float:
        codes = beam_search(
            weight, h, state, levels, lambdas, beam, torch.Generator().manual_seed(0)
        )
        return float(loss_ref(weight, h, codes, state.codebooks, state.scales, levels, lambdas))

    before = loss_and_gradients(weight, h, state, levels, lambdas)[0]
    assert after(1) < before
    assert after(8) < after(1)


def test_training_lowers_the_loss_and_stops_below_one_percent() -> None:
    weight, h = matrix_and_gram(64, 64)
    start = residual_kmeans(weight, 2, SHORT, torch.Generator().manual_seed(0))
    before = error(weight, start.decode(2), h)
    errors = [
        error(weight, train(weight, h, 2, [2], [1.0], training, 0).decode(2), h)
        for training in (
            Training(kmeans_iterations=20, steps=20, epochs=1),
            Training(kmeans_iterations=20, steps=20, epochs=3),
            Training(kmeans_iterations=20, steps=20, epochs=3, tolerance=1.0),
        )
    ]
    assert errors[1] < errors[0] < before
    # A tolerance of 100 % stops before the second epoch.
    assert errors[2] == errors[0]


def test_what_aqlm_stores_is_what_it_decodes() -> None:
    weight, h = matrix_and_gram(32, 64)
    state = train(weight, h, 2, [2], [1.0], SHORT, 0)
    assert torch.equal(state.codebooks, state.codebooks.half().float())
    assert torch.equal(state.scales, state.scales.half().float())
    suite = aqlm(weight, h, [2, 3], SHORT)
    assert torch.equal(suite.levels[2].weight, state.decode(2))
    assert suite.levels[2].bytes == 2 * 32 * 8 + 2 * 256 * 8 * 2 + 2 * 32
    assert suite.files == (suite.levels[2].bytes, suite.levels[3].bytes)


def test_dropping_codebooks_collapses_and_the_nested_loss_mends_it() -> None:
    weight, h = matrix_and_gram(64, 96)
    alone, dropped = aqlm(weight, h, [2, 3], SHORT), aqlm_drop(weight, h, [2, 3], SHORT)
    nested = paper(weight, h, [3, 2], SHORT)
    assert torch.equal(dropped.levels[3].weight, alone.levels[3].weight)
    for suite in (dropped, nested):
        assert suite.files == (additive_bytes((64, 96), 3),)
    low = [error(weight, s.levels[2].weight, h) for s in (alone, nested, dropped)]
    assert low[0] < low[1] < low[2]
    high = [error(weight, s.levels[3].weight, h) for s in (dropped, nested)]
    assert high[0] < high[1]
