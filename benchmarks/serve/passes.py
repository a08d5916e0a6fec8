"""One pass for requests at all levels against one pass for each: `python passes.py OUT --rows 3`.

The same tokens through `fused_decode.decode_together`, in turns in one process: all rows in one
call, grouped by level, and one by one. Milliseconds of the fastest round and the ratios to the
first.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch

from dropbydrop.checkpoint import Checkpoint
from dropbydrop.runtime.fused_decode import decode_together
from dropbydrop.runtime.load import load_views
from dropbydrop.serve.caches import new_cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", help="checkpoint folder")
    parser.add_argument("--rows", type=int, default=3, help="requests at each level")
    parser.add_argument("--prompt", type=int, default=64, help="tokens that each has read")
    parser.add_argument("--rounds", type=int, default=20, help="rounds of each way")
    args = parser.parse_args()
    print(json.dumps(measure(args.out, args.rows, args.prompt, args.rounds)))


@torch.inference_mode()
def measure(out: str, rows: int, prompt: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of a token of all requests, each way."""
    views = {p: model for p, (_, model) in load_views(Checkpoint.open(out)).items()}
    models = [model for model in views.values() for _ in range(rows)]
    caches = []
    for i, model in enumerate(models):
        cache = new_cache(model.config, True, 1, prompt + 3 * rounds + 8)
        ids = torch.arange(i, i + prompt)[None]
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        caches.append(cache)

    def run(parts: list[range]) -> None:
        for part in parts:
            chosen = list(part)
            made = decode_together([models[i] for i in chosen], chosen, [caches[i] for i in chosen])
            assert made is not None, "the native step does not serve this model"

    count = len(models)
    ways = {
        "one_pass": [range(count)],
        "pass_for_each_level": [range(i, i + rows) for i in range(0, count, rows)],
        "one_by_one": [range(i, i + 1) for i in range(count)],
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, parts in ways.items():
            start = time.perf_counter()
            run(parts)
            times[name].append(time.perf_counter() - start)
    best = {name: min(seconds) for name, seconds in times.items()}
    return {
        "levels": list(views), "rows": count, "ms": {n: s * 1e3 for n, s in best.items()},
        "ratios": {n: s / best["one_pass"] for n, s in best.items()},
    }  # fmt: skip


if __name__ == "__main__":
    main()
