"""Every baseline against a naive, obviously right reference on tiny matrices."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from dropbydrop.coding import codebooks as universal
from dropbydrop.coding.objective import weighted_errors
from dropbydrop.errors import CalibrationError, DropError
from dropbydrop_research import baselines
from dropbydrop_research.baselines import METHODS, Problem, choose
from dropbydrop_research.baselines import any_precision as entries
from dropbydrop_research.baselines import matryoshka as integers
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
from dropbydrop_research.baselines.gptq import gptq
from dropbydrop_research.baselines.grid import fit_grid, from_codes, to_codes
from dropbydrop_research.baselines.paper import paper
from dropbydrop_research.baselines.rtn import rtn

SHORT = Training(kmeans_iterations=20, steps=20, epochs=4)


def matrix_and_gram(d_out: int = 6, d_in: int = 144, seed: int = 0) -> tuple[Tensor, Tensor]:
    """W, and H of correlated inputs with unequal energies (full rank)."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(d_out, d_in, generator=generator) * 0.05
    x = torch.randn(4 * d_in, d_in, generator=generator)
    x = x @ torch.randn(d_in, d_in, generator=generator) / d_in**0.5
    x = x * torch.linspace(0.3, 2, d_in)[torch.randperm(d_in, generator=generator)]
    return weight, x.T @ x / len(x)


def error(weight: Tensor, decoded: Tensor, h: Tensor) -> float:
    return weighted_errors(weight, [decoded], h)[0]


# ---- scalar grids ------------------------------------------------------------------------------


def rtn_ref(weight: Tensor, bits: int) -> Tensor:
    """Value by value, over the points of its group's grid."""
    out = torch.empty_like(weight)
    for i, row in enumerate(weight):
        for low in range(0, len(row), 64):
            part = row[low : low + 64]
            lowest, highest = min(float(part.min()), 0.0), max(float(part.max()), 0.0)
            scale = float(torch.tensor((highest - lowest) / (2**bits - 1)).half())
            zero = round(-lowest / scale)
            points = torch.tensor([scale * (q - zero) for q in range(2**bits)])
            for k, value in enumerate(part):
                out[i, low + k] = points[(points - value).abs().argmin()]
    return out


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_rtn_takes_the_nearest_point_of_its_group(bits: int) -> None:
    weight, h = matrix_and_gram()  # 144 inputs: groups of 64, 64 and 16
    suite = rtn(weight, h, [bits])
    torch.testing.assert_close(suite.levels[bits].weight, rtn_ref(weight, bits))
    groups = 6 * 3
    assert suite.levels[bits].bytes == 6 * 144 * bits // 8 + 2 * groups + -(-groups * bits // 8)
    assert suite.files == (suite.levels[bits].bytes,)


def test_a_grid_keeps_zero_and_survives_constant_groups() -> None:
    w = torch.tensor([[0.0, 0.0], [0.3, 0.3], [-0.2, 0.5]])
    scale, zero = fit_grid(w, 2)
    decoded = from_codes(
        to_codes(w, scale[:, None], zero[:, None], 2), scale[:, None], zero[:, None]
    )
    assert torch.equal(decoded[0], torch.zeros(2))
    torch.testing.assert_close(decoded[1], w[1], rtol=1e-3, atol=0)
    nothing = from_codes(zero[:, None], scale[:, None], zero[:, None])
    assert torch.equal(nothing, torch.zeros(3, 1))


def eliminate(
    weight: Tensor, gram: Tensor, order: list[int], visit: Callable[[int, Tensor, Tensor], Tensor]
) -> None:
    """GPTQ by its textbook: after each column, remove it from the inverse of H explicitly."""
    h = gram.double().clone()
    h.diagonal().add_(0.01 * h.diagonal().mean())
    inverse = torch.linalg.inv(h)
    w = weight.double().clone()
    for j in order:
        left = visit(j, w[:, j].clone(), w) / inverse[j, j]
        w -= torch.outer(left, inverse[j])
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]


