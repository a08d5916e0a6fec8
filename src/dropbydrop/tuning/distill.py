"""End-to-end distillation: KL(original || level), with codebooks, scales and norms of all blocks.

Steps:
    1. the original runs over all windows once, block by block; the output of its last block is
       kept. Its logits are made from that, where they are needed.
    2. the KL of every level is measured on the windows set apart. Its inverse weighs the level:

           L = mean over P of  KL_P / KL_P(before),

       so that 2 bits, ten times as far away as 4, do not take all of the gradient.
    3. a step runs `BATCH` windows at every level: forward through the blocks, keeping the inputs of
       each; KL and its gradient by slabs of tokens; backward block by block, each run again with
       gradients (gradient checkpointing). Then Adam (optimizer.py). The levels go through a block
       side by side, and it is decoded once for all of them.
    4. values are rounded to what is stored, and the KL of every level is measured again.

The windows of a step are others at every level; `together`, they are the same ones.

The order of windows and levels follows from the seed alone: with `state` of optimizer.py and the
number of the step, a run goes on as if it had never stopped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dropbydrop.checkpoint.journal import Journal
from dropbydrop.models.block_runner import BlockRunner
from dropbydrop.system.console import phase, progress_bar

from .job import Job
from .optimizer import Values, rate_at
from .report import Result
from .student import Student

KEEP = 4  # steps between two states that are kept for `resume`
_WINDOWS = "windows.safetensors"
Part = tuple[list[int], tuple[int, ...]]  # windows of a step, and at which levels they run
BATCH = 2  # windows that a level runs in a step
LOGIT_VALUES = 1 << 23  # float32 logits in memory at a time
_SMALL = 1e-12  # a KL that is not divided by


@dataclass(frozen=True)
class Windows:
    """Tokens and what the original makes of them.

    Attributes:
        ids: int64 [n, T].
        hidden: output of the original's last block, float32 [n, T, d], on the CPU.
        held: how many of the last windows are set apart for measuring.
    """

    ids: Tensor
    hidden: Tensor
    held: int

    @property
    def training(self) -> int:
        """How many windows are trained on."""
        return self.ids.shape[0] - self.held


def last_hidden(teacher: BlockRunner, ids: Tensor, progress: bool) -> Tensor:
    """Output of the original's last block for ids [n, T]: float32 [n, T, d] on the CPU."""
    hidden = teacher.embed(ids)
    with progress_bar(progress) as bar:
        for i in bar.track(range(teacher.num_blocks), description="original model"):
            teacher.forward_block(i, teacher.block(i), hidden, out=hidden)
            teacher.release(i)
    return hidden


def schedule(
    windows: int, epochs: int, levels: Sequence[int], together: bool, seed: int
) -> list[list[Part]]:
    """The parts of every step.

    Each epoch has every window once, in an order of its own. A step takes `BATCH` windows a level
    and deals them to the levels; `together`, it takes `BATCH` windows, for all levels. The last
    step has what is left.
    """
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for _ in range(epochs):
        order += torch.randperm(windows, generator=generator).tolist()
    parts = [order[low : low + BATCH] for low in range(0, len(order), BATCH)]
    if together:
        return [[(part, tuple(levels))] for part in parts]
    count = len(levels)
    return [
        [(part, (level,)) for part, level in zip(parts[low : low + count], levels, strict=False)]
        for low in range(0, len(parts), count)
    ]


def divergence(
    student: Student,
    teacher: BlockRunner,
    leaves: Mapping[str, Tensor],
    windows: Windows,
    chosen: Mapping[int, Sequence[int]],
    weights: Mapping[int, float] | None = None,
) -> dict[int, float]:
    """Mean KL(original || level) in nats a token of each level over windows of its own.

    Args:
        chosen: level, ascending -> numbers of its windows.
        weights: the gradient of the sum over levels of weights[P] * KL_P is added to the `.grad` of
            `leaves`. None: no gradients.
    """
    levels, numbers = list(chosen), [list(own) for own in chosen.values()]
    hidden = [student.runner.embed(windows.ids[own].to(student.device)) for own in numbers]
    inputs: list[list[Tensor]] = []
    with torch.no_grad():
        for i in range(student.runner.num_blocks):
            if weights is not None:
                inputs.append(hidden)
            hidden = student.block(i, hidden, leaves, levels)
    found, grads = {}, []
    for last, level, own in zip(hidden, levels, numbers, strict=True):
        weight = None if weights is None else weights[level]
        found[level], grad = head_loss(student, teacher, leaves, last, windows.hidden[own], weight)
        grads.append(grad)
    for i in reversed(range(len(inputs))):
        block_inputs = [x.detach().requires_grad_() for x in inputs.pop()]
        with torch.enable_grad():
            outputs = student.block(i, block_inputs, leaves, levels)
        torch.autograd.backward(outputs, grads)
        grads = [x.grad for x in block_inputs]
    return found


