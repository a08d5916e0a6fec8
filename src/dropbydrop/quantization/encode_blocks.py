"""One run of the quantizer: encode and write a block, write the rest, keep books, report.

The books (`Tally`) can be handed over to another process, so that a run continues exactly where it
was (resume.py): `mark` returns what is new since the last call as JSON, `restore` takes a list of
such records. What has been written is handed over by the writer itself.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dropbydrop.checkpoint import CheckpointWriter, Embeddings, StoredGroup
from dropbydrop.coding.codebooks import UNIVERSAL, default_lambdas
from dropbydrop.coding.encoder import Effort, Encoded, encode_group, group_rotation
from dropbydrop.coding.learned_codebooks import learn_group
from dropbydrop.coding.rotation import Rotation, odd_factor, split_odd
from dropbydrop.models.block_runner import BlockRunner
from dropbydrop.models.input_groups import InputGroup
from dropbydrop.models.statistics import BlockStatistics
from dropbydrop.system.distributed import Ranks, assign_by_cost


@dataclass(frozen=True)
class Report:
    """What a run did. Seconds are wall-clock, memory is the peak of the whole process.

    Attributes:
        device_gib: peak memory on a GPU; 0 without one.
        errors: mean over matrices of the relative weighted error at each level.
        kept: parameters left in 8 or 16 bits (or as they were): name, bits, reason.
        resumed: blocks taken over from an interrupted run; seconds count their work too, except
            for the total.
    """

    out: Path
    levels: tuple[int, ...]
    seconds: dict[str, float]
    peak_gib: float
    device_gib: float
    model_gib: float
    errors: dict[int, float]
    matrices: int
    kept: list[dict[str, Any]]
    backend: str
    resumed: int
    log: list[dict[str, Any]] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, without the line-by-line log."""
        return {
            "out": str(self.out),
            "levels": list(self.levels),
            "seconds": {k: round(v, 2) for k, v in self.seconds.items()},
            "peak_gib": round(self.peak_gib, 3),
            "peak_device_gib": round(self.device_gib, 3),
            "model_float32_gib": round(self.model_gib, 3),
            "mean_relative_error": {str(p): e for p, e in self.errors.items()},
            "matrices": self.matrices,
            "kept": self.kept,
            "backend": self.backend,
            "resumed_blocks": self.resumed,
        }


@dataclass
class Tally:
    """The books of a run.

    Attributes:
        log: one entry a matrix: module, shape, relative errors, outliers, seconds.
        kept: parameters that are not coded: name, bits, values, reason.
        parameters: of the original model, met so far (tied ones once).
        seconds: wall-clock time by phase.
    """

    levels: tuple[int, ...]
    log: list[dict[str, Any]] = field(default_factory=list)
    kept: list[dict[str, Any]] = field(default_factory=list)
    parameters: int = 0
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("calibrate", "activations", "encode", "write"), 0.0)
    )
    _marked: tuple[int, int] = (0, 0)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the time spent inside to a phase."""
        start = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - start

    def mark(self) -> dict[str, Any]:
        """What is new since the last call, JSON-able."""
        log, kept = self._marked
        self._marked = len(self.log), len(self.kept)
        return {
            "log": self.log[log:],
            "kept": self.kept[kept:],
            "parameters": self.parameters,
            "seconds": self.seconds.copy(),
        }

    def restore(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Take over what `mark` returned in another process."""
        for record in records:
            self.log += record["log"]
            self.kept += record["kept"]
            self.parameters = record["parameters"]
            self.seconds |= record["seconds"]
        self._marked = len(self.log), len(self.kept)

    def mean_errors(self) -> dict[int, float]:
        """Mean relative error over matrices at each level."""
        return {
            p: sum(line["rel_error"][str(p)] for line in self.log) / max(len(self.log), 1)
            for p in self.levels
        }

    def log_lines(self) -> bytes:
        """The log as it is stored: without times, so that the same input gives the same bytes."""
        lines = ({k: v for k, v in line.items() if k != "seconds"} for line in self.log)
        return "".join(json.dumps(line) + "\n" for line in lines).encode()


