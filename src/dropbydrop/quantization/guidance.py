"""Weights of the calibration tokens from gradients of the loss: a pass before the encoding walk.

models/token_gradients.py says what the weights are. Steps, each of which is kept for `--resume`:

    forward, block 0 to N - 1     the block's input goes to disk, its output on to the next block
    backward, block N - 1 to 0    the input comes back; the block runs again with gradients; of each
                                  input group the weights of the tokens stay, [n, T]

In memory at a time: the state of the windows or its gradient, one block, what autograd keeps of one
batch. On disk: the inputs of all blocks, in bfloat16 where products run in it; without `--resume`
in a file without a name, which no crash can leave behind, and which shrinks on the way back.

Weights are normalised in each window: windows count alike, as they do without gradients, and
processes that share them can work alone. They are not capped by themselves: what is clipped is a
weight times the energy of its input (models/statistics.py).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Protocol

import torch
from torch import Tensor

from dropbydrop.checkpoint.journal import Journal
from dropbydrop.checkpoint.tensor_files import raw_bytes
from dropbydrop.models.block_runner import BlockRunner
from dropbydrop.models.token_gradients import TokenGradients
from dropbydrop.system.distributed import Partition
from dropbydrop.system.file_errors import file_errors

_FIRST = "state.safetensors"  # before the first block, exact


class Store(Protocol):
    """Where states of this process's windows, and weights of their tokens, wait."""

    def push(self, name: str, x: Tensor) -> None:
        """Keep a state [n, T, D]."""

    def pop(self, name: str) -> Tensor:
        """The state that was pushed last; it may go once the next step is finished."""

    def keep(self, name: str, weights: Mapping[str, Tensor]) -> None:
        """Keep weights [n, T] by module."""

    def kept(self, name: str) -> dict[str, Tensor]:
        """Weights that were kept."""


class LocalStore:
    """States in a file without a name beside `out`, weights in memory."""

    def __init__(self, out: Path) -> None:
        self._out = out
        with file_errors(out):
            self._file: IO[bytes] = tempfile.TemporaryFile(dir=out.parent)  # noqa: SIM115
        self._ends: list[tuple[int, torch.Size, torch.dtype]] = []
        self._weights: dict[str, dict[str, Tensor]] = {}

    def push(self, name: str, x: Tensor) -> None:
        """See `Store`."""
        self._ends.append((self._file.tell(), x.shape, x.dtype))
        with file_errors(self._out):
            self._file.write(raw_bytes(x))
            self._file.flush()

    def pop(self, name: str) -> Tensor:
        """See `Store`."""
        start, shape, dtype = self._ends.pop()
        x = torch.empty(shape, dtype=dtype)
        self._file.seek(start)
        with file_errors(self._out):
            self._file.readinto(raw_bytes(x))  # type: ignore[attr-defined]
            self._file.seek(start)
            self._file.truncate()
        return x

    def keep(self, name: str, weights: Mapping[str, Tensor]) -> None:
        """See `Store`."""
        self._weights[name] = dict(weights)

    def kept(self, name: str) -> dict[str, Tensor]:
        """See `Store`."""
        return self._weights[name]


