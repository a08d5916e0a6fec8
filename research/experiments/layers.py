"""Matrix by matrix: one nested code against AQLM dedicated to each level, in the same run.

    python research/experiments/layers.py smollm2 --text FILE --out ROWS.jsonl [--anchors FILE]
        [--matrices "15 q,28 down"] [--preset balanced] [--no-aqlm]

Every matrix is encoded once for levels 2, 3, 4, in byte planes ("nested") and again in trellis
planes ("trellis"); AQLM trains a code of its own for each level, as published
(baselines/additive.py). All get the same H, from 32 windows of 1,024 tokens from the start of the
text (no BOS), and one thread; our input scales are fitted to the matrix alone, as AQLM's codebooks
are. Two groups of matrices of SmolLM2:

    ordinary   those for which figures of AQLM's published code exist; H weights every token alike,
               as it was there
    outliers   weights of up to 30 sigma, inputs whose first token has up to 4e5 times the energy of
               the median one; H is energy-clipped, as `quantize` does it (models/statistics.py)

Printed for each level: the relative weighted error tr(E H E^T) / tr(W H W^T) of byte planes and of
AQLM, their ratio, and that of trellis planes over byte planes; the same ratios under H of the next
32 windows, unclipped, with and without the first token of each window; true bits a weight of both;
the Gaussian bound by reverse water-filling at our true bits and the distance of byte planes from
it; seconds of our one code for all levels beside AQLM's for all levels.

A line of FILE of --anchors: {"layer", "kind", "M", "rel": [errors after 1..M codebooks]}, of the
published code under the same H; printed beside AQLM's here. Finished matrices are kept in ROWS,
and the same command goes on. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dropbydrop.coding.code import GROUP
from dropbydrop.coding.codebooks import default_lambdas, universal_set
from dropbydrop.coding.encoder import EFFORTS, encode_group, group_rotation
from dropbydrop.coding.objective import weighted_errors
from dropbydrop.coding.planes import counts_of
from dropbydrop.data.text_files import text_windows
from dropbydrop.models.block_runner import BlockRunner
from dropbydrop.models.sources import resolve
from dropbydrop_research.baselines.additive import Training, train
from dropbydrop_research.theory import GaussianSource

LEVELS = (2, 3, 4)
WINDOWS, SEQ_LEN = 64, 1024
NAMES = {
    "q": "self_attn.q_proj",
    "o": "self_attn.o_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
ORDINARY = ("3 q", "3 up", "3 down", "15 q", "15 up", "15 down", "27 q", "27 up")
OUTLIERS = ("0 o", "2 down", "11 down", "28 down")


class Statistics(NamedTuple):
    """H of one matrix's inputs, each [d_in, d_in]: to encode under, and of text set apart."""

    raw: Tensor
    clipped: Tensor
    held_out: Tensor
    held_out_later: Tensor  # without the first token of each window


