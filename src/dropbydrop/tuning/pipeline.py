"""Tune a checkpoint: the life-cycle around the two methods.

Steps:
    1. check everything that can be checked: options, planes and their hashes, the original model
       against the checkpoint;
    2. draw the windows; some are set apart for measuring and never trained on;
    3. train (distill.py or blocks.py), in float32, and round to what the format stores;
    4. write the new folder (folder.py): the planes byte by byte, tuned tensors, log, config.

The checkpoint is only read. With `resume`, finished work is kept beside OUT until OUT is there
(resume.py): the windows first, then a block at a time, or all that is trained with Adam's moments
every `KEEP` steps. A run that goes on gives the same bytes on the same machine.

Limits: one process; dense decoders; the codes stay, so what the search has lost stays lost.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dropbydrop.checkpoint.files import check_replaceable
from dropbydrop.checkpoint.journal import Journal
from dropbydrop.data.calibration import SELF, load_windows
from dropbydrop.errors import DropError
from dropbydrop.system.atomic_folder import AtomicFolder
from dropbydrop.system.console import progress_bar
from dropbydrop.system.memory import device_peak, peak_memory
from dropbydrop.system.version import __version__

from .blocks import tune_block
from .config import Job, check_like, fingerprint, prepare
from .distill import Windows, last_hidden, measure, schedule
from .distill import train as distill
from .student import Student
from .writer import with_sets, write_tuned

KEEP = 4  # steps of distillation between two states that are kept for `resume`
_WINDOWS = "windows.safetensors"


@dataclass(frozen=True)
class TuneReport:
    """What a run did. Seconds are wall-clock, memory is the peak of the process.

    Attributes:
        loss: level -> [before, after] on windows that were not trained on, after rounding to what
            is stored: KL to the original in nats a token (distill), or the mean over blocks of the
            relative squared error of a block's output (blocks).
        steps: of the optimizer, over all blocks.
        trained: values that were trained.
        resumed: steps (distill) or blocks (blocks) taken over from an interrupted run.
        log: one entry a step or block.
    """

    out: Path
    method: str
    loss: dict[int, list[float]]
    steps: int
    trained: int
    seconds: float
    peak_gib: float
    device_gib: float
    resumed: int
    log: list[dict[str, Any]] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, without the log."""
        return {
            "out": str(self.out),
            "method": self.method,
            "loss": {str(p): pair for p, pair in self.loss.items()},
            "steps": self.steps,
            "trained": self.trained,
            "seconds": round(self.seconds, 2),
            "peak_gib": round(self.peak_gib, 3),
            "peak_device_gib": round(self.device_gib, 3),
            "resumed": self.resumed,
        }


def tune(
    checkpoint: str | Path,
    out: str | Path,
    *,
    model: str | Path | None = None,
    method: str = "distill",
    calibration: str | Path = SELF,
    bits: Sequence[int] | None = None,
    train: str = "all",
    windows: int = 64,
    seq_len: int = 512,
    epochs: int | None = None,
    learning_rate: float | None = None,
    together: bool = False,
    seed: int = 0,
    device: str = "auto",
    overwrite: bool = False,
    resume: bool = False,
    progress: bool = True,
) -> TuneReport:
    """Fine-tune the checkpoint folder `checkpoint`, and write the result as a new folder `out`.

    Args:
        checkpoint: what `quantize` (or `tune`) wrote, with all of its planes. It is only read.
        out: the checkpoint folder to create. Its planes are those of `checkpoint`, byte for byte.
        model: the original model; by default the one that the checkpoint names.
        method: "distill", the whole model end to end, KL to the original's predictions; or
            "blocks", block by block, squared error of the block's output.
        calibration: as for `quantize`: a text file, "hub:DATASET[:SPLIT]", or "self".
        bits: levels to supervise; by default all of the checkpoint.
        train: "all", codebooks (a set of its own for every input group), row scales and norms; or
            "scales", row scales and norms, with the codebooks as they are.
        windows, seq_len: tuning windows and their tokens.
        epochs: passes over the windows; by default that of the method.
        learning_rate: of Adam, relative to the size of what is trained; by default the method's.
        together: distillation runs every window at all levels, instead of at one of them.
        device: "auto" (a CUDA device if there is one), "cpu", "cuda", "cuda:1".
        overwrite: replace an existing checkpoint `out`, at the very end.
        resume: keep finished work in a hidden folder beside `out` until it is there, and go on
            from it if it is from the same command.

    Raises:
        DropError: anything about the input; nothing is left behind, or with `resume` only the
            finished work.
    """
    started = time.perf_counter()
    place = Path(os.path.abspath(out))
    if place == Path(os.path.abspath(checkpoint)):
        raise DropError(f"{out}: the tuned checkpoint needs a folder of its own; choose another.")
    job = prepare(
        checkpoint,
        model=model,
        method=method,
        calibration=calibration,
        bits=bits,
        train=train,
        windows=windows,
        seq_len=seq_len,
        epochs=epochs,
        learning_rate=learning_rate,
        together=together,
        seed=seed,
        device=device,
    )
    if not resume:
        return _report(job, place, _carry_out(job, place, overwrite, None, progress), started)
    with Journal(place, fingerprint(job)) as work:
        resumed = sum(len(step.get("log", ())) for step in work.steps)
        if (record := work.published()) is not None:
            result = Result({}, **record["result"])
        else:
            result = _carry_out(job, place, overwrite, work, progress)
    return _report(job, place, result, started, resumed)


