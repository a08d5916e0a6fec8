"""Which rotation: none, small blocks, large blocks, full mixing, or outlier columns kept apart.

    python research/experiments/rotations.py MODEL --text FILE [--blocks 0,15] [--whole EVAL_TEXT]

    none       Q = 1
    block 64   signs and a Hadamard matrix over each 64 inputs
    block max  the same over blocks of the largest power of two that divides d_in
    full       the same, and an orthogonal factor that mixes those blocks
    apart      a group of 8 columns, those with the largest share of tr(W H W^T), kept in 16 bits;
               full mixing of the others. What the columns cost is counted in its true bits.

Inputs have no factors here (balance.py): it is the mixing alone that is compared.

Every matrix of the chosen blocks is encoded with each of them, for levels 2, 3 and 4. Printed are
geometric means of tr(E H E^T) / tr(W H W^T) under an H of other windows, of outlier matrices (one
of d_in columns holds more than SHARE of tr(W H W^T)) and of ordinary ones apart. With --whole all
blocks are encoded, and the perplexity and divergence of the whole model measured on the first
windows of EVAL_TEXT; all variants of the weights are held in float16 meanwhile, 30 bytes a weight.
The last line is one JSON object.
"""

import argparse
import json
import math
import time
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from dropbydrop.coding.code import GROUP
from dropbydrop.coding.codebooks import default_lambdas, universal_set
from dropbydrop.coding.encoder import EFFORTS, encode_group
from dropbydrop.coding.objective import weighted_errors
from dropbydrop.coding.rotation import Rotation, random_signs
from dropbydrop.data.calibration import load_windows
from dropbydrop.data.text_files import text_windows
from dropbydrop.evaluation.perplexity import evaluate
from dropbydrop.models.block_runner import BlockRunner
from dropbydrop.models.sources import resolve

LEVELS = (2, 3, 4)
VARIANTS = ("none", "block 64", "block max", "full", "apart")
SHARE = 0.1


def make(variant: str, d_in: int, seed: int) -> Rotation:
    """The rotation of a variant for so many inputs; `block 64` is smaller where 64 does not fit."""
    if variant in ("full", "apart"):
        return Rotation.make(d_in, seed)
    largest = d_in & -d_in
    block = {"none": 1, "block 64": min(64, largest), "block max": largest}[variant]
    signs = torch.ones(d_in) if variant == "none" else random_signs(d_in, seed)
    return Rotation(d_in, block, signs, None)


def decode(weight: Tensor, h: Tensor, variant: str, seed: int, effort: str) -> list[Tensor]:
    """The matrix as each level would decode it. weight [d_out, d_in], h [d_in, d_in]."""
    d_in = weight.shape[1]
    coded = torch.arange(d_in)
    if variant == "apart":
        energy = ((weight @ h) * weight).sum(0)
        coded = energy.argsort(descending=True)[GROUP:].sort().values
    rotation, books = make(variant, len(coded), seed), universal_set(LEVELS)
    part = weight[:, coded].contiguous()
    found = encode_group(
        {"w": part},
        h[coded][:, coded].contiguous(),
        rotation,
        books,
        LEVELS,
        default_lambdas(LEVELS),
        EFFORTS[effort],
    )["w"]
    out = []
    for q in books.sums(found.codes, len(weight), LEVELS):
        whole = weight.half().float()
        whole[:, coded] = rotation.transpose(found.scales.float()[:, None] * q)
        out.append(whole)
    return out


def true_bits(variant: str, level: int, d_out: int, d_in: int) -> float:
    """Codes, float16 scales, signs, and the 16-bit columns that `apart` has."""
    apart = GROUP if variant == "apart" else 0
    signs = 0 if variant == "none" else d_in
    return (level * (d_in - apart) + 16 * apart) / d_in + (16 * d_out + signs) / (d_out * d_in)