def statistics(runner: BlockRunner, windows: Tensor, wanted: set[str]) -> dict[str, Statistics]:
    """Module -> its statistics; the first half of windows [n, T] is that of the encoding."""
    n, t = windows.shape
    own, held = runner.embed(windows[: n // 2]), runner.embed(windows[n // 2 :])
    later = torch.ones(n - n // 2, t)
    later[:, 0] = 0
    found: dict[str, Statistics] = {}
    for i in range(runner.num_blocks):
        block = runner.block(i)
        raw, held_raw = (
            runner.collect_statistics(i, block, hidden, clip=math.inf).grams
            for hidden in (own, held)
        )
        a = runner.collect_statistics(i, block, own, out=own)
        b = runner.collect_statistics(i, block, held, clip=math.inf, weights=later, out=held)
        for group in a.input_groups:
            for module in wanted.intersection(group.modules):
                name = group.name
                found[module] = Statistics(raw[name], a.grams[name], held_raw[name], b.grams[name])
        runner.release(i)
    return found


def true_bits(level: int, d_out: int, d_in: int, own_codebooks: bool) -> float:
    """Codes, float16 scales, and float16 codebooks of 256 entries where they are the matrix's; else
    a byte an input for its sign and factor."""
    extra = 16 * d_out + (level * 256 * GROUP * 16 if own_codebooks else 8 * d_in)
    return level + extra / (d_out * d_in)


def nested(
    weight: Tensor, h: Tensor, seed: int, preset: str, kind: str
) -> tuple[list[Tensor], float]:
    """Our one code in planes of a kind decoded at every level, and its seconds."""
    books = universal_set(LEVELS, None, kind, EFFORTS[preset].window)
    lambdas = default_lambdas(LEVELS)
    start = time.perf_counter()
    rotation = group_rotation({"w": weight}, h, seed)
    code = encode_group({"w": weight}, h, rotation, books, LEVELS, lambdas, EFFORTS[preset])["w"]
    seconds = time.perf_counter() - start
    scaled = code.scales.float()[:, None]
    decoded = books.sums(code.codes, len(weight), counts_of(books.planes, LEVELS))
    return [rotation.transpose(scaled * q) for q in decoded], seconds


def aqlm(weight: Tensor, h: Tensor) -> tuple[list[Tensor], float]:
    """AQLM's codes decoded, one trained for each level, and their seconds together."""
    start = time.perf_counter()
    decoded = [train(weight, h, p, [p], [1.0], Training(), seed=0).decode(p) for p in LEVELS]
    return decoded, time.perf_counter() - start


def measure(
    matrix: str, weight: Tensor, stats: Statistics, seed: int, preset: str, with_aqlm: bool
) -> dict[str, Any]:
    """One row: lists have an entry a level."""
    h = stats.clipped if matrix in OUTLIERS else stats.raw
    under = {"own": h, "held_out": stats.held_out, "held_out_later": stats.held_out_later}
    ours, seconds = nested(weight, h, seed, preset, "bytes")
    trellis, trellis_seconds = nested(weight, h, seed, preset, "trellis")
    source = GaussianSource.of(weight, h)
    bits = [true_bits(p, *weight.shape, own_codebooks=False) for p in LEVELS]
    row: dict[str, Any] = {
        "matrix": matrix,
        "group": "outliers" if matrix in OUTLIERS else "ordinary",
        "shape": list(weight.shape),
        "nested": {name: weighted_errors(weight, ours, gram) for name, gram in under.items()},
        "trellis": {name: weighted_errors(weight, trellis, gram) for name, gram in under.items()},
        "seconds": seconds,
        "trellis_seconds": trellis_seconds,
        "true_bits": bits,
        "aqlm_true_bits": [true_bits(p, *weight.shape, own_codebooks=True) for p in LEVELS],
        "bound": [source.distortion(b) / source.power for b in bits],
    }
    if with_aqlm:
        theirs, row["aqlm_seconds"] = aqlm(weight, h)
        row["aqlm"] = {name: weighted_errors(weight, theirs, gram) for name, gram in under.items()}
    return row


def tell(row: dict[str, Any], anchors: dict[tuple[str, int], float]) -> None:
    """Print a row, a line a level."""
    for i, p in enumerate(LEVELS):
        e = row["nested"]["own"][i]
        line = (
            f"{row['matrix']:>8} P={p}  ours {e:.6f} ({row['true_bits'][i]:.3f} bits, "
            f"{10 * math.log10(e / row['bound'][i]):.1f} dB above the bound {row['bound'][i]:.6f})"
        )
        ratios = [row["trellis"][n][i] / row["nested"][n][i] for n in row["nested"]]
        line += "  trellis over bytes {:.2f}, held out {:.2f}, without first tokens {:.2f}".format(
            *ratios
        )
        if "aqlm" in row:
            line += f"  AQLM {row['aqlm']['own'][i]:.6f} ({row['aqlm_true_bits'][i]:.3f} bits)"
            ratios = [row["nested"][n][i] / row["aqlm"][n][i] for n in row["nested"]]
            line += "  ratio {:.2f}, held out {:.2f}, without first tokens {:.2f}".format(*ratios)
            line += f"  {row['seconds']:.1f} / {row['aqlm_seconds']:.0f} s"
        if (row["matrix"], p) in anchors:
            line += f"  published AQLM {anchors[row['matrix'], p]:.6f}"
        print(line, flush=True)


def summary(
    rows: list[dict[str, Any]], anchors: dict[tuple[str, int], float]
) -> dict[str, dict[str, Any]]:
    """Geometric means of the ratios of a group, and of seconds."""
    found: dict[str, dict[str, Any]] = {}
    for group in ("ordinary", "outliers"):
        part = [row for row in rows if row["group"] == group]
        result: dict[str, Any] = {"matrices": len(part)}
        for name in ("own", "held_out", "held_out_later") if part else ():
            result[f"trellis_over_bytes_{name}"] = [
                geometric_mean([row["trellis"][name][i] / row["nested"][name][i] for row in part])
                for i in range(len(LEVELS))
            ]
        coded = [row for row in part if "aqlm" in row]
        for name in ("own", "held_out", "held_out_later") if coded else ():
            result[name] = [
                geometric_mean([row["nested"][name][i] / row["aqlm"][name][i] for row in coded])
                for i in range(len(LEVELS))
            ]
        if coded:
            result["seconds"] = geometric_mean([r["seconds"] / r["aqlm_seconds"] for r in coded])
        known = [[(r["nested"]["own"][i] / anchors[r["matrix"], p]) for r in part
                  if (r["matrix"], p) in anchors] for i, p in enumerate(LEVELS)]  # fmt: skip
        if all(known):
            result["published"] = [geometric_mean(ratios) for ratios in known]
        found[group] = result
    return found


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="finished matrices, JSON lines")
    parser.add_argument("--anchors", type=Path, help="figures of AQLM's published code")
    parser.add_argument("--matrices", default=",".join((*ORDINARY, *OUTLIERS)))
    parser.add_argument("--preset", default="balanced", choices=EFFORTS)
    parser.add_argument("--no-aqlm", action="store_true", help="train no AQLM")
    args = parser.parse_args()
    wanted = [name.strip() for name in args.matrices.split(",")]
    lines = args.anchors.read_text().splitlines() if args.anchors else []
    anchors = {(f"{a['layer']} {a['kind']}", a["M"]): a["rel"][-1] for a in map(json.loads, lines)}
    settings = {"text": args.text.name, "preset": args.preset, "aqlm": not args.no_aqlm}
    lines = args.out.read_text().splitlines() if args.out.exists() else []
    rows = {row["matrix"]: row for row in map(json.loads, lines)}
    if any(row["settings"] != settings for row in rows.values()):
        raise SystemExit(f"{args.out} has rows of other settings than {settings}; name another.")

    source = resolve(args.model)
    runner = BlockRunner.open(source.folder)
    module_of = {}
    for matrix in wanted:
        layer, kind = matrix.split()
        module_of[matrix] = f"{runner.block_prefix(int(layer))}.{NAMES[kind]}"
    if todo := [matrix for matrix in wanted if matrix not in rows]:
        windows, _ = text_windows(args.text, source.tokenizer(), SEQ_LEN, WINDOWS)
        found = statistics(runner, windows, {module_of[m] for m in todo})
        torch.set_num_threads(1)
        for matrix in todo:
            module = module_of[matrix]
            weight = runner.read(f"{module}.weight", torch.float32)
            seed = wanted.index(matrix)
            row = measure(matrix, weight, found[module], seed, args.preset, not args.no_aqlm)
            rows[matrix] = row | {"settings": settings}
            with args.out.open("a") as file:
                file.write(json.dumps(rows[matrix]) + "\n")
            tell(row, anchors)
    told = [rows[matrix] for matrix in wanted]
    if not todo:
        for row in told:
            tell(row, anchors)
    result = summary(told, anchors)
    for group, means in result.items():
        print(
            f"{group}, geometric means of byte planes over AQLM's, and of trellis planes over "
            f"byte planes, at {LEVELS} bits: {means}"
        )
    print(json.dumps({"benchmark": "layers", **settings, "means": result, "rows": told}))


if __name__ == "__main__":
    main()
