"""Mutants, opened and loaded: what may happen to one, and the counts of a campaign.

    python tests/fuzz/campaign.py loads FIRST COUNT CORPUS     # a child: ends itself, or crashes

A mutant is refused with a DropError, or it opens, loads and gives finite logits; and a file that
its manifest does not describe is never loaded. Anything else is a failure, reported by the number
of the mutant. Loads run in a child, whose end by a signal is a failure of the mutant it named last.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash
from rich.console import Console

import mutants
from mutants import Files, Mutant, Stage

_CONSOLE = Console(file=io.StringIO(), width=80)
SLOW = 20.0  # seconds of processor time that no mutant may take


@dataclass
class Campaign:
    """Counts of outcomes, and what failed: number of the mutant and what happened."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def add(self, number: int, made: Mutant, outcome: str) -> None:
        """Record one; an outcome that begins with "!" is a failure."""
        self.counts[outcome.split(":")[0]] += 1
        if outcome.startswith("!"):
            self.failures.append(f"mutant {number} ({'; '.join(made.changes)}): {outcome}")


def differs(folder: Path, sha256: bool = False) -> bool:
    """Whether a file that decides the model is not what the manifest says.

    By the XXH128 of its chunks, which is what loading compares; with `sha256`, or where a manifest
    has no other, by SHA-256. A manifest whose SHA-256 alone is damaged describes the right file:
    loading takes it, and `verify` must tell.
    """
    from dropbydrop.checkpoint.contents import is_document
    from dropbydrop.checkpoint.files import Manifest, read_json
    from dropbydrop.system.digest import CHUNK

    manifest = Manifest.from_dict(read_json(folder / "manifest.json"))
    for name, entry in manifest.files.items():
        path = folder / name
        if not path.exists() or is_document(name):
            continue
        data = path.read_bytes()
        chunks = range(0, len(data), CHUNK)
        if sha256 or entry.xxh128 is None:
            if hashlib.sha256(data).hexdigest() != entry.sha256:
                return True
        elif [xxhash.xxh128_hexdigest(data[i : i + CHUNK]) for i in chunks] != list(entry.xxh128):
            return True
    return False


def opened(folder: Path, shown: set[str] | None = None) -> str:
    """Everything that reads a folder without a model: what happened.

    Args:
        shown: what `info` has printed already, which is not printed again: the table is a function
            of this text alone, and takes a third of the time.
    """
    from dropbydrop.checkpoint import Checkpoint
    from dropbydrop.cli.info import describe
    from dropbydrop.planning.plan import Plan
    from dropbydrop.planning.sensitivity import known_sensitivity
    from dropbydrop.system.errors import DropError

    outcome = "refused"
    for verify in (True, False):
        try:
            checkpoint = Checkpoint.open(folder, verify)
            _show(describe(checkpoint), shown)
            findings = checkpoint.verify()
            checkpoint.check_contents(len(checkpoint.manifest.planes))
            outcome = "opened" if verify else "opened without hashes"
            for read in (known_sensitivity, lambda c: Plan.load(folder / "plan.json").check(c)):
                try:
                    read(checkpoint)
                except DropError:
                    outcome += ", sidecar refused"
            if verify and differs(folder):
                return "! a file that differs from the manifest was accepted"
            if not findings and differs(folder, sha256=True):
                return "! verify calls a folder intact that is not"
            return outcome
        except DropError:
            continue
        except Exception as error:
            return f"! {type(error).__name__}: {str(error)[:200]}"
    return outcome


def _show(found: dict[str, Any], shown: set[str] | None) -> None:
    """Print what `info` prints, as JSON and as a table."""
    from dropbydrop.cli.tables import print_info

    text = json.dumps(found)
    if shown is None or text not in shown:
        with _CONSOLE.capture():
            print_info(found, _CONSOLE)
        if shown is not None and len(shown) < 10_000:
            shown.add(text)


def open_mutants(corpus: list[Files], numbers: Iterable[int], scratch: Path) -> Campaign:
    """Open each mutant, in folders below `scratch`, which is made."""
    done, stage, shown = Campaign(), Stage(scratch), set[str]()
    for number in numbers:
        made, start = mutants.mutant(corpus, number), time.process_time()
        outcome = opened(stage.put(made), shown)
        if time.process_time() - start > SLOW:
            outcome = f"! took {time.process_time() - start:.0f} s"
        done.add(number, made, outcome)
    return done


def loaded(folder: Path, made: Mutant) -> str:
    """A model of the folder, and its logits of few and of many tokens."""
    import torch

    import dropbydrop
    from dropbydrop.system.errors import DropError

    try:
        model = dropbydrop.load(folder)
    except DropError:
        return "refused"
    except Exception as error:
        return f"! {type(error).__name__}: {str(error)[:200]}"
    if differs(folder):
        return "! a file that differs from the manifest was loaded"
    try:
        with torch.no_grad():
            few = model(input_ids=torch.arange(3)[None], use_cache=True).logits
            many = model(input_ids=torch.arange(40)[None] + 5).logits
    except Exception as error:
        return (
            f"! forward: {type(error).__name__}: {str(error)[:200]}" if made.exact else "odd model"
        )
    finite = bool(torch.isfinite(few).all() and torch.isfinite(many).all())
    return "loaded" if finite else "! logits are not finite" if made.exact else "odd model"


def load_mutants(corpus: list[Files], first: int, count: int, scratch: Path) -> Campaign:
    """Load mutants first ... first + count - 1, in children that may crash."""
    scratch.mkdir(parents=True, exist_ok=True)
    store = scratch / "corpus.pickle"  # our own, of this process
    store.write_bytes(pickle.dumps(corpus))
    done, number, end = Campaign(), first, first + count
    while number < end:
        child = subprocess.run(
            [sys.executable, __file__, "loads", str(number), str(end - number), str(store)],
            capture_output=True, text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip
        lines = [json.loads(line) for line in child.stdout.splitlines() if line.startswith("{")]
        begun = [line["number"] for line in lines if "outcome" not in line]
        for line in (line for line in lines if "outcome" in line):
            done.add(line["number"], mutants.mutant(corpus, line["number"]), line["outcome"])
        if child.returncode == 0:
            break
        if not begun:
            raise RuntimeError(child.stderr[-2000:])
        outcome = f"! child ended with {child.returncode}: {child.stderr[-300:]}"
        done.add(begun[-1], mutants.mutant(corpus, begun[-1]), outcome)
        number = begun[-1] + 1
    return done


def _child(first: int, count: int, store: str) -> None:
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    corpus: list[Files] = pickle.loads(Path(store).read_bytes())
    for number in range(first, first + count):
        made = mutants.mutant(corpus, number)
        folder = made.write(Path(store).parent / "loading")
        _say({"number": number})
        _say({"number": number, "outcome": loaded(folder, made)})


def _say(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    _child(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
