"""Every trellis search backend against naive references written from the definitions."""

import itertools

import numpy as np
import pytest
import torch

from dropbydrop.coding.codebook_set import TrellisSet
from dropbydrop.coding.objective import condition
from dropbydrop.coding.planes import TrellisPlane, trellis_planes
from dropbydrop.coding.trellis import backends, batched, cpu, search
from dropbydrop.system.errors import KernelError

NATIVE = cpu.backends()


def books(planes, seed=0, taps=None):
    """Codebooks with random taps; values of each plane as large as what the earlier ones leave."""
    generator = torch.Generator().manual_seed(seed)
    parts, size = [], 1.0
    for plane in planes:
        values = (torch.randn(64, generator=generator).clamp(-2.5, 2.5) * 25).round()
        parts.append(
            {
                "": values.to(torch.int8),
                ".scale": torch.tensor([size / 25]),
                ".taps": torch.randint(1, 64, (plane.window,), generator=generator).to(torch.uint8)
                if taps is None
                else taps.clone(),
            }
        )
        size *= 0.35 if plane.bits == 2 else 0.6
    return TrellisSet(tuple(planes), tuple(parts))


def label_of(taps, window):
    """Label of a window given as bits, the newest first."""
    found = 0
    for tap, bit in zip(taps, window, strict=True):
        found ^= int(tap) * int(bit)
    return found


def naive_ring(x, weights, values, taps, k):
    """The least of sum_r weights_r (x_r - value_r)^2 over all rings of bits, and such a ring.

    One Viterbi pass for every state that a ring can begin in: exact. x, weights float64 [rows].
    """
    window = len(taps)
    states, stays = 1 << window, 1 << (window - k)
    bits = [[state >> age & 1 for age in range(window)] for state in range(states)]
    value = np.array([values[label_of(taps, b)] for b in bits])
    metrics = np.full((stays, states), np.inf)  # [the L - k newest bits before row 0, state]
    starts = np.arange(stays)
    metrics[starts, starts] = 0  # older bits do not matter
    back = []
    for x_r, weight in zip(x, weights, strict=True):
        options = metrics.reshape(stays, 1 << k, stays)
        back.append(options.argmin(1))
        metrics = np.repeat(options.min(1), 1 << k, axis=1) + weight * (x_r - value) ** 2
    ends = metrics.reshape(stays, 1 << k, stays)[starts, :, starts]  # newest bits as at the start
    start = int(ends.min(1).argmin())
    state = int(ends[start].argmin()) * stays + start
    ring = []
    for came in reversed(back):
        ring[:0] = [state >> (k - 1 - i) & 1 for i in range(k)]
        stay = state >> k
        state = stay | int(came[start, stay]) << (window - k)
    return ends.min(), ring


def ring_values(ring, values, taps, k, rows):
    """Value of every row of a ring of bits."""
    window = len(taps)
    return np.array(
        [
            values[
                label_of(taps, [ring[(k * r + k - 1 - age) % len(ring)] for age in range(window)])
            ]
            for r in range(rows)
        ]
    )


@pytest.mark.parametrize("k", [1, 2])
def test_the_naive_viterbi_finds_the_best_of_all_rings(k):
    rng = np.random.default_rng(k)
    taps, values = rng.integers(1, 64, 5), rng.normal(size=64)
    rows = 12 // k
    x, weights = rng.normal(size=rows), rng.uniform(0.5, 2, rows)
    costs = [
        (weights * (x - ring_values(ring, values, taps, k, rows)) ** 2).sum()
        for ring in itertools.product([0, 1], repeat=12)
    ]
    best, ring = naive_ring(x, weights, values, taps, k)
    assert best == pytest.approx(min(costs))
    assert (weights * (x - ring_values(ring, values, taps, k, rows)) ** 2).sum() == pytest.approx(
        best
    )


def spectrum(d_in, seed=0, power=1.0):
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(d_in, d_in, generator=generator, dtype=torch.float64))
    eigenvalues = torch.arange(1, d_in + 1, dtype=torch.float64) ** -power
    return condition((q * eigenvalues) @ q.T, 0.1)


