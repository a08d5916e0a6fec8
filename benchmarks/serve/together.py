"""8 requests at once against one after another, through torch: `python together.py OUT`.

OUT is written unless it is there: a random model of Gemma 3's shape, 100 million weights in its
blocks, which has no native step. Both ways go through the server's worker, in turns in one process,
without HTTP. Tokens a second, prompts included, by the clock and of the processor, and the ratios
of the rounds.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

sys.path.insert(0, str(Path(__file__).parents[1]))

from dropbydrop.serve.engine import Engine
from dropbydrop.serve.job import Event, Failed, Finished, Job
from dropbydrop.serve.precisions import Precisions
from dropbydrop.serve.sampling import Sampler, Sampling
from dropbydrop.serve.shed import PINNED, Load
from random_model import random_checkpoint

SHAPE: dict[str, Any] = {
    "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18,
    "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 32768,
    "sliding_window": 512, "tie_word_embeddings": True, "max_position_embeddings": 4096,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="checkpoint folder")
    parser.add_argument("--requests", type=int, default=8, help="requests at once")
    parser.add_argument("--prompt", type=int, default=16, help="tokens of the shortest prompt")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of an answer")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of both ways")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1")
    args = parser.parse_args()
    if not args.out.exists():
        with torch.device("meta"):
            model = Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE))
        random_checkpoint(args.out, model)
    precisions = Precisions(args.out, None, args.device)
    precisions.warm_up()
    engine = Engine(precisions, None, 64)
    engine.start()
    print(json.dumps(measure(engine, args)))
    engine.stop()


def measure(engine: Engine, args: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second both ways, at each level."""
    found: dict[str, Any] = {"batched": engine.precisions.batched}
    count = args.requests * args.tokens
    for bits in engine.precisions.levels:
        times: dict[str, list[tuple[float, float]]] = {"together": [], "one_by_one": []}
        for _ in range(args.rounds + 1):  # the first is to warm up
            jobs = made(bits, args)
            times["together"].append(answer(engine, [jobs]))
            times["one_by_one"].append(answer(engine, [[job] for job in made(bits, args)]))
        rates = {
            name: {
                "clock": count / median(t[0] for t in seconds[1:]),
                "processor": count / median(t[1] for t in seconds[1:]),
            }
            for name, seconds in times.items()
        }
        pairs = list(zip(times["one_by_one"][1:], times["together"][1:], strict=True))
        ratios = {
            kind: [round(a[i] / b[i], 2) for a, b in pairs]
            for i, kind in enumerate(("clock", "processor"))
        }
        found[str(bits)] = {"tokens_per_second": rates, "ratios": ratios}
    return found


def made(bits: int, args: argparse.Namespace) -> list[Job]:
    """Greedy requests with prompts of one to `requests` times the shortest."""
    jobs = []
    for i in range(args.requests):
        ids = torch.arange(1 + i, 1 + i + args.prompt * (1 + i)).tolist()
        sampler = Sampler(Sampling(temperature=0), ids)
        load = Load(bits, PINNED)
        jobs.append(
            Job(i, ids, args.tokens, sampler, Silent(), frozenset(), load, lambda event: None)
        )
    return jobs


def answer(engine: Engine, groups: list[list[Job]]) -> tuple[float, float]:
    """Seconds until groups of requests, one after another, are answered: of the clock, and of the
    processor."""
    clock, used = time.perf_counter(), time.process_time()
    for group in groups:
        left, done = [len(group)], threading.Event()

        def emit(event: Event, left: list[int] = left, done: threading.Event = done) -> None:
            assert not isinstance(event, Failed), event
            left[0] -= isinstance(event, Finished)
            if not left[0]:
                done.set()

        for job in group:
            job.emit = emit
        engine.submit(group)
        done.wait()
    return time.perf_counter() - clock, time.process_time() - used


class Silent:
    """A stream that makes no text of its tokens."""

    stopped = False

    def push(self, token: int) -> str:
        return ""

    def end(self) -> str:
        return ""


if __name__ == "__main__":
    main()
