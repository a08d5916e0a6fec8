"""Every fault at every file operation of every command that writes.

    python tests/faults/fault_campaign.py [--code bytes] [--every 1]

Prints a table of how often each command was killed, cut off in the middle of a write, robbed of
power, refused by the operating system or interrupted, and ends with an error at the first fault
after which OUT is neither the old one nor the new one, or the same command does not succeed with
the same bytes. The tests run a sample of it.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

if __name__ == "__main__":
    root = Path(__file__).parents[2]
    sys.path[:0] = [str(root / name) for name in ("tests", "benchmarks", "research/src")]

from fault_works import Work, contents, hidden_names, make_source, put, works
from file_faults import ERRORS, SIGNALS, disturbed, operations, states

from dropbydrop.system.errors import DropError
from tiny import CODES

FAULTS = (*ERRORS, *SIGNALS)


class Trial:
    """A command and what it must leave.

    Args:
        work: the command.
        old: what is replaced, where it may be.
        folder: an empty one to work in.
    """

    def __init__(self, work: Work, old: Path, folder: Path) -> None:
        self.work, self.old, self.folder, self.number = work, old, folder, 0
        first = self._root(False)
        work.run(first)
        self.new = contents(first / "out")
        assert hidden_names(first) == []
        self.starts = (False, True) if work.replaces else (False,)

    def _root(self, replacing: bool) -> Path:
        """A new folder, with an OUT that is replaced or none."""
        self.number += 1
        place = self.folder / str(self.number)
        place.mkdir()
        if replacing:
            old = self.old / "manifest.json" if self.work.name == "plan --save" else self.old
            put(old, place / "out")
        return place

    def operations(self, replacing: bool) -> list[str]:
        """The file operations of an undisturbed run."""
        return operations(self._root(replacing), self.work.run)

    def deaths(self, replacing: bool, at: set[int] | None = None) -> int:
        """Check every moment (or those) at which the process may die; how many there were."""
        place = self._root(replacing)
        old = contents(place / "out")
        found = states(place, self.work.run, self.folder / f"{self.number}-died", at)
        for state in found:
            where = f"{self.work.name}, {state.kind} at operation {state.number}, {state.operation}"
            self._check_whole(state.root, old, where)
            self._check_again(state.root, where)
            shutil.rmtree(state.root)
        return len(found)

    def disturb(self, replacing: bool, number: int, fault: str) -> None:
        """Check one fault at one operation."""
        place = self._root(replacing)
        old = contents(place / "out")
        error = disturbed(place, self.work.run, number, fault)
        where = f"{self.work.name}, {fault} at operation {number}: {error!r}"
        if error is None:  # of no consequence, as where something is removed
            assert contents(place / "out") == self.new, where
        else:
            assert isinstance(error, KeyboardInterrupt if fault in SIGNALS else DropError), where
            self._check_whole(place, old, where)
        self._check_again(place, where)
        shutil.rmtree(place)

    def _check_whole(self, place: Path, old: object, where: str) -> None:
        found = contents(place / "out")
        if self.work.name not in ("pull", "compare"):
            assert found == old or found == self.new, where
            return
        # these fill a folder file by file, each under its name when it is whole
        assert isinstance(self.new, dict)
        for name, content in (found or {}).items() if isinstance(found, dict) else ():
            if not Path(name).name.startswith(".") and not name.endswith(".part"):
                assert content == self.new[name], f"{where}: {name}"

    def _check_again(self, place: Path, where: str) -> None:
        """The same command succeeds, or says that all is there."""
        try:
            self.work.run(place)
        except DropError as error:
            if "exists; choose another name" not in str(error):
                raise AssertionError(f"{where}: then {error}") from error
        assert contents(place / "out") == self.new, where
        assert hidden_names(place) == [], where


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--code", choices=CODES, nargs="*", default=CODES, help="kinds of planes")
    parser.add_argument("--every", type=int, default=1, help="take every n-th operation only")
    args = parser.parse_args()
    total: Counter[str] = Counter()
    for code in args.code:
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            source = make_source(place / "source", code=code)
            old = make_source(place / "old", seed=1, code=code)
            for work in works(source):
                inner = place / work.name.replace(" ", "")
                inner.mkdir()
                tried, count = Trial(work, old, inner), Counter[str]()
                for replacing in tried.starts:
                    names = tried.operations(replacing)
                    numbers = range(1, len(names) + 1, args.every)
                    count["operations"] += len(names)
                    count["deaths"] += tried.deaths(replacing, set(numbers))
                    for number in numbers:
                        for fault in FAULTS:
                            tried.disturb(replacing, number, fault)
                            count["errors" if fault in ERRORS else "signals"] += 1
                total += count
                print(f"{code}, {work.name}: {dict(count)}", flush=True)
                shutil.rmtree(inner)
    print(f"all: {dict(total)}")


if __name__ == "__main__":
    main()