def problem(d_out, d_in, seed=0):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(d_out, d_in, generator=generator)
    return w, torch.rand(d_out, generator=generator) + 0.5


def losses(w, weights, h, found, books, prefixes):
    """sum_r weight_r e_r H e_r^T of every prefix, float64."""
    errors = [w.double() - q.double() for q in books.sums(found, len(w), prefixes)]
    return [float((weights.double()[:, None] * e * (e @ h.double())).sum()) for e in errors]


def objective(w, weights, h, found, books, prefixes, lambdas):
    found = losses(w, weights, h, found, books, prefixes)
    return sum(lam * loss for lam, loss in zip(lambdas, found, strict=True))


def naive_search(w, weights, books, prefixes, lambdas, h):
    """J of inputs coded last first, as if earlier ones were free, each plane by `naive_ring`."""
    w, weights, h = w.double().numpy(), weights.double().numpy(), h.double().numpy()
    d_out, d_in = w.shape
    errors = {p: np.zeros((d_out, d_in)) for p in prefixes}
    for j in range(d_in - 1, -1, -1):
        targets = {}
        for p in prefixes:  # free inputs i < j answer with the least error: what is left is a Schur
            inverse = np.linalg.inv(h[: j + 1, : j + 1])  # complement, and its optimum for input j
            answer = -errors[p][:, j + 1 :] @ h[j + 1 :, : j + 1] @ inverse
            targets[p] = w[:, j] - answer[:, j]
        total = np.zeros(d_out)
        for m, plane in enumerate(books.planes):
            pulls = {
                p: lam * 4.0 ** -sum(later.bits for later in books.planes[m + 1 : p])
                for p, lam in zip(prefixes, lambdas, strict=True)
                if p > m
            }
            x = sum(pull * targets[p] for p, pull in pulls.items()) / sum(pulls.values()) - total
            ring = 8 * plane.shape(d_out, 1)[0] // plane.bits
            pad = np.zeros(ring - d_out)
            values = books.entries[m].double().numpy()[:, 0]
            taps = books.parts[m][".taps"].numpy()
            _, bits = naive_ring(
                np.append(x, pad), np.append(weights, pad), values, taps, plane.bits
            )
            total = total + ring_values(bits, values, taps, plane.bits, d_out)
            if m + 1 in prefixes:
                errors[m + 1][:, j] = w[:, j] - total
    return sum(
        lam * (weights[:, None] * errors[p] * (errors[p] @ h)).sum()
        for p, lam in zip(prefixes, lambdas, strict=True)
    )


