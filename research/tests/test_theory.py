"""The theory against closed forms, naive numpy references and a brute-force optimiser."""

import math

import numpy as np
import pytest
import torch

from dropbydrop_research.theory import (
    E8_SECOND_MOMENT,
    Case,
    GaussianSource,
    classify,
    components,
    cross_spectrum,
    eigenbasis,
    fixed_rate_loss,
    ideal_reconstructions,
    matched_spectrum,
    output_distortion,
    recover,
    recover_components,
    refine,
    spectrum,
    weighted_distortion,
)

EXACT = 1e-9


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random_source(seed: int, d_in: int = 6, d_out: int = 4) -> GaussianSource:
    g = torch.Generator().manual_seed(seed)
    lam = torch.exp(3 * torch.randn(d_in, generator=g, dtype=torch.float64))
    return GaussianSource(lam, torch.exp(torch.randn(d_out, generator=g, dtype=torch.float64)))


# ---- naive references -------------------------------------------------------------------------


def bisect_distortion(variances: np.ndarray, total_bits: float) -> float:
    """Reverse water-filling of a list of variances by bisection on the water level."""
    low, high = 0.0, float(variances.max())
    for _ in range(300):
        level = (low + high) / 2
        bits = 0.5 * np.log2(np.maximum(variances / level, 1)).sum() if level else math.inf
        low, high = (level, high) if bits > total_bits else (low, level)
    return float(np.minimum(variances, high).sum())


def project_to_simplex(x: np.ndarray, total: float) -> np.ndarray:
    """Nearest point with entries >= 0 and the given sum."""
    ordered = np.sort(x)[::-1]
    excess = (np.cumsum(ordered) - total) / np.arange(1, len(x) + 1)
    return np.maximum(x - excess[np.nonzero(ordered > excess)[0][-1]], 0)


def brute_force_distortion(variances: np.ndarray, total_bits: float) -> float:
    """Minimise sum_i v_i 2^(-2 r_i) over rates r >= 0, sum r = B, by projected gradient.

    Knows nothing of water levels; it optimises what reverse water-filling solves.
    """
    rates = np.full(len(variances), total_bits / len(variances))
    best = math.inf
    step = 1 / (4 * math.log(2) ** 2 * variances.max())  # 1 / Lipschitz constant of the gradient
    for _ in range(200_000):
        value = float((variances * 4.0**-rates).sum())
        if value > best * (1 - 1e-15):
            break
        best = value
        gradient = -2 * math.log(2) * variances * 4.0**-rates
        rates = project_to_simplex(rates - step * gradient, total_bits)
    return best


# ---- reverse water-filling --------------------------------------------------------------------


@pytest.mark.parametrize("bits", [0.0, 0.3, 1.0, 2.5, 4.0, 8.0])
def test_white_source(bits: float) -> None:
    source = GaussianSource(torch.full((16,), 3.0), vector(0.5, 2.0))
    expected = 16 * 3.0 * 2.5 * 4.0**-bits
    assert source.distortion(bits) == pytest.approx(expected, rel=EXACT)
    assert source.rate(expected) == pytest.approx(bits, abs=EXACT)
    gap = source.gap(2 * expected, bits + 1)
    assert gap.db == pytest.approx(10 * math.log10(8), rel=EXACT)  # 2 D at one more bit
    assert gap.bits == pytest.approx(min(bits + 1, 1.5), abs=EXACT)


@pytest.mark.parametrize("bits", [0.1, 0.499, 0.5, 0.501, 1.0, 3.0])
def test_two_components(bits: float) -> None:
    """v = 4, 1: below 1/2 bit a weight (1 bit in all) only the first is active."""
    source = GaussianSource(vector(1.0, 4.0), vector(1.0))
    expected = 4 * 4.0 ** (-2 * bits) + 1 if bits <= 0.5 else 2 * math.sqrt(4) * 4.0**-bits
    assert source.distortion(bits) == pytest.approx(expected, rel=EXACT)
    assert source.rate(expected) == pytest.approx(bits, abs=EXACT)
    filling = source.fill(bits)
    assert filling.active.tolist() == [True, bits > 0.5]
    assert float(filling.rates.mean()) == pytest.approx(bits, abs=EXACT)
    assert float(filling.distortions.sum()) == pytest.approx(expected, rel=EXACT)