class JournalStore:
    """All in the work folder of the root's journal: for runs that can be resumed."""

    def __init__(self, journal: Journal | None, partition: Partition) -> None:
        self._journal, self._partition = journal, partition

    def _write(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        whole = {key: self._partition.gather(x) for key, x in tensors.items()}
        if self._journal is not None:
            self._journal.keep(name, {key: x for key, x in whole.items() if x is not None})

    def _read(self, name: str) -> dict[str, Tensor]:
        whole = None if self._journal is None else self._journal.kept(name)
        keys = self._partition.ranks.broadcast(None if whole is None else sorted(whole))
        return {k: self._partition.scatter(None if whole is None else whole[k]) for k in keys}

    def push(self, name: str, x: Tensor) -> None:
        """See `Store`."""
        self._write(name, {"x": x})

    def pop(self, name: str) -> Tensor:
        """See `Store`."""
        return self._read(name)["x"]

    def keep(self, name: str, weights: Mapping[str, Tensor]) -> None:
        """See `Store`."""
        self._write(name, weights)

    def kept(self, name: str) -> dict[str, Tensor]:
        """See `Store`."""
        return self._read(name)

    def drop(self, name: str) -> None:
        """A state that no step needs any more."""
        if self._journal is not None:
            with suppress(OSError):  # the end of the run removes it
                (self._journal.path / name).unlink(missing_ok=True)


class Guidance:
    """The pass of a run; see the module's note.

    Args:
        partition: which windows this process has.
        seed: of the labels.

    Attributes:
        kept: whether steps are kept for `--resume`.
        steps: how many there are.
    """

    def __init__(
        self, runner: BlockRunner, partition: Partition, store: LocalStore | JournalStore, seed: int
    ) -> None:
        self.runner, self.partition, self._store = runner, partition, store
        self.kept = isinstance(store, JournalStore)
        self._gradients = TokenGradients(runner, seed)
        self.steps = 2 * runner.num_blocks

    def run(
        self,
        done: int,
        hidden: Tensor | None,
        commit: Callable[[dict[str, Any], Tensor | None], None],
    ) -> Tensor:
        """All steps that are not done.

        Args:
            hidden: at the beginning the state before the first block, [n, T, D]; later what the
                last step committed.
            commit: finishes a step, with what the next one starts from.

        Returns:
            The state before the first block, [n, T, D].
        """
        count = self.runner.num_blocks
        x = self._begin(done, hidden)
        for step in range(done, count):
            self._store.push(_state(step), x)
            x = self._forward(step, x)
            commit({"forward": step}, None)
        for step in range(max(done, count), 2 * count):
            i = 2 * count - 1 - step
            if step == count:
                x = self._head(x)
            x = self._backward(i, x)
            last = self._store.pop(_FIRST) if i == 0 else None
            commit({"backward": i}, x if last is None else last)
            if isinstance(self._store, JournalStore):
                self._store.drop(_state(i))
            if last is not None:
                x = last
        return x

    def weights(self, i: int) -> dict[str, Tensor]:
        """Of the tokens of this process's windows, to encode block i: module -> [n, T]."""
        return self._store.kept(_weights(i))

    def _begin(self, done: int, hidden: Tensor | None) -> Tensor:
        """What the next step starts from."""
        if 0 < done <= self.runner.num_blocks:  # outputs were not kept: inputs were
            return self._forward(done - 1, self._store.pop(_state(done - 1)))
        assert hidden is not None
        if done == 0:
            self._store.push(_FIRST, hidden)
        return hidden.to(self._gradients.dtype) if done == 0 else hidden

    def _batches(self) -> list[slice]:
        return [part for shard in self.partition.shards for part in shard]

    def _forward(self, i: int, x: Tensor) -> Tensor:
        """Output of block i, written over its input."""
        self.runner.block(i)
        for part in self._batches():
            x[part] = self._gradients.forward(i, x[part].to(self.runner.device)).to(x)
        self.runner.release(i)
        return x

    def _head(self, x: Tensor) -> Tensor:
        """Gradient by the state after the last block, float32."""
        first = self.partition.windows(self.partition.ranks.rank).start
        gradient = torch.empty(x.shape, device=x.device)
        for part in self._batches():
            y = x[part].to(self.runner.device)
            gradient[part] = self._gradients.head(y, first + part.start).to(gradient)
        return gradient

    def _backward(self, i: int, gradient: Tensor) -> Tensor:
        """Gradient by the input of block i, written over that by its output; keeps the weights."""
        block, x = self.runner.block(i), self._store.pop(_state(i))
        groups = self.runner.input_groups(i, block, x[:1].to(self.runner.dtype))
        weights = {group.modules[0]: torch.zeros(x.shape[:2]) for group in groups}
        for part in self._batches():
            y, g = x[part].to(self.runner.device), gradient[part].to(self.runner.device)
            g, squares = self._gradients.block(i, block, y.to(self.runner.dtype), g)
            gradient[part] = g.to(gradient)
            for group in groups:
                each = [squares[name] for name in group.modules if name in squares]
                if len(each) < len(group.modules):  # experts; see `TokenGradients.block`
                    weights.pop(group.modules[0], None)
                else:
                    weights[group.modules[0]][part] = torch.stack(each).sum(0).cpu()
        self._store.keep(_weights(i), {name: normalised(w) for name, w in weights.items()})
        self.runner.release(i)
        return gradient


def normalised(weights: Tensor) -> Tensor:
    """Weights [n, T] of mean 1 in every window; where all are 0, ones."""
    mean = weights.mean(-1, keepdim=True)
    return torch.where(mean > 0, weights / mean.clamp_min(1e-38), torch.ones_like(weights))


def _state(i: int) -> str:
    return f"input-{i}.safetensors"


def _weights(i: int) -> str:
    return f"token-weights-{i}.safetensors"
