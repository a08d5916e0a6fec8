"""Many generations and views of one loaded model: what is left of them.

    python benchmarks/endurance.py OUT [--generations 10000] [--views 1000]

Prints, for each, the growth of the process's memory and the number of modules that outlived their
view. OUT is any checkpoint; a tiny one does, since a leak does not depend on the size.
"""

from __future__ import annotations

import argparse
import gc
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import dropbydrop
from dropbydrop.runtime.modules import NestedLinear
from dropbydrop.runtime.views import store_of


@dataclass(frozen=True)
class Growth:
    """What work has left: MiB of resident memory, and quantized modules that are still alive."""

    mib: float
    objects: int
    seconds: float


def _alive() -> tuple[float, int]:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    mib = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    return mib, sum(issubclass(type(thing), NestedLinear) for thing in gc.get_objects())


def _repeat(count: int, work: Any) -> Growth:
    before, started = _alive(), time.perf_counter()
    for number in range(count):
        work(number)
    seconds = time.perf_counter() - started
    after = _alive()
    return Growth(after[0] - before[0], after[1] - before[1], seconds)


def generations(model: Any, count: int) -> Growth:
    """Generate four tokens so many times, from another prompt each time."""
    vocab = model.config.vocab_size

    def work(number: int) -> None:
        ids = torch.tensor([[3 + number % (vocab - 3), 3 + number // vocab % (vocab - 3)]])
        model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)

    return _repeat(count, work)


def views(model: Any, count: int) -> Growth:
    """Make so many views of all levels in turn, and run a token through each."""
    levels = store_of(model).checkpoint.levels

    def work(number: int) -> None:
        view = dropbydrop.view(model, bits=levels[number % len(levels)])
        with torch.no_grad():
            view(torch.tensor([[3 + number % 16]]))

    return _repeat(count, work)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="checkpoint folder")
    parser.add_argument("--generations", type=int, default=10_000, help="number of generations")
    parser.add_argument("--views", type=int, default=1_000, help="number of views")
    args = parser.parse_args()
    model = dropbydrop.load(args.out)
    for work, count in ((generations, args.generations), (views, args.views)):
        work(model, 20)  # caches fill
        grown = work(model, count)
        print(
            f"{count} {work.__name__}: {grown.mib:+.1f} MiB, {grown.objects:+d} modules, "
            f"{grown.seconds:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
