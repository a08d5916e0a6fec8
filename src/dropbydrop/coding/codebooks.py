"""Universal codebooks: one nested set for every matrix of every model.

After full rotation and division by the row scale, groups of 8 weights are close to i.i.d. N(0, 1)
samples, so one set trained offline on such samples under the nested loss serves all matrices. It
costs no stored bytes a matrix, and look-up tables can be shared by matrices with one input.

Training (`train`), on n Gaussian vectors of 8, for the levels P with weights lambda_P:
    1. start: residual k-means, one codebook after the other;
    2. repeat: codes by the production beam search with H = I; then all codebooks at once by least
       squares, A C = B with A[(m,k),(m',k')] = Lambda_max(m,m') sum(sign sign'), Lambda_m =
       sum_{P >= m} lambda_P (LSQ, Martinez et al. 2016, with the block weights of the nested loss).
Annealing noise on the codebooks (SR-D of LSQ++) was tried and did not help at these sizes.
Sets for common levels ship with the package as `universal_sets/<levels>.safetensors`, written by
`scripts/train_universal.py` from more samples and rounds. Any other choice of levels or weights is
trained when it is first needed (under a minute) and kept in the user's cache, named by all that it
depends on: levels, weights, effort, and the sources and libraries of this folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dropbydrop.system.atomic_folder import replacing
from dropbydrop.system.cache import cache_dir
from dropbydrop.system.digest import code_digest
from dropbydrop.system.errors import PrecisionError

from .code import ENTRIES, GROUP, expand_set, partial_sums
from .codebook_set import BytesSet, CodebookSet, set_of
from .objective import feedback_metric
from .planes import WINDOWS, family_of, planes_of
from .search import search

UNIVERSAL = "universal"  # the name of the set in a checkpoint
HALF = ENTRIES // 2
TRAINING = {"samples": 1 << 16, "rounds": 25, "beam": 8, "seed": 0}  # of sets that do not ship
_FOLDER = Path(__file__).parent / "universal_sets"


def default_lambdas(levels: Sequence[int]) -> list[float]:
    """Weights of the levels in J, up to a common factor.

    lambda_P = (8/3)^(P - M), and the lowest level 2.2 times that. The distortion of a good code
    falls by about 3.5 a plane; the smaller base and the bonus lean towards the lower levels,
    where an equal relative loss costs a model more. A measured choice, see docs/log.md.
    """
    weights = [(8 / 3) ** (p - levels[-1]) for p in levels]
    return [2.2 * weights[0], *weights[1:]] if len(levels) > 1 else weights


def name_of(levels: Sequence[int]) -> str:
    """File name stem of a shipped set, such as "2-3-4"."""
    return "-".join(map(str, levels))


def file_of_set(levels: Sequence[int], lambdas: Sequence[float] | None = None) -> Path:
    """Where the set of byte planes is: in the package or, once it is trained, in the cache."""
    usual, name = default_lambdas(levels), name_of(levels)
    shipped = _FOLDER / f"{name}.safetensors"
    weights = usual if lambdas is None else list(lambdas)
    if weights == usual and shipped.is_file():
        return shipped
    key = json.dumps([levels, weights, TRAINING, code_digest("coding")])
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    return cache_dir() / "universal" / f"{name}-{digest}.safetensors"


@lru_cache(maxsize=16)
def universal_set(
    levels: tuple[int, ...],
    lambdas: tuple[float, ...] | None = None,
    kind: str = "bytes",
    window: int = WINDOWS[-1],
) -> CodebookSet:
    """The set for these levels: of byte planes float32, with entries exact in float16.

    Args:
        levels: supervised levels, ascending; the last reads all planes.
        lambdas: of byte planes: their weights in J, by default `default_lambdas`. The set of
            trellis planes depends on what they are and not on which levels are supervised.
        kind: of the planes.
        window: of trellis planes, bits: the longest that ships for these levels and is no longer.

    Raises:
        PrecisionError: levels, or windows, for which no set of trellis planes ships.
    """
    if kind == "trellis":
        return _trellis_set(levels, window)
    path = file_of_set(levels, lambdas)
    with suppress(OSError, SafetensorError, KeyError):  # not there, or damaged: trained again
        return BytesSet.of(load_file(path)["codebooks"].to(torch.float32))
    codebooks = train(levels, lambdas or default_lambdas(levels), **TRAINING)
    with suppress(OSError), replacing(path) as partial:  # a cache that is full costs time, no more
        save_file({"codebooks": codebooks}, partial)
    return BytesSet.of(codebooks)


def _trellis_set(levels: Sequence[int], window: int) -> CodebookSet:
    """The first planes of the set of a family (planes.py), as it ships."""
    stem = f"trellis-{name_of(family_of(levels))}-"
    for length in range(window, WINDOWS[0] - 1, -1):
        path = _FOLDER / f"{stem}{length}.safetensors"
        if path.is_file():
            return set_of(planes_of("trellis", levels, length), load_file(path))
    shipped = sorted(file.stem for file in _FOLDER.glob("trellis-*.safetensors"))
    raise PrecisionError(
        f"no codebooks of trellis planes ship for levels {','.join(map(str, levels))} with windows "
        f"up to {window} bits (there are: {', '.join(shipped)}). Choose other --bits, or --code "
        "bytes."
    )


def least_squares(x: Tensor, codes: Tensor, lambdas: Sequence[float], ridge: float) -> Tensor:
    """Codebooks [M, K/2, g] that minimise the nested loss for fixed codes.

    x [n, g]; codes uint8 [M, n]; lambdas [M], zero where a prefix is not supervised. The ridge,
    relative to the mean use of an entry, fixes what the loss leaves open: without supervision
    between two codebooks a constant can move from one to the other.
    """
    planes, n = codes.shape
    entry = codes.long() & (HALF - 1)
    sign = 1.0 - 2.0 * (codes >= HALF).double()
    data = x.double()
    reach = [float(sum(lambdas[m:])) for m in range(planes)]
    a = torch.zeros(planes * HALF, planes * HALF, dtype=torch.float64)
    b = torch.zeros(planes * HALF, GROUP, dtype=torch.float64)
    for m in range(planes):
        rows = slice(m * HALF, (m + 1) * HALF)
        b[rows].index_add_(0, entry[m], data * sign[m][:, None])
        b[rows] *= reach[m]
        for other in range(m, planes):
            columns = slice(other * HALF, (other + 1) * HALF)
            count = torch.zeros(HALF * HALF, dtype=torch.float64)
            count.index_add_(0, entry[m] * HALF + entry[other], sign[m] * sign[other])
            block = count.view(HALF, HALF) * reach[other]
            a[rows, columns] = block
            a[columns, rows] = block.T
    a.diagonal().add_(ridge * reach[0] * n / HALF)
    found: Tensor = torch.linalg.solve(a, b).view(planes, HALF, GROUP)
    return found.to(torch.float32).contiguous()


def train(
    levels: Sequence[int],
    lambdas: Sequence[float],
    samples: int = TRAINING["samples"],
    rounds: int = TRAINING["rounds"],
    beam: int = TRAINING["beam"],
    seed: int = TRAINING["seed"],
) -> Tensor:
    """Train a set on N(0, 1) samples; see the module's note.

    Args:
        levels, lambdas: supervised prefixes and their weights in J.
        samples: number of vectors of g. rounds: of codes and least squares, after the start.
        beam: candidates that the search keeps. seed: for the samples and the start.

    Returns:
        float32 [M, K/2, g], M = levels[-1], rounded to float16 values.
    """
    planes = levels[-1]
    weights = [0.0] * planes
    for p, lam in zip(levels, lambdas, strict=True):
        weights[p - 1] = lam
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, GROUP, generator=generator)
    metric = feedback_metric(torch.eye(GROUP, dtype=torch.float64))

    def encode(data: Tensor, books: Tensor, at: Sequence[int], lam: Sequence[float]) -> Tensor:
        codes, _ = search(data, books, at, lam, beam=beam, sweeps=0, feedback=metric)
        return codes[:, :, 0]  # [M, n]

    books = []
    rest = x
    for _ in range(planes):
        pick = torch.randperm(samples, generator=generator)[:HALF]
        book = rest[pick].clone()
        for _ in range(8):
            book = least_squares(rest, encode(rest, book[None], [1], [1.0]), [1.0], 1e-4)[0]
        code = encode(rest, book[None], [1], [1.0])[0].long()  # [n]
        rest = rest - expand_set(book)[code]
        books.append(book)
    codebooks = torch.stack(books)
    for _ in range(rounds):
        codebooks = least_squares(x, encode(x, codebooks, levels, lambdas), weights, 1e-4)
    return codebooks.half().float()


def distortions(codebooks: Tensor, levels: Sequence[int], lambdas: Sequence[float]) -> list[float]:
    """Of byte planes: E ||x - x^_P||^2 / 8 on fresh N(0, 1) samples, for every P = 1..M. Beam 16.

    codebooks float32 [M, K/2, g].
    """
    generator = torch.Generator().manual_seed(12345)
    x = torch.randn(1 << 14, GROUP, generator=generator)
    metric = feedback_metric(torch.eye(GROUP, dtype=torch.float64))
    codes, _ = search(x, codebooks, levels, lambdas, beam=16, sweeps=0, feedback=metric)
    sums = partial_sums(codes, expand_set(codebooks), range(1, len(codebooks) + 1))  # [n, g] each
    return [float((x - q).square().mean()) for q in sums]
