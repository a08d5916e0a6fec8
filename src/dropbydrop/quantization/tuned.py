"""Search, then tuning, into one checkpoint: the life-cycle of `quantize` with `tune`.

Steps:
    1. the search (pipeline.py) makes a whole checkpoint, `untuned`, in the work folder beside OUT;
    2. tuning (tuning/pipeline.py) goes from there into OUT, with the settings that `tune` has by
       default. The planes are copied byte by byte; OUT appears, or is replaced, at the end.

So OUT is what `quantize` and `tune` give one after the other, file by file, and never the untuned
checkpoint: where tuning fails, OUT is as it was.

    .OUT.partial/untuned   without `resume`; removed at the end, whatever the end is
    .OUT.resume/untuned    with `resume`, when the search is done; before, its files are in `search`

Both stages have one journal and one fingerprint (checkpoint/journal.py): work that was started with
other options is refused whichever stage it was in. When the search is done, its own files are
removed; a run that goes on begins with `untuned` and the steps of tuning, and gives the same bytes.

Limits: those of tuning (job.py refuses them before the search). The disk holds two checkpoints
while the second is written.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from dropbydrop.checkpoint import Checkpoint, CheckpointWriter
from dropbydrop.checkpoint.config import MANIFEST_FILE
from dropbydrop.checkpoint.files import check_replaceable
from dropbydrop.checkpoint.journal import Journal
from dropbydrop.checkpoint.staging import DamagedWorkError
from dropbydrop.system.atomic_folder import AtomicFolder, remove
from dropbydrop.system.digest import file_digest
from dropbydrop.system.errors import DropError
from dropbydrop.system.file_errors import file_errors
from dropbydrop.tuning.job import prepare
from dropbydrop.tuning.pipeline import carry_out, taken_over
from dropbydrop.tuning.pipeline import report as report_of
from dropbydrop.tuning.report import Result, TuneReport

from .fingerprint import fingerprint
from .job import Job
from .log import RunLog

UNTUNED = "untuned"
_SEARCH = "search"
Search = Callable[[Path, CheckpointWriter, Journal | None], RunLog]


def search_and_tune(
    job: Job, place: Path, overwrite: bool, resume: bool, progress: bool, search: Search
) -> tuple[RunLog, int, TuneReport]:
    """Make the checkpoint `place`; see the module's note.

    Args:
        search: fills and finishes a writer, whose folder it is given, from where a journal ends.

    Returns:
        The books of the search, the blocks that were taken over from an interrupted run, and the
        report of tuning.

    Raises:
        DropError: as `quantize` and `tune`.
    """
    replaceable = check_replaceable if overwrite else None
    if not resume:
        with AtomicFolder(place, replaceable) as folder:
            untuned = folder.path.parent / UNTUNED
            with CheckpointWriter(untuned) as writer:
                log = search(untuned, writer, None)
            return log, 0, _tune(job, untuned, folder, None, progress)
    with Journal(place, fingerprint(job)) as journal:
        resumed = sum("block" in step for step in (*journal.earlier, *journal.steps))
        if (published := journal.published()) is not None:
            result, started = Result({}, **published["result"]), time.perf_counter()
            device, done = job.runner.device, taken_over(journal)
            report = report_of(job.tuning()[0].method, device, place, result, started, done)
            return _books(job, journal), resumed, report
        AtomicFolder(place, replaceable, journal.path).discard()  # refuses OUT before the search
        if not journal.earlier:
            _search(journal, search)
        elif not journal.steps:
            journal.clear_stage()  # a run that was killed had not come to it
        with AtomicFolder(place, replaceable, journal.path) as folder:
            report = _tune(job, journal.path / UNTUNED, folder, journal, progress)
        return _books(job, journal), resumed, report


def _search(journal: Journal, search: Search) -> None:
    """The first stage, from where the journal ends."""
    untuned, work = journal.path / UNTUNED, journal.path / _SEARCH
    remove(untuned)  # of a run that was killed before its last step was finished
    work.mkdir(exist_ok=True)
    records = [step["writer"] for step in journal.steps]
    with CheckpointWriter(untuned, work=work, records=records) as writer:
        log = search(untuned, writer, journal)
    step = {"untuned": file_digest(untuned / MANIFEST_FILE), "run": log.mark()}
    journal.end_stage(step, UNTUNED)


def _books(job: Job, journal: Journal) -> RunLog:
    """Those of the search."""
    log = RunLog(job.config.levels, unguided=job.unguided)
    log.restore([step["run"] for step in journal.earlier])
    return log


def _tune(
    job: Job, untuned: Path, folder: AtomicFolder, journal: Journal | None, progress: bool
) -> TuneReport:
    """The second stage, from where the journal ends.

    Raises:
        DamagedWorkError: `untuned` is not what the search wrote.
    """
    started = time.perf_counter()
    job.runner.release_outer()  # tuning opens the model for itself
    config, ready = job.tuning()
    if journal is not None:
        _check_kept(untuned, journal)
    opened = prepare(untuned, config, source=job.source, ready=ready)
    return carry_out(opened, folder, journal, progress, started)


def _check_kept(untuned: Path, journal: Journal) -> None:
    """Raises DamagedWorkError unless `untuned` is what the search wrote, every file of it."""
    manifest, said, wrong = untuned / MANIFEST_FILE, journal.earlier[-1]["untuned"], [""]
    with file_errors(untuned), suppress(DropError):
        if not untuned.is_symlink() and manifest.is_file() and file_digest(manifest) == said:
            opened = Checkpoint.open(untuned)
            wrong = [finding.file for finding in opened.verify()] or wrong
            opened.require(opened.levels[-1])
            opened.check_contents(len(opened.manifest.planes))
            wrong = [file for file in wrong if file]
    if wrong:
        raise DamagedWorkError(
            f"{untuned / wrong[0]} is not what the search wrote: the work that was kept is "
            f"damaged. Remove {journal.path}, and start again."
        )