def test_water_level_at_every_edge() -> None:
    """At the rate where theta = v_k exactly, D and the level are known and R(D) inverts."""
    lam = vector(64.0, 16.0, 16.0, 4.0, 1.0)
    source = GaussianSource(lam, vector(1.0))
    for level in (64.0, 16.0, 4.0, 1.0):
        bits = float(0.5 * torch.log2((lam / level).clamp(min=1)).sum()) / 5
        distortion = float(lam.clamp(max=level).sum())
        assert source.distortion(bits) == pytest.approx(distortion, rel=EXACT)
        assert source.rate(distortion) == pytest.approx(bits, abs=EXACT)
        filling = source.fill(bits)
        assert filling.level == pytest.approx(level, rel=EXACT)
        for nudge in (-1e-7, 1e-7):  # continuous through the edge
            near = source.distortion(max(bits + nudge, 0))
            assert near == pytest.approx(distortion, rel=1e-5)


def test_inactive_components_make_a_bit_cost_less_than_6_db() -> None:
    source = GaussianSource(vector(100.0, 1e-9, 1e-9, 1e-9), vector(1.0))
    gap = source.gap(source.distortion(1.0), 2.0)
    assert gap.bits == pytest.approx(1.0, abs=EXACT)
    assert gap.db > 4 * 6.0  # all bits go to one component of four


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("bits", [0.05, 0.7, 2.0])
def test_against_bisection_and_brute_force(seed: int, bits: float) -> None:
    source = random_source(seed)
    lam, rows = source.spectrum.numpy(), source.rows.numpy()
    common = sum(bisect_distortion(row * lam, bits * len(lam)) for row in rows)
    assert source.distortion(bits) == pytest.approx(common, rel=EXACT)
    joint = np.outer(rows, lam).ravel()
    optimal = bisect_distortion(joint, bits * joint.size)
    assert source.distortion(bits, "optimal") == pytest.approx(optimal, rel=EXACT)
    assert optimal <= common * (1 + EXACT)
    for allocation in ("common", "optimal"):
        assert source.rate(source.distortion(bits, allocation), allocation) == pytest.approx(
            bits, abs=EXACT
        )
    if seed < 2:
        normal = lam / lam[0]
        brute = brute_force_distortion(normal, bits * len(lam))
        unit = GaussianSource(torch.from_numpy(normal.copy()), vector(1.0))
        assert unit.distortion(bits) == pytest.approx(brute, rel=1e-6)
        assert unit.distortion(bits) <= brute * (1 + EXACT)


def test_brute_force_to_1e_9() -> None:
    """A mild spectrum, where projected gradient converges fast: agreement to 1e-9."""
    lam = np.array([1.0, 0.8, 0.5, 0.3, 0.05])
    source = GaussianSource(torch.from_numpy(lam), vector(1.0))
    for bits in (0.1, 0.4, 1.0):
        brute = brute_force_distortion(lam, bits * 5)
        assert source.distortion(bits) == pytest.approx(brute, rel=EXACT)


def test_equal_rows_make_the_allocations_agree() -> None:
    source = GaussianSource(random_source(3).spectrum, torch.full((7,), 0.3))
    for bits in (0.2, 1.0, 3.0):
        optimal = source.distortion(bits, "optimal")
        assert source.distortion(bits) == pytest.approx(optimal, rel=EXACT)


