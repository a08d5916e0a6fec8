"""Open and load as many mutated checkpoints as asked; print counts, and every failure by number.

    python scripts/fuzz_checkpoints.py --opens 100000 --loads 2000 --first 0
    python scripts/fuzz_checkpoints.py --opens 1000000 --loads 0 --state opens.jsonl    # go on

Mutant N is the same on every machine. With `--state` each block of numbers that is done becomes a
line of that file (its counts, its failures), and blocks that have one are not done again; what is
printed at the end is the sum of the file. Scratch folders go where `TMPDIR` says; one in memory
halves the time. The exit status is the number of failures, at most 100.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / part) for part in ("tests/fuzz", "tests", "benchmarks")]

import campaign  # noqa: E402
import mutants  # noqa: E402

BLOCK = 2_000  # mutants of a line of the state


def blocks(first: int, count: int) -> Iterator[range]:
    """The numbers first ... first + count - 1 in blocks."""
    for start in range(first, first + count, BLOCK):
        yield range(start, min(start + BLOCK, first + count))


def run(
    what: str,
    numbers: range,
    state: Path | None,
    one: Callable[[range, Path], campaign.Campaign],
    scratch: Path,
) -> list[dict[str, Any]]:
    """All blocks of a kind; those that the state knows are taken from there."""
    lines = [] if state is None or not state.exists() else state.read_text().splitlines()
    kept = [line for line in map(json.loads, lines) if line["what"] == what]
    done = {(line["first"], line["count"]) for line in kept}
    for block in blocks(numbers.start, len(numbers)):
        if (block.start, len(block)) in done:
            continue
        start, wall = sum(os.times()[:4]), time.monotonic()
        found = one(block, scratch / what)
        line = {
            "what": what,
            "first": block.start,
            "count": len(block),
            "seconds": round(sum(os.times()[:4]) - start, 1),
            "wall": round(time.monotonic() - wall, 1),
            "outcomes": dict(found.counts),
            "failures": found.failures,
        }
        kept.append(line)
        shutil.rmtree(scratch / what)
        gc.collect()
        if state is not None:
            with open(state, "a") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())
    return kept


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--opens", type=int, default=10_000, help="mutants to open")
    parser.add_argument("--loads", type=int, default=200, help="mutants to load")
    parser.add_argument("--first", type=int, default=0, help="number of the first mutant")
    parser.add_argument("--state", type=Path, help="file that keeps what is done")
    args = parser.parse_args()
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        corpus = mutants.make_corpus(scratch / "corpus")
        gc.collect()
        gc.freeze()  # the libraries, which are most of what a collection would look through
        for what, count, one in (
            ("opens", args.opens, lambda n, f: campaign.open_mutants(corpus, n, f)),
            ("loads", args.loads, lambda n, f: campaign.load_mutants(corpus, n.start, len(n), f)),
        ):
            lines = run(what, range(args.first, args.first + count), args.state, one, scratch)
            total: Counter[str] = Counter()
            for line in lines:
                total += Counter(line["outcomes"])
                failures += line["failures"]
            number, seconds = sum(line["count"] for line in lines), sum(n["seconds"] for n in lines)
            print(f"{number} {what}, {seconds:.0f} s of processor time: {dict(total)}", flush=True)
    print("\n".join(failures) or "no failures")
    return min(len(failures), 100)


if __name__ == "__main__":
    sys.exit(main())