def gptq_ref(weight: Tensor, gram: Tensor, bits: int, act_order: bool) -> Tensor:
    out = torch.empty_like(weight, dtype=torch.float64)
    grids: dict[int, tuple[Tensor, Tensor]] = {}
    if act_order:
        order = sorted(range(len(gram)), key=lambda j: -float(gram[j, j]))
        for g, low in enumerate(range(0, weight.shape[1], 64)):
            grids[g] = fit_grid(weight[:, low : low + 64], bits)
    else:
        order = list(range(len(gram)))

    def visit(j: int, column: Tensor, w: Tensor) -> Tensor:
        g = j // 64
        if g not in grids:
            grids[g] = fit_grid(w[:, j : j + 64].float(), bits)
        scale, zero = (t.double() for t in grids[g])
        out[:, j] = from_codes(to_codes(column, scale, zero, bits), scale, zero)
        return column - out[:, j]

    eliminate(weight, gram, order, visit)
    return out.float()


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("bits", [2, 4])
def test_gptq_is_the_textbook_column_loop(bits: int, act_order: bool) -> None:
    weight, h = matrix_and_gram()
    found = gptq(weight, h, [bits], act_order).levels[bits].weight
    expected = gptq_ref(weight, h, bits, act_order)
    # float32 against float64: a value half-way between two points may go either way
    assert float((found - expected).abs().gt(1e-4).float().mean()) < 0.01
    assert error(weight, found, h) == pytest.approx(error(weight, expected, h), rel=0.01)
    assert error(weight, found, h) < 0.7 * error(weight, rtn_ref(weight, bits), h)


def test_gptq_with_inputs_that_are_always_zero() -> None:
    weight, h = matrix_and_gram()
    h[7], h[:, 7] = 0, 0
    found = gptq(weight, h, [3]).levels[3].weight
    assert torch.equal(found[:, 7], torch.zeros(6))
    assert error(weight, found, h) < 0.1


def test_useless_statistics_are_refused() -> None:
    weight, _ = matrix_and_gram()
    with pytest.raises(CalibrationError, match="calibrate on more"):
        gptq(weight, torch.full((144, 144), -1.0), [3])


# ---- matryoshka --------------------------------------------------------------------------------


def slice_ref(q: int, bits: int, level: int) -> int:
    """Leading bits, rounded half up, clipped, back in place."""
    step = 2 ** (bits - level)
    return min(int(q / step + 0.5), 2**level - 1) * step


@pytest.mark.parametrize(("bits", "level"), [(4, 2), (4, 3), (4, 4), (8, 3)])
def test_slices_of_every_code(bits: int, level: int) -> None:
    every = torch.arange(2**bits, dtype=torch.uint8)
    expected = [slice_ref(q, bits, level) for q in range(2**bits)]
    assert integers.sliced(every, bits, level).tolist() == expected


def test_matryoshka_is_the_column_loop_with_averaged_feedback() -> None:
    weight, h = matrix_and_gram(d_in=80)
    levels = [2, 3, 4]
    grids: dict[int, tuple[Tensor, Tensor]] = {}
    expected = torch.empty(6, 80, dtype=torch.int64)

    def visit(j: int, column: Tensor, w: Tensor) -> Tensor:
        g = j // 64
        if g not in grids:
            grids[g] = fit_grid(w[:, j : j + 64].float(), 4)
        left = torch.empty_like(column)
        for i, value in enumerate(column.tolist()):
            s, z = float(grids[g][0][i]), float(grids[g][1][i])
            errors = {q: [value - s * (slice_ref(q, 4, r) - z) for r in levels] for q in range(16)}
            best = min(errors, key=lambda q: sum(e * e for e in errors[q]))
            expected[i, j], left[i] = best, sum(errors[best]) / 3
        return left

    eliminate(weight, h, list(range(80)), visit)
    master = integers.encode(weight, h, levels)
    assert float((master.codes != expected).float().mean()) < 0.01


