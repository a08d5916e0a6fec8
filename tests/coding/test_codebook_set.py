"""What stored codes mean, against decoders that follow docs/format.md word by word."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dropbydrop.coding.codebook_set import CodebookSet, TrellisSet, pack_stream, stream_bits
from random_model import random_planes, random_set
from tiny import CODES


def naive_value(books: CodebookSet, m: int, codes: torch.Tensor, r: int, j: int) -> float:
    """Plane m's part of W[r, j], before the row scale."""
    part = books.parts[m]
    if books.kind == "bytes":
        code, book = int(codes[r, j // 8]), part[""].float()
        if len(book) == 256:
            return float(book[code, j % 8])
        return float(book[code & 127, j % 8]) * (-1 if code & 128 else 1)
    length, k, label = 8 * len(codes), books.planes[m].bits, 0
    for age, tap in enumerate(part[".taps"].tolist()):
        i = (k * r + k - 1 - age) % length
        if int(codes[i // 8, j]) >> (i % 8) & 1:
            label ^= tap
    return float(part[""][label].float() * part[".scale"][0])


@pytest.mark.parametrize("code", CODES)
@given(
    d_out=st.integers(1, 40),
    window=st.integers(8, 17),
    levels=st.sampled_from([(2, 3, 4), (3, 4, 5), (1, 2, 3, 4), (2,)]),
    symmetric=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_decoding(
    code: str, d_out: int, window: int, levels: tuple[int, ...], symmetric: bool, seed: int
) -> None:
    """Every prefix and every range of rows is what the definition says, bit for bit."""
    planes = random_planes(code, levels, sign_symmetric=symmetric, window=window)
    books, d_in = random_set(planes, seed), 16
    generator = torch.Generator().manual_seed(seed)
    codes = [
        torch.randint(0, 256, p.shape(d_out, d_in), dtype=torch.uint8, generator=generator)
        for p in planes
    ]
    scales = torch.rand(d_out, generator=generator).half()
    total = torch.zeros(d_out, d_in)
    for m in range(len(planes)):
        total += torch.tensor(
            [[naive_value(books, m, codes[m], r, j) for j in range(d_in)] for r in range(d_out)]
        )
        found = books.decode(codes[: m + 1], scales, m + 1)
        assert torch.equal(found, total * scales.float()[:, None])
    for first in range(0, d_out, 7):
        rows = slice(first, min(d_out, first + 9))
        assert torch.equal(books.decode(codes, scales, len(planes), rows=rows), found[rows])


def test_a_stream_of_bits() -> None:
    bits = torch.randint(0, 2, (21, 3), dtype=torch.uint8)
    packed = pack_stream(bits)
    assert packed.shape == (3, 3)
    assert torch.equal(stream_bits(packed)[:21], bits)
    assert int(packed[1, 2]) == sum(int(bits[8 + i, 2]) << i for i in range(8))


@pytest.mark.parametrize(
    ("suffix", "value", "message"),
    [
        ("", -64, "2 has values beyond 63"),
        ("", -128, "2 has values beyond 63"),
        (".taps", 64, "2.taps has labels of more than 64 values"),
        (".scale", 0.0, "2.scale is not above 0"),
        (".scale", float("nan"), "2.scale has values that are not finite"),
        (".scale", float("inf"), "2.scale has values that are not finite"),
    ],
)
def test_values_that_no_codebook_holds(suffix: str, value: float, message: str) -> None:
    books = random_set(random_planes("trellis", (2, 3, 4)))
    assert isinstance(books, TrellisSet)
    assert list(books.problems()) == []
    books.parts[1][suffix][-1] = value
    assert next(books.problems()) == message
