"""Matrix by matrix: one nested code against AQLM dedicated to each level.

    python benchmarks/layers.py MODEL --text FILE --anchors aqlm_layers.jsonl [--preset balanced]

For every matrix of the anchors file the Gram matrix of its inputs is rebuilt as it was for AQLM
(32 windows of 1,024 tokens from the start of the text, no BOS, every token weighted alike), the
matrix is encoded once for levels 2, 3, 4, and its weighted errors tr(E H E^T) / tr(W H W^T)
are divided by AQLM's, which come from a code of its own for each level. Beside them: the errors
under an H from the next 32 windows, true bits a weight of both, the Gaussian bound by reverse
water-filling at our true bits and the distance to it, and seconds (one thread).

Lines of the anchors file: {"layer", "kind": q|up|down, "M", "rel": [errors after 1..M codebooks],
"sec"}; its seconds are of another run and machine state, so only their order of magnitude counts.
The last line printed is one JSON object.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch

from dropbydrop.baselines.additive import Training, train
from dropbydrop.code import GROUP
from dropbydrop.encoder import EFFORTS, encode_site
from dropbydrop.objective import weighted_errors
from dropbydrop.refit import prefixes
from dropbydrop.rotation import Rotation
from dropbydrop.sources import resolve
from dropbydrop.theory import GaussianSource
from dropbydrop.universal import default_lambdas, universal_set
from dropbydrop.walk import Walk

LEVELS = (2, 3, 4)
NAMES = {"q": "self_attn.q_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}


def grams(walk: Walk, ids: torch.Tensor, wanted: set[str]) -> dict[str, torch.Tensor]:
    """Module -> H over all tokens of ids [n, T], unclipped."""
    hidden, found = walk.embed(ids), {}
    for i in range(walk.num_blocks):
        captured = walk.capture(i, walk.block(i), hidden, clip=math.inf, out=hidden)
        for site in captured.sites:
            for module in wanted.intersection(site.modules):
                found[module] = captured.grams[site.name]
        walk.release(i)
    return found


def true_bits(level: int, d_out: int, d_in: int, own_codebooks: bool) -> float:
    """Codes, float16 scales, and fp16 codebooks of 256 entries where they are the matrix's own."""
    extra = 16 * d_out + (level * 256 * GROUP * 16 if own_codebooks else d_in)
    return level + extra / (d_out * d_in)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--anchors", type=Path, required=True)
    parser.add_argument("--preset", default="balanced", choices=EFFORTS)
    parser.add_argument("--aqlm", action="store_true", help="train AQLM in the same run")
    args = parser.parse_args()
    anchors = [json.loads(line) for line in args.anchors.read_text().splitlines()]
    anchors = [a for a in anchors if a["kind"] in NAMES]
    source = resolve(args.model)
    walk = Walk.open(source.folder)
    module_of = {
        (a["layer"], a["kind"]): f"{walk.block_prefix(a['layer'])}.{NAMES[a['kind']]}"
        for a in anchors
    }
    tokens = source.tokenizer()(args.text.read_text(), return_tensors="pt").input_ids[0]
    windows = tokens[: 64 * 1024].view(64, 1024)
    names = set(module_of.values())
    own, held = grams(walk, windows[:32], names), grams(walk, windows[32:], names)

    torch.set_num_threads(1)
    codebooks, lambdas = universal_set(LEVELS), default_lambdas(LEVELS)
    rows, logs = [], {p: [] for p in LEVELS}
    for n, ((layer, kind), module) in enumerate(sorted(module_of.items())):
        weight = walk.read(f"{module}.weight", torch.float32)
        rotation = Rotation.make(weight.shape[1], seed=n)
        start = time.perf_counter()
        code = encode_site(
            {module: weight},
            own[module],
            rotation,
            codebooks,
            LEVELS,
            lambdas,
            EFFORTS[args.preset],
        )[module]
        seconds = time.perf_counter() - start
        scaled = code.scales.float()[:, None]
        decoded = [rotation.inverse(scaled * q) for q in prefixes(code.codes, codebooks, LEVELS)]
        held_out = weighted_errors(weight, decoded, held[module])
        bound = GaussianSource.of(weight, own[module])
        for i, p in enumerate(LEVELS):
            peer = next(
                (a for a in anchors if (a["layer"], a["kind"], a["M"]) == (layer, kind, p)), None
            )
            if peer is None:
                continue
            bits = true_bits(p, *weight.shape, own_codebooks=False)
            limit = bound.distortion(bits) / bound.power
            ratio = code.errors[i] / peer["rel"][-1]
            logs[p].append(math.log(ratio))
            rows.append(
                {
                    "matrix": f"{layer} {kind}",
                    "level": p,
                    "nested": code.errors[i],
                    "aqlm_dedicated": peer["rel"][-1],
                    "ratio": ratio,
                    "held_out": held_out[i],
                    "true_bits": bits,
                    "aqlm_true_bits": true_bits(p, *weight.shape, own_codebooks=True),
                    "bound": limit,
                    "db_above_bound": 10 * math.log10(code.errors[i] / limit),
                    "seconds_all_levels": seconds,
                    "aqlm_seconds": peer["sec"],
                }
            )
            r = rows[-1]
            if args.aqlm:
                start = time.perf_counter()
                state = train(weight, own[module], p, [p], [1.0], Training(), seed=0)
                r["aqlm_here_seconds"] = time.perf_counter() - start
                r["aqlm_here"] = weighted_errors(weight, [state.decode(p)], own[module])[0]
                r["ratio_here"] = r["nested"] / r["aqlm_here"]
                print(
                    f"{r['matrix']:>8} P={p} aqlm here {r['aqlm_here']:.5f}, "
                    f"{r['aqlm_here'] / r['aqlm_dedicated']:.2f} of the anchor's, ratio "
                    f"{r['ratio_here']:.2f}, {r['aqlm_here_seconds']:.1f} s",
                    flush=True,
                )
            print(
                f"{r['matrix']:>8} P={p} ours {r['nested']:.5f} aqlm {r['aqlm_dedicated']:.5f} "
                f"ratio {ratio:.2f} held-out {r['held_out']:.5f} bits {bits:.3f} / "
                f"{r['aqlm_true_bits']:.3f} bound {limit:.5f} ({r['db_above_bound']:.1f} dB) "
                f"{seconds:.1f} s / {r['aqlm_seconds']:.0f} s",
                flush=True,
            )
    mean = {str(p): math.exp(sum(v) / len(v)) for p, v in logs.items() if v}
    print("geometric mean of the ratios:", {p: round(v, 3) for p, v in mean.items()})
    print(json.dumps({"geometric_mean_ratio": mean, "rows": rows}))


if __name__ == "__main__":
    main()
