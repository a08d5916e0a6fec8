"""Block by block: codebooks, scales and norms of a block, so that its output is the original's.

For block i, with x its input in the unquantized model and y the original block's output, all levels
P train on one loss with the same codebooks, scales and norms:

    e_P = sum_t w_t |y_P(x_t) - y_t|^2 / sum_t w_t |y_t - x_t|^2
    L   = mean over P of e_P / e_P(before)

The denominator is what the block adds to the residual stream; w_t clips the few tokens that carry
thousands of times the energy of the others, as in models/statistics.py. Dividing by e_P before
tuning gives levels equal say. Adam runs over the training windows for some epochs; the result is
rounded to what is stored and kept if L fell on the windows set apart, else the block stays as it
was.

In memory: the hidden states of all windows before and after the block, one block.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dropbydrop.checkpoint.journal import Journal
from dropbydrop.models.statistics import CLIP, token_weights
from dropbydrop.system.console import progress_bar

from .distill import schedule
from .job import Job
from .optimizer import rate_at
from .report import Result
from .student import Student

_LEAST = 1e-8  # of the energy of a block's output, to which an error is related


def output_errors(
    student: Student,
    i: int,
    leaves: Mapping[str, Tensor],
    x: Tensor,
    y: Tensor,
    weights: Mapping[int, float] | None = None,
) -> dict[int, float]:
    """e_P of block i at every level. x, y [b, T, d]: input and output of the original block.

    With `weights`, the gradient of the sum of weights[P] * e_P is added to the `.grad` of `leaves`.
    """
    x, y = x.to(student.device), y.to(student.device)
    clip = token_weights(y.square().sum(-1), CLIP)[..., None]
    # a block that adds nothing (zeros, for layers to come) is measured against its input
    scale = (clip * (y - x).square()).sum()
    scale = torch.maximum(scale, (_LEAST * clip * y.square()).sum().clamp_min(1e-30))
    out = {}
    with torch.set_grad_enabled(weights is not None):
        outputs = student.block(i, [x] * len(student.levels), leaves, student.levels)
        total: Tensor | None = None
        for level, got in zip(student.levels, outputs, strict=True):
            error = (clip * (got - y).square()).sum() / scale
            out[level] = float(error.detach())
            if weights is not None:
                part = weights[level] * error
                total = part if total is None else total + part
        if total is not None:
            total.backward()
    return out


def _mean_errors(
    student: Student, i: int, leaves: Mapping[str, Tensor], x: Tensor, y: Tensor, held: int
) -> dict[int, float]:
    """Mean of e_P over the windows set apart, the last `held`."""
    sums = dict.fromkeys(student.levels, 0.0)
    for w in range(x.shape[0] - held, x.shape[0]):
        for level, error in output_errors(student, i, leaves, x[w : w + 1], y[w : w + 1]).items():
            sums[level] += error / held
    return sums


def tune_block(
    job: Job, student: Student, i: int, x: Tensor, y: Tensor
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tune one block; x, y [n, T, d]: input and output of the original block.

    Returns:
        Its tuned tensors as they are stored, empty if they were no better; and the log entry:
        errors of every level before and after, and whether it was kept.
    """
    held, config = job.held, job.config
    values = student.values(i)
    before = _mean_errors(student, i, values.leaves, x, y, held)
    plan = schedule(x.shape[0] - held, config.passes, student.levels, True, config.seed)
    weights = {p: 1 / (max(before[p], 1e-12) * len(before)) for p in before}
    for number, step in enumerate(plan, 1):
        for chosen, _ in step:
            output_errors(student, i, values.leaves, x[chosen], y[chosen], weights)
        values.step(number, rate_at(number, len(plan), config.rate))
    stored = values.rounded()
    leaves = student.leaves_of(stored)
    after = _mean_errors(student, i, leaves, x, y, held)
    kept = sum(after[p] / max(before[p], 1e-12) for p in before) < len(before)
    log = {
        "block": i,
        "before": {str(p): e for p, e in before.items()},
        "after": {str(p): e for p, e in (after if kept else before).items()},
        "kept": kept,
    }
    return stored if kept else {}, log


def run(job: Job, student: Student, journal: Journal | None, progress: bool) -> Result:
    """Tune every block, from where the journal ends."""
    config, teacher = job.config, job.teacher
    steps = [] if journal is None else journal.steps
    log = [line for step in steps for line in step.get("log", ())]
    tensors: dict[str, Tensor] = {}
    if journal is not None and steps:
        calibration = steps[0]["calibration"]
        for line in log:
            tensors |= journal.kept(_file_of(line["block"]))
        hidden = journal.hidden() if len(log) < teacher.num_blocks else None
    else:
        text = job.windows(progress)
        calibration, hidden = text.description, teacher.embed(text.ids)
        if journal is not None:
            journal.commit({"calibration": calibration}, hidden)
    with progress_bar(progress) as bar:
        task = bar.add_task("tune", total=teacher.num_blocks, completed=len(log))
        for i in range(len(log), teacher.num_blocks):
            assert hidden is not None
            output = teacher.forward_block(i, teacher.block(i), hidden)
            teacher.release(i)
            tuned, line = tune_block(job, student, i, hidden, output)
            hidden = output
            log.append(line)
            tensors |= tuned
            if journal is not None:
                journal.keep(_file_of(i), tuned)
                more = i + 1 < teacher.num_blocks
                journal.commit({"block": i, "log": [line]}, hidden if more else None)
            bar.advance(task)
    loss = {
        str(p): [sum(line[when][str(p)] for line in log) / len(log) for when in ("before", "after")]
        for p in job.levels
    }
    a_block = len(schedule(config.windows - job.held, config.passes, job.levels, True, config.seed))
    blocks = range(teacher.num_blocks)
    trained = sum(t.numel() for i in blocks for t in student.trained_in(i).values())
    return Result(tensors, loss, a_block * teacher.num_blocks, trained, log, calibration)


def _file_of(block: int) -> str:
    """Tuned tensors of a block in the work folder."""
    return f"block-{block}.safetensors"