Key = tuple[str, str, int]  # kind of matrix, variant, level


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=16, help="of 1,024 tokens, for each H")
    parser.add_argument("--blocks", default="0,1", help="ignored with --whole")
    parser.add_argument("--whole", type=Path, metavar="EVAL_TEXT")
    parser.add_argument("--eval-windows", type=int, default=3, help="of 1,024 tokens")
    parser.add_argument("--preset", default="fast", choices=EFFORTS)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    source = resolve(args.model)
    runner = BlockRunner.open(source.folder)
    chosen = range(runner.num_blocks) if args.whole else [int(i) for i in args.blocks.split(",")]
    hidden = runner.embed(
        load_windows(args.text, source.tokenizer(), 2 * args.windows, 1024, seed=0).ids
    )
    logs: dict[Key, list[float]] = defaultdict(list)
    bits: dict[Key, list[float]] = defaultdict(list)
    seconds: dict[str, float] = defaultdict(float)
    weights: dict[str, dict[str, Tensor]] = defaultdict(dict)  # variant and level -> module -> W
    kinds: dict[str, str] = {}
    for i in range(max(chosen) + 1):
        block = runner.block(i)
        if i not in chosen:
            runner.forward_block(i, block, hidden, out=hidden)
            runner.release(i)
            continue
        halves = hidden.split(args.windows)
        one, two = (runner.collect_statistics(i, block, half, out=half) for half in halves)
        for n, group in enumerate(one.input_groups):
            h, other = one.grams[group.name], two.grams[group.name]
            for module in group.modules:
                weight = runner.read(f"{module}.weight", torch.float32)
                share = ((weight @ h) * weight).sum(0)
                outlier = float(share.max() / share.sum()) > SHARE
                kinds[module] = "outlier" if outlier else "ordinary"
                for variant in VARIANTS:
                    start = time.perf_counter()
                    decoded = decode(weight, h, variant, 97 * i + n, args.preset)
                    seconds[variant] += time.perf_counter() - start
                    errors = weighted_errors(weight, decoded, other)
                    for p, error, w in zip(LEVELS, errors, decoded, strict=True):
                        key = (kinds[module], variant, p)
                        logs[key].append(math.log(error))
                        bits[key].append(true_bits(variant, p, *weight.shape))
                        if args.whole:
                            weights[f"{variant}, {p} bits"][module] = w.half()
        runner.release(i)
        print(f"block {i} done", flush=True)
    result = {"preset": args.preset, "rows": mean_rows(logs, bits, kinds), "seconds": dict(seconds)}
    if args.whole:
        result["whole"] = whole(source, weights, args.whole, args.eval_windows)
    print(json.dumps(result))


def mean_rows(
    logs: dict[Key, list[float]], bits: dict[Key, list[float]], kinds: dict[str, str]
) -> list[dict]:
    """Print and return the geometric mean error and the mean true bits of every kind of matrix.

    Args:
        logs: log of the error of every matrix; bits: its true bits.
        kinds: module -> "ordinary" or "outlier".
    """
    rows = []
    for kind in ("ordinary", "outlier"):
        count = sum(k == kind for k in kinds.values())
        print(f"{kind}: {count} matrices. error at {LEVELS} bits (true bits)")
        for variant in VARIANTS if count else ():
            cells = []
            for p in LEVELS:
                values, cost = logs[kind, variant, p], bits[kind, variant, p]
                error, mean = math.exp(sum(values) / count), sum(cost) / count
                rows.append({"kind": kind, "variant": variant, "level": p, "matrices": count,
                             "error": error, "true_bits": mean})  # fmt: skip
                cells.append(f"{error:.5f} ({mean:.3f})")
            print(f"| {variant} | {' | '.join(cells)} |", flush=True)
    return rows


def whole(source, weights: dict[str, dict[str, Tensor]], text: Path, windows: int) -> dict:
    """Perplexity and KL of the model with each set of weights."""
    ids, _ = text_windows(text, source.tokenizer(), 1024, windows)
    original = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32).eval()
    model = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32).eval()

    def variant(name: str):
        @torch.no_grad()
        def run(window: Tensor) -> Tensor:
            for module, weight in weights[name].items():
                model.get_submodule(module).weight.copy_(weight)
            return model(window, use_cache=False).logits

        return run

    found = evaluate({name: variant(name) for name in weights}, original, ids)
    print(f"original: perplexity {found['reference']['ppl']:.2f}")
    for name, row in found["bits"].items():
        print(f"| {name} | {row['ppl']:.2f} | {row['kl']:.4f} |")
    return found


if __name__ == "__main__":
    main()
