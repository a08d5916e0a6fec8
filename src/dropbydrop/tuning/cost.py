"""What tuning will take, before there is a checkpoint: one block with random codes is timed.

`Trial` is a `Student` of block 0 alone, so what is timed is what runs: decoding and rotations,
forward and backward, the head. The rest is counted (distill.py):

    original   all windows once through all blocks
    loss       before and after: the windows set apart, at all levels
    steps      forward at all levels side by side, heads and gradients, forward and backward again

Memory is that of the trial and what it has less of than the run: codes of the other blocks, their
trained values, inputs of the blocks, the original's last states.

Limits: method distill. Block 0 stands for all. Writing and drawing the text are the caller's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor

from dropbydrop.coding.codebook_set import CodebookSet
from dropbydrop.coding.planes import counts_of
from dropbydrop.coding.rotation import Rotation
from dropbydrop.models.block_runner import BlockRunner
from dropbydrop.models.input_groups import InputGroup
from dropbydrop.system.accelerator import multiplies_bfloat16

from .config import TuneConfig
from .distill import BATCH, head_loss, schedule
from .job import fitting, held_of
from .optimizer import Values
from .student import RotatedLinear, Student, TunedGroup

_T = TypeVar("_T")


@dataclass(frozen=True)
class Cost:
    """What tuning will take.

    Attributes:
        seconds: without drawing the text and writing the checkpoint.
        missing: bytes that the run holds and the trial, in this process, did not.
        kept: bytes that a run which can be resumed keeps on disk.
    """

    seconds: float
    missing: int
    kept: int


class Trial(Student):
    """A student of which block 0 alone is there, with random codes.

    Args:
        runner: of the model; it is left as it is, with block 0 in memory.
        groups: input groups of block 0.
        books: the set that the search uses.
    """

    def __init__(
        self,
        runner: BlockRunner,
        groups: Sequence[InputGroup],
        books: CodebookSet,
        levels: Sequence[int],
    ) -> None:  # no checkpoint, so not the student's
        self.levels, self.half = tuple(levels), multiplies_bfloat16(runner.device)
        self.device = runner.device
        self.runner = BlockRunner.open(
            runner.files.folder, runner.dtype, runner.device, runner.batch_tokens, runner.files
        )
        prefix_of = dict(zip(levels, counts_of(books.planes, levels), strict=True)).__getitem__
        described: Any = SimpleNamespace(quantization=SimpleNamespace(prefix_of=prefix_of))
        self.checkpoint = described
        self.sets = tuple(f"input-group-{i}" for i in range(len(groups)))
        self.start, self.elementwise, self.grids, self._fixed = {}, set(), {}, {}
        prefix, state = f"{runner.block_prefix(0)}.", runner.block(0).state_dict()
        coded = {f"{module}.weight" for group in groups for module in group.modules}
        for local, tensor in state.items():
            if (name := f"{prefix}{local}") not in coded:
                trained = tensor.is_floating_point() and tensor.dim() == 1
                (self.start if trained else self._fixed)[name] = tensor.clone()
        weights = {name: state[name.removeprefix(prefix)] for name in coded}
        self._input_groups = {
            0: [self._random(i, group, weights, books) for i, group in enumerate(groups)]
        }

    def _random(
        self, number: int, group: InputGroup, weights: dict[str, Tensor], books: CodebookSet
    ) -> TunedGroup:
        generator = torch.Generator().manual_seed(number)
        rotation = Rotation.make(group.d_in, seed=number).to(self.device)
        codes = []
        for module in group.modules:
            weight = weights[f"{module}.weight"]
            shapes = [plane.shape(*weight.shape) for plane in books.planes]
            drawn = [
                torch.randint(0, 256, s, generator=generator, dtype=torch.uint8) for s in shapes
            ]
            codes.append(tuple(plane.to(self.device) for plane in drawn))
            self.elementwise.add(f"{module}.scales")
            self.start[f"{module}.scales"] = weight.float().std().expand(len(weight)).clone()
            linear: Any = self.runner.model.get_submodule(module)
            self.runner.model.set_submodule(module, RotatedLinear(linear, rotation))
        self.add_set(number, books, len(books.planes))
        rows = tuple(len(weights[f"{module}.weight"]) for module in group.modules)
        return TunedGroup(group.modules, rows, tuple(codes), books, rotation, self.sets[number])


def cost(
    runner: BlockRunner,
    config: TuneConfig,
    groups: Sequence[InputGroup],
    books: CodebookSet,
    levels: Sequence[int],
    blocks: float,
) -> Cost:
    """What tuning by `config` will take.

    Args:
        runner: of the model; block 0 is in memory afterwards.
        groups: input groups of block 0; books: the set that the search uses.
        blocks: the model, in blocks like the first.
    """
    n, length = config.windows, fitting(config, runner).seq_len
    runner.release(0)
    loading = _seconds(runner.device, lambda: runner.block(0))
    student = Trial(runner, groups, books, levels)
    values = student.values()
    generator = torch.Generator().manual_seed(0)
    vocab = int(runner.model.config.get_text_config().vocab_size)
    x = student.runner.embed(torch.randint(0, vocab, (BATCH, length), generator=generator))
    x = x.to(runner.device)
    original = _seconds(runner.device, lambda: runner.forward_block(0, runner.block(0), x))
    held, count = held_of(n), len(student.levels)
    plain, gradient = _head_seconds(student, runner, values, x)
    step = _seconds(runner.device, lambda: values.step(1, 1e-6))
    seconds = blocks * (loading + original * n / BATCH)
    seconds += 2 * held * (blocks * _loss_seconds(student, values, x[:1]) + count * plain / BATCH)
    plan = schedule(n - held, config.passes, student.levels, config.together, config.seed)
    sizes = [{level: len(own) for own, at in parts for level in at} for parts in plan]
    each = {at: _step_seconds(student, values, x, at) for at in set(map(tuple, sizes))}
    for counts in sizes:  # all batches are whole but for the last one
        batches = sum(counts.values()) / BATCH
        seconds += blocks * (step + each[tuple(counts)] * batches / len(counts))
        seconds += gradient * batches
    codes = sum(plane.numel() for g in student.groups_of(0) for m in g.codes for plane in m)
    state = x.element_size() * length * x.shape[-1]  # of a window
    others = max(0.0, blocks - 1)
    missing = others * (codes + 7 * 4 * values.count + count * BATCH * state) + n * state
    return Cost(seconds, int(missing), int(n * state + blocks * 3 * 4 * values.count))


def _head_seconds(
    student: Student, teacher: BlockRunner, values: Values, x: Tensor
) -> tuple[float, float]:
    """The head's loss on a batch of windows, without and with its gradient."""
    target = x.cpu()

    def run(weight: float | None) -> float:
        return _seconds(
            x.device, lambda: head_loss(student, teacher, values.leaves, x, target, weight)
        )

    return run(None), run(1.0)


def _loss_seconds(student: Student, values: Values, x: Tensor) -> float:
    """Block 0 on one window [1, T, D], at all levels side by side."""

    def run() -> None:
        with torch.no_grad():
            student.block(0, [x] * len(student.levels), values.leaves, student.levels)

    return _seconds(x.device, run)


def _step_seconds(student: Student, values: Values, x: Tensor, levels: tuple[int, ...]) -> float:
    """Block 0 on a batch of windows a level: forward, and forward and backward again."""

    def run() -> None:
        with torch.no_grad():
            student.block(0, [x] * len(levels), values.leaves, levels)
        own = [x.detach().requires_grad_() for _ in levels]
        with torch.enable_grad():
            outputs = student.block(0, own, values.leaves, levels)
        torch.autograd.backward(outputs, [torch.ones_like(x)] * len(levels))

    return _seconds(x.device, run)


def _seconds(device: torch.device, action: Callable[[], _T]) -> float:
    """Of the second of two calls: the first warms up."""
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
