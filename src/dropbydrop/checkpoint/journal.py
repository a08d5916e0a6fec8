"""The work folder of a run that can be resumed, after `kill -9` at any moment or a full disk.

Layout of `.<name>.resume` beside OUT:

    journal.jsonl     line 1: the fingerprint; then one line for each finished step
    hidden-<k>.raw    the hidden states after step k: the activation chain
    *.raw             tensors of the finished blocks (staging.py)
    *.safetensors     other tensors that later steps need (`keep`)
    checkpoint/, old/ the final files while they are assembled, and an OUT that is being replaced

Step 0 is the calibration (its windows, embedded), step k the encoding of block k - 1. A step is
finished when its line in the journal is complete, and the line is written last: what it refers to
(raw files, hidden states) has been synced before. So the last complete line always describes a
consistent state; anything behind it (a torn line, longer raw files, a newer `hidden` file) is cut
off or removed. Nothing of a finished step is ever overwritten, therefore a full disk loses none.

The fingerprint holds everything the result depends on: content of model and calibration file,
options, this package's own files, versions of torch and transformers. Work that was started with
another one is refused, not mixed. A lock on the folder keeps two runs from sharing it.

Limits: one machine and build. With another number of threads sums may be rounded differently.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from dropbydrop.system.atomic_folder import full_disk, lock, sync, sync_folder
from dropbydrop.system.digest import file_digest
from dropbydrop.system.errors import DropError

from .config import MANIFEST_FILE
from .staging import StagingFile
from .tensor_files import StreamedTensor, stream_tensors

JOURNAL = "journal.jsonl"


def work_folder(out: Path) -> Path:
    """Where a run that can be resumed keeps its work."""
    return out.parent / f".{out.name}.resume"


class Journal:
    """An opened and locked work folder; use as a context manager.

    Leaving it normally removes the folder (OUT is in place). Leaving it with an error keeps it,
    unless no step was finished, and adds to the error how to go on.

    Attributes:
        path: the folder.
        steps: the records of the finished steps, in order.
    """

    def __init__(self, out: Path, fingerprint: Mapping[str, Any]) -> None:
        """Open the work folder of `out`, or create it.

        Raises:
            DropError: another process works on it; it was started with other options or from
                other files; `out`'s parent does not exist, or the disk is full.
        """
        self.out, self.path = out, work_folder(out)
        if not out.parent.is_dir():
            raise DropError(f"{out.parent} is not a folder; create it first.")
        self._journal = self.path / JOURNAL
        busy = DropError(
            f"another process is working on {out} (it holds {self.path}); wait for it, or choose "
            "another name."
        )
        self._lock = lock(self.path, busy)
        try:
            records = self._read(json.loads(json.dumps(fingerprint)))
        except BaseException:
            os.close(self._lock)
            raise
        self.steps = [record for record in records if "manifest" not in record]
        self._announced = [record for record in records if "manifest" in record][-1:]

    # ---- the journal -----------------------------------------------------------------------

    def _read(self, fingerprint: dict[str, Any]) -> list[dict[str, Any]]:
        """Finished steps of a journal that fits; a fresh journal if there are none."""
        lines, end = [], 0
        if self._journal.is_file():
            for raw in self._journal.read_bytes().splitlines(keepends=True):
                try:
                    lines.append(json.loads(raw))
                except ValueError:
                    break
                if not raw.endswith(b"\n"):
                    lines.pop()
                    break
                end += len(raw)
        if len(lines) > 1:
            if changes := differences(lines[0], fingerprint):
                raise DropError(
                    f"{self.path} holds the work of an interrupted run that cannot be continued "
                    f"like this; what differs: {changes}. Give the same command again, or remove "
                    "the folder to start from the beginning."
                )
            with open(self._journal, "r+b") as file:
                file.truncate(end)
            return lines[1:]
        for path in self.path.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._append(fingerprint)
        return []

    def _append(self, record: Mapping[str, Any]) -> None:
        with full_disk(self.out):
            with open(self._journal, "ab") as file:
                file.write(json.dumps(record).encode() + b"\n")
                sync(file)
            sync_folder(self.path)

    def commit(self, record: dict[str, Any], hidden: Tensor | None) -> None:
        """Finish a step: `record`, and the hidden states that the next one starts from.

        What the record refers to must be durable by now.

        Raises:
            DropError: the disk is full; earlier steps are not affected.
        """
        file = self.path / f"hidden-{len(self.steps)}.raw"
        if hidden is not None:
            cleanup = full_disk(self.out, cleanup=lambda: file.unlink(missing_ok=True))
            with cleanup, StagingFile(file) as staging:
                staging.add("hidden", hidden)
                record = {**record, "hidden": [file.name, staging.commit()]}
        sync_folder(self.path)
        self._append(record)
        self.steps.append(record)
        for old in self.path.glob("hidden-*.raw"):
            if old != file:
                old.unlink()

    def hidden(self) -> Tensor:
        """The hidden states after the last finished step.

        Raises:
            FormatError: the file is gone or cut off.
        """
        name, entries = self.steps[-1]["hidden"]
        with StagingFile(self.path / name, entries) as staging:
            return staging.read("hidden")

    def keep(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors that later steps need to the file `name`, and make them durable.

        Raises:
            DropError: the disk is full.
        """
        path = self.path / name
        streamed = [StreamedTensor.of(*item) for item in tensors.items()]
        with (
            full_disk(self.out, cleanup=lambda: path.unlink(missing_ok=True)),
            open(path, "wb") as file,
        ):
            file.writelines(stream_tensors(streamed))
            sync(file)

    def kept(self, name: str) -> dict[str, Tensor]:
        """What `keep` wrote under this name."""
        return load_file(self.path / name)

    # ---- the end ---------------------------------------------------------------------------

    def publishing(self, record: Mapping[str, Any]) -> None:
        """Note, right before the rename, what OUT is going to be: {"manifest": SHA-256, ...}."""
        self._append(record)

    def published(self) -> dict[str, Any] | None:
        """The last record given to `publishing`, if OUT is what it announced: all is done."""
        for record in self._announced:
            with contextlib.suppress(OSError):
                if file_digest(self.out / MANIFEST_FILE) == record["manifest"]:
                    return record
        return None

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None or not self.steps:
            self._remove()
        else:
            note = f"The finished part is kept in {self.path}: {self._progress()}"
            if isinstance(error, DropError | KeyboardInterrupt):  # the user sees only the message
                error.args = (f"{error} {note}".strip(),)
            else:
                error.add_note(note)
        os.close(self._lock)

    def _remove(self) -> None:
        """The journal goes last: killed in between, the next run still knows that all is done."""
        for path in self.path.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path != self._journal:
                path.unlink()
        shutil.rmtree(self.path, ignore_errors=True)

    def _progress(self) -> str:
        blocks = sum("block" in step for step in self.steps)
        steps = max((step.get("step", 0) for step in self.steps), default=0)
        what = f"{blocks} finished blocks" if blocks else "the calibration"
        what = f"{steps} finished steps" if steps else what
        return f"{what}. Give the same command again (with --resume) to go on, or remove it."


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between two fingerprints (in their JSON form), by name; "" if nothing does."""
    names = sorted(k for k in {**before, **now} if before.get(k) != now.get(k))
    return ", ".join(f"{k} ({_short(before.get(k))} then, {_short(now.get(k))} now)" for k in names)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:36] + " …"