@dataclass
class Result:
    """What a method yields: tensors as they are stored, and what the report says.

    Attributes:
        loss: level, as a string -> [before, after].
    """

    tensors: dict[str, Tensor]
    loss: dict[str, list[float]]
    steps: int
    trained: int
    log: list[dict[str, Any]]
    calibration: dict[str, Any]


def _carry_out(
    job: Job, place: Path, overwrite: bool, work: Journal | None, progress: bool
) -> Result:
    """Steps 2 to 4 of the module's note, from where `work` was left."""
    replace = check_replaceable if overwrite else None
    with AtomicFolder(place, replace, None if work is None else work.path) as folder:
        student = Student(
            job.checkpoint, job.source.folder, job.train, job.levels, job.teacher.device, job.half
        )
        check_like(student, job.teacher)
        run = _distill if job.method == "distill" else _blocks
        result = run(job, student, work, progress)
        _publish(job, student, folder, result, work)
    return result


def _draw(job: Job) -> tuple[Tensor, dict[str, Any]]:
    """Windows, int64 [n, T], and their description."""
    text = load_windows(
        job.calibration,
        job.source.tokenizer(),
        job.windows,
        job.seq_len,
        job.seed,
        source=job.source,
        device=job.teacher.device,
    )
    return text.ids, dict(text.description)


def _distill(job: Job, student: Student, work: Journal | None, progress: bool) -> Result:
    """End-to-end distillation, see distill.py."""
    values, log = student.values(), []
    steps = [] if work is None else work.steps
    fresh = None if steps else _draw(job)
    plan = schedule(job.windows - job.held, job.epochs, job.levels, job.together, job.seed)
    with progress_bar(progress) as bar:
        if fresh is None:
            assert work is not None
            kept = work.kept(_WINDOWS)
            windows = Windows(kept["ids"], kept["hidden"], job.held)
            calibration, before = steps[0]["calibration"], steps[0]["before"]
        else:
            ids, calibration = fresh
            original = bar.add_task("original model", total=job.teacher.num_blocks)
            hidden = last_hidden(job.teacher, ids, lambda: bar.advance(original))
            windows = Windows(ids, hidden, job.held)
            before = _named(measure(student, job.teacher, values.leaves, windows))
            if work is not None:
                work.keep(_WINDOWS, {"ids": ids, "hidden": hidden})
                work.commit({"calibration": calibration, "before": before}, None)
        for step in steps[1:]:
            log += step["log"]
        if len(steps) > 1 and work is not None:
            values.restore(work.hidden())
        unsaved: list[dict[str, Any]] = []
        task = bar.add_task("distill", total=len(plan), completed=len(log))

        def after_step(number: int, losses: Mapping[str, float]) -> None:
            line = {"step": number, "relative_kl": {p: round(v, 6) for p, v in losses.items()}}
            log.append(line)
            unsaved.append(line)
            bar.advance(task)
            if work is not None and (len(unsaved) == KEEP or number == len(plan)):
                work.commit({"step": number, "log": unsaved[:]}, values.state.cpu())
                unsaved.clear()

        start = {int(p): kl for p, kl in before.items()}
        distill(student, job.teacher, values, windows, start, plan, job.rate, len(log), after_step)
        tensors = values.rounded()
        stored = {n: t.to(student.device, torch.float32) for n, t in tensors.items()}
        after = _named(measure(student, job.teacher, stored, windows))
    loss = {p: [before[p], after[p]] for p in before}
    return Result(tensors, loss, len(plan), values.count, log, calibration)


