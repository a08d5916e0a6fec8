"""Encode the matrices of a model block by block, and write them and all else that is stored.

With several processes each encodes its share of a block's matrices; the root, which alone has a
writer and keeps the log, collects and writes all. Every matrix has one owner, and the rotation of
an input group is made once and sent, so that the bytes do not depend on how many take part.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dropbydrop.checkpoint import CheckpointWriter, Embeddings, StoredGroup
from dropbydrop.coding.codebook_set import CodebookSet
from dropbydrop.coding.codebooks import UNIVERSAL, default_lambdas
from dropbydrop.coding.encoder import Effort, Encoded, encode_group, group_rotation, learn_group
from dropbydrop.coding.rotation import Rotation, odd_factor, split_odd
from dropbydrop.models.block_runner import BlockRunner
from dropbydrop.models.input_groups import InputGroup
from dropbydrop.models.statistics import BlockStatistics
from dropbydrop.system.distributed import Ranks, assign_by_cost

from .config import QuantizeConfig
from .log import RunLog


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
        modules: dict[str, Any] = {
            name: block.get_submodule(name.removeprefix(prefix))
            for group in statistics.input_groups
            for name in group.modules
        }
        rotations = self._rotations(statistics, modules)
        # work of a matrix: a search that is linear in its size, products with H
        costs = [m.weight.numel() * (2000.0 + m.weight.shape[1]) for m in modules.values()]
        owners = dict(zip(modules, assign_by_cost(costs, self.ranks.size), strict=True))
        mine = {name for name, owner in owners.items() if owner == self.ranks.rank}
        encoded, sets = self.ranks.on_all_ranks(
            lambda: self._encode_groups(statistics, modules, rotations, mine)
        )
        for group in statistics.input_groups:
            if self.ranks.root:
                self._add_group(group, rotations[group.name], sets.get(group.name))
            for name in group.modules:
                module = modules[name]
                result = self._collect(encoded.pop(name, None), owners[name])
                if result is not None:
                    self._add_matrix(name, module, *result, statistics.energy_ratio[group.name])
        if self.ranks.root:
            self._keep_others(prefix, block, modules)

    def _add_group(
        self, group: InputGroup, rotation: Rotation, learned: CodebookSet | None
    ) -> None:
        """Write what the matrices of an input group share."""
        name = UNIVERSAL
        if learned is not None:
            name = f"input-group-{len(self.writer.input_groups)}"
            self.writer.add_codebook_set(name, learned.to("cpu"))
        stored = StoredGroup(group.name, group.modules, group.d_in, name)
        self.writer.add_group(stored, rotation)

    def _keep_others(self, prefix: str, block: nn.Module, coded: Mapping[str, Any]) -> None:
        """Write the parameters and buffers of a block that are not coded."""
        done = {f"{name}.{leaf}" for name in coded for leaf in ("weight", "bias")}
        for local, _ in block.named_parameters():
            if prefix + local not in done:
                self._keep(prefix + local, "not a matrix of a linear layer")
        for local, _ in block.named_buffers():
            if local in block.state_dict():
                self._keep(prefix + local, "a buffer")

    def _rotations(
        self, statistics: BlockStatistics, modules: Mapping[str, Any]
    ) -> dict[str, Rotation]:
        """The rotation of every input group. The root makes it and all ranks take its bytes: an
        input scale that differed on one of them would decode its matrices wrong."""

        def scaled(input_group: InputGroup, seed: int) -> Tensor | None:
            if not self.ranks.root:
                return None
            weights = {name: modules[name].weight.detach() for name in input_group.modules}
            return group_rotation(weights, statistics.grams[input_group.name], seed).packed()

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
        modules: Mapping[str, Any],
        rotations: Mapping[str, Rotation],
        mine: set[str],
    ) -> tuple[dict[str, tuple[Encoded, float]], dict[str, CodebookSet]]:
        """This process's matrices, name -> code and seconds; learned sets by input group."""
        out: dict[str, tuple[Encoded, float]] = {}
        sets: dict[str, CodebookSet] = {}
        for input_group in statistics.input_groups:
            names = [name for name in input_group.modules if name in mine]
            if not names:
                continue
            start = time.perf_counter()
            arguments = (
                {name: modules[name].weight.detach().float() for name in names},
                statistics.grams[input_group.name],
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
            spent = (time.perf_counter() - start) / len(names)
            out |= {name: (code, spent) for name, code in encoded.items()}
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

    def _add_matrix(
        self, name: str, module: Any, code: Encoded, seconds: float, energy_ratio: float
    ) -> None:
        """Write a coded matrix and note it in the log."""
        bias, weight = module.bias, module.weight.detach().float()
        self.writer.add_linear(
            name,
            [plane.cpu() for plane in code.codes],
            scales=code.scales.cpu(),
            bias=None if bias is None else bias.detach().cpu(),
            d_in=weight.shape[1],
        )
        self.log.parameters += weight.numel() + (0 if bias is None else bias.numel())
        rms = float(weight.square().mean().sqrt())
        self.log.matrices.append(
            {
                "module": name,
                "shape": list(weight.shape),
                "rel_error": dict(zip(map(str, self.levels), code.errors, strict=True)),
                "max_over_rms": round(float(weight.abs().max()) / max(rms, 1e-30), 2),
                "token_energy_over_median": round(energy_ratio, 1),
                "seconds": round(seconds, 3),
            }
        )

    def _keep(self, name: str, reason: str) -> None:
        """A parameter that is stored as it is."""
        tensor = self.runner.read(name)
        self.writer.add_tensor(name, tensor)
        self.log.parameters += tensor.numel()
        bits = 8 * tensor.element_size()
        self.log.kept.append(
            {"name": name, "bits": bits, "values": tensor.numel(), "reason": reason}
        )

    def write_rest(self, head_bits: int) -> Embeddings:
        """Write embedding, head and what else lies outside of the blocks."""
        runner = self.runner
        modules = [*runner.embedding_modules, *([] if runner.tied else runner.head_modules)]
        for module in modules:
            weight = runner.read(f"{module}.weight")
            self.writer.add_embedding(module, weight, head_bits)
            self.log.parameters += weight.numel()
            role = "head" if module in runner.head_modules else "embedding"
            reason = f"{role}{' and tied head' if runner.tied else ''}; --head-bits chooses"
            self.log.kept.append(
                {"name": module, "bits": head_bits, "values": weight.numel(), "reason": reason}
            )
        for name in runner.outer_names():
            if name.removesuffix(".weight") not in modules:
                self._keep(name, "outside of the decoder blocks")
        return Embeddings(head_bits, tuple(modules), runner.tied)
