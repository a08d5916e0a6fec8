"""Perplexity and divergence of models against a reference, paired over the same windows.

For each window of T tokens a model predicts T - 1 of them (the first has no context); windows do
not overlap and share nothing. Everything is in nats:

    nll    mean of -log p(next token) over all predictions;  ppl = exp(nll)
    kl     mean of KL(reference || model) = sum_v p_ref(v) (log p_ref(v) - log p(v))
    excess nll - nll of the reference

`kl` decides between methods: it uses the whole distribution, so it needs far fewer windows than
perplexity to tell two models apart. The 95 % intervals of `kl` and `excess` are percentiles of a
bootstrap over windows; all models see the same resamples, so differences stay paired.

Memory: the logits of one window for the reference and for one model, [T, vocab] each; softmaxes
run over chunks of tokens in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dropbydrop.system.console import progress_bar
from dropbydrop.system.errors import CalibrationError

# Values of a chunk of [tokens, vocab]. On a CPU 2 MiB in float32, so that the passes of a softmax
# find it in the cache: four times as fast as chunks of 64 MiB, which suit a GPU.
_CHUNK_VALUES, _CHUNK_VALUES_CPU = 1 << 24, 1 << 19


def evaluate(
    models: Mapping[str, Callable[..., Any]],
    reference: Callable[..., Any] | None,
    ids: Tensor,
    *,
    seed: int = 0,
    resamples: int = 2000,
    progress: bool = True,
) -> dict[str, Any]:
    """Evaluate `models` (name -> model) and the reference on windows `ids` [n, T].

    A model is anything that maps ids [1, T] to an object with `.logits` [1, T, vocab], or to the
    logits themselves. Without a reference there is no kl and no excess.

    Returns:
        JSON-able: {"seq_len", "windows", "reference": {"ppl", "nll", "per_window"} or None,
        "bits": {name: {"ppl", "nll", "kl", "kl_interval", "excess", "excess_interval",
        "per_window": {"nll": [n], "kl": [n]}}}}. Intervals are [low, high], or None for n = 1.

    Raises:
        CalibrationError: windows too short to predict anything, or a model whose vocabulary
            differs from the reference's.
    """
    n, t = ids.shape
    if n < 1 or t < 2:
        raise CalibrationError(f"{n} windows of {t} tokens: perplexity needs 1 or more of 2.")
    base = torch.zeros(n, dtype=torch.float64)
    found = {name: torch.zeros(2, n, dtype=torch.float64) for name in models}  # nll, kl
    with progress_bar(progress) as bar:
        task = bar.add_task("evaluate", total=n * (len(models) + (reference is not None)))
        for w in range(n):
            window, target = ids[w : w + 1], ids[w, 1:]
            log_ref: Tensor | None = None
            if reference is not None:
                log_ref = _log_probabilities(_logits(reference, window))
                base[w] = _nll(log_ref, target)
                bar.advance(task)
            for name, model in models.items():
                logits = _logits(model, window)
                if log_ref is not None and logits.shape != log_ref.shape:
                    raise CalibrationError(
                        f"model {name} has {logits.shape[-1]:,} outputs and its reference "
                        f"{log_ref.shape[-1]:,}: they are not versions of the same model."
                    )
                found[name][:, w] = _nll_and_kl(logits, log_ref, target)
                del logits
                bar.advance(task)
    result: dict[str, Any] = {
        "seq_len": t,
        "windows": n,
        "reference": None if reference is None else _figures(base) | {"per_window": base.tolist()},
        "bits": {},
    }
    for name, (nll, kl) in found.items():
        figures: dict[str, Any] = _figures(nll)
        per_window = {"nll": nll.tolist()}
        if reference is not None:
            for key, values in (("kl", kl), ("excess", nll - base)):
                figures[key] = float(values.mean())
                figures[f"{key}_interval"] = bootstrap_interval(values, seed, resamples)
            per_window["kl"] = kl.tolist()
        result["bits"][name] = figures | {"per_window": per_window}
    return result


def bootstrap_interval(
    values: Tensor, seed: int = 0, resamples: int = 2000, level: float = 0.95
) -> list[float] | None:
    """Percentile bootstrap interval of the mean of `values` [n]; None for n = 1.

    Give the difference of two models' values for a paired comparison.
    """
    n = values.numel()
    if n < 2:
        return None
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, n, (resamples, n), generator=generator)
    means = values.to(torch.float64)[index].mean(1)
    tail = (1 - level) / 2
    ends = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=torch.float64))
    return [float(ends[0]), float(ends[1])]


def _figures(nll: Tensor) -> dict[str, Any]:
    mean = float(nll.mean())
    return {"ppl": math.exp(mean) if mean < 700 else math.inf, "nll": mean}


@torch.no_grad()
def _logits(model: Callable[..., Any], window: Tensor) -> Tensor:
    """Logits that predict the window's tokens 1..T-1: [T - 1, vocab]."""
    if isinstance(model, PreTrainedModel):
        out = model(window.to(model.device), use_cache=False)
    else:
        out = model(window)
    logits: Tensor = getattr(out, "logits", out)
    return logits[0, :-1]


def _chunks(logits: Tensor) -> list[slice]:
    rows, vocab = logits.shape
    values = _CHUNK_VALUES_CPU if logits.device.type == "cpu" else _CHUNK_VALUES
    step = max(1, values // vocab)
    return [slice(low, min(low + step, rows)) for low in range(0, rows, step)]


def _log_probabilities(logits: Tensor) -> Tensor:
    """log_softmax, float32, written over the logits where their dtype allows. [T - 1, vocab]."""
    out = logits if logits.dtype == torch.float32 else torch.empty_like(logits, dtype=torch.float32)
    for rows in _chunks(logits):
        out[rows] = torch.log_softmax(logits[rows].to(torch.float32), dim=-1)
    return out


def _nll(log_p: Tensor, target: Tensor) -> float:
    picked = log_p.gather(1, target.to(log_p.device)[:, None])
    return -float(picked.to(torch.float64).mean())


def _nll_and_kl(logits: Tensor, log_ref: Tensor | None, target: Tensor) -> Tensor:
    """Mean nll and mean KL(reference || model) of one window: float64 [2]."""
    nll = kl = 0.0
    for rows in _chunks(logits):
        log_p = torch.log_softmax(logits[rows].to(torch.float32), dim=-1)
        nll += _nll(log_p, target[rows]) * log_p.shape[0]
        if log_ref is not None:
            ref = log_ref[rows].to(log_p.device)
            kl += float((ref.exp() * (ref - log_p)).sum(-1).to(torch.float64).sum())
    return torch.tensor([nll, kl], dtype=torch.float64) / target.numel()
