"""Weights of outputs (YAQA's other half): what they gain on trellis planes.

    python research/experiments/output_side.py MODEL --text FILE --eval FILE [--eval FILE ...]
        [--blocks 1,9] [--windows 64] [--rows 96] [--gate 0.97]

Gradients of the model's own likelihood on `--windows` windows give, for each matrix of the chosen
blocks, H of its inputs with tokens weighted by |g|^2 (as presets `balanced` and `best` do) and H_O
of its outputs, from either half of the tokens (theory/output_metric.py). The matrices are coded for
levels 2, 3 and 4 with windows of 12 bits, with feedback between blocks of `--rows` rows where the
other half of the tokens says that at most `--gate` of the error is left, and without any. Printed
is the KL of the model with these matrices, all else untouched, on windows of each `--eval` text.
The last line is one JSON object.

Limits: the whole model and its gradients are in memory, and every H_O twice. Dense decoders whose
matrices are nn.Linear. Row scales are refit as if rows erred apart.
"""

import argparse
import json
import time
from collections import defaultdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from dropbydrop.coding import trellis
from dropbydrop.coding.codebooks import default_lambdas, universal_set
from dropbydrop.coding.encoder import DAMP, group_rotation, stored_scales
from dropbydrop.coding.objective import Coded, condition
from dropbydrop.coding.planes import counts_of
from dropbydrop.coding.refit import refit_scales
from dropbydrop.coding.trellis.arguments import beyond_of
from dropbydrop.data.calibration import load_windows
from dropbydrop.data.text_files import text_windows
from dropbydrop.models.block_runner import BlockRunner
from dropbydrop.models.pretrained import read_model
from dropbydrop.models.sources import resolve
from dropbydrop.models.statistics import CLIP
from dropbydrop_research.theory.output_metric import between_rows, choose, damped

LEVELS = (2, 3, 4)
WINDOW = 12
Decoded = dict[str, list[Tensor]]  # module -> its weight at each level