class Run:
    """Encodes and writes; `tally` has the books. With several processes each encodes its share of a
    block's matrices, and the root, which alone has a writer, collects and writes all.

    Args:
        codebooks: the universal set, float32 [M, K/2, g].
        learned: start from it, and learn a set for every input group (one process only).
    """

    def __init__(
        self,
        runner: BlockRunner,
        writer: CheckpointWriter | None,
        levels: tuple[int, ...],
        codebooks: Tensor,
        effort: Effort,
        seed: int,
        backend: str | None,
        learned: bool = False,
        ranks: Ranks | None = None,
    ) -> None:
        self.runner, self._writer, self.levels = runner, writer, levels
        self.codebooks = codebooks.to(runner.device)
        self.effort, self.seed, self.backend, self.learned = effort, seed, backend, learned
        self.lambdas = default_lambdas(levels)
        self.tally = Tally(levels)
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
            for input_group in statistics.input_groups
            for name in input_group.modules
        }
        rotations = self._rotations(statistics, modules)
        # work of a matrix: a search that is linear in its size, products with H
        costs = [m.weight.numel() * (2000.0 + m.weight.shape[1]) for m in modules.values()]
        owners = dict(zip(modules, assign_by_cost(costs, self.ranks.size), strict=True))
        own = {name for name, owner in owners.items() if owner == self.ranks.rank}
        encoded, own_books = self.ranks.on_all_ranks(
            lambda: self._encode_groups(statistics, modules, rotations, own)
        )
        done: set[str] = set()
        for input_group in statistics.input_groups:
            rotation = rotations[input_group.name]
            if self.ranks.root:
                books = own_books.get(input_group.name)
                kind = UNIVERSAL if books is None else f"site-{len(self.writer.input_groups)}"
                if books is not None:
                    self.writer.add_codebook_set(kind, list(books.cpu()))
                spec = StoredGroup(
                    input_group.name, input_group.modules, input_group.d_in, kind, rotation.spec()
                )
                self.writer.add_group(spec, rotation)
            for name in input_group.modules:
                done |= {f"{name}.weight", f"{name}.bias"}
                result = self._collect(encoded.pop(name, None), owners[name])
                if result is not None:
                    self._add(
                        name, modules[name], *result, statistics.energy_ratio[input_group.name]
                    )
        if not self.ranks.root:
            return
        for local, _ in block.named_parameters():
            if prefix + local not in done:
                self._keep(prefix + local, "not a matrix of a linear layer")
        for local, _ in block.named_buffers():
            if local in block.state_dict():
                self._keep(prefix + local, "a buffer")

    def _rotations(
        self, statistics: BlockStatistics, modules: Mapping[str, Any]
    ) -> dict[str, Rotation]:
        """Site -> its rotation. The root makes it and all ranks take its bytes: a factor that
        differed on one of them would decode its matrices wrong."""

        def balanced(input_group: InputGroup, seed: int) -> Tensor | None:
            if not self.ranks.root:
                return None
            weights = {name: modules[name].weight.detach() for name in input_group.modules}
            return group_rotation(weights, statistics.grams[input_group.name], seed).packed()

        found = {}
        for input_group in statistics.input_groups:
            seed = self.seed * 1_000_003 + self._input_groups
            self._input_groups += 1
            packed = self.ranks.on_all_ranks(partial(balanced, input_group, seed))
            stored = self.ranks.broadcast(packed)
            odd = split_odd(input_group.d_in)[1]
            rotation = Rotation.from_stored(
                {"kind": "full", "scaled": True}, input_group.d_in, stored, odd_factor(odd)
            )
            found[input_group.name] = rotation.to(self.runner.device)
        return found

    def _encode_groups(
        self,
        statistics: BlockStatistics,
        modules: Mapping[str, Any],
        rotations: Mapping[str, Rotation],
        own: set[str],
    ) -> tuple[dict[str, tuple[Encoded, float]], dict[str, Tensor]]:
        """This process's matrices, name -> code and the seconds it took; learned sets by site."""
        out: dict[str, tuple[Encoded, float]] = {}
        books: dict[str, Tensor] = {}
        for input_group in statistics.input_groups:
            names = [name for name in input_group.modules if name in own]
            if not names:
                continue
            mark = time.perf_counter()
            order = (
                {name: modules[name].weight.detach().float() for name in names},
                statistics.grams[input_group.name],
                rotations[input_group.name],
                self.codebooks,
                self.levels,
                self.lambdas,
                self.effort,
                self.backend,
            )
            if self.learned:
                encoded, books[input_group.name] = learn_group(*order)
            else:
                encoded = encode_group(*order)
            spent = (time.perf_counter() - mark) / len(names)
            out |= {name: (code, spent) for name, code in encoded.items()}
        return out, books

    def _collect(
        self, result: tuple[Encoded, float] | None, owner: int
    ) -> tuple[Encoded, float] | None:
        """A matrix's code on the root, None elsewhere; `result` is its owner's."""
        if owner == 0:
            return result
        if result is not None:
            code, spent = result
            result = replace(code, codes=code.codes.cpu(), scales=code.scales.cpu()), spent
        return self.ranks.to_root(result, owner)

    def _add(
        self, name: str, module: Any, code: Encoded, seconds: float, energy_ratio: float
    ) -> None:
        """Write a coded matrix and note it in the books."""
        bias, weight = module.bias, module.weight.detach().float()
        self._write(name, code, None if bias is None else bias.detach().cpu())
        self.tally.parameters += weight.numel() + (0 if bias is None else bias.numel())
        self._log(name, weight, code, energy_ratio, seconds)

    def _write(self, name: str, code: Encoded, bias: Tensor | None) -> None:
        codes = [plane.cpu() for plane in code.codes]
        self.writer.add_linear(name, codes, scales=code.scales.cpu(), bias=bias)

    def _log(
        self, name: str, weight: Tensor, code: Encoded, energy_ratio: float, seconds: float
    ) -> None:
        rms = float(weight.square().mean().sqrt())
        self.tally.log.append(
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
        self.tally.parameters += tensor.numel()
        bits = 8 * tensor.element_size()
        self.tally.kept.append(
            {"name": name, "bits": bits, "values": tensor.numel(), "reason": reason}
        )

    def write_rest(self, head_bits: int) -> Embeddings:
        """Write embedding, head and what else lies outside of the blocks."""
        runner = self.runner
        modules = [*runner.embedding_modules, *([] if runner.tied else runner.head_modules)]
        for module in modules:
            weight = runner.read(f"{module}.weight")
            self.writer.add_embedding(module, weight, head_bits)
            self.tally.parameters += weight.numel()
            what = "head" if module in runner.head_modules else "embedding"
            reason = f"{what}{' and tied head' if runner.tied else ''}; --head-bits chooses"
            self.tally.kept.append(
                {"name": module, "bits": head_bits, "values": weight.numel(), "reason": reason}
            )
        for name in runner.outer_names():
            if name.removesuffix(".weight") not in modules:
                self._keep(name, "outside of the decoder blocks")
        return Embeddings(head_bits, tuple(modules), runner.tied)
