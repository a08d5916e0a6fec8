"""Statistics of the inputs of a block's linear layers: input groups and their Gram matrices H.

Input groups (input_groups.py) are found at run time, by watching the calls, not by names:

1. A forward pre-hook on every `nn.Linear` of the block sees its input tensor.
2. Two calls belong to one input group when address, size and in-place version of their inputs
   agree. The recorder keeps each input alive until the forward is over; otherwise the allocator
   would give the same address to a later activation and join unrelated layers.
3. The first call of an input group adds the batch to its Gram matrix,

       H = sum_t w_t x_t x_t^T / number of tokens,    w_t = min(1, clip * median / ||x_t||^2),

   the median being that of ||x||^2 over the tokens of the same window. A few tokens (the first one
   above all) carry up to 4e5 times the energy of the median token; unclipped, they make H nearly
   rank one and every other direction is drowned by its damping. `torch.median` is the lower one
   for even lengths. Where the median is 0 nothing is clipped. A caller's weights v_t (gradients of
   the loss, token_gradients.py) multiply ||x_t||^2 before it is clipped, and w_t after.

Layout: H is float32 [d_in, d_in], symmetric. Only the lower block triangle is computed (a third
less work) and mirrored at the end. Sums run in float32: 1e5 tokens leave a relative error near
1e-6, far below what the damping hides; factorise it in float64. Batches are added up in shards
(`fold`), and shards in their order, so that several processes get the same bits as one
(system/distributed.py); that takes room for H twice.

Experts (experts.py) are stacks of matrices: that of gate and up is an input group of its own, with
the H of all tokens, that of down has an H for each expert.

A linear that is called twice in one forward, that sees a subset of the tokens (experts outside of
transformers' registry), or whose inputs are no multiple of the group size has no input group: it
stays as it is. If more than MAX_UNCOVERED of the block is left so, the model is refused with the
names and the reasons.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import Token
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from dropbydrop.system.errors import CalibrationError, UnsupportedModelError

from . import experts
from .input_groups import InputGroup, codable, group_name, why_not_coded

if TYPE_CHECKING:
    from dropbydrop.system.distributed import Partition

CLIP = 20.0
MAX_UNCOVERED = 0.05  # share of a block's matrices that may stay outside of called linears
_COLUMNS = 256  # width of the column blocks of a Gram product
# [n, T] for all input groups, or by an input group's first module (others have none)
TokenWeights = Tensor | Mapping[str, Tensor] | None


@dataclass
class BlockStatistics:
    """What one pass over a block yields.

    Attributes:
        input_groups: in the order of their calls.
        grams: input group name -> H, float32 [d_in, d_in], tokens clipped and weighted; of the
            down of experts one for each, [E, d_in, d_in].
        energy_ratio: input group name -> largest ||x||^2 over the median one, maximum over windows.
        tokens: the number of tokens each H averages over.
        hidden: the block's output, [n, T, d].
        routed: input group name -> tokens that each expert saw, [E]; of the down of experts.
        guided: input groups whose tokens have weights of the caller.
    """

    input_groups: list[InputGroup]
    grams: dict[str, Tensor]
    energy_ratio: dict[str, float]
    tokens: int
    hidden: Tensor
    routed: dict[str, Tensor] = field(default_factory=dict)
    guided: set[str] = field(default_factory=set)


def token_weights(energy: Tensor, clip: float) -> Tensor:
    """w = min(1, clip * median / energy), median over the last dimension. energy [b, T] -> [b, T].

    An infinite `clip` gives ones.
    """
    median = energy.median(dim=-1, keepdim=True).values  # [b, 1]
    limit = torch.where(median > 0, clip * median, torch.inf)
    return (limit / energy.clamp_min(torch.finfo(energy.dtype).tiny)).clamp(max=1.0)


def weighted(energy: Tensor, clip: float, given: Tensor | None) -> Tensor:
    """Weights of tokens of these energies: those `given`, clipped. All [.., T]."""
    own = torch.ones_like(energy) if given is None else given.to(energy)
    return own * token_weights(energy * own, clip)


def weights_of(weights: TokenWeights, windows: slice) -> TokenWeights:
    """Those of some windows."""
    if isinstance(weights, Mapping):
        return {name: w[windows] for name, w in weights.items()}
    return None if weights is None else weights[windows]


def add_gram(total: Tensor, y: Tensor) -> None:
    """Add the lower block triangle of y^T y to `total` [d, d]; y [tokens, d] float32."""
    d = y.shape[1]
    count = max(1, round(d / _COLUMNS))
    edges = [d * j // count for j in range(count + 1)]
    for low, high in pairwise(edges):
        total[low:, low:high].addmm_(y[:, low:].T, y[:, low:high])


def mirror(total: Tensor, scale: float) -> Tensor:
    """The symmetric matrix whose lower triangle is that of `total` [d, d], times `scale`.

    `total` is scaled in place; the result is new, [d, d].
    """
    total.mul_(scale)
    upper = torch.ones_like(total, dtype=torch.bool).triu_(1)
    return torch.where(upper, total.T, total)


@dataclass
class _Sums:
    """A tensor that is summed over batches, shard by shard."""

    running: Tensor | None = None  # of the shard that is running
    over: list[Tensor] = field(default_factory=list)  # of the shards that are over

    def of(self, *shape: int, device: torch.device) -> Tensor:
        """What to add to: zeros at the beginning of a shard."""
        if self.running is None:
            self.running = torch.zeros(*shape, device=device)
        return self.running

    def fold(self, keep: bool) -> None:
        """A shard is over; see `InputRecorder.fold`."""
        if self.running is not None and (keep or not self.over):
            self.over.append(self.running)
        elif self.running is not None:
            self.over[0].add_(self.running)
        self.running = None


@dataclass
class _Entry:
    """One input group while it is being recorded."""

    modules: list[str]
    d_in: int
    experts: int = 0
    ratio: float = 0.0
    gram: _Sums = field(default_factory=_Sums)  # [d, d]; of a down [2 E, d, d]: routed, forced
    counts: _Sums = field(default_factory=_Sums)  # of a down, tokens [E + 1]: routed, forced


@dataclass
class InputRecorder:
    """Watches the linear layers of one block; use as a context manager around its forwards.

    Call `batch(shape, weights)` before and `end()` after each forward of the block, and `fold()`
    after each shard of batches.

    Args:
        block: the block; `prefix` is its full name in the model.
        clip: see the module's note. `grams=False` only finds the input groups.

    Raises:
        UnsupportedModelError: when input groups are asked for, and too much is in none.
    """

    block: nn.Module
    prefix: str
    clip: float = CLIP
    grams: bool = True
    _input_groups: dict[str, _Entry] = field(default_factory=dict)  # by first module
    _calls: list[tuple[Tensor, int, _Entry]] = field(default_factory=list)
    _seen: set[str] = field(default_factory=set)
    _left: dict[str, str] = field(default_factory=dict)  # module that has no group -> the reason
    _shape: tuple[int, int] = (0, 0)
    _weights: TokenWeights = None
    _handles: list[torch.utils.hooks.RemovableHandle] = field(default_factory=list)
    _experts: dict[nn.Module, str] = field(default_factory=dict)  # module -> full name
    _token: Token[experts.Watcher | None] | None = None

    def __enter__(self) -> InputRecorder:
        self._token = experts.watching.set(self)
        for name, part in self.block.named_modules(prefix=self.prefix):
            if experts.is_experts(part):
                self._experts[part] = name
        for full, module in codable(self.block, self.prefix).items():

            def hook(module: nn.Module, args: tuple, kwargs: dict, full: str = full) -> None:
                self._called(full, args[0] if args else next(iter(kwargs.values())))

            self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._calls.clear()
        if self._token is not None:
            experts.watching.reset(self._token)

    def batch(self, shape: tuple[int, int], weights: TokenWeights = None) -> None:
        """Announce a forward over [b, T] tokens, `weights` [b, T] as in the module's note."""
        self._shape, self._weights = shape, weights

    def _weights_of(self, entry: _Entry) -> Tensor | None:
        """The caller's weights [b, T] for an input group."""
        given = self._weights
        return given.get(entry.modules[0]) if isinstance(given, Mapping) else given

    def end(self) -> None:
        """The forward is over: let go of its inputs."""
        self._calls.clear()
        self._seen.clear()

    def fold(self, keep: bool = False) -> None:
        """A shard is over: add its sums to those of the shards before it, or `keep` them apart."""
        for entry in self._input_groups.values():
            entry.gram.fold(keep)
            entry.counts.fold(keep)

    def _called(self, full: str, x: Tensor) -> None:
        if full in self._seen:
            reason = f"{full} is called more than once in one forward of its block"
            self._left.setdefault(full, reason)
            return
        self._seen.add(full)
        b, t = self._shape
        if x.numel() != b * t * x.shape[-1]:
            self._left.setdefault(full, self._rows(full, x))
            return
        for held, version, entry in self._calls:
            same = held.data_ptr() == x.data_ptr() and held.numel() == x.numel()
            if same and held.shape[-1] == x.shape[-1] and version == x._version:
                if full not in entry.modules:
                    entry.modules.append(full)
                return
        entry = self._input_groups.setdefault(full, _Entry([full], x.shape[-1]))
        self._calls.append((x, x._version, entry))
        if self.grams:
            self._add(entry, x.detach().reshape(b, t, -1).to(torch.float32))  # [b, T, d_in]

    def _rows(self, full: str, x: Tensor) -> str:
        """Why a module that does not see every token has no input group."""
        b, t = self._shape
        rows = x.numel() // x.shape[-1]
        return f"{full} sees {rows} rows for {b * t} tokens: a routed (mixture-of-experts) layer"

    def inputs(self, module: nn.Module, x: Tensor) -> None:
        """See `experts.Watcher`: the input group of gate and up."""
        full = f"{self._experts[module]}.{experts.stacks(module)[0]}"
        b, t = self._shape
        if x.numel() != b * t * x.shape[-1]:
            self._left.setdefault(full, self._rows(full, x))
            return
        count = cast(Any, module).num_experts
        group = _Entry([full], x.shape[-1], count)
        entry = self._input_groups.setdefault(full, group)
        if self.grams:
            self._add(entry, x.detach().reshape(*self._shape, -1).to(torch.float32))

    def middle(self, module: nn.Module, e: int, h: Tensor, tokens: Tensor | None) -> None:
        """See `experts.Watcher`: the input group of down."""
        full = f"{self._experts[module]}.{experts.stacks(module)[1]}"
        count, d = cast(Any, module).num_experts, h.shape[-1]
        entry = self._input_groups.setdefault(full, _Entry([full], d, count))
        if not self.grams:
            return
        h = h.detach().to(torch.float32)
        energy = torch.linalg.vector_norm(h, dim=-1).square()  # [t]
        given = None if tokens is None else self._weights_of(entry)
        chosen = None if given is None else given.reshape(-1)[tokens]
        weights = weighted(energy, self.clip, chosen)
        gram = entry.gram.of(2 * count, d, d, device=h.device)
        add_gram(gram[e if tokens is not None else count + e], h * weights.sqrt()[:, None])
        counts = entry.counts.of(count + 1, device=h.device)
        if tokens is not None:
            counts[e] += len(h)
            median = energy.median().clamp_min(torch.finfo(energy.dtype).tiny)
            entry.ratio = max(entry.ratio, float(energy.max() / median))
        elif e == 0:
            counts[count] += len(h)

    def _add(self, entry: _Entry, x: Tensor) -> None:
        """Add inputs x [b, T, d_in] to the sums of their input group."""
        d = entry.d_in
        gram = entry.gram.of(d, d, device=x.device)
        energy = torch.linalg.vector_norm(x, dim=-1).square()  # [b, T]
        median = energy.median(dim=-1).values.clamp_min(torch.finfo(energy.dtype).tiny)  # [b]
        entry.ratio = max(entry.ratio, float((energy.amax(-1) / median).max()))
        weights = weighted(energy, self.clip, self._weights_of(entry))
        add_gram(gram, (x * weights.sqrt()[..., None]).view(-1, d))  # [b * T, d_in]

    def _kept(self) -> list[tuple[_Entry, list[str]]]:
        """Input groups seen so far, in the order of their calls, with the modules they keep."""
        kept = [
            (entry, [name for name in entry.modules if name not in self._left])
            for entry in self._input_groups.values()
        ]
        return [(entry, modules) for entry, modules in kept if modules]

    def input_groups(self) -> list[InputGroup]:
        """The input groups seen so far, in the order of their calls.

        Raises:
            UnsupportedModelError: too much of the block is in none of them.
        """
        names = [module for _, modules in self._kept() for module in modules]
        check_uncovered(self.block, self.prefix, set(names), list(self._left.values()))
        if len(names) != len(set(names)):
            raise UnsupportedModelError(
                f"the linear layers of {self.prefix} share their inputs differently from one "
                "batch to the next; such models are not supported."
            )
        return [
            InputGroup(group_name(modules), tuple(modules), entry.d_in, experts=entry.experts)
            for entry, modules in self._kept()
        ]

    def result(self, hidden: Tensor, partition: Partition, tokens: int) -> BlockStatistics:
        """Sum over the shards of all processes, normalise, hand over; empties the recorder.

        Args:
            hidden: the block's output [n, T, d] for this process's windows.
            partition: which windows this process has.
            tokens: number of tokens of all processes.

        Raises:
            CalibrationError: activations that are not finite.
        """
        input_groups = partition.ranks.on_all_ranks(self.input_groups)
        entries = [entry for entry, _ in self._kept()]
        largest = partition.ranks.largest([entry.ratio for entry in entries])
        grams: dict[str, Tensor] = {}
        ratio: dict[str, float] = {}
        routed: dict[str, Tensor] = {}
        for input_group, entry, most in zip(input_groups, entries, largest, strict=True):
            total = partition.total(entry.gram.over)
            if entry.counts.over:
                *counts, sample = partition.total(entry.counts.over)
                tally = routed[input_group.name] = torch.stack(counts)
                whole = torch.stack([mirror(one, 1.0) for one in total])
                own, forced = whole.chunk(2)
                grams[input_group.name] = experts.blend(own, forced, tally, float(sample))
            else:
                grams[input_group.name] = mirror(total, 1 / tokens)
            entry.gram, entry.counts = _Sums(), _Sums()
            if not bool(torch.isfinite(grams[input_group.name]).all()):
                raise CalibrationError(
                    f"the inputs of {input_group.name} are not finite: the model overflows on the "
                    "calibration text. Use dtype float32, or check the model's weights."
                )
            ratio[input_group.name] = most
        given = self._weights if isinstance(self._weights, Mapping) else {}
        guided = {group.name for group in input_groups if group.modules[0] in given}
        return BlockStatistics(input_groups, grams, ratio, tokens, hidden, routed, guided)


