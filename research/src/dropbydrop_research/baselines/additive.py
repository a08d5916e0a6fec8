"""Additive quantization with codebooks learned for each matrix, as AQLM trains them.

Egiazarian et al., Extreme Compression of LLMs via Additive Quantization (ICML 2024), with the
defaults of its published code, for any weighting of prefixes:

    L = sum_P lambda_P tr((W - W^_P) H (W - W^_P)^T) / d_out,
    W^_P = diag(scales) sum_{m <= P} C_m[codes_m]

AQLM is the case of one level. Steps:
    1. scales = norms of the rows; codes and codebooks by residual k-means on W / scales, one
       codebook after the other: random points to start, 100 iterations, stop when nothing moves;
    2. epochs of 100 Adam steps on codebooks and scales (learning rate 1e-4, betas 0 and 0.95,
       amsgrad; one optimizer for all epochs), then one pass of beam search over all codes, groups
       and codebooks in random order, beam 1;
    3. stop before an epoch that starts less than 1 % below the best start so far.
Codebooks and scales are rounded to float16 at the end, as they are stored.

The same numbers as the published code at less work, so its seconds here are a lower bound: the
gradient is written out (of a quadratic, one product E H a level; the tests compare it with
autograd), E H of a group is reused for all its codebooks, and sums run in float32, not float64.
Deviations: no fine-tuning of the block afterwards (it would be for all methods, or none), and H is
that of the unquantized model, the same for every method compared.

Layout: codes int64 [M, d_out, G]; codebooks float32 [M, K, g], K = 256, g = 8; scales [d_out].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dropbydrop.coding.code import ENTRIES, GROUP

_EPS = 1e-9


@dataclass(frozen=True)
class Training:
    """Defaults of AQLM's published code."""

    kmeans_iterations: int = 100
    steps: int = 100  # of Adam, an epoch
    learning_rate: float = 1e-4
    tolerance: float = 0.01
    beam: int = 1
    epochs: int = 1000


@dataclass
class Additive:
    """One matrix; see the module's note for the layout."""

    codes: Tensor
    codebooks: Tensor
    scales: Tensor

    def prefixes(self) -> list[Tensor]:
        """Unscaled sums of the first 1..M codebooks, each [d_out, d_in]."""
        d_out, groups = self.codes.shape[1:]
        total = self.codebooks.new_zeros(d_out * groups, self.codebooks.shape[2])
        out = []
        for book, codes in zip(self.codebooks, self.codes, strict=True):
            total = total + torch.nn.functional.embedding(codes.reshape(-1), book)
            out.append(total.view(d_out, -1))
        return out

    def decode(self, level: int) -> Tensor:
        """W^_level, float32 [d_out, d_in]."""
        return self.scales[:, None] * self.prefixes()[level - 1]


# ---- start ---------------------------------------------------------------------------------


