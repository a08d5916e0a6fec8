"""Every scalar baseline against a naive, obviously right reference on tiny matrices."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dropbydrop.coding.objective import weighted_errors
from dropbydrop.system.errors import CalibrationError
from dropbydrop_research.baselines import METHODS, Problem
from dropbydrop_research.baselines import any_precision as entries
from dropbydrop_research.baselines import matryoshka as integers
from dropbydrop_research.baselines.gptq import gptq
from dropbydrop_research.baselines.grid import fit_grid, from_codes, to_codes
from dropbydrop_research.baselines.rtn import rtn
from problems import error, matrix_and_gram

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
