"""Objective, refits and the encoder of an input group."""

import json
import math
from itertools import pairwise

import pytest
import torch
from safetensors import safe_open

from dropbydrop.coding import codebooks as universal
from dropbydrop.coding import encoder
from dropbydrop.coding.channel_scaling import input_scales_of
from dropbydrop.coding.codebook_set import BytesSet
from dropbydrop.coding.codebooks import (
    default_lambdas,
    distortions,
    least_squares,
    train,
    universal_set,
)
from dropbydrop.coding.encoder import EFFORTS, Effort, encode_group, group_rotation, stored_scales
from dropbydrop.coding.objective import (
    Coded,
    condition,
    descent_metric,
    feedback_metric,
    objective,
    weighted_errors,
)
from dropbydrop.coding.refit import refit_codebooks, refit_scales
from dropbydrop.coding.rotation import Rotation
from dropbydrop.coding.search import search
from dropbydrop.system.errors import CalibrationError

LEVELS, LAMBDAS = [2, 3], [1.0, 3.0]


def gram(d_in, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d_in, d_in, generator=generator)
    x = torch.randn(4 * d_in, d_in, generator=generator) @ mix
    return x.T @ x / len(x)


def coded(d_out=12, d_in=32, planes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(d_out, d_in, generator=generator)
    books = torch.randn(planes, 128, 8, generator=generator) * 0.5
    codes = torch.randint(0, 256, (planes, d_out, d_in // 8), generator=generator)
    scales = torch.rand(d_out, generator=generator) + 0.5
    return Coded(weight, scales, list(codes.to(torch.uint8))), books


def test_metrics_give_the_same_quadratic_form():
    h = condition(gram(32), 0.01)
    metric = feedback_metric(h)
    e = torch.randn(5, 32, dtype=torch.float64)
    exact = ((e @ h) * e).sum(1)
    total = torch.zeros(5, dtype=torch.float64)
    for j in range(4):
        part = e @ metric.coupling[j].double()
        part += e[:, 8 * j : 8 * j + 8] @ metric.factor[j].double()
        total += part.square().sum(1)
    torch.testing.assert_close(total, exact, rtol=1e-4, atol=1e-6)
    # Descent: H_jj = R R^T, and the coupling turns errors into the whitened pull on group j.
    metric = descent_metric(h)
    for j in range(4):
        own = slice(8 * j, 8 * j + 8)
        r = metric.factor[j].double()
        torch.testing.assert_close(r @ r.T, h[own, own], rtol=1e-5, atol=1e-6)
        rest = e.clone()
        rest[:, own] = 0
        torch.testing.assert_close(
            e @ metric.coupling[j].double(),
            torch.linalg.solve(r, (rest @ h[:, own]).T).T,
            rtol=1e-3,
            atol=1e-5,
        )
        assert not metric.coupling[j][own].any()


def test_condition_adds_a_ridge_of_the_mean_diagonal():
    h = torch.diag(torch.tensor([1.0, 3.0]))
    torch.testing.assert_close(condition(h, 0.5), torch.diag(torch.tensor([2.0, 4.0])).double())
    assert torch.equal(h, torch.diag(torch.tensor([1.0, 3.0]))), "the input was changed"


def test_objective_and_errors_equal_the_definition():
    x, books = coded()
    h = gram(32)
    entries = torch.cat([books, -books], 1)
    value, errors = 0.0, []
    for p, lam in zip(LEVELS, LAMBDAS, strict=True):
        q = sum(entries[m][x.codes[m].long()].reshape(12, 32) for m in range(p))
        e = x.weight - x.scales[:, None] * q
        value += lam * float(torch.trace(e @ h @ e.T))
        errors.append(float(torch.trace(e @ h @ e.T) / torch.trace(x.weight @ h @ x.weight.T)))
    x = Coded(x.weight, x.scales, x.codes)
    codebooks = BytesSet.of(books)
    assert objective(x, h, codebooks, LEVELS, LAMBDAS) == pytest.approx(value, rel=1e-5)
    decoded = [x.scales[:, None] * q for q in x.sums(codebooks, LEVELS)]
    assert weighted_errors(x.weight, decoded, h) == pytest.approx(errors, rel=1e-5)


def test_scales_are_the_optimum():
    x, books = coded()
    h = gram(32)
    metric = feedback_metric(condition(h, 0.01))
    w = x.weight / x.scales[:, None]
    codes, _ = search(w, books, LEVELS, LAMBDAS, beam=2, sweeps=0, feedback=metric)
    rest = (h, BytesSet.of(books), LEVELS, LAMBDAS)
    best = refit_scales(Coded(x.weight, x.scales, list(codes)), *rest)
    assert not torch.equal(best, x.scales)

    def value(scales):
        return objective(Coded(x.weight, scales, list(codes)), *rest)

    assert value(best) < value(x.scales)
    for row in range(12):  # every row is at its own optimum
        for factor in (0.98, 1.02):
            other = best.clone()
            other[row] *= factor
            assert value(other) > value(best)


def naive_codebooks(matrices, h, books, levels, lambdas):
    """The exact minimum: J is a least-squares problem in the stacked entries; solved densely."""
    root = torch.linalg.cholesky(h.double())
    rows, right = [], []
    planes = books.shape[0]
    for x in matrices:
        for r in range(x.weight.shape[0]):
            for p, lam in zip(levels, lambdas, strict=True):
                design = torch.zeros(h.shape[0], planes * 128 * 8, dtype=torch.float64)
                for j in range(h.shape[0] // 8):
                    for m in range(p):
                        c = int(x.codes[m][r, j])
                        sign = -1.0 if c & 128 else 1.0
                        for i in range(8):
                            design[8 * j + i, (m * 128 + (c & 127)) * 8 + i] = sign * x.scales[r]
                rows.append(lam**0.5 * root.T @ design)
                right.append(lam**0.5 * root.T @ x.weight[r].double())
    a, b = torch.cat(rows), torch.cat(right)
    start = books.double().reshape(-1)
    step = torch.linalg.lstsq(a, b - a @ start, driver="gelsd").solution
    return (start + step).view_as(books).float()


def test_codebook_refit_converges_to_the_least_squares_optimum():
    one, books = coded(d_out=6, d_in=16, planes=2, seed=1)
    two, _ = coded(d_out=5, d_in=16, planes=2, seed=2)
    h = gram(16) + 0.1 * torch.eye(16)
    levels, lambdas = [1, 2], [1.0, 2.0]

    def value(b):
        return sum(objective(x, h, BytesSet.of(b), levels, lambdas) for x in (one, two))

    best = value(naive_codebooks([one, two], h, books, levels, lambdas))
    few = value(refit_codebooks([one, two], h, books, levels, [lambdas] * 2, iterations=3))
    many = value(refit_codebooks([one, two], h, books, levels, [lambdas] * 2, iterations=150))
    assert value(books) > few > many
    scale = value(books)
    assert many - best < 2e-3 * scale


def test_universal_least_squares_lowers_the_nested_loss():
    x = torch.randn(4000, 8)
    books = universal_set((2, 3, 4)).stacked
    lambdas = [0.0, 1.0, 3.0, 9.0]
    metric = feedback_metric(torch.eye(8, dtype=torch.float64))
    codes, _ = search(x, books, [2, 3, 4], lambdas[1:], beam=4, sweeps=0, feedback=metric)
    codes = codes[:, :, 0]

    def loss(b):
        total, rest = 0.0, x
        for m in range(4):
            rest = rest - torch.cat([b[m], -b[m]])[codes[m].long()]
            total += lambdas[m] * float(rest.square().sum())
        return total

    fitted = least_squares(x, codes, lambdas, ridge=1e-6)
    assert loss(fitted) < loss(books)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        assert loss(fitted + 0.01 * torch.randn(fitted.shape, generator=generator)) > loss(fitted)


def test_shipped_set_is_near_the_known_distortions():
    # Dedicated joint codes reach .0945 .0274 .0079 at 2, 3, 4 bits; nesting costs up to 20 %.
    levels = (2, 3, 4)
    found = distortions(universal_set(levels).stacked, levels, default_lambdas(levels))
    assert found[1] < 0.105
    assert found[2] < 0.0300
    assert found[3] < 0.0092


SHIPPED = sorted(path.stem for path in universal._FOLDER.glob("[1-9]*"))


def test_the_sets_that_ship():
    assert {"2-3-4", "3-4-5", "1-2-3-4"} <= set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_sets_are_what_the_script_made(name):
    """Levels, weights and distortions noted in the file are those of its codebooks, today."""
    levels = tuple(map(int, name.split("-")))
    with safe_open(universal._FOLDER / f"{name}.safetensors", "pt") as file:
        notes = {k: json.loads(v) for k, v in file.metadata().items() if k != "format"}
        assert list(file.keys()) == ["codebooks"]
        stored = file.get_tensor("codebooks")
    assert stored.dtype == torch.float16
    assert stored.shape == (levels[-1], 128, 8)
    books, lambdas = universal_set(levels).stacked, default_lambdas(levels)
    assert torch.equal(books, stored.float())
    assert tuple(notes["levels"]) == levels
    assert notes["lambdas"] == pytest.approx(lambdas)
    found = distortions(books, levels, lambdas)
    assert found == pytest.approx(notes["distortions"], rel=5e-3)
    assert all(found[p - 1] > 4.0**-p for p in levels), "below the bound of any code"
    for low, high in pairwise(levels):  # a plane divides the error by 4 at best
        assert found[high - 1] < found[low - 1] / 2.7 ** (high - low)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_sets_are_trained_to_the_end(name):
    """One more round, on other samples, does not lower the loss on a third sample."""
    levels = [int(p) for p in name.split("-")]
    books, lambdas = universal_set(tuple(levels)).stacked, default_lambdas(levels)
    weights = [lambdas[levels.index(p)] if p in levels else 0.0 for p in range(1, levels[-1] + 1)]
    fit, test = torch.randn(2, 1 << 15, 8, generator=torch.Generator().manual_seed(5))
    metric = feedback_metric(torch.eye(8, dtype=torch.float64))

    def encode(x, b):
        return search(x, b, levels, lambdas, beam=8, sweeps=0, feedback=metric)[0][:, :, 0]

    def loss(b):
        total, rest = 0.0, test
        for book, code, weight in zip(b, encode(test, b), weights, strict=True):
            rest = rest - torch.cat([book, -book])[code.long()]
            total += weight * float(rest.square().sum())
        return total

    again = least_squares(fit, encode(fit, books), weights, 1e-4)
    assert loss(books) < 1.005 * loss(again)


def test_a_set_for_any_levels_can_be_trained_and_is_reproducible():
    quick = {"samples": 4096, "rounds": 2, "beam": 2}
    one, two = train([1, 2], [1.0, 3.0], **quick), train([1, 2], [1.0, 3.0], **quick)
    assert one.shape == (2, 128, 8)
    assert torch.equal(one, two)
    assert torch.equal(one, one.half().float())


@pytest.mark.parametrize("preset", ["fast", "balanced"])
def test_encoding_a_site(preset):
    torch.manual_seed(0)
    weights = {"a": torch.randn(24, 96) * 0.02, "b": torch.randn(8, 96) * torch.rand(8, 1)}
    weights["a"][:, 5] *= 40  # an outlier column
    weights["b"][3] = 0
    h = gram(96)
    books, lambdas = universal_set((2, 3, 4)), default_lambdas([2, 3, 4])
    rotation = Rotation.make(96, seed=1)
    out = encode_group(weights, h, rotation, books, [2, 3, 4], lambdas, EFFORTS[preset])
    assert set(out) == {"a", "b"}
    for name, e in out.items():
        assert [plane.shape for plane in e.codes] == [(len(weights[name]), 12)] * 4
        assert e.scales.dtype == torch.float16
        decoded = [
            rotation.transpose(e.scales.float()[:, None] * q)
            for q in books.sums(e.codes, len(weights[name]), [2, 3, 4])
        ]
        assert weighted_errors(weights[name], decoded, h) == pytest.approx(e.errors, rel=1e-2)
        assert e.errors[0] > e.errors[1] > e.errors[2]
    assert out["a"].errors[0] < 0.1  # white noise coded without H would be near 0.1


def test_factors_of_inputs_are_the_formula():
    torch.manual_seed(0)
    weights = [torch.randn(24, 16) * torch.rand(16) * 3, torch.randn(8, 16) * 100]
    h = gram(16)
    log = []
    for i in range(16):
        power = sum(
            float(w[r, i] ** 2 / w[r].square().mean()) for w in weights for r in range(len(w))
        )
        log.append(0.375 * math.log(power) - 0.125 * math.log(float(h[i, i])))
    naive = [math.exp(x - sum(log) / 16) for x in log]
    assert input_scales_of(weights, h).tolist() == pytest.approx(naive, rel=1e-4)


def test_factors_where_statistics_say_nothing():
    weight, h = torch.randn(8, 16), gram(16)
    weight[:, 3] = 0
    weight[2] = 0
    h[5], h[:, 5] = 0, 0
    input_scales = input_scales_of([weight], h)
    assert bool(torch.isfinite(input_scales).all())
    assert input_scales.min() > 0
    assert torch.equal(input_scales_of([weight * 0], h * 0), torch.ones(16))
    weight[:, 3] = 1e6  # one column is nearly everything
    assert float(input_scales_of([weight], h).log2().abs().max()) == pytest.approx(4)
    assert torch.equal(input_scales_of([weight * 0], h * torch.nan), torch.ones(16))


@pytest.mark.parametrize("levels", [(2,), (2, 3, 4)])
def test_balanced_inputs_lower_the_error(levels):
    """Columns of W and inputs of unequal size: the rotation alone would mix them up for good."""
    torch.manual_seed(0)
    spread = torch.randn(2, 96).exp()
    weights, h = {"a": torch.randn(64, 96) * spread[0]}, gram(96) * spread[1] * spread[1][:, None]
    books, lambdas = universal_set(levels), default_lambdas(levels)
    errors = [
        encode_group(weights, h, rotation, books, levels, lambdas, EFFORTS["fast"])["a"].errors
        for rotation in (group_rotation(weights, h, 1), Rotation.make(96, seed=1))
    ]
    assert all(one < 0.7 * other for one, other in zip(*errors, strict=True))


def test_learned_codebooks_fit_their_site():
    torch.manual_seed(0)
    weights = {"a": torch.randn(96, 64).sign() * 0.1, "b": torch.randn(32, 64).sign()}
    h, levels, lambdas = gram(64), [1, 2], default_lambdas([1, 2])
    books = BytesSet.of(train(levels, lambdas, samples=4096, rounds=2, beam=2))
    rotation, effort = Rotation(64, 1, torch.ones(64), None), Effort(4, 1, 1)
    plain = encode_group(weights, h, rotation, books, levels, lambdas, effort)
    fitted, own = encoder.learn_group(weights, h, rotation, books, levels, lambdas, effort)
    assert own.stacked.shape == books.stacked.shape
    assert torch.equal(own.stacked, own.stacked.half().float())
    for name, e in fitted.items():
        sums = own.sums(e.codes, len(weights[name]), levels)
        decoded = [e.scales.float()[:, None] * q for q in sums]
        assert weighted_errors(weights[name], decoded, h) == pytest.approx(e.errors, rel=1e-2)
        # signs are no Gaussian samples: much of what the universal set misses can be learned
        assert e.errors[1] < 0.7 * plain[name].errors[1]


def test_learning_that_does_not_help_is_not_kept(monkeypatch):
    weights, h, levels = {"a": torch.randn(16, 32)}, gram(32), [2, 3, 4]
    books, lambdas = universal_set((2, 3, 4)), default_lambdas(levels)
    rest = (weights, h, Rotation.make(32), books, levels, lambdas, Effort(2, 1, 0))
    plain = encode_group(*rest)["a"]
    monkeypatch.setattr(encoder, "refit_codebooks", lambda matrices, h, old, *_: old * torch.nan)
    found, own = encoder.learn_group(*rest)
    assert own is books
    assert all(torch.equal(*pair) for pair in zip(found["a"].codes, plain.codes, strict=True))
    assert found["a"].errors == plain.errors


def test_more_effort_is_not_worse():
    torch.manual_seed(0)
    weights, h = {"a": torch.randn(64, 64)}, gram(64)
    books, lambdas = universal_set((2, 3, 4)), default_lambdas([2, 3, 4])
    values = []
    for effort in (Effort(2, 0, 0), Effort(8, 2, 0), Effort(16, 3, 2)):
        e = encode_group(weights, h, Rotation.make(64), books, [2, 3, 4], lambdas, effort)["a"]
        values.append(sum(lam * err for lam, err in zip(lambdas, e.errors, strict=True)))
    assert values[0] > values[1] > values[2]


def test_useless_statistics_are_refused():
    weights, h = {"x": torch.randn(8, 16)}, torch.full((16, 16), torch.nan)
    with pytest.raises(CalibrationError, match="x"):
        encode_group(weights, h, Rotation.make(16), universal_set((2, 3, 4)), [2, 3, 4],
                    [1.0, 1.0, 1.0], EFFORTS["fast"])  # fmt: skip


def test_stored_scales_survive_float16():
    s = torch.tensor([0.0, 1e-9, 0.1234567, 1e6])
    out = stored_scales(s)
    assert torch.equal(out, out.half().float())
    assert (out > 0).all()
    assert out.isfinite().all()