class Statistics:
    """H of every input group, and H_O of every matrix from either half of the windows."""

    def __init__(self, model: nn.Module, groups: list[tuple[str, ...]]) -> None:
        self.groups = groups
        self.inputs: dict[str, Tensor] = {}  # by first module
        self.outputs: dict[str, list[Tensor]] = {}
        self._x: dict[str, Tensor] = {}
        self._g: dict[str, Tensor] = {}
        for group in groups:
            for name in group:
                model.get_submodule(name).register_forward_hook(partial(self._hook, name))

    def _hook(self, name: str, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        if out.requires_grad:
            self._x[name] = args[0].detach().flatten(0, 1).float()
            out.register_hook(lambda g: self._g.update({name: g.flatten(0, 1).float()}))

    def add(self, half: int) -> None:
        """The window that ran forward and back."""
        for group in self.groups:
            x = self._x[group[0]]
            weight = sum(self._g[name].square().sum(1) for name in group)
            weight = weight / weight.mean().clamp_min(1e-30)
            energy = weight * x.square().sum(1)
            clip = (CLIP * energy.median() / energy.clamp_min(1e-30)).clamp(max=1)
            gram = self.inputs.setdefault(group[0], torch.zeros(x.shape[1], x.shape[1]))
            gram.addmm_((x * (weight * clip)[:, None]).T, x)
            for name in group:
                g = self._g[name] * clip.sqrt()[:, None]
                g = g / g.square().sum(1).mean().sqrt().clamp_min(1e-30)
                both = self.outputs.setdefault(name, [g.new_zeros(g.shape[1], g.shape[1])] * 2)
                both[half] = both[half] + g.T @ g
        self._x.clear()
        self._g.clear()


def gradients(model: nn.Module, ids: Tensor, statistics: Statistics, seed: int) -> None:
    """Forward and back over every window; labels are drawn from the model."""
    generator = torch.Generator().manual_seed(seed)
    for number, window in enumerate(ids):
        embedded = model.get_input_embeddings()(window[None]).detach().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(inputs_embeds=embedded, use_cache=False).logits[0].float()
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
        statistics.add(number % 2)


def encode(model: nn.Module, statistics: Statistics, rows: int, gate: float, seed: int) -> Decoded:
    """Every matrix at each level. rows 0: no metric of outputs."""
    books, lambdas = universal_set(LEVELS, None, "trellis", WINDOW), default_lambdas(LEVELS)
    prefixes, found = counts_of(books.planes, LEVELS), {}
    for group in statistics.groups:
        gram = statistics.inputs[group[0]]
        weights = {name: model.get_submodule(name).weight.data for name in group}
        rotation = group_rotation(weights, gram, seed)
        h = condition(rotation.apply_gram(gram), DAMP)
        for name, weight in weights.items():
            w = rotation.apply_weight(weight)
            scales = stored_scales(w.square().mean(1).sqrt())
            row_weights, more = scales.square(), {}
            if rows and len(w) >= rows + max(rows, beyond_of(books.planes, 0)):
                halves = statistics.outputs[name]
                damping, cost = choose(halves, rows)
                if cost < gate:
                    metric = damped(sum(halves), damping)
                    metric = scales.double()[:, None] * metric * scales.double()
                    feedback, diagonal = between_rows(metric, rows)
                    row_weights = diagonal.float()
                    more = {"row_feedback": feedback.float(), "row_block": rows}
            codes = trellis.search(
                w / scales[:, None], row_weights, books, prefixes, lambdas,
                lower=torch.linalg.cholesky(h).float(), **more,
            )  # fmt: skip
            coded = Coded(w, scales, codes)
            scales = stored_scales(refit_scales(coded, h.float(), books, prefixes, lambdas))
            sums = coded.sums(books, prefixes)
            found[name] = [rotation.transpose(scales[:, None] * q) for q in sums]
    return found


@torch.inference_mode()
def divergences(model: nn.Module, decoded: Decoded, ids: Tensor) -> list[float]:
    """Mean KL of each level over windows [n, T], nats a token."""
    means = [0.0] * len(LEVELS)
    for window in ids:
        reference = model(window[None]).logits[0].float().log_softmax(-1)
        for level in range(len(LEVELS)):
            kept = {name: model.get_submodule(name).weight.data for name in decoded}
            for name, weights in decoded.items():
                model.get_submodule(name).weight.data = weights[level]
            found = model(window[None]).logits[0].float().log_softmax(-1)
            for name, weight in kept.items():
                model.get_submodule(name).weight.data = weight
            kl = kl_div(found, reference, reduction="sum", log_target=True)
            means[level] += float(kl) / ids.numel()
    return means


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--eval", type=Path, action="append", required=True)
    parser.add_argument("--blocks", help="comma-separated; all by default")
    parser.add_argument("--windows", type=int, default=64, help="of 512 tokens")
    parser.add_argument("--eval-windows", type=int, default=6, help="of 1,024 tokens, a text")
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--gate", type=float, default=0.97)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    source = resolve(args.model)
    model = read_model(source.folder, dtype=torch.float32).eval().requires_grad_(False)
    runner = BlockRunner.open(source.folder)
    chosen = range(runner.num_blocks)
    if args.blocks:
        chosen = [int(i) for i in args.blocks.split(",")]
    tokenizer, groups = source.tokenizer(), []
    ids = load_windows(args.text, tokenizer, args.windows, 512, args.seed).ids
    for i in chosen:
        found = runner.input_groups(i, runner.block(i), runner.embed(ids[:1, :16]))
        groups += [group.modules for group in found]
        runner.release(i)
    statistics = Statistics(model, groups)
    started = time.perf_counter()
    gradients(model, ids, statistics, args.seed)
    print(f"gradients of {len(ids)} windows: {time.perf_counter() - started:.0f} s", flush=True)
    texts = {
        file.name: text_windows(file, tokenizer, 1024, args.eval_windows)[0] for file in args.eval
    }
    result: dict[str, dict[str, list[float]]] = defaultdict(dict)
    for name, rows in (("without", 0), ("with", args.rows)):
        started = time.perf_counter()
        decoded = encode(model, statistics, rows, args.gate, args.seed)
        seconds = time.perf_counter() - started
        for file, windows in texts.items():
            result[name][file] = divergences(model, decoded, windows)
            numbers = " ".join(f"{kl:.4f}" for kl in result[name][file])
            print(f"{name:8} {file:24} {numbers}  ({seconds:.0f} s)", flush=True)
    print(json.dumps({"model": source.name, "seed": args.seed, "rows": args.rows, "kl": result}))


if __name__ == "__main__":
    main()
