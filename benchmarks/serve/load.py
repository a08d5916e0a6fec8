"""Load that is raised to several times what a server can do at its highest level.

    python benchmarks/serve/load.py OUT --seconds 120 --json load.json --picture load.svg

First the highest level is measured: requests one after another give tokens a second, R, and the
target is a quarter of it; 16 requests at once, as many as run together, give the capacity in
requests a second. Then requests arrive at random (Poisson, a fixed seed) at a rate that grows from
a quarter of the capacity to `--times` the capacity, twice: to a server that has all levels and may
move `auto` requests down, and to one that has only the highest level, under the same target and
queue.

A request is *within target* if its first token came within `--first` seconds and the others at the
target or faster. *Turned away* is 429; *lost* is anything else without a whole answer. Every answer
is then computed again in this process (`replay.py`): *corrupted* are those that differ, and the KL
divergence to the original tells what lower levels cost.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx2 as httpx
from load_client import PROMPTS, Answer, ask, server
from replay import Judge, levels

BINS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", help="checkpoint folder")
    parser.add_argument("--seconds", type=float, default=60.0, help="duration of each load")
    parser.add_argument("--times", type=float, default=3.0, help="highest rate, in capacities")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of an answer")
    parser.add_argument("--first", type=float, default=2.0, help="seconds to the first token")
    parser.add_argument("--reference", default="smollm2", help="the model before it was quantized")
    parser.add_argument("--queue", type=int, default=32, help="requests that may wait")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--picture", type=Path, help="file for the picture")
    args = parser.parse_args()
    found = measure(args)
    for name, figures in found["servers"].items():
        print(name, json.dumps(figures["counts"]))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    if args.picture:
        draw(found, args.picture)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    with server(args.out, "--target-tps", "0") as (address, _):
        status = httpx.get(f"{address}/status.json").json()
        highest = max(level["bits"] for level in status["levels"])
        body = {"model": status["model"], "max_tokens": args.tokens}
        rate, seconds = asyncio.run(capacity(address, {**body, "bits": highest}))
    target, most = rate / 4, args.times / seconds
    found: dict[str, Any] = {
        "levels": [level["bits"] for level in status["levels"]], "tokens": args.tokens,
        "first": args.first, "tokens_per_second_alone": rate, "target": target,
        "capacity": 1 / seconds, "most_rate": most, "seconds": args.seconds, "servers": {},
    }  # fmt: skip
    common = ("--target-tps", f"{target:.3f}", "--queue", str(args.queue))
    arrivals = times_of_arrival(args.seconds, 0.25 / seconds, most)
    sheds, all_answers = {}, {}
    for name, only in (("shedding", ()), ("fixed", ("--bits", str(highest)))):
        with server(args.out, *common, *only) as (address, _):
            all_answers[name] = asyncio.run(load(address, arrivals, {**body, "bits": "auto"}))
            sheds[name] = httpx.get(f"{address}/status.json").json()["shed"]
    judge = Judge(args.out, original(args.reference))
    for name, answers in all_answers.items():
        verdict = judge.judge(answers)
        found["servers"][name] = figures(answers, verdict, found, sheds[name])
    return found


def original(model: str) -> Any:
    """The model before it was quantized."""
    import torch

    from dropbydrop.models.pretrained import read_model
    from dropbydrop.models.sources import resolve

    return read_model(resolve(model).folder, dtype=torch.float32).eval()


async def capacity(address: str, body: dict[str, Any], count: int = 16) -> tuple[float, float]:
    """Tokens a second of a request alone, and seconds a request where all run at once."""
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(count)]
    async with httpx.AsyncClient(base_url=address, timeout=120) as client:
        start = time.perf_counter()
        alone = [await ask(client, prompt, start, **body) for prompt in prompts]
        start = time.perf_counter()
        together = await asyncio.gather(*[ask(client, p, start, **body) for p in prompts])
        seconds = (time.perf_counter() - start) / count
    assert all(answer.failure is None for answer in [*alone, *together]), together
    return sorted(answer.rate for answer in alone)[count // 2], seconds


def times_of_arrival(seconds: float, low: float, high: float) -> list[float]:
    """A Poisson process whose rate grows evenly from `low` to `high` requests a second."""
    chance, now, found = random.Random(0), 0.0, []
    while True:
        now += chance.expovariate(high)
        if now > seconds:
            return found
        if chance.random() < (low + (high - low) * now / seconds) / high:
            found.append(now)


async def load(address: str, arrivals: list[float], body: dict[str, Any]) -> list[Answer]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    async with httpx.AsyncClient(base_url=address, timeout=120, limits=limits) as client:
        start, running = time.perf_counter(), []
        for number, at in enumerate(arrivals):
            await asyncio.sleep(max(0.0, start + at - time.perf_counter()))
            prompt = PROMPTS[number % len(PROMPTS)]
            running.append(asyncio.create_task(ask(client, prompt, start, **body)))
        return list(await asyncio.gather(*running))


def figures(
    answers: list[Answer], verdict: dict[str, Any], setup: dict[str, Any], shed: dict[str, int]
) -> dict[str, Any]:
    def good(answer: Answer) -> bool:
        if answer.failure is not None or answer.first is None:
            return False
        return answer.first - answer.sent <= setup["first"] and answer.rate >= setup["target"]

    whole = [answer for answer in answers if answer.failure is None]
    spent = levels(whole)
    tokens = max(1, sum(spent.values()))
    away = sum(answer.failure == "turned away" for answer in answers)
    counts = {
        "sent": len(answers), "answered": len(whole), "within_target": sum(map(good, answers)),
        "turned_away": away, "lost": len(answers) - len(whole) - away,
        "share_of_tokens": {f"{b:g}": round(n / tokens, 4) for b, n in sorted(spent.items())},
        "failures": Counter(a.failure for a in answers if a.failure), "shed": shed, **verdict,
    }  # fmt: skip
    width, rows = setup["seconds"] / BINS, []
    for i in range(BINS):
        mine = [a for a in answers if i * width <= a.sent < (i + 1) * width]
        begun = [a.switches[0][1] for a in mine if a.switches]
        rows.append(
            {
                "rate": len(mine) / width,
                "within_target": sum(map(good, mine)) / width,
                "level": sum(begun) / len(begun) if begun else None,
            }
        )
    return {
        "counts": counts,
        "bins": rows,
        "answers": [asdict(a) | {"text": None} for a in answers],
    }


def draw(found: dict[str, Any], file: Path) -> None:
    """Requests within target, and the level they began at, over the load that was offered."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    x = [
        0.25 + (found["most_rate"] / found["capacity"] - 0.25) * (i + 0.5) / BINS
        for i in range(BINS)
    ]
    for name, colour in (("shedding", "#17618f"), ("fixed", "#a6370f")):
        rows = found["servers"][name]["bins"]
        label = "all levels, auto" if name == "shedding" else f"{max(found['levels'])} bits only"
        good = [row["within_target"] / found["capacity"] for row in rows]
        left.plot(x, good, "o-", color=colour, label=label)
        right.plot(x, [row["level"] for row in rows], "o-", color=colour, label=label)
    left.plot(x, x, ":", color="#888888", label="offered")
    unit = f"{max(found['levels'])}-bit capacity"
    left.set(xlabel=f"requests offered, over {unit}", ylabel=f"within target, over {unit}")
    right.set(xlabel=f"requests offered, over {unit}", ylabel="level of the first token, mean")
    right.set_yticks(found["levels"])
    left.legend(fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
