"""What it costs to run an input group at a lower level: KL to the full model, in nats a token.

For the model at its highest level M, let p be its next-token distribution and dW = W_P - W_M the
change of an input group's matrices at level P. To second order in dW the divergence is the Fisher
form

    KL(M || P) ~ 1/2 sum_t E_y (g_t . dW x_t)^2,    g_t = d log p(y) / d output_t,  y ~ p,

with labels y drawn from the model itself (with the labels of a text it would be the empirical
Fisher matrix, which is something else). Labels of different tokens are independent, so one backward
pass serves all input groups, all levels and all tokens of a window. Correlations between the errors
of
different tokens are left out: that estimate would need one backward pass a token.

    1. a forward pass at level M that keeps only the input of every matrix;
    2. a backward pass in which every matrix is decoded again: g W_M goes on to the layer below, and
       (g W_P - g W_M) . x gives the inner products for every lower level P. Memory is that of the
       activations of one window, never that of a dense model;
    3. forward passes at the lower levels measure KL(M || P) of the uniform levels on the same
       windows. Where the quadratic form is far off (2 bits), its input groups keep their shares,
       but their
       sum is set to what was measured: losses[s][P] = form[s][P] * KL[P] / sum_s form[s][P].

About 8 forward passes a window in all. The result is a sidecar, sensitivity.json, beside the
checkpoint and not in its manifest; it carries the checkpoint's fingerprint and is refused by any
other. Without one, the log of the quantization serves: every relative error of a matrix counts the
same. That knows how well a matrix was encoded, but not how much it matters.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from dropbydrop.checkpoint import Checkpoint
from dropbydrop.checkpoint.config import LOG_FILE, Fields, check_version
from dropbydrop.checkpoint.files import dump_json, read_json
from dropbydrop.errors import CalibrationError, DropError, FormatError, PrecisionError
from dropbydrop.evaluation.perplexity import evaluate
from dropbydrop.runtime.modules import NestedLinear
from dropbydrop.system.atomic_folder import write_whole
from dropbydrop.system.console import progress_bar

SIDECAR = "sensitivity.json"
SIDECAR_FORMAT = "dropbydrop-sensitivity"


@dataclass(frozen=True)
class Sensitivity:
    """Losses of every input group at every level.

    Attributes:
        checkpoint: fingerprint.
        losses: input group name -> level -> expected KL to the highest level, nats a token; 0 at
            the highest. From a log the unit is arbitrary.
        kind: "measured" or "log".
        kl: level -> measured KL of the uniform level (empty from a log).
        description: what it was measured on.
    """

    checkpoint: str
    losses: Mapping[str, Mapping[int, float]]
    kind: str
    kl: Mapping[int, float] = field(default_factory=dict)
    description: Mapping[str, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> Path:
        """Write the sidecar into the checkpoint's folder.

        Raises:
            DropError: the folder cannot be written to.
        """
        data = {
            "format": SIDECAR_FORMAT,
            "format_version": 1,
            "checkpoint": self.checkpoint,
            "losses": {s: {str(p): v for p, v in row.items()} for s, row in self.losses.items()},
            "kl": {str(p): v for p, v in self.kl.items()},
            "description": dict(self.description),
        }
        target = folder / SIDECAR
        try:
            write_whole(target, dump_json(data))
        except OSError as error:
            raise DropError(
                f"{target} cannot be written ({error.strerror}); copy the checkpoint to a folder "
                "of your own to plan with it."
            ) from error
        return target

    @staticmethod
    def load(checkpoint: Checkpoint) -> Sensitivity | None:
        """The sidecar of a checkpoint, or None if there is none.

        Raises:
            FormatError: of another checkpoint, or damaged.
        """
        path = checkpoint.path / SIDECAR
        if not path.is_file():
            return None
        fields = Fields(read_json(path), str(path))
        again = f"Remove it, or measure again: dropbydrop plan {checkpoint.path} --measure"
        if fields.data.pop("format", None) != SIDECAR_FORMAT:
            raise FormatError(f"{path} is no table of sensitivities. {again}")
        check_version(fields.data.pop("format_version", None), str(path))
        found = fields.take("checkpoint", str)
        if found != checkpoint.fingerprint:
            raise FormatError(f"{path} was measured on another checkpoint. {again}")
        try:
            losses = {
                str(input_group): {int(p): float(v) for p, v in row.items()}
                for input_group, row in fields.take("losses", dict).items()
            }
            kl = {int(p): float(v) for p, v in fields.take("kl", dict).items()}
        except (TypeError, ValueError, AttributeError) as error:
            raise FormatError(f"{path} is damaged ({error}). {again}") from error
        result = Sensitivity(found, losses, "measured", kl, fields.take("description", dict))
        fields.done()
        input_groups = {input_group.name for input_group in checkpoint.quantization.input_groups}
        rows_fit = all(set(row) == set(checkpoint.levels) for row in losses.values())
        values = [v for row in losses.values() for v in row.values()]
        if (
            set(losses) != input_groups
            or not rows_fit
            or not all(0 <= v < math.inf for v in values)
        ):
            raise FormatError(
                f"{path} does not have one loss for every input group and level. {again}"
            )
        return result


def known_sensitivity(checkpoint: Checkpoint) -> Sensitivity:
    """The sidecar if there is one, else what the quantization log tells.

    Raises:
        DropError: there is neither.
        FormatError: the sidecar is damaged or of another checkpoint.
    """
    known = Sensitivity.load(checkpoint) or from_log(checkpoint)
    if known is None:
        raise DropError(
            f"{checkpoint.path} has neither {SIDECAR} nor {LOG_FILE}, so nothing is known about "
            f"which matrices matter. Measure it: dropbydrop plan {checkpoint.path} --measure "
            "--avg-bits 2.6"
        )
    return known


def from_log(checkpoint: Checkpoint) -> Sensitivity | None:
    """Losses of an input group: the sum of its matrices' relative errors; None without a log."""
    path = checkpoint.path / LOG_FILE
    if not path.is_file():
        return None
    errors: dict[str, dict[int, float]] = {}
    try:
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            errors[entry["module"]] = {int(p): float(e) for p, e in entry["rel_error"].items()}
        losses = {
            input_group.name: {
                p: sum(errors[m][p] - errors[m][checkpoint.levels[-1]] for m in input_group.modules)
                for p in checkpoint.levels
            }
            for input_group in checkpoint.quantization.input_groups
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return Sensitivity(checkpoint.fingerprint, losses, "log")


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
        seed: of the labels.

    Raises:
        PrecisionError: the model is not at its checkpoint's highest level.
        CalibrationError: no windows, or a pass that gave values that are not finite.
    """
    from dropbydrop.runtime.views import precision, store_of, view

    store = store_of(model)
    checkpoint = store.checkpoint
    levels = checkpoint.levels
    if precision(model) != levels[-1]:
        raise PrecisionError(
            f"sensitivities are measured against the full model: load it at {levels[-1]} bits, not "
            f"{precision(model)}."
        )
    if ids.dim() != 2 or ids.shape[0] < 1 or ids.shape[1] < 2:
        raise CalibrationError(f"ids of shape {list(ids.shape)}: give 1 or more windows [n, T].")
    lower = levels[:-1]
    forms = {
        input_group.name: dict.fromkeys(levels, 0.0)
        for input_group in checkpoint.quantization.input_groups
    }
    views = {p: view(model, p) for p in lower}
    probe = _Probe(view(model, levels[-1]), views)
    generator = torch.Generator().manual_seed(seed)
    with progress_bar(progress) as bar:
        task = bar.add_task("sensitivity", total=ids.shape[0])
        for window in ids:
            for (input_group, p), inner in probe.inner_products(window[None], generator).items():
                forms[input_group][p] += 0.5 * float(inner.double().square().sum()) / ids.numel()
            bar.advance(task)
    kl = dict.fromkeys(levels, 0.0)
    if lower:
        named = {str(p): low for p, low in views.items()}
        figures = evaluate(named, view(model, levels[-1]), ids, progress=progress)["bits"]
        kl |= {p: max(0.0, figures[str(p)]["kl"]) for p in lower}
    for p in lower:
        total = sum(row[p] for row in forms.values())
        if not math.isfinite(total) or not math.isfinite(kl[p]):
            raise CalibrationError(
                f"level {p} gave values that are not finite; measure in float32, on other text."
            )
        for row in forms.values():
            row[p] *= kl[p] / total if total > 0 and kl[p] > 0 else 1.0
    about = {"windows": ids.shape[0], "seq_len": ids.shape[1], "seed": seed}
    return Sensitivity(
        checkpoint.fingerprint, forms, "measured", kl, {**(description or {}), **about}
    )


class _Probe:
    """A view whose matrices report inner products of error and gradient on their way back."""

    def __init__(self, view: Any, lower: Mapping[int, Any]) -> None:
        self.view = view.requires_grad_(False)
        self.inner: dict[tuple[str, int], Tensor] = {}
        modules = {p: _linears(model) for p, model in lower.items()}
        for name, module in _linears(view).items():
            others = {p: modules[p][name] for p in lower}
            product = _Product(module, others, self.inner)
            cast(Any, module).forward = product  # of this private view's module alone

    def inner_products(
        self, ids: Tensor, generator: torch.Generator
    ) -> dict[tuple[str, int], Tensor]:
        """(input group, level) -> g_t . dW x_t for every token: [T]. ids [1, T]."""
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


def _linears(model: Any) -> dict[str, NestedLinear]:
    return {m.name: m for m in model.modules() if isinstance(m, NestedLinear)}


class _Product:
    """y = W x of one matrix, with a backward pass of our own."""

    def __init__(
        self,
        module: NestedLinear,
        lower: Mapping[int, NestedLinear],
        inner: dict[tuple[str, int], Tensor],
    ) -> None:
        self.module, self.lower, self.inner = module, lower, inner

    def __call__(self, x: Tensor) -> Tensor:
        result: Tensor = _Recorded.apply(x, self)
        return result

    def backward(self, x: Tensor, gradient: Tensor) -> Tensor:
        """Gradient of x [1, T, d_in] from that of y [1, T, d_out]; adds to the inner products."""
        input_group = self.module.input_group
        g = gradient.float().flatten(0, -2)
        turned = input_group.rotation.apply(x.float().flatten(0, -2))
        full = g @ self.module.rotated_weight()
        for p, module in self.lower.items():
            inner = ((g @ module.rotated_weight() - full) * turned).sum(-1)
            old = self.inner.get((input_group.name, p))
            self.inner[input_group.name, p] = inner if old is None else old + inner
        return input_group.rotation.transpose(full).view(x.shape).to(x.dtype)


class _Recorded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, product: _Product) -> Tensor:
        ctx.save_for_backward(x)
        ctx.product = product
        return type(product.module).forward(product.module, x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.product.backward(ctx.saved_tensors[0], gradients[0]), None


def self_windows(model: Any, windows: int, seq_len: int, seed: int = 0) -> Tensor:
    """Text that the model writes itself, sampled from its own distribution: int64 [n, T]."""
    from dropbydrop.system.console import quiet_transformers

    config = model.generation_config
    first = next(
        (t for t in (config.bos_token_id, model.config.eos_token_id, 0) if t is not None), 0
    )
    first = first[0] if isinstance(first, list) else first
    prompt = torch.full((windows, 1), int(first), device=model.device)
    torch.manual_seed(seed)
    with quiet_transformers(), torch.no_grad():
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
