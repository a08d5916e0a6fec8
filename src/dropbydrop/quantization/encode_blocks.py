"""Encode the matrices of a model block by block, and write them and all else that is stored.

With several processes each encodes its share of a block's matrices; the root, which alone has a
writer and keeps the log, collects and writes all. Every matrix has one owner, and the rotation of
an input group is made once and sent, so that the bytes do not depend on how many take part.

Experts are stacks of matrices (models/experts.py). Each matrix is coded for itself and has an owner
of its own; they share a rotation, made for the mean of their H, and are written together.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dropbydrop.checkpoint import CheckpointWriter, Embeddings, StoredGroup
from dropbydrop.coding.codebook_set import CodebookSet
from dropbydrop.coding.codebooks import UNIVERSAL, default_lambdas
from dropbydrop.coding.encoder import Effort, Encoded, encode_group, group_rotation, learn_group
from dropbydrop.coding.planes import counts_of
from dropbydrop.coding.rotation import Rotation, odd_factor, split_odd
from dropbydrop.models.block_runner import BlockRunner
from dropbydrop.models.experts import bias_of, layout_of, leaves_of, weight_of
from dropbydrop.models.input_groups import InputGroup
from dropbydrop.models.statistics import BlockStatistics
from dropbydrop.system.distributed import Ranks, assign_by_cost

from .config import QuantizeConfig
from .encode_tables import TableWriter
from .log import RunLog


class Place(NamedTuple):
    """A matrix of a block: a linear's, or one of a stack of experts."""

    module: str
    expert: int | None


