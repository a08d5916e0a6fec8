"""What a model takes, against what its plan predicts.

    python benchmarks/cpu/memory.py OUT --bits 2,2.5,3,4

OUT should be of some size, for the interpreter's ups and downs count too; `python
benchmarks/random_model.py OUT` makes a random checkpoint, and random codes weigh what real ones
weigh. Every precision runs in a process of its own: imports and a first product are done, the
resident set is noted, the model is loaded, reads a prompt of --context tokens less 8, and generates
8. Reported beside the prediction of `Plan.memory`:

    held       unique tensor bytes, which must be the predicted weights exactly
    resident   growth of the resident set once it has generated, without what the allocator keeps
               for later (prediction: weights and cache)
    kept       what the allocator keeps
    peak       the largest it was in between (prediction: the same and the activations)

The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path


def measure(out: str, bits: str, context: int) -> dict[str, float]:
    """In this process: load, generate, compare."""
    import torch

    import dropbydrop
    from dropbydrop.checkpoint import Checkpoint
    from dropbydrop.cli.options import parse_precision
    from dropbydrop.planning.memory import held_bytes

    torch.ones(64, 64) @ torch.ones(64, 64)
    checkpoint = Checkpoint.open(out)
    warm = _status("VmRSS")
    model = dropbydrop.load(out, **vars(parse_precision(bits)), dtype=torch.bfloat16)
    plan = dropbydrop.plan_of(model)
    ids = torch.randint(5, 200, (1, context - 8), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        kept = model.generate(ids, do_sample=False, min_new_tokens=8, max_new_tokens=8,
                              pad_token_id=0, return_dict_in_generate=True)  # fmt: skip
    need = plan.memory(checkpoint, torch.bfloat16, context)
    untrimmed, peak = _status("VmRSS"), _status("VmHWM")
    gc.collect()
    _return_free_memory()
    resident = _status("VmRSS")
    del kept
    return {
        "bits": plan.average_bits(checkpoint),
        "held": held_bytes(model),
        "predicted_weights": need.weights - need.shared,
        "resident": resident - warm,
        "untrimmed": untrimmed - warm,
        "predicted_resident": need.total - need.activations,
        "peak": peak - warm,
        "predicted_peak": need.total,
    }


def _return_free_memory() -> None:
    """Have glibc give back what it keeps for later."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.split(f"{field}:")[1].split()[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="checkpoint folder")
    parser.add_argument("--bits", default="2,2.5,3,4")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--one", help=argparse.SUPPRESS)  # this process measures that precision
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(str(args.out), args.one, args.context)))
        return
    rows = []
    print(f"{'bits':>6}{'held MB':>9}{'=':>3}{'resident':>10}{'ratio':>7}{'kept':>8}{'peak':>8}")
    for bits in args.bits.split(","):
        command = [sys.executable, __file__, str(args.out), "--one", bits,
                   "--context", str(args.context)]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        row = json.loads(done.stdout.splitlines()[-1])
        rows.append(row)
        exact = "yes" if row["held"] == row["predicted_weights"] else "NO"
        print(
            f"{row['bits']:6.2f}{row['held'] / 1e6:9.1f}{exact:>4}{row['resident'] / 1e6:9.1f}"
            f"{row['resident'] / row['predicted_resident']:7.3f}"
            f"{(row['untrimmed'] - row['resident']) / 1e6:8.1f}{row['peak'] / 1e6:8.1f}"
        )
    print(json.dumps({"benchmark": "memory", "checkpoint": args.out.name,
                      "context": args.context, "rows": rows}))  # fmt: skip


if __name__ == "__main__":
    main()