def _nearest(points: Tensor, centers: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Points [n', g] part by part, with the index of the nearest center of each, int64 [n'].

    On a CPU torch's argmax takes several times as long as the product that it reads. The maximum
    of a row is vectorized, and a product finds where it is; the parts stay in the cache.
    """
    half = centers.square().sum(1) / -2
    columns = torch.arange(len(centers), dtype=centers.dtype, device=centers.device)
    for part in points.split(1 << 16 if points.is_cuda else 1 << 10):
        score = torch.addmm(half, part, centers.T)
        won = (score - score.amax(1, keepdim=True)).ge_(0)
        draws = int(won.sum()) != len(part)  # or NaN
        yield part, score.argmax(1) if draws else (won @ columns).long()


def nearest(points: Tensor, centers: Tensor) -> Tensor:
    """Index of the nearest center [k, g] for each point [n, g]; of equal ones, one."""
    return torch.cat([index for _, index in _nearest(points, centers)])


def kmeans(points: Tensor, k: int, iterations: int, generator: torch.Generator) -> Tensor:
    """Centers [k, g] of points [n, g] by Lloyd's algorithm; empty clusters keep their center.

    Starts from k points drawn without repeats; with fewer points than k some are drawn twice.
    """
    pick = torch.randperm(len(points), generator=generator)[:k].to(points.device)
    centers = points[pick.repeat(-(-k // len(pick)))[:k]]
    for i in range(iterations):
        total = torch.zeros_like(centers)
        count = torch.zeros(k, 1, dtype=torch.long, device=centers.device)
        for part, own in _nearest(points, centers):
            total.index_add_(0, own, part)
            count += torch.bincount(own, minlength=k)[:, None]
        moved = torch.where(count > 0, total / count.clamp(min=1), centers)
        if i % 10 == 0 and torch.allclose(moved, centers, rtol=1e-6, atol=1e-8):
            break
        centers = moved
    return centers


def residual_kmeans(
    weight: Tensor, planes: int, training: Training, generator: torch.Generator
) -> Additive:
    """Step 1. weight float32 [d_out, d_in]."""
    scales = weight.norm(dim=1) + _EPS
    rest = (weight / scales[:, None]).reshape(-1, GROUP)
    codes, books = [], []
    for _ in range(planes):
        book = kmeans(rest, ENTRIES, training.kmeans_iterations, generator)
        code = nearest(rest, book)
        rest = rest - book[code]
        books.append(book)
        codes.append(code.view(len(weight), -1))
    return Additive(torch.stack(codes), torch.stack(books), scales)


# ---- the loss and its gradient -------------------------------------------------------------


def loss_and_gradients(
    weight: Tensor, h: Tensor, state: Additive, levels: Sequence[int], lambdas: Sequence[float]
) -> tuple[float, Tensor, Tensor]:
    """L, and its gradients with respect to codebooks [M, K, g] and scales [d_out]."""
    prefixes, scales = state.prefixes(), state.scales[:, None]
    value, by_scale = 0.0, torch.zeros_like(state.scales)
    by_book = torch.zeros_like(state.codebooks)
    pull: dict[int, Tensor] = {}  # level -> dL / d(sum of its codewords)
    for p, lam in zip(levels, lambdas, strict=True):
        q = prefixes[p - 1]
        e = torch.addcmul(weight, scales, q, value=-1)
        eh = e @ h
        factor = lam / len(weight)
        value += factor * float(torch.dot(eh.view(-1), e.view(-1)))
        by_scale -= 2 * factor * torch.linalg.vecdot(eh, q)
        pull[p] = eh.mul_(-2 * factor * scales)
    sums: Tensor | None = None
    for m in reversed(range(len(state.codes))):  # codebook m + 1 is in every prefix from m + 1 on
        if m + 1 in pull:
            sums = pull[m + 1] if sums is None else sums.add_(pull[m + 1])
        if sums is not None:
            by_book[m].index_add_(0, state.codes[m].reshape(-1), sums.view(-1, GROUP))
    return value, by_book, by_scale


# ---- codes ---------------------------------------------------------------------------------


def beam_search(
    weight: Tensor,
    h: Tensor,
    state: Additive,
    levels: Sequence[int],
    lambdas: Sequence[float],
    beam: int,
    generator: torch.Generator,
) -> Tensor:
    """One pass over all codes; returns those of the best hypothesis, int64 [M, d_out, G].

    Every row keeps its `beam` best hypotheses. For one group and codebook, each hypothesis is
    extended by all K entries; the rest of its codes stays. With beam 1 no code gets worse.
    """
    planes, d_out, groups = state.codes.shape
    books, scales = state.codebooks, state.scales
    k = books.shape[1]
    lam = torch.tensor(list(lambdas), device=h.device)
    prefixes = state.prefixes()
    error = torch.stack([weight - scales[:, None] * prefixes[p - 1] for p in levels])
    start = torch.einsum("l,lri,lri->r", lam, error @ h, error)
    error, codes, losses = error[None], state.codes[None].clone(), start[None]
    rows = torch.arange(d_out, device=h.device)
    for j in torch.randperm(groups, generator=generator).tolist():
        part = slice(j * GROUP, (j + 1) * GROUP)
        block = h[part, part]
        pull = error @ h[:, part]  # [beam, levels, d_out, g]
        for m in torch.randperm(planes, generator=generator).tolist():
            first = next(i for i, p in enumerate(levels) if p > m)
            total = lam[first:].sum()
            old = scales[:, None] * books[m][codes[:, m, :, j]]  # [beam, d_out, g]
            away = torch.einsum("l,blrg->brg", lam[first:], pull[:, first:]) + total * old @ block
            # L as a function of the new part v: L(v) = c - 2 v . away + total v H_jj v^T
            constant = losses + 2 * (old * away).sum(-1) - total * (old @ block * old).sum(-1)
            energy = ((books[m] @ block) * books[m]).sum(-1) * total
            cost = constant[..., None] - 2 * scales[:, None] * (away @ books[m].T)
            cost += scales.square()[:, None] * energy  # [beam, d_out, K]
            flat = cost.transpose(0, 1).reshape(d_out, -1)
            best, index = flat.topk(min(beam, flat.shape[1]), largest=False)
            parent, entry = (index // k).T, (index % k).T  # [beam', d_out]
            losses = best.T.contiguous()
            if beam > 1:
                codes = codes[parent, :, rows].transpose(1, 2).contiguous()
                error = error[parent, :, rows].transpose(1, 2).contiguous()
                pull = pull[parent, :, rows].transpose(1, 2).contiguous()
                old = old[parent, rows]
            delta = scales[:, None] * books[m][entry] - old
            codes[:, m, :, j] = entry
            error[:, first:, :, part] -= delta[:, None]
            pull[:, first:] -= (delta @ block)[:, None]
    return codes[0]


# ---- the whole -----------------------------------------------------------------------------


def train(
    weight: Tensor,
    gram: Tensor,
    planes: int,
    levels: Sequence[int],
    lambdas: Sequence[float],
    training: Training,
    seed: int,
) -> Additive:
    """Quantize weight float32 [d_out, d_in] under gram [d_in, d_in]; see the module's note."""
    generator = torch.Generator().manual_seed(seed)
    state = residual_kmeans(weight, planes, training, generator)
    optimizer = torch.optim.Adam(
        [state.codebooks, state.scales],
        lr=training.learning_rate,
        betas=(0.0, 0.95),
        amsgrad=True,
    )
    lowest = float("inf")
    for _ in range(training.epochs):
        for step in range(training.steps):
            value, by_book, by_scale = loss_and_gradients(weight, gram, state, levels, lambdas)
            if step == 0:
                if value > (1 - training.tolerance) * lowest:
                    return _stored(state)
                lowest = value
            state.codebooks.grad, state.scales.grad = by_book, by_scale
            optimizer.step()
        state.codes = beam_search(weight, gram, state, levels, lambdas, training.beam, generator)
    return _stored(state)


def _stored(state: Additive) -> Additive:
    """What float16 codebooks and scales give back."""
    return Additive(state.codes, state.codebooks.half().float(), state.scales.half().float())


def additive_bytes(shape: Sequence[int], level: int) -> int:
    """Codes and codebooks of the first `level` planes, float16 scales; shape [d_out, d_in]."""
    d_out, d_in = shape
    return level * (d_out * d_in // GROUP + 2 * ENTRIES * GROUP) + 2 * d_out