def test_null_components_and_rows() -> None:
    """Rank 1 of 4: all the rate goes to it. Zero rows count as weights, and give their bits away
    only in the optimal allocation."""
    source = GaussianSource(vector(9.0, 0.0, 0.0, 0.0), vector(2.0, 0.0))
    assert source.size == 8
    assert source.power == 18.0
    assert source.distortion(0.5) == pytest.approx(18 * 4.0**-2, rel=EXACT)
    assert source.distortion(0.5, "optimal") == pytest.approx(18 * 4.0**-4, rel=EXACT)
    assert source.rate(18 * 4.0**-4, "optimal") == pytest.approx(0.5, abs=EXACT)
    nothing = GaussianSource(torch.zeros(3), vector(1.0))
    assert nothing.distortion(1.0) == 0.0
    assert nothing.rate(0.1) == 0.0
    assert not nothing.fill(1.0).active.any()
    with pytest.raises(ValueError, match="no gap"):
        nothing.gap(0.1, 1.0)


def test_rate_at_the_ends() -> None:
    source = random_source(1)
    assert source.rate(source.power) == 0.0
    assert source.rate(2 * source.power) == 0.0
    assert source.rate(0.0) == math.inf
    assert source.distortion(0.0) == pytest.approx(source.power, rel=EXACT)
    for bad in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="rate"):
            source.distortion(bad)


def test_extreme_spectra_keep_their_digits() -> None:
    lam = torch.logspace(6, -14, 400, dtype=torch.float64)
    source = GaussianSource(lam, torch.logspace(-8, 2, 50, dtype=torch.float64))
    for bits in (0.01, 1.0, 4.0, 16.0):
        for allocation in ("common", "optimal"):
            rate = source.rate(source.distortion(bits, allocation), allocation)
            assert rate == pytest.approx(bits, rel=EXACT)


def test_source_of_matrices() -> None:
    g = torch.Generator().manual_seed(0)
    w = torch.randn(64, 12, generator=g) * torch.linspace(0.5, 2, 64)[:, None]
    x = torch.randn(12, 40, generator=g)
    h = x @ x.T  # float32, as it is captured
    source = GaussianSource.of(w, h)
    assert torch.allclose(source.spectrum, torch.linalg.svdvals(x.double()).square(), rtol=1e-4)
    assert source.power == pytest.approx(
        float(w.double().square().mean(1).sum()) * float(h.trace())
    )
    # rotating inputs changes neither eigenvalues nor row norms, hence no bound
    q = torch.linalg.qr(torch.randn(12, 12, generator=g)).Q
    turned = GaussianSource.of(w @ q.T, q @ h @ q.T)
    assert turned.distortion(1.3) == pytest.approx(source.distortion(1.3), rel=1e-4)


def test_bad_matrices_are_refused() -> None:
    with pytest.raises(ValueError, match="square"):
        spectrum(torch.ones(2, 3))
    with pytest.raises(ValueError, match="not symmetric"):
        spectrum(vector(1, 2, 0, 1).view(2, 2))
    with pytest.raises(ValueError, match="semi-definite"):
        spectrum(torch.diag(vector(1.0, -0.5)))
    with pytest.raises(ValueError, match="not finite"):
        spectrum(torch.diag(vector(1.0, math.nan)))
    with pytest.raises(ValueError, match="non-negative"):
        GaussianSource(vector(-1.0), vector(1.0))
    with pytest.raises(ValueError, match="allocation"):
        random_source(0).distortion(1.0, "best")  # type: ignore[arg-type]


def test_sampled_and_held_out_spectra_bracket_the_bound() -> None:
    """Few samples: the bound from their own H is too low, along held-out energies too high."""
    g = torch.Generator().manual_seed(0)
    true = torch.arange(1, 49, dtype=torch.float64) ** -1.0
    row = vector(1.0)
    exact = GaussianSource(true, row).distortion(2.0)

    def gram() -> torch.Tensor:
        x = torch.randn(96, 48, generator=g, dtype=torch.float64) * true.sqrt()
        return x.T @ x / 96

    h, held = gram(), gram()
    low = GaussianSource(spectrum(h), row).distortion(2.0)
    high = GaussianSource(cross_spectrum(eigenbasis(h)[1], held), row).distortion(2.0)
    assert low < 0.9 * exact < exact < high
    lam, vectors = eigenbasis(h)
    assert torch.allclose(lam, spectrum(h))
    assert torch.allclose((vectors * lam) @ vectors.T, h)
    assert torch.allclose(cross_spectrum(vectors, h), lam)
    with pytest.raises(ValueError, match="held-out"):
        cross_spectrum(vectors, held[:4, :4])


