"""The meaning of the codes: decoding, prefixes, sign symmetry, rotation."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dropbydrop.coding.code import (
    ENTRIES,
    GROUP,
    decode,
    expand_codebook,
    expand_set,
    partial_sums,
)
from dropbydrop.coding.rotation import (
    Rotation,
    hadamard,
    pack_input_scales,
    round_input_scales,
    split_odd,
    unpack_input_scales,
)
from dropbydrop.system.errors import FormatError


def naive_decode(codes, stored, scales, prefix, symmetric):
    """One number at a time, from the definition."""
    d_out, groups = codes[0].shape
    out = torch.zeros(d_out, groups * GROUP)
    for r in range(d_out):
        for j in range(groups):
            for i in range(GROUP):
                value = 0.0
                for m in range(prefix):
                    c = int(codes[m][r, j])
                    if symmetric:
                        value += (-1 if c & 128 else 1) * float(stored[m][c & 127, i])
                    else:
                        value += float(stored[m][c, i])
                out[r, j * GROUP + i] = value * float(scales[r])
    return out


@pytest.mark.parametrize("symmetric", [True, False])
def test_decode_equals_the_definition(symmetric):
    torch.manual_seed(0)
    codes = [torch.randint(0, 256, (5, 3), dtype=torch.uint8) for _ in range(4)]
    stored = [torch.randn(ENTRIES // 2 if symmetric else ENTRIES, GROUP) for _ in range(4)]
    scales = torch.rand(5) + 0.5
    entries = [expand_codebook(s, symmetric) for s in stored]
    for prefix in (1, 2, 3, 4):
        expected = naive_decode(codes, stored, scales, prefix, symmetric)
        torch.testing.assert_close(decode(codes, entries, scales, prefix), expected)


def test_a_prefix_reads_no_later_plane_and_is_a_partial_sum_bit_for_bit():
    torch.manual_seed(1)
    codes = [torch.randint(0, 256, (7, 4), dtype=torch.uint8) for _ in range(3)]
    entries = [expand_codebook(torch.randn(128, GROUP)) for _ in range(3)]
    one = torch.ones(7)
    two = decode(codes, entries, one, 2)
    assert torch.equal(two, decode(codes[:2], entries[:2], one, 2))
    codes[2].random_(0, 256)
    assert torch.equal(two, decode(codes, entries, one, 2))
    third = entries[2][codes[2].long()].reshape(7, -1)
    assert torch.equal(two + third, decode(codes, entries, one, 3))


@settings(deadline=None, max_examples=25)
@given(
    d_out=st.integers(1, 5), groups=st.integers(1, 6), planes=st.integers(1, 8),
    seed=st.integers(0, 99), data=st.data(),
)  # fmt: skip
def test_partial_sums_are_those_of_the_naive_code(d_out, groups, planes, seed, data):
    """At any choice of levels; bit for bit, whatever else is asked for."""
    some = st.lists(st.integers(1, planes), min_size=1, unique=True).map(sorted)
    levels = data.draw(some)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (planes, d_out, groups), dtype=torch.uint8, generator=generator)
    stored = torch.randn(planes, ENTRIES // 2, GROUP, generator=generator)
    entries = expand_set(stored)
    sums = partial_sums(codes, entries, levels)
    assert len(sums) == len(levels)
    for prefix, found in zip(levels, sums, strict=True):
        assert found.shape == (d_out, groups * GROUP)
        expected = naive_decode(codes, stored, torch.ones(d_out), prefix, True)
        torch.testing.assert_close(found, expected)
        (alone,) = partial_sums(codes[:prefix], entries[:prefix], [prefix])
        assert torch.equal(found, alone)
        assert torch.equal(found, decode(codes, entries, torch.ones(d_out), prefix))
    assert len({t.data_ptr() for t in sums}) == len(sums)


@settings(deadline=None, max_examples=25)
@given(rows=st.integers(1, 9), planes=st.integers(1, 4))
def test_partial_sums_of_one_group(rows, planes):
    """Codes [M, n, 1], as the search has them: [n, g]."""
    codes = torch.randint(0, 256, (planes, rows, 1), dtype=torch.uint8)
    entries = torch.randn(planes, ENTRIES, GROUP)
    (found,) = partial_sums(codes, entries, [planes])
    expected = sum(entries[m][codes[m, :, 0].long()] for m in range(planes))
    torch.testing.assert_close(found, expected)


def test_codebook_shapes_are_checked():
    with pytest.raises(FormatError, match="128"):
        expand_codebook(torch.randn(256, GROUP), sign_symmetric=True)
    with pytest.raises(ValueError, match="prefix 3"):
        decode(
            [torch.zeros(1, 1, dtype=torch.uint8)] * 2, [torch.zeros(256, 8)] * 2, torch.ones(1), 3
        )


def naive_matrix(rotation):
    """Q from its definition: (O kron H) diag(signs)."""
    odd = torch.eye(rotation.d_in // rotation.block) if rotation.odd is None else rotation.odd
    return torch.kron(odd, hadamard(rotation.block)) * rotation.signs


@pytest.mark.parametrize(
    ("d_in", "block"),
    [(576, None), (96, None), (64, None), (7, None), (1536, 64), (96, 32), (40, 1)],
)
def test_rotation_equals_its_matrix(d_in, block):
    rotation = Rotation.make(d_in, seed=3)
    if block is not None:
        rotation = replace(rotation, block=block, odd=None)
    q = naive_matrix(rotation)
    torch.manual_seed(0)
    x = torch.randn(2, 3, d_in)
    torch.testing.assert_close(q @ q.T, torch.eye(d_in), atol=2e-5, rtol=0)
    torch.testing.assert_close(rotation.apply(x), x @ q.T, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(rotation.transpose(rotation.apply(x)), x, atol=2e-5, rtol=1e-4)
    gram = x.view(-1, d_in).T @ x.view(-1, d_in)
    torch.testing.assert_close(rotation.apply_gram(gram), q @ gram @ q.T, atol=2e-4, rtol=1e-3)


def test_full_mixing_spreads_one_input_over_all():
    x = torch.zeros(576)
    x[17] = 1.0
    y = Rotation.make(576, seed=0).apply(x)
    assert (y.abs() > 0).all()
    assert y.abs().max() < 0.15  # 30 sigma in one input become below 5 in all of them


def test_stored_rotation_round_trip():
    for d_in in (576, 12, 7):
        r = Rotation.make(d_in, seed=5)
        packed = r.packed()
        assert (packed.dtype, packed.shape) == (torch.uint8, (d_in,))
        assert torch.equal(unpack_input_scales(packed, d_in), r.signs)
        back = Rotation.from_stored(d_in, packed, r.odd)
        x = torch.randn(4, d_in)
        assert torch.equal(back.apply(x), r.apply(x))


def test_every_byte_is_a_signed_factor():
    packed = torch.arange(256).to(torch.uint8)
    signs = unpack_input_scales(packed, 256)
    naive = [(-1 if b >= 128 else 1) * 2 ** (((b & 127) - 64) / 8) for b in range(256)]
    assert signs.tolist() == pytest.approx(naive, rel=1e-6)
    assert torch.equal(pack_input_scales(signs), packed)
    close = signs.abs() * torch.linspace(0.96, 1.04, 256)  # half a step is 4.4 %
    assert torch.equal(round_input_scales(close), signs.abs())
    assert round_input_scales(torch.tensor([1e-9, 1e9])).tolist() == [
        2**-8,
        pytest.approx(2**7.875),
    ]
    with pytest.raises(ValueError, match="round_input_scales"):
        pack_input_scales(torch.tensor([1.0, 2.0**-9]))


@pytest.mark.parametrize("d_in", [96, 7, 64])
def test_scaled_rotation_equals_its_matrix(d_in):
    torch.manual_seed(0)
    plain = Rotation.make(d_in, seed=3)
    r = plain.scale(torch.rand(d_in) * 4 + 0.1)
    assert torch.equal(r.signs.sign(), plain.signs)
    q = naive_matrix(r)
    x, weight = torch.randn(3, d_in), torch.randn(5, d_in)
    torch.testing.assert_close(r.apply(x), x @ q.T, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(r.transpose(x), x @ q, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(r.apply_weight(weight), weight @ q.inverse(), atol=1e-4, rtol=1e-3)
    # what is coded multiplies what is rotated, and decoding gives W back
    product = r.apply_weight(weight) @ r.apply(x).T
    torch.testing.assert_close(product, weight @ x.T, atol=1e-4, rtol=1e-3)
    back = r.transpose(r.apply_weight(weight))
    torch.testing.assert_close(back, weight, atol=2e-5, rtol=1e-4)
    gram = x.T @ x
    torch.testing.assert_close(r.apply_gram(gram), q @ gram @ q.T, atol=1e-3, rtol=1e-3)
    stored = Rotation.from_stored(d_in, r.packed(), r.odd)
    assert torch.equal(stored.apply(x), r.apply(x))


def test_bad_rotations_are_refused():
    with pytest.raises(ValueError, match="input scales already"):
        Rotation.make(16).scale(torch.full((16,), 2.0)).scale(torch.ones(16))
    for bad in (0.0, -1.0, torch.nan, torch.inf):
        with pytest.raises(ValueError, match="finite and above 0"):
            Rotation.make(16).scale(torch.full((16,), bad))
    with pytest.raises(FormatError, match="input scales"):
        Rotation.from_stored(16, torch.zeros(2, dtype=torch.uint8), None)
    with pytest.raises(FormatError, match="odd3"):
        Rotation.from_stored(96, pack_input_scales(torch.ones(96)), None)
    with pytest.raises(ValueError, match="power of two"):
        Rotation(96, 48, torch.ones(96), None).apply(torch.ones(96))
    assert split_odd(1536) == (512, 3)


odd_widths = st.builds(
    lambda power, odd: 2**power * odd, st.integers(0, 6), st.sampled_from([1, 3, 5, 7, 9, 15])
)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(2.0**-8, 2.0**7.8), min_size=1, max_size=40), st.integers(0, 999))
def test_input_scales_survive_packing(values, seed):
    """Rounded once, they come back exactly; rounding moves them by at most half a step."""
    scales = torch.tensor(values, dtype=torch.float32)
    rounded = round_input_scales(scales)
    assert float((rounded.log2() - scales.log2()).abs().max()) <= 1 / 16 + 1e-5
    generator = torch.Generator().manual_seed(seed)
    signed = rounded * (1.0 - 2.0 * torch.randint(0, 2, rounded.shape, generator=generator))
    packed = pack_input_scales(signed)
    assert packed.shape == signed.shape
    assert torch.equal(unpack_input_scales(packed, len(signed)), signed)
    assert torch.equal(round_input_scales(rounded), rounded)


@settings(deadline=None, max_examples=40)
@given(d_in=odd_widths, rows=st.integers(1, 4), scaled=st.booleans(), seed=st.integers(0, 99))
def test_rotations_of_any_width_keep_products(d_in, rows, scaled, seed):
    """W' x' = W x; Q^T is the transpose of Q; and Q comes back from what is stored."""
    generator = torch.Generator().manual_seed(seed)
    rotation = Rotation.make(d_in, seed=seed)
    if scaled:
        rotation = rotation.scale(torch.rand(d_in, generator=generator) + 0.25)
    x = torch.randn(3, d_in, generator=generator)
    weight = torch.randn(rows, d_in, generator=generator)
    turned = rotation.apply(x)
    assert turned.shape == x.shape
    close = {"rtol": 1e-4, "atol": 1e-4 * d_in**0.5}
    torch.testing.assert_close(turned @ rotation.apply_weight(weight).T, x @ weight.T, **close)
    torch.testing.assert_close(  # <Q x, w> = <x, Q^T w>
        turned @ weight.T, x @ rotation.transpose(weight).T, **close
    )
    again = Rotation.from_stored(d_in, rotation.packed(), rotation.odd)
    assert torch.equal(again.apply(x), turned)
    if not scaled:
        torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
        torch.testing.assert_close(rotation.transpose(turned), x, **close)
