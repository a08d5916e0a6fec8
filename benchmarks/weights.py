"""Weights of the levels: our default beside the paper's, at levels 3, 4, 5, matrix by matrix.

    python benchmarks/weights.py MODEL --text FILE [--blocks 3,15,27] [--preset balanced]

The paper supervises levels 3 and 5 with one half each on their raw errors; level 4 is what its
codes give. Ours supervises all three (universal.default_lambdas). Either way a universal set is
trained with the same weights and effort, and every linear layer of the blocks is encoded under the
Gram matrix of 32 windows of 1,024 tokens. Printed: relative errors tr(E H E^T) / tr(W H W^T) under
it and under that of the next 32 windows, as geometric means over the matrices, and their ratio.
The last line is one JSON object.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from layers import grams

from dropbydrop.encoder import EFFORTS, encode_site
from dropbydrop.objective import weighted_errors
from dropbydrop.refit import prefixes
from dropbydrop.rotation import Rotation
from dropbydrop.sources import resolve
from dropbydrop.universal import default_lambdas, train
from dropbydrop.walk import Walk

LEVELS = (3, 4, 5)
WEIGHTS = {
    "ours": (LEVELS, tuple(default_lambdas(LEVELS))),
    "paper": ((3, 5), (0.5, 0.5)),
}


def mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--blocks", default="3,15,27")
    parser.add_argument("--preset", default="balanced", choices=EFFORTS)
    args = parser.parse_args()
    source = resolve(args.model)
    walk = Walk.open(source.folder)
    blocks = [int(i) for i in args.blocks.split(",")]
    modules = [
        name.removesuffix(".weight")
        for i in blocks
        for name, weight in walk.block(i).named_parameters(prefix=walk.block_prefix(i))
        if weight.dim() == 2
    ]
    tokens = source.tokenizer()(args.text.read_text(), return_tensors="pt").input_ids[0]
    windows = tokens[: 64 * 1024].view(64, 1024)
    own, held = grams(walk, windows[:32], set(modules)), grams(walk, windows[32:], set(modules))
    books = {name: train(*weights) for name, weights in WEIGHTS.items()}
    rows = []
    for n, module in enumerate(modules):
        weight = walk.read(f"{module}.weight", torch.float32)
        rotation = Rotation.make(weight.shape[1], seed=n)
        row: dict = {"matrix": module}
        for name, (levels, lambdas) in WEIGHTS.items():
            code = encode_site(
                {module: weight}, own[module], rotation, books[name], levels, lambdas,
                EFFORTS[args.preset],
            )[module]  # fmt: skip
            scaled = code.scales.float()[:, None]
            decoded = [
                rotation.inverse(scaled * q) for q in prefixes(code.codes, books[name], LEVELS)
            ]
            row[name] = weighted_errors(weight, decoded, own[module])
            row[f"{name}_held_out"] = weighted_errors(weight, decoded, held[module])
        rows.append(row)
        ratio = " ".join(f"{p / o:.3f}" for p, o in zip(row["paper"], row["ours"], strict=True))
        print(f"{module:40} paper / ours at 3, 4, 5: {ratio}", flush=True)
    result: dict = {"model": args.model, "levels": LEVELS, "matrices": len(rows), "rows": rows}
    for text in ("", "_held_out"):
        for i, p in enumerate(LEVELS):
            ours, paper = (mean([r[f"{k}{text}"][i] for r in rows]) for k in ("ours", "paper"))
            result[f"level_{p}{text}"] = {"ours": ours, "paper": paper, "ratio": paper / ours}
            print(f"level {p}{text}: ours {ours:.5f} paper {paper:.5f} ratio {paper / ours:.3f}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