def between_rows(metric, size):
    """F and the diagonal of D of a metric [d_out, d_out], from Schur complements: what is left of
    the form when the rows behind a block answer with the least error."""
    rows = len(metric)
    bounds = [*range(0, rows // size * size, size), rows]
    feedback, weights = torch.zeros(rows, rows), torch.zeros(rows)
    for first, last in itertools.pairwise(bounds):
        rest = metric[last:, :last]
        left = metric[:last, :last] - rest.T @ torch.linalg.solve(metric[last:, last:], rest)
        own = left[first:, first:]
        feedback[:first, first:last] = torch.linalg.solve(own, left[first:, :first]).T.float()
        weights[first:last] = own.diagonal().float()
    return feedback, weights


LEVELS = {
    "2 3 4": ([1, 2, 3], [4.0, 3.0, 8.0], (2, 1, 1)),
    "3 4 5": ([2, 3, 4], [4.0, 3.0, 8.0], (2, 1, 1, 1)),
    "1 2 3 4": ([1, 2, 3, 4], [1.0, 2.0, 4.0, 8.0], (1, 1, 1, 1)),
    "2 and 4": ([1, 3], [1.0, 5.0], (2, 1, 1)),
    "1": ([1], [1.0], (1,)),
    "2": ([1], [1.0], (2,)),
}


@pytest.mark.parametrize("backend", backends())
class TestEveryBackend:
    @pytest.mark.parametrize("window", [8, 9])
    @pytest.mark.parametrize("k", [1, 2])
    @pytest.mark.parametrize("d_out", [90, 77])
    def test_a_plane_is_the_exact_optimum(self, backend, k, window, d_out):
        planes = (TrellisPlane(k, window),)
        ours = books(planes, seed=window)
        w, weights = problem(d_out, 2)
        found = search(w, weights, ours, [1], [1.0], lower=torch.eye(2), backend=backend)
        assert [tuple(code.shape) for code in found] == [planes[0].shape(d_out, 2)]
        cost = losses(w, weights, torch.eye(2), found, ours, [1])[0]
        values, taps = ours.entries[0][:, 0].double().numpy(), ours.parts[0][".taps"].numpy()
        pad = np.zeros(8 * found[0].shape[0] // k - d_out)
        best = sum(
            naive_ring(
                np.append(w[:, j].double(), pad), np.append(weights.double(), pad), values, taps, k
            )[0]
            for j in range(2)
        )
        assert best * (1 - 1e-6) <= cost <= best * 1.004

    @pytest.mark.parametrize("name", LEVELS)
    def test_error_feedback_equals_the_reference(self, backend, name):
        prefixes, lambdas, bits = LEVELS[name]
        ours = books([TrellisPlane(k, 8) for k in bits], seed=3)
        h = spectrum(3)
        w, weights = problem(72, 3, seed=1)
        lower = torch.linalg.cholesky(h).float()
        found = search(w, weights, ours, prefixes, lambdas, lower=lower, backend=backend)
        expected = naive_search(w, weights, ours, prefixes, lambdas, h)
        ours_j = objective(w, weights, h, found, ours, prefixes, lambdas)
        # Another choice between nearly equal paths is another draw of all that follows: some 200
        # squared errors.
        assert 0.93 < ours_j / expected < 1.07

    def test_feedback_beats_rounding(self, backend):
        ours = books(trellis_planes([2, 3], 8))
        h = spectrum(6, power=3.0)
        w, weights = problem(60, 6)
        lower = torch.linalg.cholesky(h).float()
        with_h, without = (
            search(w, weights, ours, [1, 2], [1.0, 3.0], lower=factor, backend=backend)
            for factor in (lower, torch.eye(6))
        )
        numbers = [
            objective(w, weights, h, found, ours, [1, 2], [1.0, 3.0]) for found in (with_h, without)
        ]
        assert numbers[0] < 0.8 * numbers[1]

    def test_sweeps_lower_the_objective_from_any_codes(self, backend):
        ours = books(trellis_planes([2, 3], 8))
        h = spectrum(4).float()
        w, weights = problem(40, 4)
        codes = [
            torch.randint(0, 256, plane.shape(40, 4), dtype=torch.uint8) for plane in ours.planes
        ]
        kept = [code.clone() for code in codes]
        values = []
        for sweeps in range(3):
            found = search(
                w, weights, ours, [1, 2], [1.0, 3.0], h=h, sweeps=sweeps, codes=codes,
                backend=backend,
            )  # fmt: skip
            values.append(objective(w, weights, h, found, ours, [1, 2], [1.0, 3.0]))
            if not sweeps:
                assert all(map(torch.equal, found, codes))
        assert all(map(torch.equal, codes, kept)), "the input codes were written to"
        assert values[1] < 0.5 * values[0]
        assert values[2] <= values[1] * (1 + 1e-6)

    def test_heavy_rows_have_less_error(self, backend):
        ours = books([TrellisPlane(2, 8)])
        w, weights = problem(96, 1)
        weights = torch.where(torch.arange(96) % 8 == 0, 8.0, 1.0)
        found = search(w, weights, ours, [1], [1.0], lower=torch.eye(1), backend=backend)
        error = (w - ours.sums(found, 96, [1])[0]).square()
        assert error[weights > 1].mean() < 0.6 * error[weights == 1].mean()

    def test_outputs_with_a_metric(self, backend):
        """tr(H_O E H E^T) is less with feedback between rows; blocks alone cost nothing."""
        ours = books(trellis_planes([2, 3], 8), seed=2)
        h, outputs = torch.eye(1), spectrum(400, seed=1, power=0.7)
        w, _ = problem(400, 1)
        feedback, weights = between_rows(outputs, 96)
        plain = outputs.diagonal().float()

        def costs(row_weights, **more):
            more |= {"lower": h, "backend": backend}
            codes = search(w, row_weights, ours, [1, 2], [1.0, 3.0], **more)
            errors = [w.double() - q.double() for q in ours.sums(codes, 400, [1, 2])]
            return torch.tensor([float((outputs @ e @ e.T).trace()) for e in errors])

        without = costs(plain)
        with_metric = costs(weights, row_feedback=feedback, row_block=96)
        blocks = costs(plain, row_feedback=torch.zeros(400, 400), row_block=96)
        assert float(weights.sum() / plain.sum()) == pytest.approx(0.8, abs=0.01)  # what is left
        assert (with_metric < 0.92 * without).all()
        assert (blocks < 1.06 * without).all()

    @pytest.mark.parametrize("rows", [144, 191, 203])
    def test_blocks_of_any_rows(self, backend, rows):
        """Planes pad their rings by themselves, and have as many blocks nevertheless."""
        ours = books(trellis_planes([2, 3], 8), seed=7)
        w, weights = problem(rows, 1)
        apart = {"row_feedback": torch.zeros(rows, rows), "row_block": 48}
        settings = {"lower": torch.eye(1), "backend": backend}
        found = []
        for more in (apart, {}):
            codes = search(w, weights, ours, [1, 2], [1.0, 1.0], **settings, **more)
            found.append(losses(w, weights, torch.eye(1), codes, ours, [1, 2]))
        for blocks, whole in zip(*found, strict=True):
            assert blocks < 1.35 * whole

    @pytest.mark.parametrize("rows", [1, 5, 12, 24, 31])
    def test_a_short_ring_is_closed(self, backend, rows):
        ours = books(trellis_planes([2, 3], 8), seed=7)
        w, weights = problem(rows, 2)
        found = search(w, weights, ours, [1, 2], [1.0, 1.0], lower=torch.eye(2), backend=backend)
        low, high = losses(w, weights, torch.eye(2), found, ours, [1, 2])
        power = float((weights[:, None] * w.square()).sum())
        assert low < 0.45 * power
        assert high < 0.9 * low


@pytest.mark.parametrize("backend", NATIVE)
class TestNative:
    """What the native backends promise beyond the others."""

    @pytest.mark.parametrize("window", [12, 13, 14])
    @pytest.mark.parametrize("k", [1, 2])
    def test_equals_torch(self, backend, k, window):
        ours = books([TrellisPlane(k, window)], seed=1)
        w, weights = problem(100, 1)
        cost, reference = (
            losses(
                w, weights, torch.eye(1),
                search(w, weights, ours, [1], [1.0], lower=torch.eye(1), backend=name), ours, [1],
            )[0]
            for name in (backend, "torch")
        )  # fmt: skip
        assert 0.999 < cost / reference < 1.005

    @pytest.mark.parametrize("taps", ["zero", "alike"])
    def test_taps_of_any_rank(self, backend, taps):
        given = torch.zeros(9, dtype=torch.uint8) if taps == "zero" else torch.full((9,), 33).byte()
        ours = books([TrellisPlane(1, 9)], taps=given)
        w, weights = problem(64, 1)
        cost, reference = (
            losses(
                w, weights, torch.eye(1),
                search(w, weights, ours, [1], [1.0], lower=torch.eye(1), backend=name), ours, [1],
            )[0]
            for name in (backend, "torch")
        )  # fmt: skip
        assert cost == pytest.approx(reference, rel=2e-3)

    def test_threads_do_not_change_the_result(self, backend):
        ours = books(trellis_planes([2, 3], 8))
        w, weights = problem(1601, 5)
        h = spectrum(5)
        before = torch.get_num_threads()
        results = []
        try:
            for threads in (1, 3):
                torch.set_num_threads(threads)
                results.append(
                    search(
                        w, weights, ours, [1, 2], [1.0, 3.0], sweeps=1, h=h.float(),
                        lower=torch.linalg.cholesky(h).float(), backend=backend,
                    )
                )  # fmt: skip
        finally:
            torch.set_num_threads(before)
        assert all(map(torch.equal, *results))

    def test_segments_lose_next_to_nothing(self, backend):
        ours = books(trellis_planes([2, 3], 10), seed=2)
        w, weights = problem(3000, 6)
        args = (w, weights, ours, [1, 2], [1.0, 3.0])
        found = search(*args, lower=torch.eye(6), backend=backend)
        cut = objective(*args[:2], torch.eye(6), found, *args[2:])
        parts = 0.0  # rings of their own: each pays for its own closure
        for rows in (slice(0, 1000), slice(1000, 2000), slice(2000, 3000)):
            one = (w[rows], weights[rows])
            found = search(*one, *args[2:], lower=torch.eye(6), backend=backend)
            parts += objective(*one, torch.eye(6), found, *args[2:])
        assert cut < parts * 1.003

    def test_instruction_sets_agree(self, backend):
        ours = books(trellis_planes([2, 3, 4], 12))
        w, weights = problem(700, 40)  # enough for metrics to tie
        h = spectrum(40)
        args = (w, weights, ours, [1, 2, 3], [4.0, 3.0, 8.0])
        lower = torch.linalg.cholesky(h).float()
        found, best = (search(*args, lower=lower, backend=name) for name in (backend, NATIVE[0]))
        if backend == "portable":  # may round a product before it is added
            j, reference = (objective(*args[:2], h, one, *args[2:]) for one in (found, best))
            assert j == pytest.approx(reference, rel=0.01)
        else:
            assert all(map(torch.equal, found, best))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("window", [8, 12, 14, 16])
def test_cuda_finds_codes_as_good_as_those_of_the_cpu(backend, window):
    ours, (w, weights), h = books(trellis_planes([2, 3, 4], window)), problem(600, 4), spectrum(4)
    args = ([1, 2, 3], [4.0, 3.0, 8.0])
    lower = torch.linalg.cholesky(h).float()
    here = search(w, weights, ours, *args, lower=lower)
    there = search(
        w.cuda(), weights.cuda(), ours.to("cuda"), *args, lower=lower.cuda(), backend=backend
    )
    found = [code.cpu() for code in there]
    numbers = [objective(w, weights, h, codes, ours, *args) for codes in (found, here)]
    assert numbers[0] == pytest.approx(numbers[1], rel=0.03)  # segments differ, and so draws


def test_bad_arguments_are_refused():
    ours = books(trellis_planes([2, 3], 8))
    w, weights = problem(16, 4)
    lower = torch.eye(4)
    with pytest.raises(KernelError, match="avx1024"):
        search(w, weights, ours, [1, 2], [1.0, 1.0], lower=lower, backend="avx1024")
    with pytest.raises(ValueError, match="every plane"):
        search(w, weights, ours, [1], [1.0], lower=lower)
    with pytest.raises(ValueError, match="ascend"):
        search(w, weights, ours, [2, 1], [1.0, 1.0], lower=lower)
    with pytest.raises(ValueError, match="positive"):
        search(w, weights, ours, [1, 2], [1.0, 0.0], lower=lower)
    with pytest.raises(ValueError, match="start needs"):
        search(w, weights, ours, [1, 2], [1.0, 1.0])
    with pytest.raises(ValueError, match="start needs"):
        search(w, weights, ours, [1, 2], [1.0, 1.0], lower=lower, sweeps=1)
    with pytest.raises(ValueError, match="matrix"):
        search(w, weights, ours, [1, 2], [1.0, 1.0], lower=torch.eye(5))
    apart = {"row_feedback": torch.zeros(16, 16), "row_block": 8}
    for wrong, reason in (
        ({"row_feedback": torch.zeros(16, 4)}, "between 16 rows"),
        ({"row_block": 6}, "whole cycles"),
        ({"row_block": 0}, "whole cycles"),
        ({}, "too few"),
        ({"sweeps": 1, "h": lower}, "without sweeps"),
    ):
        with pytest.raises(ValueError, match=reason):
            search(w, weights, ours, [1, 2], [1.0, 1.0], lower=lower, **{**apart, **wrong})
    with pytest.raises(ValueError, match="codes of"):
        search(w, weights, ours, [1, 2], [1.0, 1.0], codes=[torch.zeros(3, 4)] * 2)
    with pytest.raises(KernelError, match="torch"):
        cpu.search(
            "torch", batched.Problem(w, weights, ours, [1, 2], [1.0, 1.0], lower, None, 0, None)
        )