def test_matryoshka_levels_are_slices_of_one_file() -> None:
    weight, h = matrix_and_gram()
    master = integers.encode(weight, h, [2, 3, 4])
    suite = METHODS["matryoshka"].encode(Problem({"w": weight}, h), [2, 3, 4])["w"]
    for level, served in suite.levels.items():
        codes = torch.tensor([[slice_ref(int(q), 4, level) for q in row] for row in master.codes])
        group = torch.arange(144) // 64
        expected = master.scales[:, group] * (codes.float() - master.zeros[:, group])
        assert torch.equal(served.weight, expected)
    assert suite.files == (suite.levels[4].bytes,)
    assert suite.levels[2].bytes < suite.levels[3].bytes < suite.levels[4].bytes
    errors = weighted_errors(weight, [suite.levels[p].weight for p in (2, 3, 4)], h)
    assert errors[0] > errors[1] > errors[2]


# ---- any-precision -----------------------------------------------------------------------------


def spread(values: Tensor, f: Tensor) -> float:
    """Weighted squared error of values around their weighted mean."""
    if not len(values):
        return 0.0
    mean = (values * f).sum() / f.sum()
    return float((f * (values - mean).square()).sum())


def test_any_precision_splits_every_cluster_at_its_best_place() -> None:
    weight, h = matrix_and_gram(d_in=64)
    f = h.diagonal().double()
    parent = entries.encode(weight, f, [3]).codes
    child = entries.encode(weight, f, [3, 4])
    for i, c in itertools.product(range(6), range(8)):
        member = parent[i] == c
        values, mass = weight[i, member].double(), f[member]
        order = values.argsort()
        values, mass = values[order], mass[order]
        best = min(
            (spread(values[:p], mass[:p]) + spread(values[p:], mass[p:])
             for p in range(1, len(values))),
            default=0.0,
        )  # fmt: skip
        halves = child.codes[i, member][order] & 1
        found = sum(spread(values[halves == k], mass[halves == k]) for k in (0, 1))
        assert found == pytest.approx(best, rel=1e-6, abs=1e-12)


def test_any_precision_nests_bit_for_bit() -> None:
    weight, h = matrix_and_gram()
    f = h.diagonal()
    top = entries.encode(weight, f, [3, 4, 5])
    for level in (3, 4):
        alone = entries.encode(weight, f, [level])
        assert torch.equal(top.codes >> (5 - level), alone.codes)
        assert torch.equal(top.values[level], alone.values[level])
        assert torch.equal(top.decode(level), alone.decode(level))


def test_any_precision_seed_is_a_fixed_point_of_kmeans() -> None:
    weight, h = matrix_and_gram()
    f = h.diagonal().double()
    found = entries.encode(weight, f, [3])
    assert found.values[3].diff(dim=1).min() >= 0
    distance = (weight[..., None] - found.values[3][:, None]).abs()
    nearest = distance.argmin(-1)
    assert float((nearest != found.codes).float().mean()) < 0.02  # values are rounded to float16
    for i, c in itertools.product(range(6), range(8)):
        member = found.codes[i] == c
        mean = (weight[i, member].double() * f[member]).sum() / f[member].sum()
        assert float(found.values[3][i, c]) == pytest.approx(float(mean), rel=1e-3, abs=1e-5)


def test_any_precision_with_few_and_equal_values() -> None:
    weight = torch.zeros(2, 16)
    weight[1, 3] = 1.0
    found = entries.encode(weight, torch.ones(16), [3, 4])
    for level in (3, 4):
        assert torch.equal(found.decode(level), weight)


# ---- additive ----------------------------------------------------------------------------------


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


# ---- the registry ------------------------------------------------------------------------------


@lru_cache
def quick_set(levels: tuple[int, ...], lambdas: tuple[float, ...]) -> Tensor:
    """A universal set that is trained in no time."""
    return universal.train(levels, lambdas, samples=2048, rounds=1, beam=2)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_serves_a_site(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_weights_of_the_paper_are_on_the_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = []

    def remember(levels: tuple[int, ...], lambdas: tuple[float, ...]) -> Tensor:
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
