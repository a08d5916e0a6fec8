"""Tune a checkpoint: the life-cycle around the two methods.

Steps:
    1. check everything that can be checked (job.py): planes and their hashes, the original model
       against the checkpoint;
    2. draw the windows; some are set apart for measuring and never trained on;
    3. train (distill.py or blocks.py), in float32, and round to what the format stores;
    4. write the new folder (writer.py): the planes byte by byte, tuned tensors, log, config.

The checkpoint is only read. With `resume`, finished work is kept beside OUT until OUT is there
(checkpoint/journal.py): the windows first, then a block at a time, or all that is trained with
Adam's moments every few steps. A run that goes on gives the same bytes on the same machine.

Limits: one process; dense decoders; the codes stay, so what the search has lost stays lost.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dropbydrop.checkpoint.files import check_replaceable
from dropbydrop.checkpoint.journal import Journal
from dropbydrop.system.atomic_folder import AtomicFolder
from dropbydrop.system.errors import DropError
from dropbydrop.system.memory import device_peak, peak_memory
from dropbydrop.system.paths import absolute
from dropbydrop.system.version import __version__

from . import blocks, distill
from .config import TuneConfig
from .job import Job, check_like, fingerprint, prepare
from .report import Result, TuneReport, card_section
from .student import Student
from .writer import with_sets, write_tuned


def tune(
    checkpoint: str | Path,
    out: str | Path,
    bits: Sequence[int] | None = None,
    *,
    config: TuneConfig | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: bool = True,
    **options: Any,
) -> TuneReport:
    """Fine-tune the checkpoint folder `checkpoint`, and write the result as a new folder `out`.

    Args:
        checkpoint: what `quantize` (or `tune`) wrote, with all of its planes. It is only read.
        out: the checkpoint folder to create. Its planes are those of `checkpoint`, byte for byte.
        bits: levels to supervise; by default all of the checkpoint.
        config: how, by default `TuneConfig()`.
        overwrite: replace an existing checkpoint `out`, at the very end.
        resume: keep finished work in a hidden folder beside `out` until it is there, and go on
            from it if it is from the same command.
        options: fields of `TuneConfig` by name, in the place of those of `config`.

    Raises:
        DropError: anything about the input; nothing is left behind, or with `resume` only the
            finished work.
    """
    started = time.perf_counter()
    if bits is not None:
        options["levels"] = tuple(bits)
    config, place = replace(config or TuneConfig(), **options), absolute(out)
    if place == absolute(checkpoint):
        raise DropError(f"{out}: the tuned checkpoint needs a folder of its own; choose another.")
    job, replaceable = prepare(checkpoint, config), check_replaceable if overwrite else None
    if not resume:
        with AtomicFolder(place, replaceable) as folder:
            return carry_out(job, folder, None, progress, started)
    with Journal(place, fingerprint(job)) as journal:
        if (published := journal.published()) is not None:
            result, done = Result({}, **published["result"]), taken_over(journal)
            return report(config.method, job.teacher.device, place, result, started, done)
        with AtomicFolder(place, replaceable, journal.path) as folder:
            return carry_out(job, folder, journal, progress, started)


def carry_out(
    job: Job, folder: AtomicFolder, journal: Journal | None, progress: bool, started: float
) -> TuneReport:
    """Steps 2 to 4 of the module's note, from where the journal ends; `folder` is published.

    Args:
        started: seconds of `time.perf_counter` when the run began, for the report.
    """
    student = Student(
        job.checkpoint,
        job.source.folder,
        job.config.train,
        job.levels,
        job.teacher.device,
        job.half,
    )
    check_like(student, job.teacher)
    resumed = taken_over(journal)
    run = distill.run if job.config.method == "distill" else blocks.run
    result = run(job, student, journal, progress)
    _publish(job, student, folder, result, journal)
    return report(job.config.method, job.teacher.device, folder.out, result, started, resumed)


def taken_over(journal: Journal | None) -> int:
    """Steps or blocks that are in the journal already."""
    return sum(len(step.get("log", ())) for step in ([] if journal is None else journal.steps))


def _publish(
    job: Job, student: Student, folder: AtomicFolder, result: Result, journal: Journal | None
) -> None:
    """Write the checkpoint with what was done to it; see writer.py."""
    old = job.checkpoint.quantization
    done = {
        **job.config.to_dict(),
        "model": job.source.name,
        "calibration": result.calibration,
        "loss": result.loss,
        "version": __version__,
    }
    provenance = {**old.provenance, "tuning": [*old.provenance.get("tuning", []), done]}

    def announce(manifest: str) -> None:
        if journal is not None:
            journal.publishing({"manifest": manifest, "result": result.to_dict()})

    write_tuned(
        folder,
        job.checkpoint,
        replace(with_sets(old, student.sets), provenance=provenance),
        result.tensors,
        result.log,
        card_section(job, result),
        announce,
    )


def report(
    method: str, device: torch.device, out: Path, result: Result, started: float, resumed: int
) -> TuneReport:
    """What a run by this method on this device did, with the peaks of now."""
    return TuneReport(
        out=out,
        method=method,
        loss={int(p): pair for p, pair in result.loss.items()},
        steps=result.steps,
        trained=result.trained,
        seconds=time.perf_counter() - started,
        peak_gib=peak_memory() / 2**30,
        device_gib=device_peak(device) / 2**30,
        resumed=resumed,
        log=result.log,
    )
