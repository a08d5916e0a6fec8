"""Several processes on one run: torchrun --nproc-per-node N -m dropbydrop quantize ...

Who does what, for each block:
    1. every rank runs its own windows through the block. Windows are dealt in lanes: the batches of
       a run form LANES contiguous lanes whatever the number of ranks, and a rank has whole lanes;
    2. H of an input group is the sum of its lanes, added in their order. Lanes are broadcast one
       after the other, so every rank adds the same float32 matrices in the same order as a single
       process
       does: H, and with it every code, is the same bit for bit, for any number of ranks with the
       same kind of device and number of threads;
    3. matrices are dealt to ranks by estimated work (`assign_by_cost`); rank 0 collects codes,
        writes them.

Rank 0 alone touches OUT, keeps the journal of --resume (with the hidden states of all ranks, so a
run may be resumed with another number of them) and prints. A failure of any rank stops all, with
its message (`together`).

Tensors on the CPU travel by gloo, those on GPUs by NCCL. Nothing is pickled.
Limits: at most LANES ranks. H travels once a lane; the traffic is LANES times its size a block.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from dropbydrop.errors import DropError

SHARDS = 8
_TIMEOUT = timedelta(hours=2)  # rank 0 may write calibration text for long while others wait
_T = TypeVar("_T")


class PeerError(DropError):
    """Another rank failed; its own message says why."""


def rank_of_process() -> int:
    """This process among those of torchrun; 0 outside of it."""
    return int(os.environ.get("RANK", 0))


@dataclass(frozen=True)
class Ranks:
    """The ranks of a run; of one process by default."""

    rank: int = 0
    size: int = 1

    @property
    def root(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    @staticmethod
    @contextmanager
    def join(device: str) -> Iterator[Ranks]:
        """The team that torchrun started this process in, for as long as the context lasts.

        Raises:
            DropError: more ranks than LANES.
        """
        size = int(os.environ.get("WORLD_SIZE", 1))
        if size == 1:
            yield Ranks()
            return
        if size > SHARDS:
            raise DropError(
                f"{size} processes: a run is dealt to at most {SHARDS}. Start fewer "
                "(--nnodes times --nproc-per-node)."
            )
        cuda = torch.device(device).type == "cuda"
        if cuda:
            torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=_TIMEOUT)
        try:
            yield Ranks(dist.get_rank(), size)
        finally:
            dist.destroy_process_group()

    # ---- errors ----------------------------------------------------------------------------

    def together(self, work: Callable[[], _T]) -> _T:
        """Do local work (no communication); if it fails anywhere, fail everywhere.

        Raises:
            PeerError: on all ranks but the first that failed, with its rank and message.
        """
        if self.size == 1:
            return work()
        result, failure = None, None
        try:
            result = work()
        except Exception as error:
            failure = error
        first = torch.tensor([self.size if failure is None else self.rank])
        dist.all_reduce(first, dist.ReduceOp.MIN)
        who = int(first)
        if who == self.size:
            return result  # type: ignore[return-value]
        message = self._text(str(failure) if who == self.rank else "", who)
        if who == self.rank and failure is not None:
            raise failure
        raise PeerError(f"rank {who} failed: {message}")

    def _text(self, text: str, source: int) -> str:
        """A text of one rank, on all."""
        data = torch.tensor(list(text.encode()), dtype=torch.uint8)
        size = torch.tensor([data.numel()])
        dist.broadcast(size, source)
        if self.rank != source:
            data = torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(data, source)
        return bytes(data.tolist()).decode()

    # ---- values ----------------------------------------------------------------------------

    def number(self, value: int) -> int:
        """The root's integer, on all ranks."""
        if self.size == 1:
            return value
        shared = torch.tensor([value])
        dist.broadcast(shared, 0)
        return int(shared)

    def integers(self, values: Tensor | None) -> Tensor:
        """The root's int64 [n, T], on the CPU of all ranks."""
        if self.size == 1:
            assert values is not None
            return values
        shape = torch.tensor([0, 0] if values is None else list(values.shape))
        dist.broadcast(shape, 0)
        shared = torch.empty(*shape.tolist(), dtype=torch.int64) if values is None else values.cpu()
        shared = shared.contiguous()
        dist.broadcast(shared, 0)
        return shared

    def largest(self, values: Sequence[float]) -> list[float]:
        """The maximum over ranks, one by one."""
        if self.size == 1:
            return list(values)
        shared = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return shared.tolist()

    def to_root(self, tensor: Tensor | None, owner: int, like: Tensor) -> Tensor | None:
        """A tensor of rank `owner` on the root's CPU (None elsewhere); `like` has its shape."""
        if owner == 0:
            return None if tensor is None else tensor.cpu()
        if self.rank == owner:
            assert tensor is not None
            dist.send(tensor.cpu().contiguous(), 0)
        elif self.root:
            received = torch.empty(like.shape, dtype=like.dtype)
            dist.recv(received, owner)
            return received
        return None

    def from_root(self, tensor: Tensor | None, owner: int, like: Tensor) -> Tensor | None:
        """A tensor of the root's on the CPU of rank `owner`, None elsewhere."""
        if owner == 0:
            return tensor if self.root else None
        if self.root:
            assert tensor is not None
            dist.send(tensor.cpu().contiguous(), owner)
        elif self.rank == owner:
            received = torch.empty(like.shape, dtype=like.dtype)
            dist.recv(received, 0)
            return received
        return None

    def partition(self, shards: Sequence[list[slice]]) -> Partition:
        """This rank's part of a run whose batches of windows form these lanes.

        Raises:
            DropError: fewer lanes than ranks.
        """
        if len(shards) < self.size:
            raise DropError(
                f"{self.size} processes, but the calibration makes only {len(shards)} batches. "
                "Start fewer processes, or give more calibration (--windows)."
            )
        owners = [shard * self.size // len(shards) for shard in range(len(shards))]
        return Partition(self, tuple(shards), tuple(owners))


@dataclass(frozen=True)
class Partition:
    """Lanes, of windows counted over the whole run, and the rank of each."""

    ranks: Ranks
    all_shards: tuple[list[slice], ...]
    owners: tuple[int, ...]

    def windows(self, rank: int) -> slice:
        """The windows of a rank; contiguous."""
        own = [
            shard
            for shard, owner in zip(self.all_shards, self.owners, strict=True)
            if owner == rank
        ]
        return slice(own[0][0].start, own[-1][-1].stop)

    @property
    def count(self) -> int:
        """Windows of the whole run."""
        return self.all_shards[-1][-1].stop

    @property
    def shards(self) -> list[list[slice]]:
        """Own lanes, relative to this rank's first window."""
        first = self.windows(self.ranks.rank).start
        return [
            [slice(part.start - first, part.stop - first) for part in shard]
            for shard, owner in zip(self.all_shards, self.owners, strict=True)
            if owner == self.ranks.rank
        ]

    def total(self, own: Sequence[Tensor]) -> Tensor:
        """The sum of all lanes in their order, on every rank; `own` are this rank's.

        One process folds lanes as it goes (`own` is then their sum already).
        """
        if self.ranks.size == 1:
            (only,) = own
            return only
        mine = iter(own)
        total: Tensor | None = None
        for owner in self.owners:
            part = next(mine) if owner == self.ranks.rank else torch.empty_like(own[0])
            dist.broadcast(part, owner)
            if total is None:
                total = part
            else:
                total.add_(part)
        assert total is not None
        return total

    def gather(self, hidden: Tensor) -> Tensor | None:
        """Hidden states [own windows, T, d] of all ranks on the root's CPU, in order."""
        if self.ranks.size == 1:
            return hidden.cpu()
        parts = []
        for rank in range(self.ranks.size):
            span = self.windows(rank)
            like = hidden.new_empty((span.stop - span.start, *hidden.shape[1:]), device="meta")
            parts.append(
                self.ranks.to_root(hidden if rank == self.ranks.rank else None, rank, like)
            )
        return torch.cat([part for part in parts if part is not None]) if self.ranks.root else None

    def scatter(self, hidden: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The root's hidden states [all windows, T, d] of `dtype`, each rank its own windows."""
        if self.ranks.size == 1:
            assert hidden is not None
            return hidden
        shape = [self.ranks.number(0 if hidden is None else hidden.shape[i]) for i in (1, 2)]
        own = None
        for rank in range(self.ranks.size):
            span = self.windows(rank)
            like = torch.empty(span.stop - span.start, *shape, dtype=dtype, device="meta")
            part = None if hidden is None else hidden[span]
            got = self.ranks.from_root(part, rank, like)
            own = got if rank == self.ranks.rank else own
        assert own is not None
        return own


def assign_by_cost(costs: Sequence[float], size: int) -> list[int]:
    """A rank for each job: the largest first, each to the rank with the least work so far."""
    load, owner = [0.0] * size, [0] * len(costs)
    for job in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owner[job] = min(range(size), key=lambda rank: (load[rank], rank))
        load[owner[job]] += costs[job]
    return owner
