"""Several processes on one run: torchrun --nproc-per-node N -m dropbydrop quantize ...

Who does what, for each block:
    1. every rank runs its windows through the block. The batches of a run form SHARDS contiguous
       shards, whatever the number of ranks, and a rank has whole shards (`Partition`);
    2. H of an input group is the sum of its shards, added in their order. Shards are broadcast one
       after the other, so every rank adds the same float32 matrices in the same order as a single
       process does: H, and with it every code, is the same bit for bit, for any number of ranks
       with the same kind of device and number of threads;
    3. matrices are assigned to ranks by estimated work (`assign_by_cost`); rank 0 collects codes,
       writes them.

Rank 0 alone touches OUT, keeps the journal of --resume (with the hidden states of all ranks, so a
run may be resumed with another number of them) and prints. A failure of any rank stops all, with
its message (`on_all_ranks`).

Tensors on the CPU travel by gloo, those on GPUs by NCCL; small values as JSON, codes in the
form of a safetensors file. Nothing is pickled: whoever reaches the port cannot run code.
Limits: at most SHARDS ranks. H travels once a shard; the traffic is SHARDS times its size a block.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from safetensors.torch import load, save
from torch import Tensor
from torch import distributed as dist

from .errors import DropError

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
        """The ranks that torchrun started this process among, for as long as the context lasts.

        Raises:
            DropError: more ranks than SHARDS.
        """
        size = int(os.environ.get("WORLD_SIZE", 1))
        if size == 1:
            yield Ranks()
            return
        if size > SHARDS:
            raise DropError(
                f"{size} processes: a run is shared by at most {SHARDS}. Start fewer "
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

    def on_all_ranks(self, work: Callable[[], _T]) -> _T:
        """Do local work (no communication); if it fails on one rank, fail on all.

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
        lowest = torch.tensor([self.size if failure is None else self.rank])
        dist.all_reduce(lowest, dist.ReduceOp.MIN)
        first = int(lowest)
        if first == self.size:
            return result  # type: ignore[return-value]
        message = self._broadcast(str(failure), first)
        if first == self.rank and failure is not None:
            raise failure
        raise PeerError(f"rank {first} failed: {message}")

    def broadcast(self, value: _T | None) -> _T:
        """The root's value, on all ranks; what the others pass is ignored.

        A tensor on the CPU, a dictionary of them, or anything that JSON has.
        """
        shared: _T | None = self._broadcast(value, 0) if self.size > 1 else value
        assert shared is not None
        return shared

    def _broadcast(self, value: Any, source: int) -> Any:
        data = _encode(value) if self.rank == source else torch.empty(0, dtype=torch.uint8)
        size = torch.tensor([data.numel()])
        dist.broadcast(size, source)
        if self.rank != source:
            data = torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(data, source)
        return _decode(data)

    def largest(self, values: Sequence[float]) -> list[float]:
        """The maximum over ranks, one by one."""
        if self.size == 1:
            return list(values)
        shared = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return shared.tolist()

    def to_root(self, value: _T | None, owner: int) -> _T | None:
        """A value of rank `owner` on the root, None elsewhere; of the kinds of `broadcast`."""
        if owner != 0 and self.rank == owner:
            data = _encode(value)
            dist.send(torch.tensor([data.numel()]), 0)
            dist.send(data, 0)
        elif owner != 0 and self.root:
            size = torch.zeros(1, dtype=torch.int64)
            dist.recv(size, owner)
            data = torch.empty(int(size), dtype=torch.uint8)
            dist.recv(data, owner)
            return _decode(data)
        return value if self.root else None

    def partition(self, shards: Sequence[list[slice]]) -> Partition:
        """This rank's part of a run whose batches of windows form these shards.

        Raises:
            DropError: fewer shards than ranks.
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
    """Which windows of a run each rank has.

    Attributes:
        all_shards: batches of each shard, as slices of the windows of the whole run.
        owners: rank of each shard, ascending.
    """

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
        """The shards of this rank, relative to its first window."""
        first = self.windows(self.ranks.rank).start
        return [
            [slice(part.start - first, part.stop - first) for part in shard]
            for shard, owner in zip(self.all_shards, self.owners, strict=True)
            if owner == self.ranks.rank
        ]

    def total(self, own: Sequence[Tensor]) -> Tensor:
        """The sum of all shards in their order, on every rank; `own` are this rank's, [d, d] each.

        One process adds shards as it goes (`own` is then their sum already).
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
        """Hidden states [windows of this rank, T, d] of all ranks on the root's CPU, in order.

        Returns:
            [windows of the run, T, d] on the root, None elsewhere.
        """
        mine = hidden.cpu()
        if self.ranks.size == 1:
            return mine
        if not self.ranks.root:
            dist.send(mine.contiguous(), 0)
            return None
        whole = mine.new_empty(self.count, *mine.shape[1:])
        whole[self.windows(0)] = mine
        for rank in range(1, self.ranks.size):
            dist.recv(whole[self.windows(rank)], rank)
        return whole

    def scatter(self, hidden: Tensor | None) -> Tensor:
        """The root's hidden states [windows of the run, T, d], each rank its part of them."""
        if self.ranks.size == 1:
            assert hidden is not None
            return hidden
        mine = None if hidden is None else [list(hidden.shape[1:]), str(hidden.dtype)]
        shape, dtype = self.ranks.broadcast(mine)
        own = self.windows(self.ranks.rank)
        if hidden is not None:
            for rank in range(1, self.ranks.size):
                dist.send(hidden[self.windows(rank)].cpu().contiguous(), rank)
            return hidden[own]
        kind = getattr(torch, str(dtype).removeprefix("torch."))
        received = torch.empty(own.stop - own.start, *shape, dtype=kind)
        dist.recv(received, 0)
        return received


def _encode(value: Any) -> Tensor:
    """A value as bytes, uint8 [size]: its kind in one byte, then safetensors or JSON."""
    if isinstance(value, Tensor):
        data = b"t" + save({"value": value.contiguous()})
    elif isinstance(value, dict):
        data = b"d" + save({name: tensor.contiguous() for name, tensor in value.items()})
    else:
        data = b"j" + json.dumps(value).encode()
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _decode(data: Tensor) -> Any:
    """The value that `_encode` was given."""
    raw = data.numpy().tobytes()
    if raw[:1] == b"j":
        return json.loads(raw[1:])
    tensors = load(raw[1:])
    return tensors["value"] if raw[:1] == b"t" else tensors


def assign_by_cost(costs: Sequence[float], size: int) -> list[int]:
    """A rank for each job: the largest first, each to the rank with the least work so far."""
    load, owner = [0.0] * size, [0] * len(costs)
    for job in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owner[job] = min(range(size), key=lambda rank: (load[rank], rank))
        load[owner[job]] += costs[job]
    return owner