def check_uncovered(
    block: nn.Module, prefix: str, linears: set[str], reasons: Sequence[str] = ()
) -> None:
    """Refuse a block called `prefix` with more than MAX_UNCOVERED of its weights in no linear.

    Args:
        linears: full names of the linear layers, and of the stacks of experts, that count.
        reasons: why others do not.

    Raises:
        UnsupportedModelError: names the parameters and their share.
    """
    matrices = {f"{prefix}.{n}": p.numel() for n, p in block.named_parameters() if p.ndim >= 2}
    covered = {f"{name}.weight" for name in linears} | linears
    left = {name: size for name, size in matrices.items() if name not in covered}
    total = sum(matrices.values())
    share = sum(left.values()) / max(total, 1)
    if total and share <= MAX_UNCOVERED:
        return
    names = sorted(left, key=lambda name: -left[name])
    shown = ", ".join(f"{name} ({left[name]:,} weights)" for name in names[:4])
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    named = block.named_modules(prefix=prefix)
    other = [why_not_coded(n, m) for n, m in named if f"{n}.weight" in left]
    why = "; ".join([reason for reason in (*reasons, *other) if reason][:4])
    shown = f"{shown or 'it has no matrices at all'}{more}{why and f' ({why})'}"
    raise UnsupportedModelError(
        f"{share:.0%} of a block's weights are in no linear layer that its forward calls once with "
        f"every token: {shown}. Quantizing the rest would not be the model that was asked for. "
        "Experts (mixture-of-experts) that are none of transformers' registered ones, and unusual "
        "layers, are not supported; use another model."
    )
