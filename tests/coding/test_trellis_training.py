"""Universal trellis sets: what ships is as good as it says, and training does what it is for."""

import json

import pytest
import torch
from safetensors import safe_open

from dropbydrop.coding import codebooks
from dropbydrop.coding.codebook_set import set_of
from dropbydrop.coding.codebooks import default_lambdas
from dropbydrop.coding.planes import TrellisPlane, counts_of, planes_of, trellis_planes
from dropbydrop.coding.trellis import training

SHIPPED = sorted(codebooks._FOLDER.glob("trellis-*.safetensors"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_set_that_ships_is_as_good_as_its_metadata_says(path):
    *levels, window = (int(word) for word in path.stem.split("-")[1:])
    with safe_open(path, "pt") as file:
        said = json.loads(file.metadata()["distortions"])
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    planes = planes_of("trellis", levels, window)
    for m, plane in enumerate(planes, 1):
        for suffix, (_, shape) in plane.parts.items():
            assert tuple(stored[f"{m}{suffix}"].shape) == shape
        values = stored[f"{m}"].int()
        assert torch.equal(values, -values.flip(0))
        assert values.abs().max() == 63
    if window > 12:  # the search takes a while; the others hold it to its word
        return
    books = set_of(planes, stored)
    found = training.distortions(
        books, counts_of(planes, levels), default_lambdas(levels), sequences=64
    )
    bits = 0
    for plane, here, there in zip(planes, found, said, strict=True):
        bits += plane.bits
        assert here == pytest.approx(there, rel=0.05)
        assert 4.0**-bits < here < 4.0**-bits * 1.42  # 1.5 dB above the bound at most


def test_training_lowers_the_error_and_ties_the_values():
    planes = trellis_planes([2, 3], 8)
    generator = torch.Generator().manual_seed(1)
    taps = [torch.randint(1, 64, (8,), generator=generator).to(torch.uint8) for _ in planes]
    once, often = (
        training.train([2, 3], 8, [1.0, 3.0], taps, sequences=32, rounds=rounds)
        for rounds in (1, 5)
    )
    before, after = (
        training.distortions(books, [1, 2], [1.0, 3.0], sequences=32) for books in (once, often)
    )
    assert after[0] < 0.99 * before[0]
    assert after[1] < 0.99 * before[1]
    for part in often.parts:
        assert torch.equal(part[""], -part[""].flip(0))
        assert part[""].abs().max() == 63


def test_least_squares_gives_the_mean_of_what_a_label_stands_for():
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    label = torch.randint(0, 64, x.shape, generator=torch.Generator().manual_seed(1))
    plane = TrellisPlane(1, 8)
    start = training._set([plane], [torch.zeros(64)], [torch.ones(8, dtype=torch.uint8)])
    (values,) = training.fitted(start, [label], [x], [1.0])
    signed = torch.where(label < 32, x, -x)
    folded = torch.where(label < 32, label, 63 - label)
    for h in range(32):
        uses = signed[folded == h]
        assert values[h] == pytest.approx(float(uses.mean()) if len(uses) else 0.0, abs=1e-6)
        assert values[63 - h] == -values[h]


def test_rounding_keeps_values_within_what_kernels_take():
    values = torch.linspace(-2.0, 2.0, 64) ** 3
    whole, scale = training.rounded(values)
    assert whole.dtype == torch.int8
    assert whole.abs().max() == 63
    assert (whole * scale - values).abs().max() < 0.09 * values.abs().max()
    assert (whole * scale - values).square().mean().sqrt() < 0.012 * values.abs().max()


def test_taps_that_are_found_are_valid_and_better_than_most():
    plane, x = TrellisPlane(2, 8), training.noise(16, 3)
    generator = torch.Generator().manual_seed(0)
    best = training.find_taps(plane, x, generator, 12)
    assert best.valid()
    others = [training.find_taps(plane, x, generator, 1).error for _ in range(5)]
    assert best.error <= sorted(others)[2]
    longer = training.find_taps(TrellisPlane(2, 10), x, generator, 6, shorter=best.taps)
    assert longer.valid()
    assert longer.error < best.error
