"""The work folder of a run that can be resumed, without the run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dropbydrop.checkpoint.journal import JOURNAL, Journal, differences, work_folder
from dropbydrop.checkpoint.staging import DamagedWorkError
from dropbydrop.system.errors import DropError, FormatError

MANIFEST = json.dumps({}).encode()
DONE = {"manifest": hashlib.sha256(MANIFEST).hexdigest(), "run": 5}


def interrupt(out: Path, fingerprint: dict[str, object], work: Callable[[Journal], object]) -> None:
    """A run that is interrupted after `work`."""

    def run() -> None:
        with Journal(out, fingerprint) as journal:
            work(journal)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="Give the same command again"):
        run()


def two_steps(work: Journal) -> None:
    """Two finished steps, and what the next one needs."""
    work.keep("windows.safetensors", {"ids": torch.arange(6).view(2, 3)})
    work.commit({"calibration": {}}, torch.ones(2, 2, dtype=torch.bfloat16))
    work.commit({"block": 0}, torch.full((2, 2), 0.5))


def test_finished_steps_are_found_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupt(out, {"seed": 1}, two_steps)
    with Journal(out, {"seed": 1}) as work:
        found = [sorted(step) for step in work.steps]
        assert found == [["calibration", "hidden", "kept"], ["block", "hidden"]]
        assert torch.equal(work.hidden(), torch.full((2, 2), 0.5))
        assert torch.equal(work.kept("windows.safetensors")["ids"], torch.arange(6).view(2, 3))
    assert list(tmp_path.iterdir()) == []  # all is done: nothing stays


def test_another_fingerprint_is_refused_by_name(tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupt(out, {"seed": 1, "levels": (2, 3)}, two_steps)
    message = r"what differs: bits \(null then, 3 now\), seed \(1 then, 2 now\)\. Give the same"
    with pytest.raises(DropError, match=message):
        Journal(out, {"seed": 2, "levels": (2, 3), "bits": 3})
    assert differences({"a": 1}, {"a": 1}) == ""


def test_a_step_is_finished_when_its_line_is_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupt(out, {}, two_steps)
    journal = work_folder(out) / JOURNAL
    journal.write_bytes(journal.read_bytes() + b'{"block": 1')
    interrupt(out, {}, lambda work: [] if len(work.steps) == 2 else work.steps.clear())
    (work_folder(out) / "hidden-1.raw").write_bytes(b"")
    with pytest.raises(FormatError, match=r"damaged\. Remove it"), Journal(out, {}) as work:
        work.hidden()


@pytest.mark.parametrize("damage", ["doubled", "flipped", "lost", "last", "exchanged", "deep"])
def test_a_damaged_journal_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    out = tmp_path / "out"
    interrupt(out, {}, two_steps)
    interrupt(out, {}, lambda work: work.commit({"block": 1}, torch.ones(1)))
    journal = work_folder(out) / JOURNAL
    lines = journal.read_bytes().splitlines(keepends=True)
    a, b, c, d = lines
    journal.write_bytes(
        b"".join(
            {
                "doubled": [a, b, c, c, d],
                "flipped": [a, b, c.replace(b'"block": 0', b'"block": 8'), d],
                "lost": [a, b, d, b],
                "last": [a, b, c, d.replace(b'"block": 1', b'"block": 9')],
                "exchanged": [a, c, b, d],
                "deep": [a, b, b"[" * 200_000 + b"\n", d],
            }[damage]
        )
    )
    if damage == "last":  # torn, for all one knows: the step before has no hidden states any more
        with (
            pytest.raises(DamagedWorkError, match=r"hidden-1\.raw has 0 bytes"),
            Journal(out, {}) as work,
        ):
            work.hidden()
    else:
        with pytest.raises(DamagedWorkError, match=r"line \d of .*journal.jsonl is not what was"):
            Journal(out, {})
    assert journal.exists()


def _windows(work: Journal) -> object:
    return work.kept("windows.safetensors")


def test_kept_tensors_and_hidden_states_are_compared(tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupt(out, {}, two_steps)
    for name in ("windows.safetensors", "hidden-1.raw"):
        path = work_folder(out) / name
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 4]))
        read = Journal.hidden if name.startswith("hidden") else _windows
        with (
            pytest.raises(DamagedWorkError, match=f"{name}.* not what was written: damaged"),
            Journal(out, {}) as work,
        ):
            read(work)
        path.write_bytes(content)
    with Journal(out, {}) as work:
        work.hidden()
        work.kept("windows.safetensors")


def test_a_run_that_was_killed_after_the_rename_is_done(tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupt(out, {}, two_steps)
    interrupt(out, {}, lambda work: work.publishing(DONE))
    with Journal(out, {}) as work:
        assert work.published() is None  # announced, not renamed
        out.mkdir()
        (out / "manifest.json").write_bytes(MANIFEST)
        assert work.published() == DONE
