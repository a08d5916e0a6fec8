"""The nested additive code: what the stored bytes mean.

A weight matrix W [d_out, d_in] is cut into G = d_in / g groups of g consecutive inputs.
Group j of row r is the sum of one entry of each of the first P codebooks, times a row scale:

    W^_P[r, g*j : g*(j+1)] = scales[r] * sum_{m=1..P} C_m[codes_m[r, j]]            (AQLM, eq. 2)

Invariant: lower precision = prefix. Decoding P planes reads codes_1..codes_P and nothing else,
and equals, bit for bit, the P-th partial sum of decoding more planes.

Sign symmetry: a codebook may store only K/2 entries; the top bit of a code is then the sign,
C[c] = -stored[c - K/2] for c >= K/2. It halves codebooks and search at no loss on symmetric
sources.

Limits: g = 8, K = 256, uint8 codes (one plane = 1 bit a weight). Others raise FormatError.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dropbydrop.system.errors import FormatError

GROUP = 8
ENTRIES = 256


def expand_codebook(stored: Tensor, sign_symmetric: bool = True) -> Tensor:
    """Expand a stored codebook to its K entries.

    Args:
        stored: [K/2, g] when `sign_symmetric`, else [K, g].

    Returns:
        float32 [K, g].

    Raises:
        FormatError: the shape is not the one of a plane with K = 256, g = 8.
    """
    rows = ENTRIES // 2 if sign_symmetric else ENTRIES
    if tuple(stored.shape) != (rows, GROUP):
        raise FormatError(
            f"codebook of shape {tuple(stored.shape)}; a plane with sign_symmetric="
            f"{str(sign_symmetric).lower()} stores [{rows}, {GROUP}]. The checkpoint is damaged or "
            "was written by a newer version."
        )
    table = stored.to(torch.float32)
    return torch.cat([table, -table]) if sign_symmetric else table


def expand_set(codebooks: Tensor) -> Tensor:
    """A set of sign-symmetric codebooks [..., K/2, g] -> all entries [..., K, g], same dtype."""
    return torch.cat([codebooks, -codebooks], dim=-2)


def partial_sums(
    codes: Sequence[Tensor] | Tensor, entries: Sequence[Tensor] | Tensor, levels: Sequence[int]
) -> list[Tensor]:
    """Sums of the first P entries for each P in `levels`, before scaling.

    The one place where a prefix is decoded. It runs in the order of the planes, in the dtype of the
    entries, and each sum goes on from the one before, so a prefix does not depend on what follows.

    Args:
        codes: M planes of one shape, integers [..., G]; only the first `levels[-1]` are read.
        entries: M tensors [K, g], all entries of each codebook.
        levels: ascending, from 1 to M.

    Returns:
        [..., G * g] for each level.
    """
    groups = codes[0].shape[-1]
    size = entries[0].shape[-1]
    total = entries[0].new_zeros(codes[0].numel(), size)  # [... * G, g]
    sums = []
    for m in range(levels[-1]):
        total += torch.nn.functional.embedding(codes[m].reshape(-1).to(torch.int32), entries[m])
        if m + 1 in levels:
            done = total.clone() if m + 1 < levels[-1] else total
            sums.append(done.view(*codes[0].shape[:-1], groups * size))  # [..., G * g]
    return sums


def decode(
    codes: Sequence[Tensor],
    entries: Sequence[Tensor],
    scales: Tensor,
    prefix: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Decode the first `prefix` planes to a dense matrix (in the rotated space of its input group).

    The sum runs in float32 in the order of the planes and is scaled once at the end, so that
    every prefix is a partial sum of the next one, bit for bit before scaling.

    Args:
        codes: M tensors uint8 [d_out, G]; only the first `prefix` are read.
        entries: M tensors [K, g], as `expand_codebook` returns them.
        scales: [d_out], the row scales of this level.
        prefix: P, 1 <= P <= M.

    Returns:
        `dtype` [d_out, G * g].
    """
    if not 1 <= prefix <= min(len(codes), len(entries)):
        raise ValueError(f"prefix {prefix} with {len(codes)} planes and {len(entries)} codebooks")
    (weight,) = partial_sums(codes, [e.to(torch.float32) for e in entries[:prefix]], [prefix])
    return weight.mul_(scales.to(torch.float32)[:, None]).to(dtype)