class BlockEncoder:
    """Encodes and writes; see the module's note.

    Args:
        writer: the root's; None on the other ranks.
        config: its levels, seed, search backend and kind of codebooks are read.
        books: the universal set. With learned codebooks a set for every input group starts from it
            (one process only).

    Attributes:
        log: the books of the run.
    """

    def __init__(
        self,
        runner: BlockRunner,
        writer: CheckpointWriter | None,
        config: QuantizeConfig,
        effort: Effort,
        books: CodebookSet,
        ranks: Ranks | None = None,
    ) -> None:
        self.runner, self._writer, self.config, self.effort = runner, writer, config, effort
        self.levels, self.learned = config.levels, config.codebooks != UNIVERSAL
        self.books = books.to(runner.device)
        self.lambdas = default_lambdas(self.levels)
        self.log = RunLog(self.levels)
        self.ranks = ranks or Ranks()
        self._input_groups = self.ranks.broadcast(0 if writer is None else len(writer.input_groups))

    @property
    def writer(self) -> CheckpointWriter:
        """The root's writer."""
        assert self._writer is not None, "only the root writes"
        return self._writer

    def encode_block(self, i: int, block: nn.Module, statistics: BlockStatistics) -> None:
        """Encode and write every matrix of block i, and the parameters that stay as they are."""
        prefix = f"{self.runner.block_prefix(i)}."
        weights = {
            name: weight_of(block, name.removeprefix(prefix))
            for group in statistics.input_groups
            for name in group.modules
        }
        rotations = self._rotations(statistics, weights)
        matrices = {
            Place(name, e): weight[e or 0] if group.experts else weight
            for group in statistics.input_groups
            for name in group.modules
            for weight in (weights[name],)
            for e in (range(group.experts) if group.experts else [None])
        }
        # work of a matrix: a search that is linear in its size, products with H
        costs = [m.numel() * (2000.0 + m.shape[1]) for m in matrices.values()]
        owners = dict(zip(matrices, assign_by_cost(costs, self.ranks.size), strict=True))
        mine = {place: m for place, m in matrices.items() if owners[place] == self.ranks.rank}
        encoded, sets = self.ranks.on_all_ranks(
            lambda: self._encode_groups(statistics, rotations, mine)
        )
        for group in statistics.input_groups:
            if self.ranks.root:
                layout = layout_of(block, group.modules[0].removeprefix(prefix))
                self._add_group(group, rotations[group.name], sets.get(group.name), layout)
            for name in group.modules:
                places = [place for place in matrices if place.module == name]
                results = [self._collect(encoded.pop(p, None), owners[p]) for p in places]
                found = [result for result in results if result is not None]
                if found:
                    bias = bias_of(block, name.removeprefix(prefix))
                    self._add_module(name, weights[name], bias, found, group, statistics)
        if self.ranks.root:
            self._keep_others(prefix, block, weights)

    def _add_group(
        self, group: InputGroup, rotation: Rotation, learned: CodebookSet | None, layout: str
    ) -> None:
        """Write what the matrices of an input group share."""
        name = UNIVERSAL
        if learned is not None:
            name = f"input-group-{len(self.writer.input_groups)}"
            self.writer.add_codebook_set(name, learned.to("cpu"))
        stored = StoredGroup(
            group.name, group.modules, group.d_in, name, layout, experts=group.experts
        )
        self.writer.add_group(stored, rotation)

    def _keep_others(self, prefix: str, block: nn.Module, coded: Mapping[str, Any]) -> None:
        """Write the parameters and buffers of a block that are not coded."""
        local_names = (name.removeprefix(prefix) for name in coded)
        done = {prefix + leaf for name in local_names for leaf in leaves_of(block, name)}
        for local, _ in block.named_parameters():
            if prefix + local not in done:
                self._keep(prefix + local, "not a matrix of a linear layer")
        for local, _ in block.named_buffers():
            if local in block.state_dict():
                self._keep(prefix + local, "a buffer")

    def _rotations(
        self, statistics: BlockStatistics, weights: Mapping[str, Tensor]
    ) -> dict[str, Rotation]:
        """The rotation of every input group. The root makes it and all ranks take its bytes: an
        input scale that differed on one of them would decode its matrices wrong."""

        def scaled(input_group: InputGroup, seed: int) -> Tensor | None:
            if not self.ranks.root:
                return None
            stacked = [weights[name] for name in input_group.modules]
            each = [m for w in stacked for m in (w if input_group.experts else [w])]
            gram = statistics.grams[input_group.name]
            if gram.dim() == 3:
                gram = gram.mean(0)
            return group_rotation(dict(enumerate(each)), gram, seed).packed()

        found = {}
        for input_group in statistics.input_groups:
            seed = self.config.seed * 1_000_003 + self._input_groups
            self._input_groups += 1
            packed = self.ranks.on_all_ranks(partial(scaled, input_group, seed))
            stored = self.ranks.broadcast(packed)
            odd = odd_factor(split_odd(input_group.d_in)[1])
            rotation = Rotation.from_stored(input_group.d_in, stored, odd)
            found[input_group.name] = rotation.to(self.runner.device)
        return found

    def _encode_groups(
        self,
        statistics: BlockStatistics,
        rotations: Mapping[str, Rotation],
        mine: Mapping[Place, Tensor],
    ) -> tuple[dict[Place, tuple[Encoded, float]], dict[str, CodebookSet]]:
        """This process's matrices, place -> code and seconds; learned sets by input group."""
        out: dict[Place, tuple[Encoded, float]] = {}
        sets: dict[str, CodebookSet] = {}
        for input_group in statistics.input_groups:
            gram = statistics.grams[input_group.name]
            own = {p: w for p, w in mine.items() if p.module in input_group.modules}
            # matrices that share an H are encoded together; each expert's down has its own
            together = [own] if gram.dim() == 2 else [{p: w} for p, w in own.items()]
            for places in together:
                if not places:
                    continue
                start = time.perf_counter()
                arguments = (
                    {place: weight.float() for place, weight in places.items()},
                    gram if gram.dim() == 2 else gram[next(iter(places)).expert or 0],
                    rotations[input_group.name],
                    self.books,
                    self.levels,
                    self.lambdas,
                    self.effort,
                    self.config.backend,
                )
                if self.learned:
                    encoded, sets[input_group.name] = learn_group(*arguments)
                else:
                    encoded = encode_group(*arguments)
                spent = (time.perf_counter() - start) / len(places)
                out |= {place: (code, spent) for place, code in encoded.items()}
        return out, sets

    def _collect(
        self, result: tuple[Encoded, float] | None, owner: int
    ) -> tuple[Encoded, float] | None:
        """A matrix's code on the root, None elsewhere; `result` is its owner's."""
        if owner == 0:
            return result
        sent = None
        if result is not None:
            code, spent = result
            numbers = torch.tensor([*code.errors, spent], dtype=torch.float64)
            codes = {f"codes.{m}": plane.cpu() for m, plane in enumerate(code.codes, 1)}
            sent = {**codes, "scales": code.scales.cpu(), "numbers": numbers}
        got = self.ranks.to_root(sent, owner)
        if got is None:
            return None
        *errors, seconds = got["numbers"].tolist()
        planes = [got[f"codes.{m}"] for m in range(1, len(got) - 1)]
        return Encoded(planes, got["scales"], errors), seconds

    def _add_module(
        self,
        name: str,
        weight: Tensor,
        bias: Tensor | None,
        results: Sequence[tuple[Encoded, float]],
        group: InputGroup,
        statistics: BlockStatistics,
    ) -> None:
        """Write a coded matrix, or the coded matrices of a stack, and note it in the log."""
        codes = [code for code, _ in results]
        whole = torch.stack if group.experts else lambda parts: parts[0]
        self.writer.add_linear(
            name,
            [whole(planes).cpu() for planes in zip(*(c.codes for c in codes), strict=True)],
            scales=whole([code.scales for code in codes]).cpu(),
            bias=None if bias is None else bias.cpu(),
            d_in=group.d_in,
        )
        self.log.parameters += weight.numel() + (0 if bias is None else bias.numel())
        rms = float(weight.float().square().mean().sqrt())
        errors = [sum(level) / len(codes) for level in zip(*(c.errors for c in codes), strict=True)]
        entry = {
            "module": name,
            "shape": list(weight.shape),
            "rel_error": dict(zip(map(str, self.levels), errors, strict=True)),
            "max_over_rms": round(float(weight.abs().max()) / max(rms, 1e-30), 2),
            "token_energy_over_median": round(statistics.energy_ratio[group.name], 1),
            "guided": group.name in statistics.guided,  # tokens count by gradients of the loss
            "seconds": round(sum(seconds for _, seconds in results), 3),
        }
        if (counts := statistics.routed.get(group.name)) is not None:
            entry["tokens"] = [int(count) for count in counts]  # that each expert saw
        if group.experts:  # what a level costs each, for plans (planning/sensitivity.py)
            each = zip(*(code.errors for code in codes), strict=True)
            entry["expert_errors"] = {
                str(p): [float(f"{error:.4g}") for error in level]
                for p, level in zip(self.levels, each, strict=True)
            }
        self.log.matrices.append(entry)

    def _keep(self, name: str, reason: str) -> None:
        """A parameter that is stored as it is."""
        tensor = self.runner.read(name)
        self.writer.add_tensor(name, tensor)
        self.log.parameters += tensor.numel()
        bits = 8 * tensor.element_size()
        self.log.kept.append(
            {"name": name, "bits": bits, "values": tensor.numel(), "reason": reason}
        )

    def write_rest(self, gram: Tensor | None) -> Embeddings:
        """Write embedding, head and what else lies outside of the blocks.

        Args:
            gram: H of the head's inputs, where there is a head that is coded in planes.
        """
        runner, config = self.runner, self.config
        modules = [*runner.embedding_modules, *([] if runner.tied else runner.head_modules)]
        ends = counts_of(self.books.planes, self.levels)
        tables = TableWriter(self.writer, config, ends, self.effort, runner.device)
        for module in modules:
            weight = runner.read(f"{module}.weight")
            multiplied = module in runner.head_modules or runner.tied
            seed = config.seed * 1_000_003 + self._input_groups
            self._input_groups += 1
            found = tables.add(module, weight, gram if multiplied else None, seed)
            self.log.parameters += weight.numel()
            role = "head" if module in runner.head_modules else "embedding"
            reason = f"{role}{' and tied head' if runner.tied else ''}; --head-bits chooses"
            self.log.kept.append(
                {"name": module, "values": weight.numel(), "reason": reason, **found}
            )
        for name in runner.outer_names():
            if name.removesuffix(".weight") not in modules:
                self._keep(name, "outside of the decoder blocks")
        return tables.described(tuple(modules), runner.tied)
