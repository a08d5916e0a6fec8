"""Open and load as many mutated checkpoints as asked; print counts, and every failure by number.

    python scripts/fuzz_checkpoints.py --opens 100000 --loads 2000 --first 0

Mutant N is the same on every machine. The exit status is the number of failures, at most 100.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / part) for part in ("tests/fuzz", "tests", "benchmarks")]

import campaign  # noqa: E402
import mutants  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--opens", type=int, default=10_000, help="mutants to open")
    parser.add_argument("--loads", type=int, default=200, help="mutants to load")
    parser.add_argument("--first", type=int, default=0, help="number of the first mutant")
    args = parser.parse_args()
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        corpus = mutants.make_corpus(scratch / "corpus")
        for what, count, run in (
            ("opens", args.opens, campaign.open_mutants),
            ("loads", args.loads, lambda c, numbers, f: campaign.load_mutants(
                c, numbers.start, len(numbers), f)),
        ):  # fmt: skip
            start = time.monotonic()
            done = run(corpus, range(args.first, args.first + count), scratch / what)
            print(
                f"{count} {what} in {time.monotonic() - start:.0f} s: {dict(done.counts)}",
                flush=True,
            )
            failures += done.failures
    print("\n".join(failures) or "no failures")
    return min(len(failures), 100)


if __name__ == "__main__":
    sys.exit(main())
