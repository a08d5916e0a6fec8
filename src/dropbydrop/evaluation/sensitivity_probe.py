"""Measure what it costs to run an input group at a lower level: KL to the full model, nats a token.

For the model at its highest level M, let p be its next-token distribution and dW = W_P - W_M the
change of an input group's matrices at level P. To second order in dW the divergence is the Fisher
form

    KL(M || P) ~ 1/2 sum_t E_y (g_t . dW x_t)^2,    g_t = d log p(y) / d output_t,  y ~ p,

with labels y drawn from the model itself (with the labels of a text it would be the empirical
Fisher matrix, which is something else; Kunstner et al., arXiv 1905.12558). Labels of different
tokens are independent, so one backward pass serves all input groups, all levels and all tokens of a
window. Correlations between the errors of different tokens are left out: that estimate would need
one backward pass a token.

    1. a forward pass at level M that keeps only the input of every matrix;
    2. a backward pass in which every matrix is decoded again: g W_M goes on to the layer below, and
       (g W_P - g W_M) . x gives the inner products for every lower level P. Memory is that of the
       activations of one window, never that of a dense model;
    3. forward passes at the lower levels measure KL(M || P) of the uniform levels on the same
       windows. Where the quadratic form is far off (2 bits), its input groups keep their shares,
       but their sum is set to what was measured:
       losses[s][P] = form[s][P] * KL[P] / sum_s form[s][P].

Experts are measured one by one, each by the tokens that are routed to it; the weight that the
router gave its output is in g. The loss of a stack is the sum: that errors of two experts of one
token help or hinder each other is left out, too. An expert that no token met costs nothing.

About 8 forward passes a window in all. Embedding and head in planes take another forward pass for
each number of bits that they can be read with and each level: what is measured is how much the
level's KL grows.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from dropbydrop.planning.plan import Plan, table_choices
from dropbydrop.planning.sensitivity import Sensitivity
from dropbydrop.runtime.experts import NestedStack
from dropbydrop.runtime.modules import NestedLinear
from dropbydrop.runtime.views import precision, store_of, view
from dropbydrop.system.console import phase, progress_bar, quiet_transformers
from dropbydrop.system.errors import CalibrationError, PrecisionError

from .perplexity import evaluate


def measure(
    model: Any,
    ids: Tensor,
    *,
    seed: int = 0,
    description: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Sensitivity:
    """Measure the losses of every input group and level on windows `ids` [n, T].

    Args:
        model: a model or view with all planes in memory; it is left as it is.
        seed: seed of the labels that are drawn.
        description: what the windows are, kept in the result.

    Raises:
        PrecisionError: the model is not at its checkpoint's highest level.
        CalibrationError: no windows, or a pass that gave values that are not finite.
    """
    checkpoint = store_of(model).checkpoint
    levels = checkpoint.levels
    lower = levels[:-1]
    if precision(model) != levels[-1]:
        raise PrecisionError(
            f"sensitivities are measured against the full model: load it at {levels[-1]} bits, not "
            f"{precision(model)}."
        )
    if ids.dim() != 2 or ids.shape[0] < 1 or ids.shape[1] < 2:
        raise CalibrationError(f"ids of shape {list(ids.shape)}: give 1 or more windows [n, T].")
    groups = checkpoint.quantization.input_groups
    losses = {group.name: dict.fromkeys(levels, 0.0) for group in groups}
    experts = {
        group.name: [dict.fromkeys(levels, 0.0) for _ in range(group.experts)]
        for group in groups
        if group.experts
    }
    views = {p: view(model, p) for p in lower}
    probe = _Probe(view(model, levels[-1]), views)
    generator = torch.Generator().manual_seed(seed)
    with progress_bar(progress) as bar:
        task = bar.add_task("sensitivity", total=ids.shape[0])
        for window in ids:
            for (name, p, e), inner in probe.inner_products(window[None], generator).items():
                loss = 0.5 * float(inner.double().square().sum()) / ids.numel()
                losses[name][p] += loss
                if e is not None:
                    experts[name][e][p] += loss
            bar.advance(task)
    tables = {
        (bits, p): view(model, plan=replace(Plan.uniform(checkpoint, p), table=bits))
        for p in levels
        for bits in list(table_choices(checkpoint, p))[:-1]
    }
    kl, fewer = dict.fromkeys(levels, 0.0), defaultdict[int, dict[int, float]](dict)
    if lower or tables:
        named = {str(p): low for p, low in views.items()}
        named |= {f"{p}, table {bits}": low for (bits, p), low in tables.items()}
        figures = evaluate(named, view(model, levels[-1]), ids, progress=progress)["bits"]
        kl |= {p: max(0.0, figures[str(p)]["kl"]) for p in lower}
        for bits, p in tables:
            fewer[bits][p] = max(0.0, figures[f"{p}, table {bits}"]["kl"] - kl[p])
    for p in lower:
        _set_sum(losses, [row for rows in experts.values() for row in rows], p, kl[p])
    if tables:  # all that there are cost nothing where they are read
        fewer[max(table_choices(checkpoint, levels[-1]))] = {}
    about = {"windows": ids.shape[0], "seq_len": ids.shape[1], "seed": seed}
    description = {**(description or {}), **about}
    return Sensitivity(checkpoint.fingerprint, losses, "measured", kl, description, fewer, experts)


def _set_sum(
    losses: Mapping[str, dict[int, float]], parts: list[dict[int, float]], p: int, kl: float
) -> None:
    """Scale the losses of level p so that their sum is `kl`, and their parts; zero stays zero."""
    total = sum(row[p] for row in losses.values())
    if not math.isfinite(total) or not math.isfinite(kl):
        raise CalibrationError(
            f"level {p} gave values that are not finite; measure in float32, on other text."
        )
    for row in (*losses.values(), *parts):
        row[p] *= kl / total if total > 0 and kl > 0 else 1.0


class _Probe:
    """A view whose matrices report inner products of error and gradient on their way back."""

    def __init__(self, view: Any, lower: Mapping[int, Any]) -> None:
        self.view = view.requires_grad_(False)
        self.inner: dict[_Key, Tensor] = {}
        modules = {p: _coded(model) for p, model in lower.items()}
        for name, module in _coded(view).items():
            others = {p: modules[p][name] for p in lower}
            product = _Product(module, others, self.inner)
            # of this private view's module alone
            if isinstance(module, NestedStack):
                cast(Any, module).multiply_rotated = partial(_Recorded.apply, product)
            else:
                cast(Any, module).forward = partial(_Recorded.apply, product, None)

    def inner_products(self, ids: Tensor, generator: torch.Generator) -> dict[_Key, Tensor]:
        """(input group, level, expert) -> g_t . dW x_t for every token [T], or for those that the
        expert gets. ids [1, T]."""
        self.inner.clear()
        ids = ids.to(self.view.device)
        embedding = self.view.get_input_embeddings()
        leaf = embedding.register_forward_hook(lambda m, a, out: out.detach().requires_grad_())
        try:
            with torch.enable_grad():
                logits = self.view(ids, use_cache=False).logits[0].float()
                log_p = torch.log_softmax(logits, dim=-1)
                draw = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator)
                log_p.gather(1, draw.to(log_p.device)).sum().backward()
        finally:
            leaf.remove()
        return dict(self.inner)


_Key = tuple[str, int, int | None]  # input group, level, expert of a stack
_Coded = NestedLinear | NestedStack


def _coded(model: Any) -> dict[str, _Coded]:
    return {m.name: m for m in model.modules() if isinstance(m, _Coded)}


class _Product:
    """y = W x of one matrix or one expert's, with a backward pass of our own."""

    def __init__(
        self, module: _Coded, lower: Mapping[int, _Coded], inner: dict[_Key, Tensor]
    ) -> None:
        self.module, self.lower, self.inner = module, lower, inner

    def forward(self, expert: int | None, x: Tensor) -> Tensor:
        """y [..., d_out] of x [..., d_in], which is rotated where it is an expert's."""
        if isinstance(self.module, NestedStack):
            return NestedStack.multiply_rotated(self.module, cast(int, expert), x)
        return NestedLinear.forward(self.module, x)

    def backward(self, expert: int | None, x: Tensor, gradient: Tensor) -> Tensor:
        """Gradient of x [..., d_in] from that of y [..., d_out]; adds to the inner products."""
        input_group = self.module.input_group
        g = gradient.float().flatten(0, -2)  # [T, d_out]
        rotated = x.float().flatten(0, -2)  # [T, d_in]
        if expert is None:
            rotated = input_group.rotation.apply(rotated)
        full = g @ _rotated_weight(self.module, expert)  # [T, d_in]
        for p, module in self.lower.items():
            inner = ((g @ _rotated_weight(module, expert) - full) * rotated).sum(-1)  # [T]
            key = input_group.name, p, expert
            old = self.inner.get(key)
            self.inner[key] = inner if old is None else old + inner
        back = full if expert is not None else input_group.rotation.transpose(full)
        return back.view(x.shape).to(x.dtype)


