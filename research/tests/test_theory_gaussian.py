"""Gaussian fits and massive activations against closed forms and naive references."""

import math

import pytest
import torch

from dropbydrop_research.theory import fit_gaussian, massive_activations
from dropbydrop_research.theory.gaussian import expected_max


def test_fit_of_a_gaussian_is_at_the_sampling_floor() -> None:
    g = torch.Generator().manual_seed(0)
    fit = fit_gaussian(0.02 * torch.randn(512, 512, generator=g) + 0.001)
    assert fit.count == 512 * 512
    assert fit.std == pytest.approx(0.02, rel=0.01)
    assert fit.mean == pytest.approx(0.001, abs=2e-4)
    assert fit.kurtosis == pytest.approx(3, abs=0.05)
    assert fit.skewness == pytest.approx(0, abs=0.02)
    assert fit.kolmogorov < 1.7 / 512  # 99.4 % point of the Kolmogorov law
    assert fit.w2 < 1e-4
    assert fit.negentropy < 2e-4
    assert fit.max_over_rms == pytest.approx(fit.expected_max_over_rms, rel=0.15)
    assert sum(fit.histogram) + sum(fit.tails) == pytest.approx(1)


def test_fit_against_closed_forms_of_a_uniform() -> None:
    """U(-1, 1) on a fine grid: kurtosis 9/5; KS, W2 and KL to the normal by quadrature."""
    n = 200_001
    u = torch.linspace(-1, 1, n, dtype=torch.float64)
    fit = fit_gaussian(u)
    assert fit.kurtosis == pytest.approx(1.8, rel=1e-4)
    assert fit.max_over_rms == pytest.approx(math.sqrt(3), rel=1e-4)
    x = math.sqrt(3) * u
    cdf = torch.special.ndtr(x)
    assert fit.kolmogorov == pytest.approx(float((cdf - (u + 1) / 2).abs().max()), abs=1e-5)
    # E[X Phi^-1(U)] = sqrt(3) * 2 E[U q(U)] = sqrt(3) / sqrt(pi)
    assert fit.w2 == pytest.approx(2 - 2 * math.sqrt(3 / math.pi), abs=1e-5)
    exact = 0.5 * math.log2(2 * math.pi * math.e) - math.log2(2 * math.sqrt(3))
    # binning only loses information, here much in the two bins that straddle the ends
    assert 0.85 * exact < fit.negentropy < exact


def test_negentropy_of_a_laplacian() -> None:
    n = 400_000
    p = (torch.arange(n, dtype=torch.float64) + 0.5) / n - 0.5
    fit = fit_gaussian(-p.sign() * torch.log1p(-2 * p.abs()))
    exact = 0.5 * math.log2(2 * math.pi * math.e) - math.log2(math.sqrt(2) * math.e)
    assert 0.96 * exact < fit.negentropy < exact
    assert fit.kurtosis == pytest.approx(6, rel=0.01)


def test_kolmogorov_and_w2_against_naive_references() -> None:
    g = torch.Generator().manual_seed(3)
    values = torch.randn(300, generator=g, dtype=torch.float64).pow(3)
    fit = fit_gaussian(values)
    z = ((values - values.mean()) / values.std(correction=0)).sort().values.tolist()
    naive_ks = max(
        max(abs((i + 1) / 300 - p), abs(i / 300 - p))
        for i, p in enumerate(0.5 * math.erfc(-v / math.sqrt(2)) for v in z)
    )
    assert fit.kolmogorov == pytest.approx(naive_ks, abs=1e-12)
    # W2 by the quantile coupling on a fine grid of (0, 1)
    grid = (torch.arange(3_000_000, dtype=torch.float64) + 0.5) / 3_000_000
    paired = torch.tensor(z, dtype=torch.float64).repeat_interleave(10_000)
    naive_w2 = float((paired - torch.special.ndtri(grid)).square().mean())
    assert fit.w2 == pytest.approx(naive_w2, rel=1e-4)


def test_row_scales_are_not_tails() -> None:
    g = torch.Generator().manual_seed(1)
    w = torch.randn(256, 512, generator=g) * torch.logspace(-1, 1, 256)[:, None]
    w[7] = 0
    whole, rows = fit_gaussian(w), fit_gaussian(w, by_row=True)
    assert whole.kurtosis > 6
    assert rows.kurtosis == pytest.approx(3, abs=0.1)
    assert rows.count == 255 * 512
    assert rows.negentropy < 0.001 < whole.negentropy


def test_one_outlier_shows_in_the_tail_statistics_only() -> None:
    g = torch.Generator().manual_seed(2)
    w = torch.randn(512, 512, generator=g)
    w[3, 5] = 30
    fit = fit_gaussian(w)
    assert fit.max_over_rms > 29
    assert fit.kurtosis > 5
    assert fit.kolmogorov < 0.004


def test_fits_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="equal"):
        fit_gaussian(torch.ones(4, 4))
    with pytest.raises(ValueError, match="finite"):
        fit_gaussian(torch.tensor([1.0, math.inf]))


def test_expected_max_by_simulation() -> None:
    g = torch.Generator().manual_seed(0)
    peaks = torch.randn(4001, 1000, generator=g).abs().amax(1)
    assert expected_max(1000) == pytest.approx(float(peaks.median()), abs=0.02)


def test_massive_activations() -> None:
    energies = torch.ones(4, 50)
    energies[:, 0] = 1000
    energies[2, 7] = 400
    energies[1, 1] = 50
    report = massive_activations(energies)
    assert report.tokens == 200
    assert report.max_over_median == 1000
    assert report.count == 5
    assert report.first_token_share == pytest.approx(0.8)
    assert report.share == pytest.approx(4400 / float(energies.sum()))
    assert massive_activations(torch.ones(9)).count == 0
    with pytest.raises(ValueError, match="non-negative"):
        massive_activations(-energies)