def test_matched_spectrum() -> None:
    """Rows of N(0, C) with C sharing the eigenvectors of H: the exact source is known."""
    g = torch.Generator().manual_seed(0)
    vectors = torch.linalg.qr(torch.randn(8, 8, generator=g, dtype=torch.float64)).Q
    lam = torch.arange(8, 0, -1, dtype=torch.float64)
    power = torch.linspace(4, 0.5, 8, dtype=torch.float64)
    w = torch.randn(100_000, 8, generator=g, dtype=torch.float64) * power.sqrt() @ vectors.T
    w = torch.cat([w, torch.zeros(1, 8, dtype=torch.float64)])
    w[:-1] /= w[:-1].square().mean(1, keepdim=True).sqrt() / 3  # every row at sigma = 3
    matched = matched_spectrum(w, lam, vectors)
    naive = ((w[:-1] @ vectors).square().mean(0) / 9 * lam).sort(descending=True).values
    assert torch.allclose(matched, naive)
    # its power is the real tr(W H W^T), whatever the alignment
    h = (vectors * lam) @ vectors.T
    energy = weighted_distortion(w, torch.zeros_like(w), h)
    assert GaussianSource(matched, w.square().mean(1)).power == pytest.approx(energy, rel=EXACT)


def test_vector_quantizer_loss() -> None:
    assert fixed_rate_loss(1, 1 / 12) == pytest.approx(math.sqrt(3) * math.pi / 2, rel=EXACT)
    assert 10 * math.log10(fixed_rate_loss(8, E8_SECOND_MOMENT)) == pytest.approx(1.38, abs=5e-3)
    # sphere bound G -> 1 / (2 pi e) in high dimension: no loss left
    assert fixed_rate_loss(10**6, 1 / (2 * math.pi * math.e)) == pytest.approx(1, abs=1e-5)


# ---- Theorem 1 --------------------------------------------------------------------------------


