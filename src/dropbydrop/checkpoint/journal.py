"""The work folder of a run that can be resumed, after `kill -9` at any moment or a full disk.

Layout of `.<name>.resume` beside OUT:

    journal.jsonl     line 1: the fingerprint; then one line for each finished step
    hidden-<k>.raw    the hidden states after step k: the activation chain
    *.raw             tensors of the finished blocks (staging.py)
    *.safetensors     other tensors that later steps need (`keep`)
    checkpoint/, old/ the final files while they are assembled, and an OUT that is being replaced

Step 0 is the calibration (its windows, embedded), step k the encoding of block k - 1. A run of two
stages (a search, then tuning) has one journal: the last step of the first stage names what is kept
of it, all else of it is removed, and `steps` begins anew. A step is
finished when its line in the journal is complete, and the line is written last: what it refers to
(raw files, hidden states) has been synced before. So the last complete line always describes a
consistent state; anything behind it (a torn line, longer raw files, a newer `hidden` file) is cut
off or removed. Nothing of a finished step is ever overwritten, therefore a full disk loses none.

Kept work is compared before it is continued: a line holds the SHA-256 of every tensor and file that
it refers to, and its own `chain`, SHA-256 over the line before and itself. A bit that flipped, or a
line that is twice there, is refused by name; it cannot be computed again, since the hidden states
that it started from are gone.

The fingerprint holds everything the result depends on: content of model and calibration file,
options, this package's own files, versions of torch and transformers. Work that was started with
another one is refused, not mixed. A lock on the folder keeps two runs from sharing it.

Limits: one machine and build. With another number of threads sums may be rounded differently.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from dropbydrop.system.atomic_folder import claim, hidden, remove, sync, sync_folder
from dropbydrop.system.digest import file_digest
from dropbydrop.system.errors import DropError
from dropbydrop.system.file_errors import file_errors

from .config import MANIFEST_FILE
from .staging import DamagedWorkError, StagingFile
from .tensor_files import StreamedTensor, stream_tensors

JOURNAL = "journal.jsonl"


def work_folder(out: Path) -> Path:
    """Where a run that can be resumed keeps its work."""
    return hidden(out, "resume")


class Journal:
    """An opened and locked work folder; use as a context manager.

    Leaving it normally removes the folder (OUT is in place). Leaving it with an error keeps it,
    unless no step was finished, and adds to the error how to go on.

    Attributes:
        path: the folder.
        steps: the records of the finished steps of this stage, in order.
        earlier: those of the stages before, the last of each with "stage": what is kept of it.
    """

    def __init__(self, out: Path, fingerprint: Mapping[str, Any]) -> None:
        """Open the work folder of `out`, or create it.

        Raises:
            DropError: another process works on it; it was started with other options or from
                other files; `out`'s parent does not exist, or the disk is full.
        """
        self.out, self.path = out, work_folder(out)
        self._journal = self.path / JOURNAL
        self._last = ""  # the chain so far
        self._unsaid: dict[str, str] = {}  # files of `keep` since the last commit -> SHA-256
        with file_errors(out):
            self._lock = claim(out, "resume")
            try:
                records = self._read(json.loads(json.dumps(fingerprint)))
            except BaseException:
                os.close(self._lock)
                raise
        steps = [record for record in records if "manifest" not in record]
        ends = [number for number, step in enumerate(steps, 1) if "stage" in step]
        self.earlier, self.steps = steps[: max(ends, default=0)], steps[max(ends, default=0) :]
        self._announced = [record for record in records if "manifest" in record][-1:]

    # ---- the journal -----------------------------------------------------------------------

    def _read(self, fingerprint: dict[str, Any]) -> list[dict[str, Any]]:
        """Finished steps of a journal that fits; a fresh journal if there are none."""
        lines, end = self._lines()
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
        self._last = ""
        for path in self.path.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._append(fingerprint)
        return []

    def _lines(self) -> tuple[list[dict[str, Any]], int]:
        """The whole lines of the journal, and where they end; a torn last line is left out."""
        lines: list[dict[str, Any]] = []
        end = 0
        raw = self._journal.read_bytes() if self._journal.is_file() else b""
        parts = raw.splitlines(keepends=True)
        for number, part in enumerate(parts, 1):
            record = _parsed(part, self._last)
            if record is None:
                if number == len(parts):
                    break  # torn: it was never finished
                raise DamagedWorkError(
                    f"line {number} of {self._journal} is not what was written: damaged. Remove "
                    f"{self.path}, and start again."
                )
            self._last = record.pop("chain")
            lines.append(record)
            end += len(part)
        return lines, end

    def _append(self, record: Mapping[str, Any]) -> None:
        chain = _chained(record, self._last)
        with file_errors(self.out):
            with open(self._journal, "ab") as file:
                file.write(json.dumps({**record, "chain": chain}).encode() + b"\n")
                sync(file)
            sync_folder(self.path)
        self._last = chain

    def commit(self, record: dict[str, Any], hidden: Tensor | None) -> None:
        """Finish a step: `record`, and the hidden states that the next one starts from.

        What the record refers to must be durable by now.

        Raises:
            DropError: the disk is full; earlier steps are not affected.
        """
        file = self.path / f"hidden-{len(self.earlier) + len(self.steps)}.raw"
        if hidden is not None:
            cleanup = file_errors(self.out, cleanup=lambda: file.unlink(missing_ok=True))
            with cleanup, StagingFile(file) as staging:
                staging.add("hidden", hidden)
                record = {**record, "hidden": [file.name, staging.commit()]}
        if self._unsaid:
            record = {**record, "kept": self._unsaid}
        sync_folder(self.path)
        self._append(record)
        self._unsaid = {}
        self.steps.append(record)
        for old in self.path.glob("hidden-*.raw"):
            if old != file:
                with contextlib.suppress(OSError):  # the next step removes it
                    old.unlink()

    def end_stage(self, record: dict[str, Any], keep: str) -> None:
        """Finish the last step of a stage; the file or folder `keep` is all that stays of it.

        Raises:
            DropError: the disk is full.
        """
        self.commit({**record, "stage": keep}, None)
        self.earlier, self.steps = [*self.earlier, *self.steps], []
        self.clear_stage()

    def clear_stage(self) -> None:
        """Before the first step of a stage: remove what the one before, or a dead run, has left."""
        for path in self.path.iterdir():
            if path != self._journal and path.name != self.earlier[-1]["stage"]:
                with contextlib.suppress(OSError):  # the end of the run removes it
                    remove(path) if path.is_dir() else path.unlink()

    def hidden(self) -> Tensor:
        """The hidden states after the last finished step.

        Raises:
            DamagedWorkError: the file is gone, cut off, or not what was written.
            DropError: the system does not let it be read.
        """
        name, entries = self.steps[-1]["hidden"]
        path = self.path / name
        with file_errors(path), StagingFile(path, entries) as staging:
            return staging.read("hidden")

    def keep(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors that later steps need to the file `name`, and make them durable.

        Raises:
            DropError: the disk is full.
        """
        path = self.path / name
        streamed = [StreamedTensor.of(*item) for item in tensors.items()]
        with (
            file_errors(self.out, cleanup=lambda: path.unlink(missing_ok=True)),
            open(path, "wb") as file,
        ):
            digest = hashlib.sha256()
            for chunk in stream_tensors(streamed):
                file.write(chunk)
                digest.update(chunk)
            sync(file)
        self._unsaid[name] = digest.hexdigest()

    def kept(self, name: str) -> dict[str, Tensor]:
        """What `keep` wrote under this name before a step was finished.

        Raises:
            DamagedWorkError: the file is gone, or not what was written.
            DropError: the system does not let it be read.
        """
        path = self.path / name
        said = [step["kept"][name] for step in self.steps if name in step.get("kept", {})]
        with file_errors(path):
            if not said or not path.is_file() or file_digest(path) != said[-1]:
                raise DamagedWorkError(
                    f"{path} is missing, or not what was written: damaged. Remove {self.path}, and "
                    "start again."
                )
            return load_file(path)

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
        try:
            self._leave(error)
        finally:
            os.close(self._lock)

    def _leave(self, error: BaseException | None) -> None:
        if error is None or not (self.earlier or self.steps):
            self._remove()
        elif not isinstance(error, DamagedWorkError):  # which says what to do itself
            note = f"The finished part is kept in {self.path}: {self._progress()}"
            if isinstance(error, DropError | KeyboardInterrupt):  # the user sees only the message
                error.args = (f"{error} {note}".strip(),)
            else:
                error.add_note(note)

    def _remove(self) -> None:
        """The journal goes last: killed in between, the next run still knows that all is done, and
        removes what is left, as it does where something could not be removed."""
        for path in self.path.iterdir():
            with contextlib.suppress(OSError):
                if path.is_dir():
                    remove(path)
                elif path != self._journal:
                    path.unlink()
        if all(path == self._journal for path in self.path.iterdir()):
            remove(self.path)

    def _progress(self) -> str:
        blocks = sum("block" in step for step in self.steps)
        steps = max((step.get("step", 0) for step in self.steps), default=0)
        what = f"{blocks} finished blocks" if blocks else "the calibration"
        what = f"{steps} finished steps" if steps else what
        if self.earlier:
            what = f"the search and {what}" if self.steps else "the search"
        return f"{what}. Give the same command again (with --resume) to go on, or remove it."


def _chained(record: Mapping[str, Any], last: str) -> str:
    """The chain of a record behind a line whose chain is `last`."""
    text = json.dumps({key: value for key, value in record.items() if key != "chain"})
    return hashlib.sha256(f"{last} {text}".encode()).hexdigest()


def _parsed(line: bytes, last: str) -> dict[str, Any] | None:
    """The record of a whole line that follows the one with the chain `last`, or None."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    whole = line.endswith(b"\n") and isinstance(record, dict)
    return record if whole and record.get("chain") == _chained(record, last) else None


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between two fingerprints (in their JSON form), by name; "" if nothing does."""
    names = sorted(k for k in {**before, **now} if before.get(k) != now.get(k))
    return ", ".join(f"{k} ({_short(before.get(k))} then, {_short(now.get(k))} now)" for k in names)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:36] + " …"