def _rotated_weight(module: _Coded, expert: int | None) -> Tensor:
    """W' [d_out, d_in] of a matrix, or of one expert of a stack."""
    if isinstance(module, NestedStack):
        return module.group((cast(int, expert),)).weight()
    return module.rotated_weight()


class _Recorded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, product: _Product, expert: int | None, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.product, ctx.expert = product, expert
        y = product.forward(expert, x)
        return y.clone() if y._is_view() else y  # some families add to it in place

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, Tensor]:
        return None, None, ctx.product.backward(ctx.expert, ctx.saved_tensors[0], gradients[0])


def self_windows(model: Any, windows: int, seq_len: int, seed: int = 0) -> Tensor:
    """Text that the model writes itself, sampled from its own distribution: int64 [n, T]."""
    config = model.generation_config
    first = next(
        (t for t in (config.bos_token_id, model.config.eos_token_id, 0) if t is not None), 0
    )
    first = first[0] if isinstance(first, list) else first
    prompt = torch.full((windows, 1), int(first), device=model.device)
    torch.manual_seed(seed)
    with phase("writing text"), quiet_transformers(), torch.no_grad():
        ids: Tensor = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            repetition_penalty=1.0,
            min_new_tokens=seq_len - 1,
            max_new_tokens=seq_len - 1,
            pad_token_id=0,
        )
    return ids.cpu()
