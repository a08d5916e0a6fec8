"""Universal codebooks against learned ones: error, true bits and time, an input group at a time.

    python research/experiments/codebooks.py [MODEL --text FILE --blocks 0,2]
        [--random 2048x2048,2048x8192] [--preset fast] [--threads 1]

Encodes the input groups of some blocks twice, with the universal set and with a set of the input
group's own, and with --random matrices of these sizes (d_out x d_in) with independent Gaussian
weights and inputs of a spectrum that falls as 1/k. H comes from the first half of the windows;
errors tr(E H E^T) / tr(W H W^T) are also under an H of the second half, which shows what a learned
set has fitted to the sample.

Learning takes further rounds of sweeps, which help the universal set too; "swept" is the universal
set with as many. A set costs bits, so equal errors are not equal quality. The column before the
last says what learning is worth over that: with the slope between two levels, d log2(error) / d
bits, the bits that the lower error saves, beside the bits that the set costs. Seconds are processor
time. The last line printed is one JSON object.

Inputs have no factors here (balance.py). A matrix with 8,192 inputs takes about 3 GiB, most of it H
and its Cholesky factors in float64.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from dropbydrop.coding.codebook_set import CodebookSet
from dropbydrop.coding.codebooks import default_lambdas, universal_set
from dropbydrop.coding.encoder import (
    EFFORTS,
    LEARNING_ROUNDS,
    Encoded,
    encode_group,
    learn_group,
)
from dropbydrop.coding.objective import weighted_errors
from dropbydrop.coding.rotation import Rotation
from dropbydrop.data.calibration import load_windows
from dropbydrop.models.block_runner import BlockRunner
from dropbydrop.models.sources import resolve

LEVELS = (2, 3, 4)
InputGroup = tuple[str, dict[str, Tensor], Tensor, Tensor]  # name, weights, H, H of other windows


def model_groups(args: argparse.Namespace) -> Iterator[InputGroup]:
    """The input groups of the chosen blocks."""
    source, blocks = resolve(args.model), [int(i) for i in args.blocks.split(",")]
    runner = BlockRunner.open(source.folder)
    text = load_windows(args.text, source.tokenizer(), 2 * args.windows, 1024, seed=0)
    hidden = runner.embed(text.ids)
    for i in range(max(blocks) + 1):
        block = runner.block(i)
        if i in blocks:
            one, two = (runner.collect_statistics(i, block, h) for h in hidden.split(args.windows))
            for group in one.input_groups:
                weights = {m: runner.read(f"{m}.weight", torch.float32) for m in group.modules}
                yield (
                    group.name,
                    weights,
                    one.grams[group.name],
                    two.grams[group.name],
                )
        hidden = runner.forward_block(i, block, hidden, out=hidden)
        runner.release(i)


def random_group(d_out: int, d_in: int) -> InputGroup:
    """Independent weights [d_out, d_in]; inputs of a spectrum 1/k in a random basis."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(d_out, d_in, generator=generator)
    basis = Rotation.make(d_in, seed=1)
    spectrum = 1 / torch.arange(1, d_in + 1)
    h = basis.apply(basis.apply(torch.diag(spectrum)).T.contiguous())
    return f"random {d_out} x {d_in}", {"w": weight}, h, h


def all_groups(args: argparse.Namespace) -> Iterator[InputGroup]:
    """One after the other, so that only one H is held."""
    for size in args.random.split(",") if args.random else []:
        d_out, d_in = map(int, size.split("x"))
        yield random_group(d_out, d_in)
    if args.model:
        yield from model_groups(args)


def errors(
    weights: Mapping[str, Tensor],
    coded: Mapping[str, Encoded],
    books: CodebookSet,
    rotation: Rotation,
    h: Tensor,
) -> list[float]:
    """Relative error of a whole input group at each level, its matrices stacked."""
    stacked, decoded = torch.cat(list(weights.values())), []
    for level in range(len(LEVELS)):
        parts = [
            rotation.transpose(
                e.scales.float()[:, None] * books.sums(e.codes, len(e.scales), LEVELS)[level]
            )
            for e in coded.values()
        ]
        decoded.append(torch.cat(parts))
    return weighted_errors(stacked, decoded, h)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--text", type=Path, help="calibration of MODEL")
    parser.add_argument("--blocks", default="0")
    parser.add_argument("--windows", type=int, default=16, help="of 1,024 tokens, for each H")
    parser.add_argument("--random", help="also random matrices, 2048x2048,2048x8192")
    parser.add_argument("--preset", default="balanced", choices=EFFORTS)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if bool(args.model) != bool(args.text) or not (args.model or args.random):
        parser.error("give MODEL and --text, or --random, or both")
    torch.set_num_threads(args.threads)
    universal, lambdas, rows = universal_set(LEVELS), default_lambdas(LEVELS), []
    effort = EFFORTS[args.preset]
    print("input group | bits | universal error; ratios to it: swept, learned; the same held out |")
    print("     | bits that the set costs, and is worth | seconds: universal, swept, learned")
    for n, (name, weights, h, other) in enumerate(all_groups(args)):
        rotation = Rotation.make(h.shape[0], seed=n)
        rest = (weights, h, rotation, universal, LEVELS, lambdas)
        marks = [time.process_time()]
        coded: list[tuple[Mapping[str, Encoded], CodebookSet]] = []
        for rounds in (effort.rounds, effort.rounds + LEARNING_ROUNDS):
            coded.append((encode_group(*rest, replace(effort, rounds=rounds)), universal))
            marks.append(time.process_time())
        coded.append(learn_group(*rest, effort))
        marks.append(time.process_time())
        count = sum(w.numel() for w in weights.values())
        seconds = [end - start for start, end in pairwise(marks)]
        plain, swept, learned = (
            [errors(weights, codes, books, rotation, under) for under in (h, other)]
            for codes, books in coded
        )
        slope = -math.log2(plain[0][-1] / plain[0][0]) / (LEVELS[-1] - LEVELS[0])
        for i, p in enumerate(LEVELS):
            row = {
                "input_group": name,
                "weights": count,
                "level": p,
                "universal": plain[0][i],
                "swept_ratio": swept[0][i] / plain[0][i],
                "ratio": learned[0][i] / plain[0][i],
                "swept_ratio_held_out": swept[1][i] / plain[1][i],
                "ratio_held_out": learned[1][i] / plain[1][i],
                "bits_cost": 8 * p * universal.planes[0].codebook_bytes / count,
                "bits_worth": -math.log2(learned[1][i] / swept[1][i]) / slope,
                "seconds": seconds,
            }
            rows.append(row)
            print(
                f"{name} | {p} | {row['universal']:.5f}; {row['swept_ratio']:.4f}, "
                f"{row['ratio']:.4f}; {row['swept_ratio_held_out']:.4f}, "
                f"{row['ratio_held_out']:.4f} | {row['bits_cost']:.4f}, {row['bits_worth']:.4f} | "
                + ", ".join(f"{s:.1f}" for s in seconds),
                flush=True,
            )
    print(json.dumps({"preset": args.preset, "levels": LEVELS, "rows": rows}))


if __name__ == "__main__":
    main()