def _blocks(job: Job, student: Student, work: Journal | None, progress: bool) -> Result:
    """Block by block, see blocks.py."""
    teacher, steps = job.teacher, [] if work is None else work.steps
    log = [line for step in steps for line in step.get("log", ())]
    tensors: dict[str, Tensor] = {}
    if steps:
        assert work is not None
        calibration = steps[0]["calibration"]
        for line in log:
            tensors |= work.kept(_block_file(line["block"]))
        hidden = work.hidden() if len(log) < teacher.num_blocks else None
    else:
        ids, calibration = _draw(job)
        hidden = teacher.embed(ids)
        if work is not None:
            work.commit({"calibration": calibration}, hidden)
    with progress_bar(progress) as bar:
        task = bar.add_task("tune", total=teacher.num_blocks, completed=len(log))
        for i in range(len(log), teacher.num_blocks):
            assert hidden is not None
            output = teacher.forward_block(i, teacher.block(i), hidden)
            teacher.release(i)
            tuned, line = tune_block(
                student, i, hidden, output, job.held, job.epochs, job.rate, job.seed
            )
            hidden = output
            log.append(line)
            tensors |= tuned
            if work is not None:
                work.keep(_block_file(i), tuned)
                more = i + 1 < teacher.num_blocks
                work.commit({"block": i, "log": [line]}, hidden if more else None)
            bar.advance(task)
    loss = {
        str(p): [sum(line[when][str(p)] for line in log) / len(log) for when in ("before", "after")]
        for p in job.levels
    }
    windows = job.windows - job.held
    count = len(schedule(windows, job.epochs, job.levels, True, job.seed)) * teacher.num_blocks
    trained = sum(
        tensor.numel()
        for i in range(teacher.num_blocks)
        for tensor in student.trained_in(i).values()
    )
    return Result(tensors, loss, count, trained, log, calibration)


def _block_file(i: int) -> str:
    return f"block-{i}.safetensors"


def _named(losses: Mapping[int, float]) -> dict[str, float]:
    return {str(p): value for p, value in losses.items()}


def _publish(
    job: Job, student: Student, folder: AtomicFolder, result: Result, work: Journal | None
) -> None:
    """Write the checkpoint with what was done to it; see folder.py."""
    old = job.checkpoint.quantization
    done = {
        "method": job.method,
        "levels": list(job.levels),
        "train": job.train,
        "calibration": result.calibration,
        "epochs": job.epochs,
        "learning_rate": job.rate,
        "together": job.together,
        "seed": job.seed,
        "loss": result.loss,
        "version": __version__,
    }
    provenance = {**old.provenance, "tuning": [*old.provenance.get("tuning", []), done]}
    quantization = replace(with_sets(old, student.sets), provenance=provenance)

    def announce(manifest: str) -> None:
        if work is not None:
            rest = {k: v for k, v in asdict(replace(result, tensors={})).items() if k != "tensors"}
            work.publishing({"manifest": manifest, "result": rest})

    write_tuned(
        folder,
        job.checkpoint,
        quantization,
        result.tensors,
        result.log,
        _card(job, result),
        announce,
    )


def _card(job: Job, result: Result) -> str:
    """What the model card says about this run."""
    what = "KL to the original, nats a token" if job.method == "distill" else "error of a block"
    rows = "\n".join(f"| {p} | {a:.4f} | {b:.4f} |" for p, (a, b) in result.loss.items())
    text = result.calibration
    source = "text the model wrote itself" if text.get("kind") != "text" else f"`{text['text']}`"
    return f"""
## Tuned: {job.method}

Trained: {"codebooks, row scales and norms" if job.train == "all" else "row scales and norms"}; \
the codes are those of before. Text: {source}, {text.get("windows")} windows of \
{text.get("seq_len")} tokens, {job.epochs} epochs.

| bits | {what}, before | after |
|---|---|---|
{rows}
"""


def _report(job: Job, out: Path, result: Result, started: float, resumed: int = 0) -> TuneReport:
    return TuneReport(
        out,
        job.method,
        {int(p): pair for p, pair in result.loss.items()},
        result.steps,
        result.trained,
        time.perf_counter() - started,
        peak_memory() / 2**30,
        device_peak(job.teacher.device) / 2**30,
        resumed,
        result.log,
    )