def samples(case: Case, d_in: int = 6, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    n = {Case.SQUARE: d_in, Case.WIDE: 4 * d_in, Case.DEFICIENT: d_in - 2}[case]
    return torch.randn(d_in, n, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("case", list(Case))
def test_distortion_equivalence_and_recovery(case: Case) -> None:
    g = torch.Generator().manual_seed(1)
    x = samples(case)
    assert classify(x) is case
    w = torch.randn(5, 6, generator=g, dtype=torch.float64)
    w_hat = w + 0.1 * torch.randn(5, 6, generator=g, dtype=torch.float64)
    d_w = weighted_distortion(w, w_hat, x @ x.T)
    assert d_w == pytest.approx(output_distortion(w, w_hat, x), rel=EXACT)
    z, z_hat = components(w, x), components(w_hat, x)
    assert float((z - z_hat).square().sum()) == pytest.approx(d_w, rel=EXACT)

    recovered = recover(w_hat @ x, x)
    assert torch.allclose(recovered @ x, w_hat @ x, atol=1e-10)
    assert torch.allclose(recover_components(z_hat, x) @ x, w_hat @ x, atol=1e-10)
    # only the deficient case leaves a part of W undetermined, and it costs nothing
    assert torch.allclose(recovered, w_hat, atol=1e-9) == (case is not Case.DEFICIENT)
    assert output_distortion(w, recovered, x) == pytest.approx(d_w, rel=1e-8)


@pytest.mark.parametrize("case", list(Case))
def test_recovery_is_the_least_squares_map(case: Case) -> None:
    """A Y^ off the row space of X: naive pinv agrees, and the distance to Y does not grow."""
    g = torch.Generator().manual_seed(2)
    x = samples(case, seed=3)
    w = torch.randn(5, 6, generator=g, dtype=torch.float64)
    y_hat = w @ x + torch.randn(5, x.shape[1], generator=g, dtype=torch.float64)
    naive = y_hat.numpy() @ np.linalg.pinv(x.numpy())
    assert np.allclose(recover(y_hat, x).numpy(), naive, atol=1e-9)
    before = float((w @ x - y_hat).square().sum())
    assert output_distortion(w, recover(y_hat, x), x) <= before * (1 + EXACT)


def test_dependent_rows_are_deficient_whatever_the_shape() -> None:
    x = samples(Case.WIDE)
    x[3] = x[1] - 2 * x[0]
    assert classify(x) is Case.DEFICIENT
    assert components(torch.eye(6, dtype=torch.float64), x).shape == (6, 5)
    with pytest.raises(ValueError, match="rank 5"):
        recover_components(torch.zeros(2, 6), x)


def test_components_are_independent_with_the_spectrum_as_variances() -> None:
    x = samples(Case.WIDE)
    g = torch.Generator().manual_seed(4)
    z = components(torch.randn(200_000, 6, generator=g, dtype=torch.float64), x)
    covariance = z.T @ z / len(z)
    expected = torch.diag(spectrum(x @ x.T))
    assert torch.allclose(covariance, expected, atol=0.02 * float(expected.max()))


def test_levels_nest_without_losing_rate() -> None:
    lam = torch.cat([random_source(7, d_in=40).spectrum, torch.zeros(3, dtype=torch.float64)])
    rates = [0.25, 1.0, 2.0, 3.5]
    levels = refine(lam, rates)
    source = GaussianSource(lam, vector(1.0))
    spent = torch.zeros(43, dtype=torch.float64)
    for i, level in enumerate(levels):
        assert float(level.distortions.sum()) == pytest.approx(
            source.distortion(rates[i]), rel=EXACT
        )
        spent = spent + level.increments
        assert float(spent.mean()) == pytest.approx(rates[i], abs=EXACT)
        if i:
            before = levels[i - 1]
            assert level.level < before.level
            assert not (before.active & ~level.active).any()
            assert (level.distortions <= before.distortions).all()
            on = level.active
            step = 0.5 * torch.log2(before.distortions[on] / level.distortions[on])
            assert torch.allclose(level.increments[on], step, atol=EXACT)
    assert int(levels[0].active.sum()) < int(levels[-1].active.sum()) <= 40
    with pytest.raises(ValueError, match="increase"):
        refine(lam, [2.0, 2.0])


def test_ideal_reconstructions_meet_the_bound_at_every_level() -> None:
    """Theorem 1 by simulation: one joint law, every level on the bound, the levels a chain."""
    g = torch.Generator().manual_seed(5)
    lam = vector(8.0, 2.0, 0.5, 0.0)
    levels = refine(lam, [0.5, 1.0, 2.0])
    z = torch.randn(200_000, 4, generator=g, dtype=torch.float64) * lam.sqrt()
    recs = ideal_reconstructions(z, lam, [level.distortions for level in levels], g)
    for coarse, fine, level in zip([None, *recs], recs, levels, strict=False):
        reached = (z - fine).square().mean(0)
        assert torch.allclose(reached, level.distortions, rtol=0.02)
        # backward channel: error independent of the reconstruction, so centroids are met
        assert torch.allclose(((z - fine) * fine).mean(0), torch.zeros(4).double(), atol=0.03)
        if coarse is not None:  # Z - fine - coarse: given fine, coarse says nothing more on Z
            assert torch.allclose(((z - fine) * coarse).mean(0), torch.zeros(4).double(), atol=0.03)
    with pytest.raises(ValueError, match="must not increase"):
        ideal_reconstructions(z, lam, [levels[1].distortions, levels[0].distortions], g)