def head_loss(
    student: Student,
    teacher: BlockRunner,
    leaves: Mapping[str, Tensor],
    last: Tensor,
    target: Tensor,
    weight: float | None,
) -> tuple[float, Tensor | None]:
    """Mean KL and, with `weight`, its gradient by `last`, the last block's output [b, T, d]."""
    windows, length = last.shape[:2]
    vocab = int(student.runner.model.config.get_text_config().vocab_size)
    slab = max(1, LOGIT_VALUES // (vocab * windows))
    grad = None if weight is None else torch.empty_like(last)
    total = 0.0
    for low in range(0, length, slab):
        part = slice(low, low + slab)
        with torch.no_grad():
            log_p = torch.log_softmax(
                teacher.logits(target[:, part].to(student.device)).float(), -1
            )
        h = last[:, part].detach().requires_grad_(weight is not None)
        with torch.set_grad_enabled(weight is not None):
            log_q = torch.log_softmax(student.logits(h, leaves), -1)
            kl = torch.nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True)
            kl = kl / (windows * length)
            if weight is not None and grad is not None:
                (kl * weight).backward()
                assert h.grad is not None
                grad[:, part] = h.grad
        total += float(kl.detach())
    return total, grad


def measure(
    student: Student, teacher: BlockRunner, leaves: Mapping[str, Tensor], windows: Windows
) -> dict[int, float]:
    """Mean KL of every level over the windows set apart, in nats a token."""
    sums = dict.fromkeys(student.levels, 0.0)
    for window in range(windows.training, windows.ids.shape[0]):
        chosen = {level: [window] for level in student.levels}
        for level, kl in divergence(student, teacher, leaves, windows, chosen).items():
            sums[level] += kl / windows.held
    return sums


def _add_gradients(
    student: Student,
    teacher: BlockRunner,
    values: Values,
    windows: Windows,
    before: Mapping[int, float],
    step: Sequence[Part],
) -> dict[int, float]:
    """Gradients of a step's parts; level -> KL of its windows relative to `before`, as at first."""
    chosen = {level: own for own, levels in step for level in levels}
    runs = sum(len(own) for own in chosen.values())
    weights = {p: len(own) / (max(before[p], _SMALL) * runs) for p, own in chosen.items()}
    found = divergence(student, teacher, values.leaves, windows, chosen, weights)
    return {p: kl / max(before[p], _SMALL) for p, kl in found.items()}


def run(job: Job, student: Student, journal: Journal | None, progress: bool) -> Result:
    """Steps 1 to 4 of the module's note, from where the journal ends."""
    config, values = job.config, student.values()
    steps = [] if journal is None else journal.steps
    plan = schedule(
        config.windows - job.held, config.passes, job.levels, config.together, config.seed
    )
    log = [line for step in steps[1:] for line in step["log"]]
    unsaved: list[dict[str, Any]] = []
    windows, calibration, before = _begin(job, student, values, journal, progress)
    if len(steps) > 1 and journal is not None:
        values.restore(journal.hidden())
    with progress_bar(progress) as bar:
        task = bar.add_task("distill", total=len(plan), completed=len(log))
        for number in range(len(log) + 1, len(plan) + 1):
            losses = _add_gradients(student, job.teacher, values, windows, before, plan[number - 1])
            values.step(number, rate_at(number, len(plan), config.rate))
            line = {"step": number, "relative_kl": {str(p): round(losses[p], 6) for p in losses}}
            log.append(line)
            unsaved.append(line)
            bar.advance(task)
            if journal is not None and (len(unsaved) == KEEP or number == len(plan)):
                journal.commit({"step": number, "log": unsaved[:]}, values.state.cpu())
                unsaved.clear()
    tensors = values.rounded()
    with phase("loss after", progress):
        after = measure(student, job.teacher, student.leaves_of(tensors), windows)
    loss = {str(p): [before[p], after[p]] for p in before}
    return Result(tensors, loss, len(plan), values.count, log, calibration)


def _begin(
    job: Job, student: Student, values: Values, journal: Journal | None, progress: bool
) -> tuple[Windows, dict[str, Any], dict[int, float]]:
    """Windows, their description and the KL of every level before, from the journal if there."""
    if journal is not None and journal.steps:
        kept, first = journal.kept(_WINDOWS), journal.steps[0]
        windows = Windows(kept["ids"], kept["hidden"], job.held)
        return windows, first["calibration"], {int(p): kl for p, kl in first["before"].items()}
    text = job.windows(progress)
    hidden = last_hidden(job.teacher, text.ids, progress)
    windows = Windows(text.ids, hidden, job.held)
    with phase("loss before", progress):
        before = measure(student, job.teacher, values.leaves, windows)
    if journal is not None:
        journal.keep(_WINDOWS, {"ids": text.ids, "hidden": hidden})
        first = {"calibration": text.description, "before": {str(p): v for p, v in before.items()}}
        journal.commit(first, None)
    return windows, text.description, before
