"""What the server costs beside the model: `python benchmarks/serve/cost.py OUT --leak 10000`.

overhead      one streamed request over HTTP against the same tokens through the model's forward
              (as `dropbydrop bench` measures), in turns, at the highest level; medians
throughput    8 requests at once against the same 8 one after another, in turns
leak          resident bytes of the server over many requests, the first tenth as warm-up
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import time
from pathlib import Path
from statistics import median
from typing import Any

import httpx2 as httpx
from load_client import PROMPTS, ask, server

AT_ONCE = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", help="checkpoint folder")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each measurement")
    parser.add_argument("--leak", type=int, default=0, help="requests of the leak test")
    args = parser.parse_args()
    with server(args.out, "--target-tps", "0", "--queue", "64") as (address, pid):
        status = httpx.get(f"{address}/status.json").json()
        highest = max(level["bits"] for level in status["levels"])
        body = {"model": status["model"], "bits": highest, "max_tokens": args.tokens}
        found = {
            "overhead": asyncio.run(overhead(args, address, body, highest, pid)),
            "throughput": asyncio.run(throughput(args, address, body, pid)),
        }
        if args.leak:
            found["leak"] = asyncio.run(leak(address, {**body, "max_tokens": 4}, pid, args.leak))
    print(json.dumps(found))


async def overhead(
    args: argparse.Namespace, address: str, body: dict[str, Any], bits: int, pid: int
) -> dict[str, Any]:
    """Milliseconds of a token, prompt and request included, inside and outside."""
    from dropbydrop.evaluation.bench import decode_seconds
    from dropbydrop.runtime.load import load

    model, inside, outside = load(args.out, bits), [], []
    async with httpx.AsyncClient(base_url=address, timeout=120) as client:
        for i in range(args.rounds + 1):
            start = time.process_time()
            decode_seconds(model, 16, args.tokens)
            inside.append((time.process_time() - start) / args.tokens)
            start = used(pid)
            answer = await ask(client, PROMPTS[i % len(PROMPTS)], 0.0, **body)
            assert answer.failure is None, answer
            outside.append((used(pid) - start) / args.tokens)
    a, b = median(inside[1:]), median(outside[1:])
    ratios = [round(y / x, 2) for x, y in zip(inside[1:], outside[1:], strict=True)]
    return {"forward_ms": a * 1e3, "served_ms": b * 1e3, "ratio": b / a, "ratios": ratios}


async def throughput(
    args: argparse.Namespace, address: str, body: dict[str, Any], pid: int
) -> dict[str, Any]:
    """Tokens for each second of the processor: 8 requests at once, and one after another."""
    together, alone = [], []
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(AT_ONCE)]
    async with httpx.AsyncClient(base_url=address, timeout=300) as client:
        for _ in range(args.rounds):
            start = used(pid)
            await asyncio.gather(*(ask(client, p, 0.0, **body) for p in prompts))
            together.append(used(pid) - start)
            start = used(pid)
            for prompt in prompts:
                await ask(client, prompt, 0.0, **body)
            alone.append(used(pid) - start)
    count = AT_ONCE * args.tokens
    ratios = [round(a / b, 3) for a, b in zip(alone, together, strict=True)]
    return {
        "together": count / median(together),
        "one_after_another": count / median(alone),
        "ratio": median(alone) / median(together),
        "ratios": ratios,
    }


async def leak(address: str, body: dict[str, Any], pid: int, count: int) -> dict[str, Any]:
    """Resident MB after each tenth of `count` requests, 8 at a time, all different."""
    sizes, failures, waiting = [], 0, asyncio.Semaphore(AT_ONCE)
    async with httpx.AsyncClient(base_url=address, timeout=120) as client:

        async def one(number: int) -> None:
            nonlocal failures
            async with waiting:
                text = f"{number} {PROMPTS[number % len(PROMPTS)]}"
                mine = {**body, "bits": (2, 3, 4)[number % 3]} if body["bits"] == 4 else body
                failures += (await ask(client, text, 0.0, **mine)).failure is not None

        for tenth in range(10):
            first = tenth * count // 10
            await asyncio.gather(*(one(n) for n in range(first, (tenth + 1) * count // 10)))
            sizes.append(round(resident(pid) / 1e6, 1))
    return {"requests": count, "failures": failures, "resident_mb": sizes}


def used(pid: int) -> float:
    """Seconds of the processor that a process has used (Linux), in steps of a hundredth."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident(pid: int) -> int:
    """Bytes of a process in memory (Linux)."""
    found = re.search(r"^VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.M)
    assert found is not None
    return int(found[1]) << 10


if __name__ == "__main__":
    main()
